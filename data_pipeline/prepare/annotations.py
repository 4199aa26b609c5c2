"""The public annotation files of HDTF, CelebV-HQ and CelebV-Text, over videos that are already on disk.

HDTF (a folder of text files, one line per video):
    RD_annotion_time.txt    Radio11.mp4 00:30-01:00 01:30-02:30      one clip per time range
    RD_crop_wh.txt          Radio11_0.mp4 412 599 0 599              x, width, y, height in a video of the height below
    RD_resolution.txt       Radio11.mp4 720
  and the same for WDA and WRA.
CelebV-HQ and CelebV-Text (one JSON file): a clip's name, with or without `.mp4`, maps to `ytb_id`, `duration` {start_sec, end_sec} and
`bbox` {top, bottom, left, right}, as fractions of the picture or in its pixels; all of it under `clips`, or not.

Each clip is taken from a file of its own (`Radio11_0.mp4`, `NAME.mp4`) where there is one, else from its time range of the whole video
(`Radio11.mp4`, `YTB_ID.mp4`). Clips whose video is missing and entries that cannot be understood become items all the same and end in the
dead letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.prepare.boxes import as_fractions
from keysync_jax.data_pipeline.prepare.input_files import find_sound, find_videos
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.manifest_fields import VIDEO_SUFFIXES, find_sidecar, finite_number

HDTF_SETS = ("RD", "WDA", "WRA")
_CELEBV = {"celebvhq": "celebv-hq", "celebvtext": "celebv-text"}


def read_annotations(annotations: Path, videos: Path) -> Iterator[Item]:
    """Items of a public data set, recognised by its files' names.

    Raises:
      UsageError: neither of the three. KeySyncError: a file that cannot be understood as a whole.
    """
    if not annotations.exists():
        raise UsageError(f"{annotations} does not exist; give HDTF's folder of text files or CelebV's .json")
    files = _Files(videos)
    if annotations.is_dir() and any((annotations / f"{name}_annotion_time.txt").exists() for name in HDTF_SETS):
        yield from read_hdtf(annotations, files)
    elif annotations.suffix.lower() == ".json":
        yield from read_celebv(annotations, files)
    else:
        raise UsageError(f"{annotations} is neither a folder with RD_annotion_time.txt (HDTF) nor a CelebV .json")


def read_hdtf(folder: Path, files: _Files) -> Iterator[Item]:
    """Items of HDTF; the speaker is the video's name without its number, as in CarolynMaloney2."""
    for subset in HDTF_SETS:
        times = _table(folder / f"{subset}_annotion_time.txt")
        crops = _table(folder / f"{subset}_crop_wh.txt")
        heights = _table(folder / f"{subset}_resolution.txt")
        for video, ranges in times.items():
            for number, text in enumerate(ranges):
                clip = f"{video}_{number}"
                speaker = f"{subset}_{re.sub(r'[0-9]+$', '', video)}" if subset != "RD" else f"RD_{video}"
                common = {"speaker": speaker, "source": "hdtf", "extra": {"annotation": f"{subset} {clip}"}}
                if own := files.find(clip, f"{subset}_{clip}", f"{video}_{number:03d}", f"{subset}_{video}_{number:03d}"):
                    yield _whole(own, files, **common)
                    continue
                whole = files.find(video, f"{subset}_{video}")
                path = whole or files.root / f"{video}.mp4"
                box = None
                try:
                    start, stop = _range(text, folder / f"{subset}_annotion_time.txt", video)
                    if whole and clip in crops and video in heights:
                        box = _hdtf_box(whole, crops[clip], heights[video], folder, clip)
                except KeySyncError as error:
                    yield Item(str(path), clip, problem=str(error), reason="bad_row", **common)
                    continue
                yield Item(str(path), files.name(path), start=start, stop=stop, box=box, **_beside(path), **common)


