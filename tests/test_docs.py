"""The pages of docs/: short, and true where a machine can tell: links, anchors, pictures, verbs, options, imports, paths."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import textwrap
from functools import cache
from pathlib import Path

import pytest

from keysync_jax.cli import main
from keysync_jax.core.version import __version__

ROOT = Path(__file__).parents[1]
USE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*USE, *sorted((ROOT / "docs" / "measurements").glob("*.md")), *sorted(ROOT.glob("*.md"))]
MAX_LINES = 80  # a page that says how to use a thing is read in one sitting; measurements stand in docs/measurements

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Lines of indented and fenced code, continued lines joined."""
    lines, fenced = [], False
    for line in text_of(page).splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(line)
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def anchors_of(page: Path) -> set[str]:
    """Anchors of the headings, by GitHub's rule: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures that are not on another site."""
    found = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", USE, ids=lambda page: page.name)
def test_a_page_says_how_to_use_a_thing_in_eighty_lines(page):
    lines = text_of(page).splitlines()
    assert len(lines) <= MAX_LINES
    prose = [line for line in lines if not line.startswith("|")]
    assert not [line for line in prose if len(line) > 200], "lines are for reading; break them at 160 characters or so"


@each_page
def test_links_pictures_and_anchors_are_there(page):
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors_of(target), f"{target.name} has no heading for #{anchor}"


def test_every_page_can_be_reached_from_the_readme():
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        todo += [(page.parent / link.partition("#")[0]).resolve() for link in links_of(page) if not link.startswith("#")]
    assert {page.name for page in PAGES if page not in seen} == set()


@cache
def help_of(*words: str) -> str:
    """What `keysync WORDS --help` prints. Fails where there is no such verb."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main.main([*words, "--help"])
    assert stop.value.code == 0, f"keysync {' '.join(words)} is no command"
    return out.getvalue()


@each_page
def test_commands_name_verbs_and_options_that_exist(page):
    for line in code_of(page):
        for command in re.findall(r"(?:\bkeysync|python -m keysync_jax) ([a-z{].*)", re.sub(r"'[^']*'", "''", line)):
            verb, rest = (command.split("&&")[0] + " ").split(" ", 1)
            word = re.match(r"\{?([a-z]+)\b(?![./])", rest)  # a sub-verb, or an argument, of which --help takes no notice
            shown = help_of(verb, *([word.group(1)] if word else []))
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*(?!\.)\b", rest):
                if not option.startswith("--config"):
                    assert option in shown, f"keysync {verb} has no {option}: {line.strip()}"


def test_the_readmes_table_has_every_verb():
    listed = set(re.findall(r"^\| `keysync (\w+)", text_of(ROOT / "README.md"), flags=re.MULTILINE))
    verbs = set(re.findall(r"^    (\w+) ", help_of(), flags=re.MULTILINE))
    assert "dub" in verbs and listed == verbs


@each_page
def test_python_examples_parse_and_import_what_is_there(page):
    blocks = re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.MULTILINE | re.DOTALL)
    blocks += [textwrap.dedent(line) for line in code_of(page) if re.match(r"    from keysync_jax\S* import ", line)]
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keysync_jax"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), (
                        f"{node.module} has no {name.name}"
                    )


@each_page
def test_paths_of_the_repository_exist(page):
    for path in re.findall(r"(?<![\w./-])((?:keysync_jax|configs|converters|data_pipeline|docs|tests)/[\w./-]*\w)", text_of(page)):
        if not (ROOT / path).exists():
            assert re.search(r"NAME|KIND", path), f"{path} is not in the repository"


def test_the_changelog_and_the_citation_know_the_version():
    assert re.search(rf"^## {re.escape(__version__)}\b", text_of(ROOT / "CHANGELOG.md"), flags=re.MULTILINE)
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
