"""The `keysync` command: its verbs, their options, and the one place that turns errors into exit codes.

Everything heavy is imported inside the verb that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import re
import sys
from collections.abc import Sequence

from keysync_jax import __version__, assets
from keysync_jax.cli import (
    bench_verbs,
    data_verbs,
    evaluate_verbs,
    plan_verbs,
    train_verbs,
)
from keysync_jax.cli.verbs import add_verb, stop_on_sigterm
from keysync_jax.core import cpu
from keysync_jax.core.errors import KeySyncError, UsageError

_EXAMPLES = """\
examples:
  keysync demo -o demo                               see it run: makes a short drawn clip and dubs it
  keysync dub talk.mp4 voice.wav -o dubbed.mp4 --model DIR
  keysync convert keyframe_dub.pt interpolation_dub.pt svd/ hubert/ WavLM-Base+.pt -o DIR
  keysync inspect DIR                                what a file or model directory holds
  keysync export DIR --format diffusers -o svd_out   back to PyTorch
  keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=data

exit status: 0 done, 1 failed, 2 wrong usage.   keysync VERB --help explains a verb."""

_MODEL_HELP = "model directory, local, gs:// or hub:owner/name (made by keysync convert or keysync init)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: a file name or a dash that the terminal's encoding lacks must not fail a job that is done.
        sys.stdout.reconfigure(errors="backslashreplace")
    # `--config.key=value` names any key of a recipe, which argparse cannot enumerate.
    overrides = [a for a in argv if a.startswith("--config.")]
    parser = _parser()
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    if overrides and not getattr(args, "config", None):
        parser.error(f"{overrides[0]} needs --config NAME before it")
    args.overrides = overrides
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    cpu.prepare()
    try:
        return args.run(args) or 0
    except UsageError as error:
        return _fail(error, 2)
    except KeySyncError as error:
        return _fail(error, 1)
    except OSError as error:  # full disk, no permission, a folder where a file should be: the system's own words name the path
        return _fail(error, 1)
    except ImportError as error:
        # gcsfs is no part of the default install, and etils imports it where the first gs:// path is used, which is anywhere. Whatever
        # else cannot be imported is a broken installation, whose traceback is wanted.
        if not _lacks(error, "gcsfs"):
            raise
        paths = [found[0] for word in argv if (found := re.search(r"gs://[^\s,'\"]+", word))]
        return _fail(f"{paths[0] if paths else 'a gs:// path'} needs gcsfs, which is not installed; pip install gcsfs", 1)
    except KeyboardInterrupt:
        return _fail("stopped", 1)


def _lacks(error: BaseException | None, package: str) -> bool:
    """Whether an import failed because a package is not installed; libraries put words of their own around that error."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(error: object, status: int) -> int:
    # One line, also where a library's message has several.
    text = " ".join(line.strip() for line in str(error).splitlines())
    print(f"keysync: error: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="keysync",
        description="Lip-sync in JAX: give it a video and a new voice, get the same video with the mouth saying the new words.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"keysync-jax {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for add in (evaluate_verbs.add_demo, _add_dub, _add_convert, train_verbs.add_export, _add_inspect, _add_init, _add_verify):
        add(verbs)
    data_verbs.add_verbs(verbs)
    for add in (train_verbs.add_train, evaluate_verbs.add_evaluate, plan_verbs.add_plan, bench_verbs.add_bench):
        add(verbs)
    return parser


# ------------------------------------------------------------------------------------------------------------------- dubbing


def _add_dub(verbs) -> None:
    p = add_verb(
        verbs, "dub", _dub, "dub a video with a new voice track",
        "  keysync dub talk.mp4 voice.wav -o dubbed.mp4 --model DIR --report report.json\n"
        "  keysync dub talk.mov voice.m4a -o dubbed.mkv --model hub:owner/name --lossless",
    )  # fmt: skip
    p.add_argument("video", metavar="VIDEO", help="any container, size, rate, rotation; constant or variable frame rate")
    p.add_argument("audio", metavar="AUDIO", help="the new voice: an audio file, or a video whose track is used")
    p.add_argument("-o", "--output", required=True, metavar="OUT", help="output file: .mp4, .mkv or .mov")
    p.add_argument("--model", metavar="DIR", help=f"{_MODEL_HELP}, or demo: the bundled model, which draws cartoon mouths")
    p.add_argument("--report", metavar="JSON", help="write what was done to each shot, timings and settings")
    model = p.add_argument_group("generation")
    model.add_argument("--seed", type=int, default=23, help="noise seed; the same seed gives the same bytes (default 23)")
    model.add_argument("--steps", type=int, metavar="N", help="sampler steps, at least 10 (default: the model's own, 10)")
    model.add_argument("--audio-scale", type=float, metavar="X", help="audio guidance (default: the model's own, 5.0)")
    model.add_argument("--identity-scale", type=float, metavar="X", help="identity guidance (default: the model's own, 2.0)")
    model.add_argument("--mask", choices=["box", "full", "mouth", "heart", "face"], help="region to regenerate (default: the model's own)")
    model.add_argument("--reference-windows", action="store_true", help="the PyTorch reference's window plan, which drops the tail")
    model.add_argument("--dtype", choices=["float32", "bfloat16"], help="network compute type (default: float32 on CPU, else bfloat16)")
    model.add_argument("--microbatch", type=int, default=1, metavar="N", help="windows per device and call (default 1)")
    face = p.add_argument_group("faces")
    face.add_argument("--faces", choices=["mediapipe", "fan"], default="mediapipe", help="landmark detector (fan: needs the torch extra)")
    face.add_argument("--face-weights", metavar="DIR", help="folder with FAN's weight files")
    face.add_argument("--face", default="largest", metavar="WHICH", help="largest, center, left, right or X,Y in pixels")
    video = p.add_argument_group("output")
    video.add_argument("--crf", type=int, metavar="N", help="quality, 0 to 51, lower is better (default 16)")
    video.add_argument("--lossless", action="store_true", help="encode losslessly: pixels outside the mouth region stay bit-equal")


def _dub(args) -> int:
    if args.model is None:
        raise UsageError(assets.NO_MODEL)
    from keysync_jax.core.compile_cache import use_compile_cache
    from keysync_jax.inference.options import DubOptions
    from keysync_jax.inference.pipeline import KeySyncPipeline

    if args.model == assets.NAME:
        print(f"keysync: {assets.WARNING}", file=sys.stderr)
    stop_on_sigterm()
    use_compile_cache()
    options = DubOptions(
        seed=args.seed, steps=args.steps, audio_scale=args.audio_scale, identity_scale=args.identity_scale, mask=args.mask,
        reference_windows=args.reference_windows, faces=args.faces, face_weights=args.face_weights, face=args.face,
        crf=args.crf, lossless=args.lossless,
    )  # fmt: skip
    pipeline = KeySyncPipeline.from_pretrained(args.model, dtype=args.dtype, microbatch=args.microbatch)
    result = pipeline(args.video, args.audio, args.output, options=options, report=args.report, progress=True)
    print(result.summary)
    return 0


# ------------------------------------------------------------------------------------------------------------------- weights


def _add_convert(verbs) -> None:
    p = add_verb(
        verbs, "convert", _convert, "turn PyTorch weights into a model directory (no PyTorch needed)",
        "  keysync convert keyframe_dub.pt interpolation_dub.pt stable-video-diffusion/ hubert-base/ WavLM-Base+.pt -o model",
    )  # fmt: skip
    p.add_argument("sources", nargs="+", metavar="SRC", help="checkpoint files and folders; see docs/convert.md")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="model directory to write")
    p.add_argument("--allow-missing", action="append", default=[], metavar="KEY", help="go on without this tensor (repeat for each)")
    p.add_argument("--allow-unexpected", action="append", default=[], metavar="KEY", help="ignore this tensor (repeat for each)")
    p.add_argument("--force", action="store_true", help="replace an existing model directory")
    known = p.add_argument_group("what a checkpoint does not say of itself (defaults are those of the released weights)")
    known.add_argument(
        "--encoder", action="append", default=[], metavar="STAGE=KIND", help="speech encoder of a stage: hubert, wavlm, log_mel"
    )
    known.add_argument("--mask", metavar="KIND", help="mask that it was trained with")
    known.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the crop that it was trained with")
    known.add_argument("--head-channels", type=int, metavar="N", help="attention head size")
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="type to store (default: as it is)")