def read_celebv(path: Path, files: _Files) -> Iterator[Item]:
    """Items of CelebV-HQ or CelebV-Text; clips of one YouTube video count as one speaker."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise KeySyncError(f"{path} is not JSON ({error}); give celebvhq_info.json or celebvtext_info.json") from None
    clips = values.get("clips", values) if isinstance(values, dict) else None
    entries = {k: v for k, v in clips.items() if k != "meta_info"} if isinstance(clips, dict) else {}
    if not any(isinstance(entry, dict) and "ytb_id" in entry for entry in entries.values()):
        raise KeySyncError(f"{path} holds no entry with ytb_id and duration; give celebvhq_info.json or celebvtext_info.json")
    source = next((name for key, name in _CELEBV.items() if key in path.stem.lower().replace("-", "").replace("_", "")), "celebv")
    for name, clip in entries.items():
        yield _celebv_item(name, clip, path, files, source)


def _celebv_item(name: str, clip: Any, path: Path, files: _Files, source: str) -> Item:
    common: dict[str, Any] = {"source": source, "extra": {"annotation": name}}
    try:
        video = str(clip["ytb_id"])
        common["speaker"] = video
        start, stop = finite_number(clip["duration"]["start_sec"]), finite_number(clip["duration"]["end_sec"])
        edges = clip.get("bbox")
        sides = [finite_number(edges[side]) for side in ("left", "top", "right", "bottom")] if edges else None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return _bad_entry(name, path, f"{path}: clip {name!r} lacks ytb_id, duration or bbox ({error!r})", common)
    if own := files.find(name, *(name[: -len(suffix)] for suffix in VIDEO_SUFFIXES if name.lower().endswith(suffix))):
        return _whole(own, files, **common)
    whole = files.find(video) or files.root / f"{video}.mp4"
    if not 0 <= start < stop:
        return _bad_entry(name, path, f"{path}: clip {name!r} lasts from {start:g} to {stop:g} s, which is no time range", common)
    try:
        box = as_fractions(sides, whole) if sides else None
    except ValueError as error:
        return _bad_entry(name, path, f"{path}: the bbox of clip {name!r}: {error}", common)
    return Item(str(whole), files.name(whole), start=start, stop=stop, box=box, **_beside(whole), **common)


def _bad_entry(name: str, path: Path, problem: str, common: dict[str, Any]) -> Item:
    return Item(str(path), name, problem=problem, reason="bad_row", **common)


class _Files:
    """Video files under a folder by stem, looked up once."""

    def __init__(self, root: Path):
        self.root = root
        self._by_stem: dict[str, Path] = {}
        for name in find_videos(root).videos:
            self._by_stem.setdefault(Path(name).stem, root / name)

    def find(self, *stems: str) -> Path | None:
        return next((self._by_stem[s] for s in stems if s in self._by_stem), None)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _whole(path: Path, files: _Files, **fields: Any) -> Item:
    return Item(str(path), files.name(path), **_beside(path), **fields)


def _beside(path: Path) -> Mapping[str, str]:
    return {"audio": find_sound(path)} | {kind: find_sidecar(path, kind) for kind in ("landmarks", "emotion", "occluder")}


def _table(path: Path) -> dict[str, list[str]]:
    """Lines of words by their first word without `.mp4`; {} when there is no such file."""
    if not path.exists():
        return {}
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise KeySyncError(f"{path} is not text in UTF-8 ({error}); give the annotation files as they were published") from None
    return {words[0].removesuffix(".mp4"): words[1:] for words in lines if words}


def _range(text: str, path: Path, video: str) -> tuple[float, float]:
    """Seconds of a range such as 00:30-01:00 or 1:02:03-1:02:40."""
    try:
        start, stop = (sum(finite_number(v) * 60**i for i, v in enumerate(reversed(part.split(":")))) for part in text.split("-"))
    except ValueError:
        raise KeySyncError(f"{path}: {video} has the time range {text!r}; it must read like 00:30-01:00") from None
    if stop <= start:
        raise KeySyncError(f"{path}: {video} has the time range {text!r}, which ends before it begins")
    return start, stop


def _hdtf_box(video: Path, crop: list[str], height: list[str], folder: Path, clip: str) -> tuple[float, float, float, float] | None:
    """The crop window, given for a video of another height, as fractions; None where the video cannot be opened (it is reported later)."""
    from keysync_jax.media.video import probe

    try:
        x, width, y, tall = (float(v) for v in crop)
        lines = float(height[0])
    except (ValueError, IndexError):
        raise KeySyncError(f"{folder}: the crop or resolution of {clip} is not x width y height and lines") from None
    try:
        info = probe(video)
    except KeySyncError:
        return None
    across = lines * info.display_width / info.display_height
    return x / across, y / lines, min(1.0, (x + width) / across), min(1.0, (y + tall) / lines)
