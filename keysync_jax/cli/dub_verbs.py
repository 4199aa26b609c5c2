"""`keysync dub`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from keysync_jax.cli.verbs import add_verb, stop_on_sigterm
from keysync_jax.config import CODECS, COMPUTE_DTYPES, FACE_BACKENDS, GUIDANCES, MASK_KINDS, MISMATCHES
from keysync_jax.core import assets
from keysync_jax.core.errors import UsageError

if TYPE_CHECKING:  # --help answers without it
    from keysync_jax.inference.options import DubOptions

_MODEL_HELP = "model directory, local, gs:// or hub:owner/name (made by keysync convert or keysync init)"


def add_dub(verbs) -> None:
    """Add `keysync dub`."""
    p = add_verb(
        verbs, "dub", _dub, "dub a video with a new voice track",
        "  keysync dub talk.mp4 voice.wav -o dubbed.mp4 --model DIR --report report.json\n"
        "  keysync dub talk.mov voice.m4a -o dubbed.mkv --model hub:owner/name --lossless",
    )  # fmt: skip
    p.add_argument("video", metavar="VIDEO", help="any container, size, rate, rotation; also a photo, or a folder or pattern of pictures")
    p.add_argument("audio", metavar="AUDIO", help="the new voice: an audio file, or a video whose track is used")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="output file: .mp4, .m4v, .mov, .mkv or .webm")
    p.add_argument("--report", metavar="JSON", help="write what was done to each shot, timings and settings")
    add_model(p)
    add_options(p)


def add_model(p: argparse.ArgumentParser) -> None:
    """The options that say which model is loaded and how it computes: those of a process, not of a clip."""
    p.add_argument("--model", metavar="DIR", help=f"{_MODEL_HELP}, or demo: the bundled model, which draws cartoon mouths")
    p.add_argument("--dtype", choices=COMPUTE_DTYPES, help="network compute type (default: float32 on CPU, else bfloat16)")
    p.add_argument("--microbatch", type=int, default=1, metavar="N", help="windows per device and call (default 1)")


def add_options(p: argparse.ArgumentParser) -> None:
    """The options of one clip, a field of `DubOptions` each; a list of jobs has them as columns."""
    model = p.add_argument_group("generation")
    model.add_argument("--seed", type=int, default=23, help="noise seed; the same seed gives the same bytes (default 23)")
    model.add_argument("--steps", type=int, metavar="N", help="sampler steps, at least 10 (default: the model's own, 10)")
    model.add_argument(
        "--guidance", metavar="[KIND:]NAME=X,...",
        help=f"how conditions are strengthened, e.g. audio=5,identity=2 or apg:audio=5,identity=2; kinds: {', '.join(GUIDANCES)}",
    )  # fmt: skip
    model.add_argument("--audio-scale", type=float, metavar="X", help="audio guidance (default: the model's own, 5.0)")
    model.add_argument("--identity-scale", type=float, metavar="X", help="identity guidance (default: the model's own, 2.0)")
    model.add_argument("--mask", choices=MASK_KINDS, help="region to regenerate (default: the model's own)")
    model.add_argument("--reference-windows", action="store_true", help="the PyTorch reference's window plan, which drops the tail")
    face = p.add_argument_group("faces")
    face.add_argument("--faces", choices=FACE_BACKENDS, default=FACE_BACKENDS[0], help="landmark detector (fan: needs the torch extra)")
    face.add_argument("--face-weights", metavar="DIR", help="folder with FAN's weight files")
    face.add_argument("--face", default="largest", metavar="WHICH", help="largest, center, left, right or X,Y in pixels")
    face.add_argument(
        "--no-face", choices=("fail", "pass"), default="fail",
        help="a video without any face: fail, or pass: write it with the new voice and say so",
    )  # fmt: skip
    video = p.add_argument_group("output")
    video.add_argument("--crf", type=int, metavar="N", help="quality, 0 to 51, lower is better (default: 16, at most the source's rate)")
    video.add_argument("--lossless", action="store_true", help="encode losslessly: pixels outside the mouth region stay bit-equal")
    video.add_argument("--codec", choices=CODECS, help="default: what players play, ProRes and DNxHR as they are in .mov")
    video.add_argument("--pix-fmt", metavar="NAME", help="as FFmpeg names it, e.g. yuv444p (default: yuv420p, HDR with 10 bits)")
    video.add_argument("--keep-audio", action="store_true", help="keep the video's own sound as further tracks")
    video.add_argument("--language", metavar="CODE", help="of the voice, e.g. deu, where its file does not say it")
    length = p.add_argument_group("lengths")
    length.add_argument(
        "--range", metavar="A:B",
        help="dub a part, in seconds (12.5:20, 12.5: or :20): the voice begins at A, pictures and sound outside stay as they are",
    )  # fmt: skip
    length.add_argument(
        "--mismatch", choices=MISMATCHES, default=MISMATCHES[0],
        help="a voice that is longer or shorter: source (default: the video keeps its length, its mouth stays where the voice has ended), "
        "cut_off (the shorter ends both), loop, bounce (back and forth) or remap (slower, faster) the pictures until the voice ends, "
        "or silence (the mouth rests where the voice has ended)",
    )  # fmt: skip
    source = p.add_argument_group("sources")
    source.add_argument("--video-stream", type=int, metavar="N", help="of several, from 0 (default: the one that players show)")
    source.add_argument("--audio-stream", type=int, metavar="N", help="of the voice's file, from 0 (default: the one that players play)")
    source.add_argument(
        "--voice-channel", default="auto", metavar="WHICH",
        help="what the model hears: auto (the centre, or a mean that does not cancel), mix, left, right, center or a number from 0",
    )  # fmt: skip
    source.add_argument("--allow-damaged", action="store_true", help="dub what is there of a file that breaks off")

    add_marks(p)


def add_marks(p: argparse.ArgumentParser) -> None:
    """What an output says of itself."""
    marks = p.add_argument_group("marks", "a line in every output says that it is AI-generated; keysync detect reads it")
    marks.add_argument("--c2pa", metavar="CERT", help="sign a C2PA manifest: the certificate chain, PEM (needs the c2pa extra)")
    marks.add_argument("--key", metavar="KEY", help="its private key, PEM")
    marks.add_argument("--consent", metavar="NOTE", help="who agreed to it, for the report and the manifest")


def options_of(args: argparse.Namespace) -> DubOptions:
    """What `add_options` parsed.

    Raises:
      UsageError: a value out of range, or two that contradict each other.
    """
    from keysync_jax.inference.options import DubOptions

    return DubOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DubOptions)})


def add_detect(verbs) -> None:
    """Add `keysync detect`."""
    p = add_verb(
        verbs, "detect", _detect, "say whether videos are marked as AI-generated, and by whom",
        "  keysync detect dubbed.mp4\n  keysync detect dubbed/*.mkv     reads manifests beside them, too",
    )  # fmt: skip
    p.add_argument("videos", nargs="+", metavar="VIDEO", help="video file")


def _detect(args) -> int:
    from keysync_jax.media import provenance

    for video in args.videos:
        found = provenance.find(video)
        print(f"{video}: {found.line or 'no mark of KeySync-JAX in the container'}")
        if found.manifest is None:
            print(f"  {'; '.join(found.reasons) or 'no C2PA manifest'}")
            continue
        print(f"  C2PA manifest {found.where}: {found.manifest.lower()}, signed by {found.signer or 'nobody named'}")
        for term in found.source_types:
            print(f"  {term}")
        if found.consent:
            print(f"  consent: {found.consent}")
        for reason in found.reasons:
            print(f"  note: {reason}")
    return 0


def _dub(args) -> int:
    if args.model is None:
        raise UsageError(assets.NO_MODEL)
    from keysync_jax.core.compile_cache import use_compile_cache
    from keysync_jax.inference.pipeline import KeySyncPipeline

    if args.model == assets.NAME:
        print(f"keysync: {assets.WARNING}", file=sys.stderr)
    stop_on_sigterm()
    use_compile_cache()
    options = options_of(args)
    pipeline = KeySyncPipeline.from_pretrained(args.model, dtype=args.dtype, microbatch=args.microbatch)
    result = pipeline(args.video, args.audio, args.output, options=options, report=args.report, progress=True)
    print(result.summary)
    return 0
