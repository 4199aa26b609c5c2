"""What imports what in the library, read from the sources alone; nothing is imported.

Files are named as they are installed: `converters/table.py` is `keysync_jax.converters.table`. An import inside a function is an arrow
like any other, one under `if TYPE_CHECKING:` is kept apart (it exists for the reader and the type checker, never at run time). The tree
may be an older one, with `configs`, `converters` and `data_pipeline` as packages of their own: figures of two trees then compare.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "keysync_jax"
FOLDERS = ("configs", "converters", "data_pipeline")  # beside the package in the repository
_ORDER = re.compile(r"^\d+\. (.+)$")
_ROOM = re.compile(r"`([\w/]+)`")


@dataclass
class Module:
    name: str
    path: Path
    package: bool
    imports: set[str] = field(default_factory=set)  # modules of the library that it imports, at run time
    typing_imports: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Lines:
    """Lines by what they hold; a docstring's lines count as docstring."""

    code: int
    docstring: int
    comment: int


@dataclass
class House:
    modules: dict[str, Module]

    @functools.cached_property
    def lines(self) -> Lines:
        counts: Counter[str] = Counter()
        for module in self.modules.values():
            counts.update(_count(module.path.read_text(encoding="utf-8")))
        return Lines(counts["code"], counts["docstring"], counts["comment"])

    def room(self, module: str) -> str:
        """First name under the package: `core`, `media`, `config`; `__init__` of the package itself."""
        parts = module.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    @property
    def rooms(self) -> list[str]:
        return sorted({self.room(name) for name in self.modules})

    def arrows(self, typing: bool = False) -> list[tuple[str, str]]:
        """File to file; with `typing` those under `if TYPE_CHECKING:` instead of those that exist at run time."""
        return sorted((name, other) for name, m in self.modules.items() for other in (m.typing_imports if typing else m.imports))

    def room_arrows(self) -> list[tuple[str, str]]:
        return sorted({(self.room(a), self.room(b)) for a, b in self.arrows() if self.room(a) != self.room(b)})

    def circles(self) -> list[list[str]]:
        """Sets of files each of which reaches each other one by imports, largest first."""
        return sorted(_strongly_connected({name: sorted(m.imports) for name, m in self.modules.items()}), key=lambda c: (-len(c), c))

    def arrows_up(self, order: list[list[str]], typing: bool = False) -> list[tuple[str, str]]:
        """Arrows whose target stands in a higher storey than their source, or beside it in another room of the same storey."""
        storey = {room: level for level, rooms in enumerate(order) for room in rooms}
        found = []
        for a, b in self.arrows(typing):
            source, target = _deepest(a, storey), _deepest(b, storey)
            if source != target and storey[target] >= storey[source]:
                found.append((a, b))
        return found

    def without_a_place(self, order: list[list[str]]) -> list[str]:
        known = {room for rooms in order for room in rooms}
        return sorted({self.room(name) for name in self.modules if _find(name, known) is None})


