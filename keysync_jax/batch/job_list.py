"""The list of jobs of a batch: a table, JSON lines, or two folders paired by name.

What cannot be a batch at all (an unknown column, two items of one name, an output outside the folder) is refused here, before any work,
with the line that says so. A value that one row alone gets wrong makes that item fail with the reason, and no other.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from keysync_jax.core.errors import KeySyncError, UsageError

STATE_FOLDER = ".keysync-batch"  # in the output folder: ledger, reports, scratch
OWN_FILES = ("report.jsonl", "report.html", "report.txt")
KINDS = ("dub", "animate")
_FIELDS = ("id", "video", "audio", "output", "consent", "licence", "kind")
_ALIASES = {
    "name": "id", "image": "video", "picture": "video", "voice": "audio", "output_name": "output", "out": "output", "license": "licence",
    "licence_note": "licence", "license_note": "licence", "consent_note": "consent", "face_choice": "face", "mismatch_mode": "mismatch",
    "time_range": "range",
}  # fmt: skip
_NOT_MEDIA = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".srt", ".vtt", ".npy", ".npz", ".html", ".jpg", ".jpeg", ".png")


@dataclasses.dataclass(frozen=True)
class Job:
    """One item of a batch.

    Attributes:
      id: unique in the list.
      video, audio: absolute paths; the video of an animation is its picture.
      output: name in the output folder, with forward slashes.
      options: fields of `DubOptions`, or of `AnimateOptions`, JSON values.
      consent, licence: notes that go into the report.
      where: line of the list, for messages.
      error: why the item fails without being tried; "" for none.
      kind: which verb makes it, one of `KINDS`.
    """

    id: str
    video: str
    audio: str
    output: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    consent: str = ""
    licence: str = ""
    where: str = ""
    error: str = ""
    kind: str = "dub"


class Columns(NamedTuple):
    """The columns that are options of the verb, by the names of its flags.

    Attributes:
      names: as `lossless`, `audio_scale`.
      parse: from texts by name to the option values of a job, with the defaults of the command line; raises UsageError.
      later: names that will be options and are not yet: refused by name where a cell is filled.
      animate: those of a row of the kind "animate"; None: there are no such rows.
    """

    names: Collection[str]
    parse: Callable[[Mapping[str, str]], Mapping[str, Any]]
    later: Collection[str] = ("occlusion",)
    animate: Columns | None = None

    def of_kind(self, kind: str) -> Columns:
        """The columns of a kind's rows."""
        return self.animate if kind == "animate" and self.animate is not None else self


class _Row(NamedTuple):
    values: dict[str, str]
    where: str


def read_jobs(paths: Sequence[str | os.PathLike], columns: Columns) -> list[Job]:
    """The jobs of a `.csv`, `.jsonl` or `.json` file, or of a folder of videos and a folder of voices.

    Args:
      paths: one file, or two folders.
      columns: see `Columns`.

    Raises:
      UsageError: no such file, an unknown column, items that share an id, files of two folders that cannot be paired (all are named).
      KeySyncError: a file that cannot be read.
    """
    if len(paths) == 2:
        base, rows = Path(), list(_pairs(Path(paths[0]), Path(paths[1])))
    elif len(paths) == 1:
        base, rows = Path(paths[0]).parent, _rows(Path(paths[0]))
    else:
        raise UsageError(f"{len(paths)} inputs; give one list (.csv, .jsonl), or a folder of videos and a folder of voices")
    jobs = [_job(row, base, columns) for row in rows]
    if not jobs:
        raise UsageError(f"{paths[0]} names no item")
    _refuse_shared(jobs, lambda job: job.id, "id")
    return jobs


