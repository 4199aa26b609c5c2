"""How real the drawn faces look to a face detector: share of frames in which it finds them, and how far its landmarks are off."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from keysync_jax.data_pipeline.synthetic.clip import make_clip
from keysync_jax.media.faces import open_backend

_SEED_BASE = 9_000_000  # apart from the seeds people type
# Points that both the drawing and the detector define sharply: eye corners, mouth corners, inner lips, nose tip.
_EYES, _MOUTH = (36, 39, 42, 45), (48, 54, 62, 66)


class DetectionRate(NamedTuple):
    """One row of the report.

    Attributes:
        size: side of the frames in pixels.
        frames: frames looked at, over `clips` identities.
        found: share of frames with a face.
        one_face: share of frames with exactly one face.
        clips_complete: share of clips in which every frame has a face.
        eye_error, mouth_error: mean distance between detected and exact landmarks over the distance of the outer eye corners.
        opening_r: correlation of the detector's lip gap (62 to 66) with the exact opening, pooled over found frames.
    """

    size: int
    clips: int
    frames: int
    found: float
    one_face: float
    clips_complete: float
    eye_error: float
    mouth_error: float
    opening_r: float


def report_detection(
    n: int, sizes: tuple[int, ...] = (128, 256, 512), *, seed: int = 0, frames: int = 25, every: int = 3, backend: str = "mediapipe"
) -> list[DetectionRate]:
    """Detection rate on `n` identities per size, every frame searched anew (no tracking).

    Args:
        frames: length of each clip; every `every`-th frame is looked at.
        backend: name for `keysync_jax.media.faces.open_backend`.
    """
    rows = []
    for size in sizes:
        counts, complete, eyes, mouths, seen, exact = [], [], [], [], [], []
        with open_backend(backend, **({"track": False} if backend == "mediapipe" else {})) as detector:
            for i in range(n):
                clip = make_clip(_SEED_BASE + seed * 100_000 + i, frames, size)
                hits = []
                for frame, points, opening in zip(clip.frames[::every], clip.landmarks[::every], clip.opening[::every], strict=True):
                    faces = detector.detect(frame)
                    hits.append(len(faces))
                    if faces:
                        scale = np.linalg.norm(points[45] - points[36])
                        off = np.linalg.norm(faces[0].landmarks - points, axis=1) / scale
                        eyes.append(off[list(_EYES)].mean())
                        mouths.append(off[list(_MOUTH)].mean())
                        seen.append(np.linalg.norm(faces[0].landmarks[66] - faces[0].landmarks[62]) / scale)
                        exact.append(opening)
                counts += hits
                complete.append(min(hits) > 0)
        counts = np.array(counts)
        rows.append(
            DetectionRate(
                size,
                n,
                len(counts),
                float((counts > 0).mean()),
                float((counts == 1).mean()),
                float(np.mean(complete)),
                float(np.mean(eyes)) if eyes else float("nan"),
                float(np.mean(mouths)) if mouths else float("nan"),
                float(np.corrcoef(seen, exact)[0, 1]) if len(seen) > 2 else float("nan"),
            )
        )
    return rows


def format_report(rows: list[DetectionRate]) -> str:
    """The report as a Markdown table."""
    lines = ["| size | clips | frames | found | exactly one | clips complete | eye error | mouth error | opening r |", "|" + "---|" * 9]
    for r in rows:
        lines.append(
            f"| {r.size} | {r.clips} | {r.frames} | {r.found:.1%} | {r.one_face:.1%} | {r.clips_complete:.1%} "
            f"| {r.eye_error:.3f} | {r.mouth_error:.3f} | {r.opening_r:.3f} |"
        )
    return "\n".join(lines)
