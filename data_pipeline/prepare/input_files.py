"""The files of a folder as people hold them: videos under any name, linked folders, and sound in files of its own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.manifest_fields import SIDECARS, VIDEO_SUFFIXES

SOUND_SUFFIXES = (".wav", ".m4a", ".aac", ".flac", ".mp3", ".ogg", ".opus")
# Where collections keep sound beside a folder of pictures: the reference (audio/), VoxCeleb2 (aac/), HDTF as it is passed on (wav/).
_SOUND_FOLDERS = ("audio", "aac", "wav", "audios", "sound")
_LEVELS = 4  # folders above a video that may have such a neighbour: VoxCeleb2's mp4/SPEAKER/VIDEO/CLIP.mp4 needs three


class Found(NamedTuple):
    """What lies under a folder: relative paths of the videos, sorted, and what was left out by kind (". txt": 3)."""

    videos: tuple[str, ...]
    left_out: Counter[str]

    def in_words(self) -> str:
        """One line about what was left out; "" for nothing."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.left_out.items()))
        return f"{self.left_out.total()} other files and folders were left out: {kinds}" if kinds else ""


def find_videos(folder: Path) -> Found:
    """Videos under a folder, through links to other folders; a link back to a folder that was searched already is not followed."""
    videos: list[str] = []
    left_out: Counter[str] = Counter()
    searched = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in searched:
            folders.clear()
            left_out["folder met twice"] += 1
            continue
        searched.add(place)
        left_out["hidden"] += sum(f.startswith(".") for f in (*folders, *files))
        # Real folders first: what is reached both ways keeps its own name.
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=lambda f: (Path(root, f).is_symlink(), f))
        for name in sorted(f for f in files if not f.startswith(".")):
            path = Path(root, name)
            if name.lower().endswith(VIDEO_SUFFIXES) or (not path.suffix and _looks_like_video(path)):
                videos.append(path.relative_to(folder).as_posix())
            elif not _belongs_to_a_video(name):
                left_out[path.suffix.lower() or "no suffix"] += 1
    return Found(tuple(sorted(videos)), +left_out)


def _belongs_to_a_video(name: str) -> bool:
    """Whether a file is sound or a sidecar, which is taken with its video and does not count by itself."""
    own = (".truth.json", *SOUND_SUFFIXES, *(suffix for suffixes in SIDECARS.values() for suffix in suffixes))
    return name.lower().endswith(own)


def _looks_like_video(path: Path) -> bool:
    """Whether the first bytes are those of a container that people keep videos in."""
    try:
        with path.open("rb") as file:
            head = file.read(189)
    except OSError:
        return False
    return (
        head[4:8] == b"ftyp"
        or head[:4] in (b"\x1aE\xdf\xa3", b"\x00\x00\x01\xba", b"FLV\x01")
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (len(head) == 189 and head[0] == head[188] == 0x47)
    )


def find_sound(video: Path) -> str:
    """A file with a silent video's sound: of its name beside it, or in a neighbouring `audio`, `aac` or `wav` folder; "" for none.

    A video that has sound keeps it.
    """
    candidates = [video.with_suffix(suffix) for suffix in SOUND_SUFFIXES]
    inside: Path = Path(video.name)
    above: Sequence[Path] = list(video.parents)[: _LEVELS + 1]
    for folder in above:
        # folder/audio/… beside the pictures themselves, and folder.parent/audio/… in place of the folder of pictures.
        candidates += [(folder / name / inside).with_suffix(suffix) for name in _SOUND_FOLDERS for suffix in SOUND_SUFFIXES]
        inside = folder.name / inside
        candidates += [
            (folder.parent / name / Path(*inside.parts[1:])).with_suffix(suffix) for name in _SOUND_FOLDERS for suffix in SOUND_SUFFIXES
        ]
    found = next((path for path in dict.fromkeys(candidates) if path.is_file()), None)
    if found is None or _has_sound(video):
        return ""
    return str(found)


def _has_sound(video: Path) -> bool:
    """Whether a video has sound of its own; one that cannot be opened is reported when its turn comes."""
    from keysync_jax.media.video import probe  # here, since a folder without such files needs no decoder

    try:
        return probe(video).has_audio
    except KeySyncError:
        return True