def check_outputs(jobs: Sequence[Job], folder: Path) -> None:
    """Refuses outputs that leave the folder, two items of one output, and an output that is an input.

    Raises:
      UsageError: the first of these, by line and name.
    """
    root = folder.resolve()
    for job in jobs:
        name = PurePosixPath(job.output)
        parts = name.parts
        if not parts or name.is_absolute() or ".." in parts or "\0" in job.output or "\\" in job.output or Path(job.output).drive:
            raise UsageError(f"{job.where}: the output {job.output!r} must be a name in {folder}; it cannot lead out of it")
        if not (root / job.output).resolve().is_relative_to(root):
            raise UsageError(f"{job.where}: the output {job.output!r} leads out of {folder} over a link; name another")
        if parts[0].startswith(STATE_FOLDER) or job.output in OWN_FILES:
            raise UsageError(f"{job.where}: {job.output!r} is a name that the batch itself uses; name another output")
        if (root / job.output).is_dir():
            raise UsageError(f"{job.where}: the output {root / job.output} is a folder; name a file")
    _refuse_shared(jobs, lambda job: os.fspath((root / job.output).resolve()), "output")
    _refuse_shared(jobs, lambda job: unicodedata.normalize("NFC", job.output).casefold(), "output, but for the case of letters,")
    files = {path for job in jobs for path in PurePosixPath(job.output).parents}
    inside = next((job for job in jobs if PurePosixPath(job.output) in files), None)
    if inside is not None:
        raise UsageError(f"{inside.where}: the output {inside.output!r} is the folder of another item's output; name another")
    inputs = {os.path.realpath(path): job for job in jobs for path in (job.video, job.audio)}
    for job in jobs:
        target = os.fspath((root / job.output).resolve())
        if (reader := inputs.get(target)) is not None:
            raise UsageError(f"{job.where}: the output {job.output!r} would replace an input of {reader.where}; name another")


def _rows(path: Path) -> list[_Row]:
    if not path.exists():
        raise UsageError(f"{path} does not exist; give a .csv or .jsonl list, or a folder of videos and a folder of voices")
    if path.is_dir():
        raise UsageError(f"{path} is one folder; give two, of videos and of voices, or a .csv or .jsonl list")
    readers = {".csv": _from_csv, ".tsv": _from_csv, ".jsonl": _from_lines, ".ndjson": _from_lines, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path} is no list of jobs; write .csv or .jsonl, or give a folder of videos and a folder of voices")
    try:
        return list(reader(path, path.read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise KeySyncError(f"{path} is not a text file in UTF-8 ({error}); save it as one") from None
    except csv.Error as error:
        raise KeySyncError(f"{path} is not a CSV file ({error}); save it as one") from None


def _from_csv(path: Path, text: str) -> Iterator[_Row]:
    head = text.split("\n", 1)[0]
    separator = max((",", ";", "\t"), key=head.count)  # spreadsheets of half the world write semicolons
    table = csv.DictReader(text.splitlines(keepends=True), delimiter=separator, strict=True)
    for row in table:
        where = f"{path} line {table.line_num}"
        if None in row:
            raise UsageError(f"{where} has more fields than the first line names columns")
        yield _Row({str(name): (value or "").strip() for name, value in row.items()}, where)


def _from_lines(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path} line {number} is not JSON ({error})") from None
            yield _object(value, f"{path} line {number}")


def _from_json(path: Path, text: str) -> Iterator[_Row]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})") from None
    if not isinstance(values, list):
        raise UsageError(f"{path} must hold a list of objects")
    for number, value in enumerate(values):
        yield _object(value, f"{path} entry {number}")


def _object(value: Any, where: str) -> _Row:
    if not isinstance(value, Mapping):
        raise UsageError(f'{where} must be an object such as {{"video": "a.mp4", "audio": "a.wav"}}, not {value!r}')
    return _Row({str(name): _text(each, f"{where}: {name}") for name, each in value.items()}, where)


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(_text(each, where) for each in value)
    if isinstance(value, Mapping):
        raise UsageError(f"{where} is an object; give a text, a number, or true or false")
    return f"{value:g}" if isinstance(value, float) and value.is_integer() else str(value)


