"""The public annotation files of HDTF, CelebV-HQ and CelebV-Text, over videos that are already on disk.

HDTF (a folder of text files, one line per video):
    RD_annotion_time.txt    Radio11.mp4 00:30-01:00 01:30-02:30      one clip per time range
    RD_crop_wh.txt          Radio11_0.mp4 412 599 0 599              x, width, y, height in a video of the height below
    RD_resolution.txt       Radio11.mp4 720
  and the same for WDA and WRA.
CelebV-HQ and CelebV-Text (one JSON file): `clips` maps a clip's name to `ytb_id`, `duration` {start_sec, end_sec} and `bbox` {top, bottom,
left, right} as fractions of the picture.

Each clip is taken from a file of its own (`Radio11_0.mp4`, `NAME.mp4`) where there is one, else from its time range of the whole video
(`Radio11.mp4`, `YTB_ID.mp4`). Clips whose video is missing become items all the same and end in the dead letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.manifest_fields import VIDEO_SUFFIXES, find_sidecar, finite_number

HDTF_SETS = ("RD", "WDA", "WRA")
_CELEBV = {"celebvhq": "celebv-hq", "celebvtext": "celebv-text"}


def read_annotations(annotations: Path, videos: Path) -> Iterator[Item]:
    """Items of a public data set, recognised by its files' names.

    Raises:
      UsageError: neither of the three. KeySyncError: a line or entry that cannot be understood.
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
                start, stop = _range(text, folder / f"{subset}_annotion_time.txt", video)
                clip = f"{video}_{number}"
                speaker = f"{subset}_{re.sub(r'[0-9]+$', '', video)}" if subset != "RD" else f"RD_{video}"
                common = {"speaker": speaker, "source": "hdtf", "extra": {"annotation": f"{subset} {clip}"}}
                if own := files.find(clip, f"{subset}_{clip}", f"{video}_{number:03d}", f"{subset}_{video}_{number:03d}"):
                    yield _whole(own, files, **common)
                    continue
                whole = files.find(video, f"{subset}_{video}")
                box = None
                if whole and clip in crops and video in heights:
                    box = _hdtf_box(whole, crops[clip], heights[video], folder, clip)
                path = whole or files.root / f"{video}.mp4"
                yield Item(str(path), files.name(path), start=start, stop=stop, box=box, **_beside(path), **common)


def read_celebv(path: Path, files: _Files) -> Iterator[Item]:
    """Items of CelebV-HQ or CelebV-Text; clips of one YouTube video count as one speaker."""
    try:
        clips = json.loads(path.read_text(encoding="utf-8"))["clips"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise KeySyncError(f"{path} holds no object with 'clips' ({error!r}); give celebvhq_info.json or celebvtext_info.json") from None
    source = next((name for key, name in _CELEBV.items() if key in path.stem.lower().replace("-", "").replace("_", "")), "celebv")
    for name, clip in clips.items():
        try:
            video = str(clip["ytb_id"])
            start, stop = finite_number(clip["duration"]["start_sec"]), finite_number(clip["duration"]["end_sec"])
            box = None
            if edges := clip.get("bbox"):
                left, top, right, bottom = (finite_number(edges[side]) for side in ("left", "top", "right", "bottom"))
                box = left, top, right, bottom
        except (KeyError, TypeError, ValueError) as error:
            raise KeySyncError(f"{path}: clip {name!r} lacks ytb_id, duration or bbox ({error!r})") from None
        common = {"speaker": video, "source": source, "extra": {"annotation": name}}
        if own := files.find(name):
            yield _whole(own, files, **common)
            continue
        whole = files.find(video) or files.root / f"{video}.mp4"
        yield Item(str(whole), files.name(whole), start=start, stop=stop, box=box, **_beside(whole), **common)


class _Files:
    """Video files under a folder by stem, looked up once."""

    def __init__(self, root: Path):
        self.root = root
        self._by_stem: dict[str, Path] = {}
        for path in sorted(root.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                self._by_stem.setdefault(path.stem, path)

    def find(self, *stems: str) -> Path | None:
        return next((self._by_stem[s] for s in stems if s in self._by_stem), None)

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


def _whole(path: Path, files: _Files, **fields: Any) -> Item:
    return Item(str(path), files.name(path), **_beside(path), **fields)


def _beside(path: Path) -> Mapping[str, str]:
    return {kind: find_sidecar(path, kind) for kind in ("landmarks", "emotion", "occluder")}


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