def read_house(root: Path) -> House:
    """The library in the repository at `root`."""
    files: dict[str, tuple[Path, bool]] = {}
    for folder in (PACKAGE, *FOLDERS):
        for path in sorted((root / folder).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            if package := parts[-1] == "__init__":
                parts.pop()
            files[".".join(parts if parts[0] == PACKAGE else [PACKAGE, *parts])] = (path, package)
    modules: dict[str, Module] = {}
    for name, (path, package) in files.items():
        modules[name] = module = Module(name, path, package)
        for node, typing in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            (module.typing_imports if typing else module.imports).update(_targets(node, module, files))
        module.imports.discard(name)
        module.typing_imports -= module.imports | {name}
    return House(modules)


def read_order(design: Path) -> list[list[str]]:
    """The order of rooms from the numbered list under "## Rooms" of docs/design.md, from the ground up, one storey an item.

    An item begins with the rooms' names in backquotes; a name such as `training/store` is a room inside a room.
    """
    section = design.read_text(encoding="utf-8").split("\n## Rooms\n", 1)[1].split("\n## ", 1)[0]
    items = [found[1] for line in section.splitlines() if (found := _ORDER.match(line))]
    return [_ROOM.findall(item.partition(":")[0]) for item in items]


def same_names(house: House) -> dict[str, list[str]]:
    """Names that more than one module of the library has (packages and `__init__`, `__main__` apart)."""
    by_name: dict[str, list[str]] = {}
    for name, module in house.modules.items():
        if not module.package:
            by_name.setdefault(name.rpartition(".")[2], []).append(name)
    return {name: modules for name, modules in by_name.items() if len(modules) > 1}


def figures(house: House, order: list[list[str]] | None) -> str:
    rooms, arrows, circles = house.rooms, house.room_arrows(), house.circles()
    lines = [
        f"files                 {len(house.modules)}",
        f"rooms                 {len(rooms)}: {' '.join(rooms)}",
        f"arrows between files  {len(house.arrows())}",
        f"arrows between rooms  {len(arrows)}",
        f"circles               {len(circles)}",
        *(f"    {' '.join(circle)}" for circle in circles),
    ]
    if order and not house.without_a_place(order):
        up = house.arrows_up(order)
        lines += [f"arrows up             {len(up)}", *(f"    {a} -> {b}" for a, b in up)]
    else:
        lines += ["arrows up             not counted: the order of rooms in docs/design.md does not know this tree's rooms"]
    lines += [f"lines                 {house.lines.code} of code, {house.lines.docstring} of docstrings, {house.lines.comment} of comments"]
    return "\n".join(lines)


def _find(module: str, rooms: set[str]) -> str | None:
    """The deepest room of `rooms` in which the module lies."""
    parts = module.split(".")[1:] or ["__init__"]
    for end in range(len(parts), 0, -1):
        if (room := "/".join(parts[:end])) in rooms:
            return room
    return None


def _deepest(module: str, storey: dict[str, int]) -> str:
    room = _find(module, set(storey))
    if room is None:
        raise ValueError(f"{module} lies in no room of the order")
    return room


def _imports(tree: ast.Module) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    found: list[tuple[ast.Import | ast.ImportFrom, bool]] = []

    def walk(node: ast.AST, typing: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append((node, typing))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}:
            for child in node.body:
                walk(child, True)
            for child in node.orelse:
                walk(child, typing)
        else:
            for child in ast.iter_child_nodes(node):
                if not isinstance(child, ast.expr):  # no import is in one, and most nodes are
                    walk(child, typing)

    walk(tree, False)
    return found


def _targets(node: ast.Import | ast.ImportFrom, module: Module, files: dict[str, tuple[Path, bool]]) -> set[str]:
    """Modules that the statement reaches: `from room import file` reaches the file, `from room import name` the room's `__init__`."""
    if isinstance(node, ast.Import):
        return {name for alias in node.names if (name := _as_installed(alias.name)) in files}
    base = _as_installed(node.module or "")
    if node.level:
        parts = module.name.split(".")
        parts = parts[: len(parts) - node.level + module.package]
        base = ".".join([*parts, *(node.module or "").split(".")]).rstrip(".")
    names = {f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base for alias in node.names}
    return names & files.keys()


def _as_installed(name: str) -> str:
    return f"{PACKAGE}.{name}" if name.partition(".")[0] in FOLDERS else name


def _count(source: str) -> Counter[str]:
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            text = node.body[0]
            docstrings.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    code: set[int] = set()
    comments: set[int] = set()
    empty = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
        elif token.type not in empty:
            code.update(range(token.start[0], token.end[0] + 1))
    code -= docstrings
    return Counter(code=len(code), docstring=len(docstrings), comment=len(comments - code - docstrings))


def _strongly_connected(graph: dict[str, list[str]]) -> list[list[str]]:
    """Tarjan's algorithm, without recursion; single nodes are left out."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    waiting: set[str] = set()
    found: list[list[str]] = []
    for root in graph:
        if root in index:
            continue
        work = [(root, iter(graph[root]))]
        index[root] = low[root] = len(index)
        stack.append(root)
        waiting.add(root)
        while work:
            node, children = work[-1]
            for child in children:
                if child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    waiting.add(child)
                    work.append((child, iter(graph[child])))
                    break
                if child in waiting:
                    low[node] = min(low[node], index[child])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    circle = []
                    while True:
                        member = stack.pop()
                        waiting.discard(member)
                        circle.append(member)
                        if member == node:
                            break
                    if len(circle) > 1:
                        found.append(sorted(circle))
    return found
