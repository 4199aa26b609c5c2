"""The inputs that a data set really has: files that are damaged, mislabelled, or not of one talking face."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.data_pipeline.synthetic.clip import TalkerClip


def encode(
    path: Path, frames, samples=None, rate: int = 25, pix_fmt: str = "yuv420p", codec: str = "libx264", pcm: bool = False, options=None
):
    """Write frames [T, H, W, 3] and 16 kHz mono samples; `pcm` stores floats as they are, NaN included."""
    with av.open(str(path), "w", format=None if path.suffix != ".dat" else "mp4") as out:
        video = out.add_stream(codec, rate=rate)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = pix_fmt
        video.options = {"crf": "12", "preset": "veryfast", "threads": "1"} | (options or {})
        sound = None
        if samples is not None:
            sound = out.add_stream("pcm_f32le" if pcm else "aac", rate=16000, layout="mono")
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        if sound is not None:
            step = 1024
            for start in range(0, len(samples), step):
                part = np.ascontiguousarray(samples[None, start : start + step], np.float32)
                frame = av.AudioFrame.from_ndarray(part, format="flt" if pcm else "fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
                out.mux(sound.encode(frame))
            out.mux(sound.encode(None))
    return path


def two_faces(frames: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Two talkers side by side, [T, size, 2 size, 3], and the first one's voice."""
    left, right = (make_clip(seed, frames, size) for seed in (101, 102))
    return np.concatenate([left.frames, right.frames], axis=2), left.samples


def cut_up(frames: int, cuts: int, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """One talker after another with hard cuts in between."""
    edges = [frames * k // (cuts + 1) for k in range(cuts + 2)]
    parts = [make_clip(200 + k, b - a, size) for k, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True))]
    return np.concatenate([p.frames for p in parts]), np.concatenate([p.samples for p in parts])


# What becomes of each: the reason in the dead letter, or None where the input is good and must be used.
EXPECTED = {
    "truncated.mp4": "unreadable",
    "cut_off.mkv": "damaged",
    "zero_bytes.mp4": "unreadable",
    "no_audio.mp4": "no_audio",
    "no_face.mp4": "no_face",
    "five_frames.mp4": "too_short",
    "chroma_444.mp4": None,
    "odd_size.mp4": None,
    "wrong_extension.avi": None,
    "not_a_video.mp4": "unreadable",
    "nan_audio.mkv": "bad_audio",
    "two_faces.mp4": "several_faces",
    "ten_cuts.mp4": "too_short",
}


def write_broken_inputs(folder: Path, frames: int = 180) -> None:
    """One file per entry of `EXPECTED`; good ones have landmark sidecars where a detector would find a drawn face hard."""
    folder.mkdir(parents=True, exist_ok=True)
    talker: TalkerClip = make_clip(300, frames, 128)

    whole = encode(folder / "whole.mp4", talker.frames, talker.samples).read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "whole.mp4").unlink()
    whole = encode(folder / "whole.mkv", talker.frames, talker.samples).read_bytes()
    (folder / "cut_off.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "whole.mkv").unlink()
    np.save(folder / "cut_off.landmarks.npy", talker.landmarks)
    (folder / "zero_bytes.mp4").touch()
    encode(folder / "no_audio.mp4", talker.frames)
    np.save(folder / "no_audio.landmarks.npy", talker.landmarks)

    rng = np.random.default_rng(0)
    drift = np.cumsum(rng.integers(-2, 3, (frames, 2)), axis=0)
    scene = rng.integers(0, 255, (24, 24, 3), np.uint8).repeat(12, 0).repeat(12, 1)
    scenery = [np.roll(scene, tuple(d), (0, 1))[:256, :256] for d in drift]
    encode(folder / "no_face.mp4", scenery, talker.samples)

    encode(folder / "five_frames.mp4", talker.frames[:5], talker.samples[: 5 * 640])
    np.save(folder / "five_frames.landmarks.npy", talker.landmarks[:5])
    encode(folder / "chroma_444.mp4", talker.frames, talker.samples, pix_fmt="yuv444p")
    np.save(folder / "chroma_444.landmarks.npy", talker.landmarks)
    encode(folder / "odd_size.mp4", talker.frames[:, :127, :125], talker.samples, pix_fmt="yuv444p")
    np.save(folder / "odd_size.landmarks.npy", talker.landmarks)
    encode(folder / "wrong.mp4", talker.frames, talker.samples).rename(folder / "wrong_extension.avi")
    np.save(folder / "wrong_extension.landmarks.npy", talker.landmarks)
    (folder / "not_a_video.mp4").write_bytes(rng.bytes(50_000))

    broken = talker.samples.copy()
    broken[len(broken) // 2 :: 999] = np.nan
    encode(folder / "nan_audio.mkv", talker.frames, broken, pcm=True)
    np.save(folder / "nan_audio.landmarks.npy", talker.landmarks)
    encode(folder / "two_faces.mp4", *two_faces(frames))
    encode(folder / "ten_cuts.mp4", *cut_up(frames, 10))
