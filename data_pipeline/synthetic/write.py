"""Write a clip to disk: a video with sound, its landmarks beside it and the truth as JSON.

`a.npy` holds the frames as they are (uint8 [T, H, W, 3]) and `a.voice.npy` the samples: for machines without a video codec.

For `a.mp4`: `a.landmarks.npy` (float32 [T, 68, 2], pixels), `a.truth.json`, and `a.occluder.npz` (`mask`, bool [T, H, W]) where there
is an occluder. The truth is written last and every file appears under its name only when complete.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.synthetic.clip import TalkerClip
from keysync_jax.errors import KeySyncError, UsageError

# Container, audio codec and its sample format by file name suffix.
_CONTAINERS = {".mp4": ("mp4", "aac", "fltp"), ".mkv": ("matroska", "pcm_s16le", "s16")}
ARRAYS, VOICE = ".npy", "voice.npy"
_BT709 = 1  # H.273: primaries, transfer and matrix of the video
_LIMITED = 1


def sidecar(path: Path, suffix: str) -> Path:
    """Path of a companion file: `clip.mp4`, "truth.json" -> `clip.truth.json`."""
    return path.with_name(f"{path.stem}.{suffix}")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file next to `path`, then rename it; nothing half-written ever bears the final name.

    Raises:
        KeySyncError: the disk is full or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error))
        raise KeySyncError(f"cannot write {path}: {reason}; free space or choose another folder") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def truth(clip: TalkerClip) -> dict[str, Any]:
    """Everything true about a clip that is not an image or a sound, ready for JSON. Lengths are in outer-eye-corner distances."""
    options = dataclasses.asdict(clip.options)
    if options["room_db"] is not None and np.isneginf(options["room_db"]):
        options["room_db"] = "-inf"

    def rounded(values: np.ndarray) -> list[float]:
        return [round(float(v), 6) for v in values]

    return {
        "fps": clip.fps,
        "sample_rate": clip.sample_rate,
        "frames": len(clip.frames),
        "size": clip.frames.shape[1],
        "seeds": clip.seeds,
        "options": options,
        "opening": rounded(clip.opening),
        "width": rounded(clip.width),
        "is_closure": [bool(v) for v in clip.is_closure],
        "valence": rounded(clip.valence),
        "arousal": rounded(clip.arousal),
        "phonemes": [p.to_dict() for p in clip.phonemes],
        "identity": clip.identity,
    }


def _encode(path: Path, clip: TalkerClip, container: str, audio_codec: str, audio_format: str, crf: int) -> None:
    import av

    height, width = clip.frames.shape[1:3]
    with av.open(str(path), "w", format=container) as output:
        video = output.add_stream("libx264", rate=clip.fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        # One thread: the encoder's output must not depend on the machine.
        video.options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        context = video.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        audio = output.add_stream(audio_codec, rate=clip.sample_rate, layout="mono")
        for i, picture in enumerate(clip.frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED, threads=1)
            frame.pts, frame.time_base = i, Fraction(1, clip.fps)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        samples = clip.samples[None]
        if audio_format == "s16":
            samples = np.rint(np.clip(samples, -1, 1) * 32767).astype(np.int16)
        step = audio.codec_context.frame_size or clip.sample_rate
        for start in range(0, samples.shape[1], step):
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[:, start : start + step]), format=audio_format, layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = clip.sample_rate, start, Fraction(1, clip.sample_rate)
            output.mux(audio.encode(sound))
        output.mux(audio.encode(None))


def write_clip(clip: TalkerClip, path: str | Path, *, crf: int = 12) -> Path:
    """Write video, landmarks, truth and (if any) occluder mask.

    Args:
        path: `.mp4` (H.264 and AAC), `.mkv` (H.264 and 16-bit PCM, sound exact) or `.npy` (arrays, exact).
        crf: quality of H.264; 12 is visually lossless.

    Returns:
        The path of the video.

    Raises:
        UsageError: another suffix. KeySyncError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (*_CONTAINERS, ARRAYS):
        raise UsageError(f"{path.name}: a talker clip is written as {', '.join(_CONTAINERS)} or {ARRAYS}")
    sidecar(path, "truth.json").unlink(missing_ok=True)  # a clip without its truth is unfinished
    if path.suffix == ARRAYS:
        write_atomically(path, lambda p: np.save(p, clip.frames))
        write_atomically(sidecar(path, VOICE), lambda p: np.save(p, clip.samples))
    else:
        write_atomically(path, lambda p: _encode(p, clip, *_CONTAINERS[path.suffix], crf))
    write_atomically(sidecar(path, "landmarks.npy"), lambda p: np.save(p, clip.landmarks))
    if clip.occluder_mask is not None:
        mask = clip.occluder_mask
        write_atomically(sidecar(path, "occluder.npz"), lambda p: np.savez_compressed(p, mask=mask))
    write_atomically(sidecar(path, "truth.json"), lambda p: p.write_text(json.dumps(truth(clip)), encoding="utf-8"))
    return path
