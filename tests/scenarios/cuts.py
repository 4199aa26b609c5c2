"""How many hard cuts are found, and how many are seen where there is none, on a clip of your own.

    python tests/scenarios/cuts.py CLIP [--encode] [--seed N]

CLIP shows one talking head for some 8 s without a cut. From it are made, at run time, 60 clips with one hard cut each (another person;
the same person from another second; a zoom of 1.2; the head moved by half a width or more; between held pictures) and 20 takes without
one (held, frozen, missing and dropped pictures). `--encode` sends every one through H.264 first. Prints the rates; exit status 1 where
fewer than 95 % are found on the frame, or a take has a cut.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import av
import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from keysync_jax.media import appearance, faces, video
from keysync_jax.media.cuts import find_cuts
from keysync_jax.media.faces import Face
from keysync_jax.media.landmarks import MIRROR
from keysync_jax.media.shots import ShotDetector

_SIDE = 320  # pixels of the made clips
_THUMBNAIL = 160  # of what the detector sees, as in a dub
_LENGTH = 60  # frames of a clip with a cut
_LEAST_FOUND = 0.95


class Picture(NamedTuple):
    """uint8 `[h, w, 3]` and the landmarks in it `[68, 2]`."""

    rgb: np.ndarray
    landmarks: np.ndarray


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip")
    parser.add_argument("--encode", action="store_true", help="through H.264 at CRF 23")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    views = read(args.clip)
    table = Table("kind", "clips", "found", "elsewhere")
    found_in_all = clips = false = 0
    for kind, made in grouped([*cuts(views, args.seed), *takes(views, args.seed)]).items():
        found = elsewhere = 0
        for pictures, at in made:
            seen = detect(encoded(pictures) if args.encode else pictures)
            found += at in seen
            elsewhere += sum(cut != at for cut in seen)
        has_cut = made[0][1] is not None
        clips, found_in_all = clips + has_cut * len(made), found_in_all + found
        false += elsewhere
        table.add_row(kind, str(len(made)), f"{found}" if has_cut else "", str(elsewhere))
    console = Console()
    console.print(table)
    console.print(f"{found_in_all} of {clips} cuts found on the frame, {false} seen where there is none")
    return int(found_in_all < _LEAST_FOUND * clips or false > 0)


def read(path: str) -> dict[str, list[Picture]]:
    """Every picture of the clip around the head, from farther and from nearer."""
    found = []
    with faces.open_backend() as backend:
        for frame in video.read(path):
            rgb = frame.rgb()
            detected = backend.detect(rgb)
            if not detected:
                raise SystemExit(f"{path}: no face in frame {frame.index}; give a clip that shows one in every frame")
            found.append((rgb, detected[0]))
    middle = np.median([face.center for _, face in found], axis=0)
    size = float(np.median([max(np.ptp(face.landmarks, axis=0)) for _, face in found]))
    views = {}
    for name, sides in (("wide", 3.3), ("close", 2.1)):
        scale = _SIDE / (sides * size)
        shift = np.array([_SIDE / 2, _SIDE / 2]) - scale * middle
        views[name] = [moved(Picture(rgb, face.landmarks), scale, shift) for rgb, face in found]
    return views


def moved(picture: Picture, scale: float = 1.0, shift: np.ndarray | tuple[float, float] | None = None) -> Picture:
    """Scaled by `scale` and moved by `shift`; without it, around its middle."""
    shift = np.full(2, _SIDE / 2 * (1 - scale)) if shift is None else np.asarray(shift)
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    rgb = picture.rgb if scale > 0.5 else cv2.GaussianBlur(picture.rgb, (0, 0), 0.4 / scale)
    rgb = cv2.warpAffine(rgb, matrix, (_SIDE, _SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return Picture(rgb, picture.landmarks * scale + shift)


def another(picture: Picture, hue: int) -> Picture:
    """Another person before another wall, as far as colours and a mirror make one."""
    tones = cv2.cvtColor(picture.rgb[:, ::-1], cv2.COLOR_RGB2HSV)
    tones[..., 0] = (tones[..., 0].astype(int) + hue) % 180
    rgb = (cv2.cvtColor(tones, cv2.COLOR_HSV2RGB) * 0.85).astype(np.uint8)
    mirrored = np.stack([_SIDE - picture.landmarks[:, 0], picture.landmarks[:, 1]], axis=-1)
    return Picture(rgb, mirrored[MIRROR])


def held(pictures: list[Picture], each: int) -> list[Picture]:
    """Every picture `each` times, at the length that it had."""
    return [pictures[i // each * each] for i in range(len(pictures))]


def cuts(views: dict[str, list[Picture]], seed: int) -> Iterator[tuple[str, list[Picture], int]]:
    """(kind, pictures, frame of the cut): twelve of each of five kinds."""
    rng = np.random.default_rng(seed)
    last = len(views["wide"]) - _LENGTH

    def stretch(view: str, start: int) -> list[Picture]:
        return views[view][start : start + _LENGTH]

    for number in range(12):
        view, at, hue = ("wide", "close")[number % 2], int(rng.integers(12, 40)), int(rng.integers(10, 80))
        start, other = int(rng.integers(0, last)), int(rng.integers(0, last))
        away = (start + int(rng.integers(25, last - 25))) % last
        plain, elsewhere, stranger = stretch(view, start), stretch(view, away), [another(p, hue) for p in stretch(view, other)]
        zoomed = [moved(p, 1.2) for p in plain]
        yield "another person", plain[:at] + stranger[at:], at
        yield "another second", plain[:at] + elsewhere[at:], at
        yield "zoom of 1.2", (plain[:at] + zoomed[at:]) if number % 4 < 2 else (zoomed[:at] + plain[at:]), at
        width = float(np.ptp(views["wide"][start].landmarks[:, 0]))
        way = (1 if number % 2 else -1) * float(rng.uniform(0.5, 0.8)) * width
        wide = stretch("wide", start)
        yield "head moved", wide[:at] + [moved(p, 1.0, (way, 0)) for p in wide[at:]], at
        each = (2, 3, 3, 5)[number % 4]
        at = at // each * each
        after = (elsewhere, zoomed, stranger)[number % 3]
        yield "between held pictures", held(plain, each)[:at] + held(after, each)[at:], at


def takes(views: dict[str, list[Picture]], seed: int) -> Iterator[tuple[str, list[Picture], None]]:
    """(kind, pictures, None): four of each of five kinds, without a cut."""
    rng = np.random.default_rng(seed + 1)
    for number in range(20):
        whole = views[("wide", "close")[number % 2]]
        length = min(150, len(whole) * 3 // 4)
        start = int(rng.integers(0, len(whole) - length))
        own = whole[start : start + length]
        kind = number // 4
        if kind == 0:
            yield "take: held pictures", held(own, (2, 3, 4, 5)[number % 4]), None
        elif kind == 1:
            frozen = list(own)
            for _ in range(3):
                at, stay = int(rng.integers(10, length - 30)), int(rng.integers(5, 26))
                frozen[at : at + stay] = [own[at]] * stay
            yield "take: freezes, the world goes on", frozen, None
        elif kind == 2:
            stays = [int(rng.integers(5, 26)) if rng.random() < 0.04 else 1 for _ in own]
            yield "take: freezes, then goes on where it was", [p for p, stay in zip(own, stays, strict=True) for _ in range(stay)], None
        elif kind == 3:
            missing = [p for i, p in enumerate(own) if i % 5 != 4]
            repeated = [own[i - 1] if i % 5 == 4 else p for i, p in enumerate(own)]
            yield "take: every fifth picture missing", (missing, repeated)[number % 2], None
        else:
            kept, i = [], start
            while len(kept) < length and i < len(whole):
                kept.append(whole[i])
                i += 1 + (int(rng.integers(1, 5)) if rng.random() < 0.05 else 0)
            yield "take: dropped pictures", kept, None


def grouped(made) -> dict[str, list[tuple[list[Picture], int | None]]]:
    groups: dict[str, list[tuple[list[Picture], int | None]]] = {}
    for kind, pictures, at in made:
        groups.setdefault(kind, []).append((pictures, at))
    return groups


def encoded(pictures: list[Picture]) -> list[Picture]:
    """The same after H.264 at CRF 23."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width = encoder.height = _SIDE
    encoder.pix_fmt, encoder.time_base, encoder.options = "yuv420p", Fraction(1, 25), {"preset": "veryfast", "crf": "23"}
    decoder = av.CodecContext.create("h264", "r")
    packets = []
    for index, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture.rgb), format="rgb24").reformat(format="yuv420p")
        frame.pts = index
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return [Picture(f.to_ndarray(format="rgb24"), p.landmarks) for f, p in zip(frames, pictures, strict=True)]


def detect(pictures: list[Picture]) -> list[int]:
    """The cuts that a dub would see. The faces are those of the clip, moved with the pictures."""
    detector, detections = ShotDetector(), []
    looks: dict[int, Face] = {}
    for index, picture in enumerate(pictures):
        small = cv2.resize(picture.rgb, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA)
        detector.update(small, index)
        if id(picture) not in looks:
            face = Face.from_landmarks(picture.landmarks, 1.0)
            looks[id(picture)] = face._replace(look=appearance.appearance_of(picture.rgb, face.landmarks))
        detections.append([looks[id(picture)]])
    return find_cuts(detector, detections)


if __name__ == "__main__":
    sys.exit(main())
