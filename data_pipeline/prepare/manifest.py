"""Reading what to prepare: a folder, a list of files, a CSV or JSON manifest, or a public annotation file."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.clip_index import check_split
from keysync_jax.data_pipeline.prepare.annotations import read_annotations
from keysync_jax.data_pipeline.prepare.boxes import as_fractions
from keysync_jax.data_pipeline.prepare.input_files import find_sound, find_videos
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.manifest_fields import SIDECARS, find_sidecar, finite_number

LIST_SUFFIXES = (".txt", ".lst", ".list")
FIELDS = ("path", "speaker", "split", "source", "consent", "licence", "start", "stop", "box", "audio", "landmarks", "emotion", "occluder")
_OTHER_TABLES = (".jsonl", ".ndjson", ".tsv", ".yaml", ".yml", ".parquet", ".xlsx")  # would else be taken for a video
_ALIASES = {
    "license": "licence",
    "video": "path",
    "file": "path",
    "start_time": "start",
    "end_time": "stop",
    "end": "stop",
    "sound": "audio",
    "wav": "audio",
}


def read_inputs(
    path: str | os.PathLike, annotations: str | None = None, source: str = "", tell: Callable[[str], None] = print
) -> list[Item]:
    """Items of an input.

    Args:
      path: a folder (searched for video files, recursively), one video, a list with a path per line, a `.csv` or `.json` manifest; or,
        with `annotations`, the folder that holds a public data set's videos.
      annotations: annotation file or folder of HDTF, CelebV-HQ or CelebV-Text, see `annotations`.
      source: name of the collection for items that do not state one.
      tell: is told in a line what of a folder was left out.

    Returns:
      Items sorted by id. Files that do not exist and rows that cannot be understood are items too: they end in the dead letter.

    Raises:
      UsageError: nothing there. KeySyncError: a manifest that cannot be understood as a whole.
    """
    path = Path(path)
    try:
        items = _read(path, annotations, tell)
    except UnicodeDecodeError as error:
        raise KeySyncError(f"{path} is not a text file in UTF-8 ({error}); save it as one") from None
    except csv.Error as error:
        raise KeySyncError(f"{path} is not a CSV file ({error}); save it as one") from None
    if not items:
        raise UsageError(f"{path} names no video")
    items = sorted((dataclasses.replace(i, source=i.source or source) for i in items), key=lambda i: i.id)
    twice = "is listed twice with the same times; it was taken once"
    return [
        dataclasses.replace(b, problem=f"{b.name} {twice}", reason="listed_twice") if a and a.id == b.id else b
        for a, b in zip([None, *items], items, strict=False)
    ]


def _read(path: Path, annotations: str | None, tell: Callable[[str], object]) -> list[Item]:
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a folder, a video, a list, or a .csv or .json manifest")
    if annotations is not None:
        return list(read_annotations(Path(annotations), path))
    if path.is_dir():
        found = find_videos(path)
        if found.left_out:
            tell(f"{path}: {found.in_words()}")
        return [_item({"path": name}, path, str(path)) for name in found.videos]
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


def _from_csv(path: Path) -> Iterator[Item]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        table = csv.DictReader(file)
        if not table.fieldnames or not {"path", "video", "file"} & {_plain(n) for n in table.fieldnames}:
            raise KeySyncError(f"{path} has no column 'path'; its first line must name the columns, e.g. {','.join(FIELDS[:6])}")
        for row in table:
            where = f"{path} line {table.line_num}"
            if None in row:
                name = next((v for k, v in row.items() if k and _ALIASES.get(_plain(k), _plain(k)) == "path" and v), "")
                yield _bad_row(name, path.parent, where, f"{where} has more fields than the first line names columns")
                continue
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
    """An item from a manifest's row, also from one that cannot be understood: it costs that row and no other."""
    try:
        return _understood(values, folder, where)
    except KeySyncError as error:
        name = values.get("path") if isinstance(values, Mapping) else None
        return _bad_row(name if isinstance(name, str) else "", folder, where, str(error))


def _bad_row(name: str, folder: Path, where: str, problem: str) -> Item:
    return Item(str(folder / name), name or Path(where).name, problem=problem, reason="bad_row")


def _understood(values: Any, folder: Path, where: str) -> Item:
    """Fields that are not ours are kept as `extra`. Raises KeySyncError for a row that cannot be understood."""
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
    except (TypeError, ValueError):
        raise KeySyncError(f"{where}: start and stop are seconds") from None
    try:
        box = row.pop("box", None)
        fields["box"] = None if box in (None, "") else as_fractions(box, folder / name)
    except (TypeError, ValueError) as error:
        raise KeySyncError(f"{where}: box is x0 y0 x1 y1 as fractions of the picture or in its pixels ({error})") from None
    if fields["start"] < 0 or (fields["stop"] is not None and fields["stop"] <= fields["start"]):
        raise KeySyncError(f"{where}: start {fields['start']:g} and stop {fields['stop']} are no time range")
    sound = row.pop("audio", None)
    if sound and not isinstance(sound, str):
        raise KeySyncError(f"{where}: audio is {sound!r}; it must be the path of a file")
    fields["audio"] = str(folder / sound) if sound else find_sound(Path(fields["path"]))
    if not fields["speaker"]:
        fields["speaker"] = next((part for part in Path(name).parts[:-1] if re.fullmatch(r"id\d{5}", part)), "")  # VoxCeleb's
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


def _plain(name: str) -> str:
    return name.strip().lower()
