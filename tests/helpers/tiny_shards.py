"""A dataset of known values for the tests of writing and reading: every number says which clip, frame and column it belongs to."""

import io

import numpy as np
from PIL import Image

from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import make_group
from keysync_jax.data_pipeline.records import Column, audio_column, jpeg_column, landmarks_column, latent_column, record_bytes

CROP = (32, 32)
LATENT = (4, 4)
AUDIO = (audio_column("hubert", 6), audio_column("log_mel", 4))
COLUMNS = (latent_column(*LATENT), *AUDIO, landmarks_column(), Column("valence", "float32", ()))


def clips(lengths=(40, 20, 180, 175, 60, 33), split="train", **fields):
    """One clip per length, ids in another order than given, three clips a speaker."""
    return [
        Clip(f"clip{(7 * i) % 97:02d}", n, split=split, speaker=f"s{i // 3}", source="tiny", scores={"quality": i / 10}, **fields)
        for i, n in enumerate(lengths)
    ]


def number(clip: str) -> int:
    return int(clip.removeprefix("clip"))


def latent(clip: str, frame: int) -> np.ndarray:
    """Clip number, frame / 8, row and column of the cell in the four channels: exact in float16."""
    rows, cols = np.mgrid[: LATENT[0], : LATENT[1]]
    return np.stack([np.full(LATENT, number(clip)), np.full(LATENT, frame / 8), rows, cols], axis=-1).astype(np.float16)


def audio(clip: str, frame: int, dim: int) -> np.ndarray:
    return (frame / 8 + np.arange(2 * dim).reshape(2, dim) / 64 + number(clip)).astype(np.float16)


def landmarks(clip: str, frame: int) -> np.ndarray:
    """A face whose box mask begins at row 16 of the crop and spans columns 8 to 23; its points are all different."""
    points = np.stack([8 + 15 * np.arange(68) / 67, 10 + 20 * np.arange(68) / 67], axis=-1).astype(np.float32)
    points[28] = (16, 16)
    return points


def picture(clip: str, frame: int) -> np.ndarray:
    """Left half one grey level, right half another, both saying which frame it is."""
    image = np.full((*CROP, 3), (frame * 3) % 200, np.uint8)
    image[:, CROP[1] // 2 :] += 50
    return image


def jpeg(clip: str, frame: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(clip, frame)).save(out, "jpeg", quality=95)
    return out.getvalue()


def load(piece):
    frames = range(piece.start, piece.stop)
    return {
        "latent": np.stack([latent(piece.clip, f) for f in frames]),
        "audio_hubert": np.stack([audio(piece.clip, f, 6) for f in frames]),
        "audio_log_mel": np.stack([audio(piece.clip, f, 4) for f in frames]),
        "landmarks": np.stack([landmarks(piece.clip, f) for f in frames]),
        "valence": np.array([f / 1000 for f in frames]),
    }


def load_jpeg(piece):
    return {"jpeg": [jpeg(piece.clip, f) for f in range(piece.start, piece.stop)]}


def group(frames=100, **fields):
    size = record_bytes(COLUMNS)
    return make_group(COLUMNS, CROP, size, size * frames, **fields)


def jpeg_group(frames=150):
    return make_group((jpeg_column(*CROP),), CROP, 1000, 1000 * frames, name="jpeg", info={"quality": 95})


def tree(root) -> dict[str, bytes]:
    """Every file under a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
