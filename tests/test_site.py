"""The site of docs/: it builds without a warning, holds every page, finds what it is searched for, and loads nothing from elsewhere."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("keysync_jax", "configs", "converters", "data_pipeline")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as the documented command makes it, of a copy: it is built beside its sources."""
    tree = tmp_path_factory.mktemp("site") / "tree"
    tree.mkdir()
    shutil.copytree(ROOT / "docs", tree / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tree)
    for name in FOLDERS:
        (tree / name).symlink_to(ROOT / name)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tree, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "No issues found" in said and "griffe" not in said, said
    return tree / "site"


def test_every_page_is_in_the_table_of_contents():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(pages) == sorted(listed)


def test_pages_hold_their_text_and_the_docstrings(site):
    assert "keysync dub" in (site / "dub.html").read_text(encoding="utf-8")
    page = (site / "api" / "pipeline.html").read_text(encoding="utf-8")
    assert "from_pretrained" in page and "on_progress" in page


def test_search_finds_options_and_names(site):
    found = json.dumps(json.loads((site / "search.json").read_text(encoding="utf-8")))
    assert "--allow-damaged" in found and "KeySyncPipeline" in found and "sharding" in found


def test_nothing_is_loaded_from_elsewhere(site):
    loads = r"<(?:script|img|iframe|source)[^>]+src=[\"']?https?:|<link[^>]+rel=[\"']?(?:stylesheet|preload|icon)[^>]+href=[\"']?https?:"
    assert not [page.name for page in site.rglob("*.html") if re.search(loads, page.read_text(encoding="utf-8"))]
    assert not [
        sheet.name for sheet in site.rglob("*.css") if re.search(r"(?:url\(|@import )[\"']?https?:", sheet.read_text(encoding="utf-8"))
    ]