def _pairs(videos: Path, voices: Path) -> Iterator[_Row]:
    """A row for each name that both folders have.

    Raises:
      UsageError: files without a partner, or names that two files of a folder share: all of them.
    """
    for folder in (videos, voices):
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; two inputs are a folder of videos and a folder of voices")
    sides = [_by_name(folder) for folder in (videos, voices)]
    doubtful = [f"{folder / name}: {' and '.join(files)}" for folder, side in zip((videos, voices), sides, strict=True)
                for name, files in side.items() if len(files) > 1]  # fmt: skip
    if doubtful:
        raise UsageError(f"which file is meant is not clear: {'; '.join(doubtful)}; keep one of each, or write a list")
    lonely = [f"{videos / sides[0][name][0]} has no voice" for name in sides[0] if name not in sides[1]]
    lonely += [f"{voices / sides[1][name][0]} has no video" for name in sides[1] if name not in sides[0]]
    if lonely:
        raise UsageError(f"the folders do not pair by name: {'; '.join(lonely)}")
    for name in sides[0]:
        video, voice = (os.path.abspath(folder / side[name][0]) for folder, side in zip((videos, voices), sides, strict=True))
        yield _Row({"id": name, "video": video, "audio": voice}, f"{videos / sides[0][name][0]}")


def _by_name(folder: Path) -> dict[str, list[str]]:
    """Files of a folder by their path without suffix; hidden files and texts are passed over."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix.lower() not in _NOT_MEDIA and not any(part.startswith(".") for part in name.parts):
            found.setdefault(name.with_suffix("").as_posix(), []).append(name.as_posix())
    return found


def _job(row: _Row, base: Path, columns: Columns) -> Job:
    values: dict[str, str] = {}
    kind = next((value for name, value in row.values.items() if name.strip().lower() == "kind"), "") or "dub"
    if kind not in KINDS or kind == "animate" and columns.animate is None:
        raise UsageError(f"{row.where}: kind {kind!r} cannot be run; the kinds are: {', '.join(KINDS)}")
    others = set().union(*(columns.of_kind(other).names for other in KINDS)) - set(columns.of_kind(kind).names)
    columns = columns.of_kind(kind)
    for given, value in row.values.items():
        name = given.strip().lower().replace("-", "_").replace(" ", "_")
        name = name if name in columns.names else _ALIASES.get(name, name)
        if name in others and not value:  # a column of the other kind's rows
            continue
        if name in values:
            raise UsageError(f"{row.where}: the column {name!r} is there twice")
        values[name] = value
    named = {name for name in values if name.startswith("voice:")}
    for name in values:
        if name in columns.later and name not in columns.names or name in named and "voice" not in columns.names:
            if values[name]:
                raise UsageError(f"{row.where}: keysync {kind} has no --{name.replace('_', '-')} yet; leave the column {name!r} empty")
        elif name in others:
            raise UsageError(f"{row.where}: keysync {kind} has no --{name.replace('_', '-')}; leave the column {name!r} empty")
        elif name not in (*_FIELDS, *columns.names, *named):
            raise UsageError(f"{row.where}: there is no column {name!r}; choose from {', '.join(sorted({*_FIELDS, *columns.names}))}")
    for name in ("video", "audio"):
        if not values.get(name):
            raise UsageError(f"{row.where} has no {'image' if kind == 'animate' and name == 'video' else name}")
    video, audio = (os.path.abspath(base / values[name]) for name in ("video", "audio"))
    id_ = values.get("id") or "-".join(dict.fromkeys((Path(video).stem, Path(audio).stem)))
    output = values.get("output") or f"{id_}.mp4"
    if not PurePosixPath(output).suffix:
        output += ".mp4"
    given = {name: value for name, value in values.items() if name in columns.names and value != ""}
    given |= {name: os.path.abspath(base / values[name]) for name in named if values[name]}
    try:
        options, error = columns.parse(given), ""
    except UsageError as refused:
        options, error = {}, str(refused)
    return Job(id_, video, audio, output, options, values.get("consent", ""), values.get("licence", ""), row.where, error, kind)


def _refuse_shared(jobs: Sequence[Job], key: Callable[[Job], str], what: str) -> None:
    counts = Counter(map(key, jobs))
    shared = sorted((job for job in jobs if counts[key(job)] > 1), key=key)
    if shared:
        group = [job for job in shared if key(job) == key(shared[0])]
        names = "; ".join(f"{job.where} ({job.id} to {job.output})" for job in itertools.islice(group, 5))
        raise UsageError(f"{len(group)} items share one {what} {key(group[0])!r}: {names}; give each its own")