def _convert(args) -> int:
    from keysync_jax.converters.convert import convert

    wrong = [text for text in args.encoder if "=" not in text]
    if wrong:
        raise UsageError(f"--encoder {wrong[0]}: write STAGE=KIND, for example interpolation=hubert")
    options = {"mask": args.mask, "resolution": args.resolution, "head_channels": args.head_channels, "dtype": args.dtype}
    convert(
        args.sources, args.output, allow_missing=args.allow_missing, allow_unexpected=args.allow_unexpected, force=args.force,
        encoders=dict(text.split("=", 1) for text in args.encoder), **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    return 0


def _add_inspect(verbs) -> None:
    p = add_verb(
        verbs, "inspect", _inspect, "say what a weights file, model directory or recipe holds",
        "  keysync inspect keyframe_dub.pt\n  keysync inspect DIR --tensors\n  keysync inspect --config keyframe",
    )  # fmt: skip
    p.add_argument("path", nargs="?", metavar="PATH", help="any file or folder that convert reads, or a model directory")
    p.add_argument("--tensors", action="store_true", help="list every tensor with shape and type")
    p.add_argument("--json", action="store_true", help="machine-readable")
    p.add_argument("--config", metavar="NAME", help="show a recipe instead: a shipped name or a .py file; --config.KEY=VALUE overrides")


def _inspect(args) -> int:
    if args.config:
        from keysync_jax.training import recipes

        print(recipes.load(args.config, args.overrides))
        return 0
    if not args.path:
        raise UsageError("inspect needs a PATH or --config NAME")
    from keysync_jax.converters.inspect_weights import show

    show(args.path, tensors=args.tensors, as_json=args.json)
    return 0


def _add_init(verbs) -> None:
    p = add_verb(
        verbs, "init", _init, "make a model directory with random weights, to try things out",
        "  keysync init --size tiny -o tiny",
    )  # fmt: skip
    p.add_argument("--size", required=True, choices=["tiny", "full"], help="tiny: 128-px crop, megabytes; full: the released layout, 14 GB")
    p.add_argument("-o", "--output", required=True, metavar="DIR")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--force", action="store_true", help="replace an existing model directory")


def _init(args) -> int:
    from keysync_jax.converters.initialize import initialize

    initialize(args.size, args.output, seed=args.seed, force=args.force)
    return 0


def _add_verify(verbs) -> None:
    p = add_verb(
        verbs, "verify", _verify, "run reference cases through our code and compare the numbers",
        "  keysync verify tests/golden\n  keysync verify CASES_DIR --only wavlm --only masks",
    )  # fmt: skip
    p.add_argument("cases", metavar="CASES_DIR", help="folder of cases, each with case.json and io.safetensors")
    p.add_argument("--only", action="append", metavar="NAME", help="run this case only (repeat for more)")


def _verify(args) -> int:
    from keysync_jax.verify.harness import verify

    return verify(args.cases, names=args.only)


if __name__ == "__main__":
    sys.exit(main())
