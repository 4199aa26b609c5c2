"""`keysync animate`."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING

from keysync_jax.cli import dub_verbs
from keysync_jax.cli.verbs import add_verb, number, stop_on_sigterm
from keysync_jax.config import CODECS, FACE_BACKENDS
from keysync_jax.core import assets
from keysync_jax.core.errors import UsageError

if TYPE_CHECKING:  # --help answers without it
    from keysync_jax.inference.animate_options import AnimateOptions


def add_animate(verbs) -> None:
    """Add `keysync animate`."""
    p = add_verb(
        verbs, "animate", _animate, "make a picture say a voice, with emotions (KeyFace)",
        "  keysync animate face.jpg voice.wav -o out.mp4 --model keyface --emotion happy --report report.json\n"
        "  keysync animate family.png voice.wav -o out.mp4 --model keyface --face left --paste --emotion neutral,excited,calm",
    )  # fmt: skip
    p.add_argument("image", metavar="IMAGE", help="a photo (.jpg, .png, .webp, .avif, .tif, ...), or a video, whose frame is taken")
    p.add_argument("audio", metavar="AUDIO", help="the voice: an audio file, or a video whose track is used")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="output file: .mp4, .m4v, .mov, .mkv or .webm")
    p.add_argument("--report", metavar="JSON", help="write what was done, the emotion at the keyframes, timings and settings")
    dub_verbs.add_model(p)
    add_options(p)


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of one animation, a field of `AnimateOptions` each; a list of jobs has them as columns."""
    emotion = p.add_argument_group("emotion")
    emotion.add_argument(
        "--emotion", default="neutral", metavar="WHAT",
        help="a name (happy), several spread over the clip (neutral,happy,sad), valence,arousal (0.5,-0.2), or a .csv or .json file of "
        "seconds,valence,arousal or seconds,name (default neutral; an unknown name lists all)",
    )  # fmt: skip
    emotion.add_argument("--emotion-strength", type=number, default=1.0, metavar="X", help="factor of both numbers (default 1)")
    model = p.add_argument_group("generation")
    model.add_argument("--seed", type=int, default=23, help="noise seed; the same seed gives the same bytes (default 23)")
    model.add_argument("--steps", type=int, metavar="N", help="sampler steps, at least 10 (default: the model's own, 10)")
    model.add_argument("--guidance", metavar="[KIND:]NAME=X,...", help="of keyframes, as for dub, e.g. audio=5,identity=2")
    model.add_argument("--audio-scale", type=float, metavar="X", help="audio guidance of keyframes (default: the model's own, 5.0)")
    model.add_argument("--identity-scale", type=float, metavar="X", help="identity guidance of keyframes (default: the model's own, 2.0)")
    model.add_argument(
        "--autoguidance", type=float, metavar="X", help="away from the worse interpolation network (default: the model's own, 2.0; 1: off)"
    )
    face = p.add_argument_group("picture")
    face.add_argument("--at", type=float, metavar="SECONDS", help="of a video: which moment (default: its first frame)")
    face.add_argument("--crop", choices=("face", "none"), default="face", help="none: the picture is a square face already, e.g. a drawing")
    face.add_argument("--face", default="largest", metavar="WHICH", help="largest, center, left, right or X,Y in pixels")
    face.add_argument("--faces", choices=FACE_BACKENDS, default=FACE_BACKENDS[0], help="landmark detector (fan: needs the torch extra)")
    face.add_argument("--face-weights", metavar="DIR", help="folder with FAN's weight files")
    video = p.add_argument_group("output")
    video.add_argument("--size", type=int, metavar="N", help="side of the square that is written (default: the model's own)")
    video.add_argument("--paste", action="store_true", help="paste the square into the still picture; the report measures the seam")
    video.add_argument("--crf", type=int, metavar="N", help="quality, 0 to 51, lower is better (default 16)")
    video.add_argument("--lossless", action="store_true", help="encode losslessly")
    video.add_argument("--codec", choices=CODECS, help="default: what players play")
    video.add_argument("--pix-fmt", metavar="NAME", help="as FFmpeg names it, e.g. yuv444p (default: yuv420p)")
    video.add_argument("--language", metavar="CODE", help="of the voice, e.g. deu, where its file does not say it")
    source = p.add_argument_group("sources")
    source.add_argument("--audio-stream", type=int, metavar="N", help="of the voice's file, from 0 (default: the one that players play)")
    source.add_argument(
        "--voice-channel", default="auto", metavar="WHICH", help="what the model hears: auto, mix, left, right, center or a number from 0"
    )
    dub_verbs.add_marks(p)


def options_of(args: argparse.Namespace) -> AnimateOptions:
    """What `add_options` parsed.

    Raises:
      UsageError: a value out of range, or two that contradict each other.
    """
    from keysync_jax.inference.animate_options import AnimateOptions

    return AnimateOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(AnimateOptions)})


def _animate(args) -> int:
    if args.model is None:
        raise UsageError(assets.NO_KEYFACE)
    from keysync_jax.core.compile_cache import use_compile_cache
    from keysync_jax.inference.pipeline import KeySyncPipeline

    stop_on_sigterm()
    use_compile_cache()
    options = options_of(args)
    pipeline = KeySyncPipeline.from_pretrained(args.model, dtype=args.dtype, microbatch=args.microbatch)
    result = pipeline.animate(args.image, args.audio, args.output, options=options, report=args.report, progress=True)
    print(result.summary)
    return 0
