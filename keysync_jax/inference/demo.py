"""`keysync demo`: a drawn talker, another voice, a tiny random model, and the real job around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from converters.initialize import initialize
from data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.inference.job import DubResult
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.pipeline import KeySyncPipeline
from keysync_jax.media import audio, video
from keysync_jax.media.strip import draw_strip, tint_changes

_FRAMES, _SIZE, _COLUMNS = 75, 512, 6


def run_demo(folder: str | Path, seed: int = 0) -> DubResult:
    """Make the clip, the voice and the model in `folder`, dub, and draw `strip.png`.

    Raises:
      KeySyncError: anything the dub itself refuses.
    """
    console = Console(stderr=True)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clip, voice, model = folder / "clip.mp4", folder / "voice.wav", folder / "model"

    console.print("drawing a talker and inventing a second voice …")
    write_clip(make_clip(seed, frames=_FRAMES, size=_SIZE), clip)
    samples = make_clip(seed + 1, frames=_FRAMES, size=128).samples
    audio.save_wav(voice, samples, 16000)
    initialize("tiny", str(model), seed=seed, force=True)

    result = KeySyncPipeline.from_pretrained(model)(
        clip, voice, folder / "demo.mp4", options=DubOptions(seed=seed), report=folder / "report.json", progress=True
    )
    moments = np.linspace(0, _FRAMES - 1, _COLUMNS + 2).round().astype(int)[1:-1]
    before, after = _frames(clip, moments), _frames(folder / "demo.mp4", moments)
    changed = [tint_changes(b, a) for b, a in zip(before, after, strict=True)]
    rows = [("input", before), ("regenerated", changed), ("output", after)]
    draw_strip(rows, [m / 25 for m in moments], samples, _FRAMES / 25).save(folder / "strip.png")

    console.print(result.summary, highlight=False)
    console.print(f"\nlook at [b]{folder / 'demo.mp4'}[/b] and [b]{folder / 'strip.png'}[/b]")
    console.print("the model is tiny and [b]random: the mouth is noise[/b]; face, crop, timing, blending and audio are the real thing")
    return result


def _frames(path: Path, wanted: np.ndarray) -> list[np.ndarray]:
    chosen = set(wanted.tolist())
    return [frame.rgb() for frame in video.read(path) if frame.index in chosen]
