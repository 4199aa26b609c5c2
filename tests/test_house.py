"""Where things live: no circle of imports, no import that runs up the order of rooms in docs/design.md, no name with two meanings.

`python tests/test_house.py [TREE …]` prints the figures of this tree, or of others; `--order PAGE` where they have other rooms.
"""

import argparse
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # for the use as a script

import house  # noqa: E402

DESIGN = ROOT / "docs" / "design.md"
# Known and to be mended; an entry that is no longer needed fails, too.
KNOWN_CIRCLES: list[list[str]] = []
KNOWN_ARROWS_UP: list[tuple[str, str]] = []
KNOWN_TYPING_ARROWS_UP: list[tuple[str, str]] = []
# A module's name means one thing, but for these: `config` describes the parts of a model, `training.config` a run.
TWICE = {"config": ["keysync_jax.config", "keysync_jax.training.config"]}


@pytest.fixture(scope="module")
def library() -> house.House:
    return house.read_house(ROOT)


@pytest.fixture(scope="module")
def order() -> list[list[str]]:
    return house.read_order(DESIGN)


def test_every_room_has_one_place_in_the_order(library, order):
    rooms = [room for storey in order for room in storey]
    assert len(set(rooms)) == len(rooms)
    assert library.without_a_place(order) == []
    assert set(rooms) <= set(library.rooms)


def test_no_circle_between_files(library):
    assert library.circles() == KNOWN_CIRCLES


def test_no_import_runs_up(library, order):
    assert library.arrows_up(order) == KNOWN_ARROWS_UP


def test_no_import_for_types_runs_up(library, order):
    assert library.arrows_up(order, typing=True) == KNOWN_TYPING_ARROWS_UP


def test_names_mean_one_thing(library):
    assert house.same_names(library) == TWICE


def _tree(folder: Path, **files: str) -> house.House:
    for name, text in {"keysync_jax/__init__": "", **{k.replace("__", "/"): v for k, v in files.items()}}.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return house.read_house(folder)


def test_imports_in_functions_and_of_folders_beside_the_package_count(tmp_path):
    found = _tree(
        tmp_path,
        keysync_jax__low__a="def f():\n    from keysync_jax.high import b\n",
        keysync_jax__high__b="import keysync_jax.converters.table\n",
        converters__table="from ..low.a import f\n",
        configs__tiny="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from keysync_jax.high import b\n",
    )
    a, b, table = "keysync_jax.low.a", "keysync_jax.high.b", "keysync_jax.converters.table"
    assert found.arrows() == [(table, a), (b, table), (a, b)]
    assert found.circles() == [[table, b, a]]
    order = [["low"], ["converters"], ["high"], ["configs"], ["__init__"]]
    assert found.arrows_up(order) == [(a, b)]
    assert found.arrows_up([*order[:2], ["configs"], ["high"], ["__init__"]], typing=True) == [("keysync_jax.configs.tiny", b)]
    assert found.without_a_place(order[:3]) == ["__init__", "configs"]
    assert found.room_arrows() == [("converters", "low"), ("high", "converters"), ("low", "high")]


def test_lines_are_counted_by_what_they_hold(tmp_path):
    text = '"""Two\nlines."""\n\n# why\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """One."""\n    return """a\n\n    b"""\n'
    found = _tree(tmp_path, keysync_jax__a=text)
    assert found.lines == house.Lines(code=7, docstring=3, comment=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--order", type=Path, default=DESIGN, help="page whose list under '## Rooms' orders the trees' rooms")
    args = parser.parse_args()
    for tree in args.trees:
        print(tree, house.figures(house.read_house(tree), house.read_order(args.order)), sep="\n", end="\n\n")
