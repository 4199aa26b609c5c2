"""Reading what to prepare: a folder, a list of files, a CSV or JSON manifest, or a public annotation file."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.clip_index import check_split
from keysync_jax.data_pipeline.prepare.annotations import read_annotations
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.manifest_fields import SIDECARS, VIDEO_SUFFIXES, find_sidecar, finite_number

LIST_SUFFIXES = (".txt", ".lst", ".list")
FIELDS = ("path", "speaker", "split", "source", "consent", "licence", "start", "stop", "box", "landmarks", "emotion", "occluder")
_OTHER_TABLES = (".jsonl", ".ndjson", ".tsv", ".yaml", ".yml", ".parquet", ".xlsx")  # would else be taken for a video
_ALIASES = {"license": "licence", "video": "path", "file": "path", "start_time": "start", "end_time": "stop", "end": "stop"}


def read_inputs(path: str | os.PathLike, annotations: str | None = None, source: str = "") -> list[Item]:
    """Items of an input.

    Args:
      path: a folder (searched for video files, recursively), one video, a list with a path per line, a `.csv` or `.json` manifest; or,
        with `annotations`, the folder that holds a public data set's videos.
      annotations: annotation file or folder of HDTF, CelebV-HQ or CelebV-Text, see `annotations`.
      source: name of the collection for items that do not state one.

    Returns:
      Items sorted by id. Files that do not exist are items too: they end in the dead letter.

    Raises:
      UsageError: nothing there. KeySyncError: a manifest that cannot be understood (names the line), or two equal items.
    """
    path = Path(path)
    try:
        items = _read(path, annotations)
    except UnicodeDecodeError as error:
        raise KeySyncError(f"{path} is not a text file in UTF-8 ({error}); save it as one") from None
    except csv.Error as error:
        raise KeySyncError(f"{path} is not a CSV file ({error}); save it as one") from None
    if not items:
        raise UsageError(f"{path} names no video")
    items = sorted((dataclasses.replace(i, source=i.source or source) for i in items), key=lambda i: i.id)
    for a, b in zip(items, items[1:], strict=False):
        if a.id == b.id:
            raise KeySyncError(f"{path}: {a.name} is listed twice with the same times; list it once")
    return items


def _read(path: Path, annotations: str | None) -> list[Item]:
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a folder, a video, a list, or a .csv or .json manifest")
    if annotations is not None:
        return list(read_annotations(Path(annotations), path))
    if path.is_dir():
        return [_item({"path": name}, path, str(path)) for name in _videos(path)]
    if path.suffix.lower() == ".csv":
        return list(_from_csv(path))
    if path.suffix.lower() == ".json":
        return list(_from_json(path))
    if path.suffix.lower() in LIST_SUFFIXES:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        return [_item({"path": line.strip()}, path.parent, str(path)) for line in lines if line.strip() and not line.startswith("#")]
    if path.suffix.lower() in _OTHER_TABLES:
        raise UsageError(f"{path} is no manifest that is read here; write a .csv, a .json with a list, or a .txt with a path per line")
    return [_item({"path": path.name}, path.parent, str(path))]


def _videos(folder: Path) -> Iterator[str]:
    """Relative paths of the video files under a folder, sorted. Hidden files and folders are passed over."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith("."):
                yield (Path(root) / name).relative_to(folder).as_posix()


def _from_csv(path: Path) -> Iterator[Item]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not table.fieldnames or not {"path", "video", "file"} & {_plain(n) for n in table.fieldnames}:
            raise KeySyncError(f"{path} has no column 'path'; its first line must name the columns, e.g. {','.join(FIELDS[:6])}")
        for row in table:
            where = f"{path} line {table.line_num}"
            if None in row:
                raise KeySyncError(f"{where} has more fields than the first line names columns")
            yield _item({k: v for k, v in row.items() if v not in (None, "")}, path.parent, where)


def _from_json(path: Path) -> Iterator[Item]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KeySyncError(f"{path} is not JSON ({error})") from None
    if isinstance(values, dict):
        values = values.get("clips", values.get("items"))
    if not isinstance(values, list):
        raise KeySyncError(f"{path} must hold a list of paths or objects, or an object with such a list as 'items'")
    for number, value in enumerate(values):
        yield _item({"path": value} if isinstance(value, str) else value, path.parent, f"{path} entry {number}")


def _item(values: Any, folder: Path, where: str) -> Item:
    """An item from a manifest's row; fields that are not ours are kept as `extra`."""
    if not isinstance(values, Mapping):
        raise KeySyncError(f"{where} must be a path or an object, not {values!r}")
    row = {_ALIASES.get(_plain(str(k)), _plain(str(k))): v for k, v in values.items()}
    name = row.pop("path", None)
    if not isinstance(name, str) or not name:
        raise KeySyncError(f"{where} has no path")
    fields: dict[str, Any] = {"path": str(folder / name), "name": Path(name).as_posix()}
    for key in ("speaker", "split", "source", "consent", "licence"):
        value = row.pop(key, None)
        fields[key] = "" if value is None else str(value)  # 0 is a speaker, too
    if fields["split"]:
        check_split(fields["split"], where)
    try:
        fields["start"] = finite_number(row.pop("start", 0) or 0)
        stop = row.pop("stop", None)
        fields["stop"] = None if stop in (None, "") else finite_number(stop)
        box = row.pop("box", None)
        fields["box"] = None if box in (None, "") else _box(box)
    except (TypeError, ValueError):
        raise KeySyncError(f"{where}: start and stop are seconds, box is x0 y0 x1 y1 as fractions of the picture") from None
    if fields["start"] < 0 or (fields["stop"] is not None and fields["stop"] <= fields["start"]):
        raise KeySyncError(f"{where}: start {fields['start']:g} and stop {fields['stop']} are no time range")
    for key in SIDECARS:
        given = row.pop(key, None)
        if given and not isinstance(given, str):
            raise KeySyncError(f"{where}: {key} is {given!r}; it must be the path of a file")
        fields[key] = str(folder / given) if given else find_sidecar(Path(fields["path"]), key)
    fields["extra"] = {k: v for k, v in row.items() if v not in (None, "")}
    try:
        json.dumps(fields["extra"], allow_nan=False)
    except ValueError:
        raise KeySyncError(f"{where} holds NaN or an infinite number, which no JSON has; leave the field out") from None
    return Item(**fields)


def _box(value: str | Sequence[float]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (finite_number(v) for v in (value.replace(",", " ").split() if isinstance(value, str) else value))
    # A face may stick out of the picture; numbers far outside are pixels.
    if not (-1 <= x0 < x1 <= 2 and -1 <= y0 < y1 <= 2):
        raise ValueError(value)
    return x0, y0, x1, y1


def _plain(name: str) -> str:
    return name.strip().lower()
