"""Which frames go into which shard: a pure function of the clip index, so that any number of workers writes the same files."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.clip_index import Clip

TARGET_BYTES = 256 * 2**20


class Piece(NamedTuple):
    """Frames start..stop-1 of one clip, with the clip's fingerprint."""

    clip: str
    start: int
    stop: int
    fingerprint: str = ""


class Shard(NamedTuple):
    """One file: records first_record..first_record + num_records - 1 of its split.

    `index` counts the shards of the split over all batches.
    """

    split: str
    index: int
    first_record: int
    pieces: tuple[Piece, ...]

    @property
    def num_records(self) -> int:
        return sum(p.stop - p.start for p in self.pieces)


def frames_per_shard(frame_bytes: int, target_bytes: int = TARGET_BYTES) -> int:
    """How many frames of `frame_bytes` fill a shard of `target_bytes`."""
    if frame_bytes < 1 or target_bytes < 1:
        raise KeySyncError(f"shards need positive sizes, not {frame_bytes} bytes per frame and {target_bytes} per shard")
    return max(1, target_bytes // frame_bytes)


def plan_shards(clips: Sequence[Clip], frames: int) -> list[Shard]:
    """Cut each split, and within it each batch, into nearly equal shards of at most about `frames` frames.

    A batch's shards depend on that batch and on how many shards came before, so that adding clips as a new batch leaves the files of
    earlier ones as they are. A cut moves to the nearest clip boundary when that is within an eighth of `frames`; a longer clip is cut
    inside, which readers do not notice because positions are global.

    Args:
      clips: in storage order (`clip_index.order_clips`).
      frames: target number of frames in a shard.
    """
    shards: list[Shard] = []
    for split, members in itertools.groupby(clips, key=lambda c: c.split):
        index = 0
        for _, batch in itertools.groupby(members, key=lambda c: c.batch):
            run = list(batch)
            edges = [0, *itertools.accumulate(c.num_frames for c in run)]
            for start, stop in itertools.pairwise(_cuts(edges, frames)):
                shards.append(Shard(split, index, run[0].first_record + start, _pieces(run, edges, start, stop)))
                index += 1
    return shards


def _cuts(edges: Sequence[int], frames: int) -> list[int]:
    """Frame offsets at which shards begin, and the end. `edges`: offsets at which clips begin, and the end."""
    total = edges[-1]
    count = -(-total // frames)
    cuts = [0]
    for k in range(1, count):
        ideal = total * k // count
        right = bisect.bisect_left(edges, ideal)
        nearest = min(edges[right - 1 : right + 1], key=lambda e: abs(e - ideal))
        cut = nearest if abs(nearest - ideal) <= frames // 8 else ideal
        if cuts[-1] < cut < total:
            cuts.append(cut)
    return [*cuts, total]


def _pieces(run: Sequence[Clip], edges: Sequence[int], start: int, stop: int) -> tuple[Piece, ...]:
    """The parts of the clips that cover offsets start..stop-1 of the run."""
    first = bisect.bisect_right(edges, start) - 1
    last = bisect.bisect_left(edges, stop)
    return tuple(
        Piece(clip.id, max(start - begin, 0), min(stop - begin, clip.num_frames), clip.fingerprint)
        for clip, begin in zip(run[first:last], edges[first:last], strict=True)
    )
