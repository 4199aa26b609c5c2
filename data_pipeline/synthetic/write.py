"""Write a clip to disk: a video with sound, its landmarks beside it and the truth as JSON.

`a.npy` holds the frames as they are (uint8 [T, H, W, 3]) and `a.voice.npy` the samples: for machines without a video codec.

For `a.mp4`: `a.landmarks.npy` (float32 [T, 68, 2], pixels), `a.truth.json`, and `a.occluder.npz` (`mask`, bool [T, H, W]) where there
is an occluder. The truth is written last and every file appears under its name only when complete.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.core.clock import FRAME_RATE, SAMPLE_RATE
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import write_atomically, write_text
from keysync_jax.data_pipeline.synthetic.clip import TalkerClip

# Container, audio codec and its sample format by file name suffix.
_CONTAINERS = {".mp4": ("mp4", "aac", "fltp"), ".mkv": ("matroska", "pcm_s16le", "s16")}
ARRAYS = ".npy"
VOICE_FILE, LANDMARK_FILE, OCCLUDER_FILE, TRUTH_FILE = "voice.npy", "landmarks.npy", "occluder.npz", "truth.json"
_BT709 = 1  # H.273: primaries, transfer and matrix of the video
_LIMITED = 1


def sidecar(path: Path, suffix: str) -> Path:
    """Path of a companion file: `clip.mp4`, "truth.json" -> `clip.truth.json`."""
    return path.with_name(f"{path.stem}.{suffix}")


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
    # Absolute: what stands before the first colon of a relative path would be taken for a protocol.
    # Matroska files carry a random identifier otherwise.
    options = {"fflags": "+bitexact"} if container == "matroska" else {}
    with av.open(str(path.absolute()), "w", format=container, container_options=options) as output:
        video = output.add_stream("libx264", rate=clip.fps)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        # One thread: the encoder's output must not depend on the machine.
        video.options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}
        context = video.codec_context
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        audio = output.add_stream(audio_codec, rate=clip.sample_rate, layout="mono")
        assert isinstance(audio, av.AudioStream)
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
    check_suffix(path)
    record = sidecar(path, TRUTH_FILE)
    try:
        record.unlink(missing_ok=True)  # a clip without its truth is unfinished
    except OSError as error:
        raise KeySyncError(f"cannot replace {record}: {error.strerror}; remove it or choose another folder") from error
    if path.suffix == ARRAYS:
        write_atomically(path, lambda p: np.save(p, clip.frames))
        write_atomically(sidecar(path, VOICE_FILE), lambda p: np.save(p, clip.samples))
    else:
        write_atomically(path, lambda p: _encode(p, clip, *_CONTAINERS[path.suffix], crf))
    write_atomically(sidecar(path, LANDMARK_FILE), lambda p: np.save(p, clip.landmarks))
    if clip.occluder_mask is not None:
        mask = clip.occluder_mask
        write_atomically(sidecar(path, OCCLUDER_FILE), lambda p: np.savez_compressed(p, mask=mask))
    write_text(record, json.dumps(truth(clip)))
    return path


def check_suffix(path: Path) -> None:
    """Raises UsageError where no clip is written under such a name."""
    if path.suffix not in (*_CONTAINERS, ARRAYS):
        raise UsageError(f"{path.name}: a talker clip is written as {', '.join(_CONTAINERS)} or {ARRAYS}")


def check_clip(path: Path, *, occluder: bool = False) -> tuple[int, int]:
    """Checks that the files of a written clip are there, whole and of one length; pictures are not decoded, the truth is not read.

    Args:
        path: of the video, or of the `.npy` with the frames.
        occluder: whether there must be a mask.

    Returns:
        Number of frames, and their side in pixels.

    Raises:
        KeySyncError: names the file that is missing, damaged or does not fit.
    """
    if path.suffix == ARRAYS:
        frames = _open(path)
        if frames.dtype != np.uint8 or frames.ndim != 4 or len(frames) < 1 or frames.shape[1:] != (frames.shape[2], frames.shape[2], 3):
            raise KeySyncError(f"{path} holds {frames.dtype} {frames.shape}; frames are uint8 (T, size, size, 3)")
        count, size = frames.shape[:2]
        _check_numbers(sidecar(path, VOICE_FILE), (count * SAMPLE_RATE // FRAME_RATE,))
    else:
        count, size = _video_extent(path)
    _check_numbers(sidecar(path, LANDMARK_FILE), (count, 68, 2))
    if occluder:
        try:
            with np.load(sidecar(path, OCCLUDER_FILE), allow_pickle=False) as file:
                known = "mask" in file.files
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
            raise KeySyncError(f"{sidecar(path, OCCLUDER_FILE)} cannot be read ({error})") from error
        if not known:
            raise KeySyncError(f"{sidecar(path, OCCLUDER_FILE)} holds no mask")
    return count, size


def _open(path: Path) -> np.ndarray:
    """The array of a file, mapped: a file that was cut off is noticed, and little of it is read."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise KeySyncError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
        raise KeySyncError(f"{path} is no whole array ({error})") from error


def _check_numbers(path: Path, shape: tuple[int, ...]) -> None:
    values = _open(path)
    if values.dtype.kind != "f" or values.shape != shape:
        raise KeySyncError(f"{path} holds {values.dtype} {values.shape}, not float {shape}, as its clip's frames ask for")
    if not np.isfinite(values).all():
        raise KeySyncError(f"{path} holds values that are not finite")


def _video_extent(path: Path) -> tuple[int, int]:
    import av
    import av.error

    try:
        with av.open(str(path.absolute())) as video:
            stream = video.streams.video[0]
            # Matroska does not say how many frames there are.
            return stream.frames or round((video.duration or 0) * FRAME_RATE / av.time_base), stream.width
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise KeySyncError(f"{path} is no whole video ({error})") from error
