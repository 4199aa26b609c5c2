"""The verbs that show and judge: `keysync demo` and `keysync evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from keysync_jax.cli.verbs import add_verb, stop_on_sigterm
from keysync_jax.config import COMPUTE_DTYPES, FACE_BACKENDS, HELD_OUT, LIP_RATIOS
from keysync_jax.core import assets
from keysync_jax.core.errors import UsageError
from keysync_jax.core.files import check_target, write_text

_GRID_CLIPS = 24  # enough that a mean over clips does not mislead


def add_demo(verbs) -> None:
    """Add `keysync demo`."""
    p = add_verb(
        verbs, "demo", _demo, "dub an unseen drawn clip with the bundled model and judge it",
        "  keysync demo -o demo\n  keysync demo --seed 7 --model DIR",
    )  # fmt: skip
    p.add_argument("-o", "--output", default="keysync_demo", metavar="DIR", help="folder for the clip, the dub, a picture and the figures")
    p.add_argument("--seed", type=int, help="another seed is another person with another voice (default 0)")
    p.add_argument("--model", metavar="DIR", help="another model directory for drawn talkers (default: the bundled model)")
    p.add_argument("--record", type=int, metavar="N", help="run seeds 0 to N-1 and record in --model DIR what they reach")
    p.add_argument("--quiet", action="store_true", help="print nothing but figures below the model's recorded floor")


def _demo(args) -> int:
    if args.record is not None and args.model in (None, assets.NAME):
        raise UsageError("--record writes into the model directory; name yours with --model DIR (the bundled one is part of the package)")
    if args.record is not None and args.seed is not None:
        raise UsageError("--record runs seeds 0 to N-1; leave out --seed")
    from keysync_jax.core.compile_cache import use_compile_cache
    from keysync_jax.demo import tour as demo

    stop_on_sigterm()
    use_compile_cache()
    if args.record is not None:
        print(demo.record(args.output, args.model, args.record, quiet=args.quiet))
        return 0
    return 0 if demo.run_demo(args.output, seed=args.seed or 0, model=args.model, quiet=args.quiet).passed else 1


def add_evaluate(verbs) -> None:
    """Add `keysync evaluate`."""
    p = add_verb(
        verbs, "evaluate", _evaluate, "measure lip-sync on drawn talkers, or LipLeak of any video",
        "  keysync evaluate --talkers --model DIR --output talkers.json\n"
        "  keysync evaluate --talkers --model DIR --guidance-grid 5/2,2.5/1.5,1/1      choose guidance on the validation split\n"
        "  keysync evaluate --vae --model DIR\n"
        "  keysync evaluate --video dubbed.mp4 --reference talk.mp4 --plot mouth.png\n"
        "  keysync evaluate --video dubbed_with_silence.mp4 --audio-silent",
    )  # fmt: skip
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--talkers", action="store_true", help="dub held-out drawn talkers and measure their mouths in the pixels")
    what.add_argument("--vae", action="store_true", help="the autoencoder alone on held-out true frames: the gate before training")
    what.add_argument("--video", metavar="GEN", help="mouth aspect ratio, LipLeak and variance of Laplacian of a real video")
    p.add_argument("--output", "-o", metavar="JSON", help="write the figures here, per clip as well")
    p.add_argument("--gate", action="store_true", help="exit with status 1 if a mark is missed; takes a test that can decide")
    p.add_argument("--quiet", action="store_true", help="no progress")
    clips = p.add_argument_group("talkers and vae")
    clips.add_argument("--model", metavar="DIR", help="model directory (it may lack the parts that are not measured)")
    clips.add_argument("--clips", type=int, metavar="N", help=f"held-out clips (default 50; {_GRID_CLIPS} for the grid)")
    clips.add_argument("--silent-clips", type=int, metavar="N", help="of these, dubbed with silence too (default: all, at most 24)")
    clips.add_argument("--seconds", type=float, metavar="S", help="length of a clip (default 6)")
    clips.add_argument("--seed", type=int, help="another seed is another set of clips, and other noise (default 0)")
    clips.add_argument("--split", choices=HELD_OUT, help="held-out set (default test; the grid uses validation)")
    clips.add_argument("--size", type=int, metavar="PX", help="side of the drawn frames (default 128)")
    clips.add_argument("--keyframes-only", action="store_true", help="the keyframe stage alone, measured where keyframes stand")
    clips.add_argument("--one-stage", action="store_true", help="consecutive frames from the keyframe stage, nothing interpolated")
    clips.add_argument("--audio-scale", type=float, metavar="X", help="audio guidance of both stages (default: the model's own)")
    clips.add_argument("--identity-scale", type=float, metavar="X", help="identity guidance of both stages (default: the model's own)")
    clips.add_argument(
        "--guidance-grid", metavar="A/I,…", help="pairs audio/identity to compare; KEYFRAME:INTERPOLATION pairs as in 5/2:2.5/1.5"
    )
    clips.add_argument("--steps", type=int, metavar="N", help="sampler steps, at least 10 (default: the model's own)")
    clips.add_argument("--dtype", choices=COMPUTE_DTYPES, help="network compute type")
    clips.add_argument("--microbatch", type=int, metavar="N", help="windows per device and call (default 4 on a CPU, else 16)")
    video = p.add_argument_group("video")
    video.add_argument("--reference", metavar="V", help="video to compare with: the same figures, differences, correlation")
    video.add_argument("--audio-silent", action="store_true", help="GEN was driven by silence: its open frames are the leak")
    video.add_argument("--threshold", type=float, metavar="X", help="mouth aspect ratio above which a mouth is open (0.25)")
    video.add_argument("--ratio", choices=LIP_RATIOS, help=f"which lip points (default {LIP_RATIOS[0]})")
    video.add_argument("--series", metavar="FILE", help="figures of every frame as .csv or .json")
    video.add_argument("--plot", metavar="PNG", help="draw the mouth aspect ratio over time")
    video.add_argument("--faces", choices=FACE_BACKENDS, help=f"landmark detector (default {FACE_BACKENDS[0]})")
    video.add_argument("--face-weights", metavar="DIR", help="folder with FAN's weight files")
    video.add_argument("--face", metavar="WHICH", help="largest, center, left, right or X,Y in pixels (default largest)")


# None or False where not given, so that one that is given to another mode is refused and not ignored.
_VIDEO_ONLY = ("reference", "audio_silent", "threshold", "ratio", "series", "plot", "faces", "face_weights", "face")
_CLIPS_ONLY = ("model", "clips", "seconds", "seed", "split", "size", "microbatch", "gate")
_TALKERS_ONLY = ("guidance_grid", "keyframes_only", "one_stage", "audio_scale", "identity_scale", "silent_clips", "steps", "dtype")


def _evaluate(args) -> int:
    refused = _TALKERS_ONLY if not args.talkers else ()
    refused += _VIDEO_ONLY if args.video is None else _CLIPS_ONLY
    wrong = [name for name in refused if getattr(args, name) is not None and getattr(args, name) is not False]  # 0 == False
    if wrong:
        mode = "--talkers" if args.talkers else "--vae" if args.vae else "--video"
        raise UsageError(f"--{wrong[0].replace('_', '-')} does not go with {mode}")
    if args.microbatch is not None and args.microbatch < 1:
        raise UsageError(f"--microbatch is {args.microbatch}; it must be at least 1")
    if args.steps is not None:
        from keysync_jax.diffusion.schedules import MIN_STEPS

        if args.steps < MIN_STEPS:
            raise UsageError(f"--steps is {args.steps}; the noise schedule is defined from {MIN_STEPS} steps up")
    if args.gate and args.guidance_grid:
        raise UsageError("--gate judges one guidance; leave out --guidance-grid")
    taken = {Path(path).resolve(): path for path in (args.video, args.reference) if path is not None}
    for path in (args.output, args.series, args.plot):
        _check_target(path, taken)
    if args.video is not None:
        from keysync_jax.evaluation.video_report import evaluate_video

        chosen = {"threshold": args.threshold, "ratio": args.ratio, "backend": args.faces, "weights": args.face_weights, "face": args.face}
        report = evaluate_video(
            args.video, args.reference, silent=args.audio_silent, series=args.series, plot=args.plot, quiet=args.quiet, **_chosen(chosen)
        )
        _write(args.output, report)
        return 0
    if not args.model:
        raise UsageError("evaluate --talkers and --vae need --model DIR")
    from keysync_jax.core.compile_cache import use_compile_cache

    use_compile_cache()
    reports = _vae(args) if args.vae else _talkers(args)
    _write(args.output, reports[0] if len(reports) == 1 else {"kind": "guidance grid", "runs": reports})
    return 0 if not args.gate or reports[0]["passed"] else 1


def _chosen(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given; the others keep the callee's defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _test(args, mode: str):
    from keysync_jax.evaluation.talkers import TalkerTest

    grid = args.guidance_grid is not None
    if grid and args.split == "test":
        raise UsageError("guidance is chosen on the validation split; leave out --split test")
    options = {"clips": _GRID_CLIPS, "split": "validation"} if grid else {}
    options |= _chosen({name: getattr(args, name) for name in ("clips", "silent_clips", "seconds", "size", "seed", "split")})
    test = TalkerTest(**options, mode=mode)
    if args.gate and test.undecided:
        raise UsageError(f"--gate needs a test that can decide: {test.undecided}")
    return test


def _vae(args) -> list[dict]:
    from keysync_jax.evaluation import talkers_report
    from keysync_jax.evaluation.talkers import evaluate_vae

    test = _test(args, "dub")
    with talkers_report.progress(f"{test.clips} clips", test.clips, args.quiet) as tick:
        report = evaluate_vae(_open(args.model), test, args.microbatch or 8, tick)
    talkers_report.show_vae(report)
    return [report]


def _talkers(args) -> list[dict]:
    from keysync_jax.evaluation import talkers, talkers_report
    from keysync_jax.evaluation.talkers_model import TalkerModel, parse_grid

    if args.keyframes_only and args.one_stage:
        raise UsageError("--keyframes-only and --one-stage contradict each other; give one")
    mode = "keyframes" if args.keyframes_only else "one stage" if args.one_stage else "dub"
    test = _test(args, mode)
    wanted = None if args.guidance_grid is None else parse_grid(args.guidance_grid)
    if wanted and (args.audio_scale is not None or args.identity_scale is not None):
        raise UsageError("--guidance-grid names the scales; leave out --audio-scale and --identity-scale")
    directory = _open(args.model)
    model = TalkerModel(directory, mode, steps=args.steps, microbatch=args.microbatch, dtype=args.dtype)
    scales = wanted or [_scales(args, model)]
    with talkers_report.progress(f"{test.clips} clips", talkers.total_windows(test, model, len(scales)), args.quiet) as tick:
        reports = talkers.evaluate(directory, test, model, scales, tick)
    if wanted:
        talkers_report.show_grid(reports)
    else:
        talkers_report.show_talkers(reports[0])
    return reports


def _scales(args, model):
    from keysync_jax.evaluation.talkers_model import Scales

    own = model.own_scales()
    return Scales(
        *(
            (_given(args.audio_scale, audio, "--audio-scale"), _given(args.identity_scale, identity, "--identity-scale"))
            for audio, identity in (own.keyframe, own.interpolation)
        )
    )


def _given(value: float | None, default: float, option: str) -> float:
    if value is not None and not 0 <= value < 100:
        raise UsageError(f"{option} {value} is out of range; choose 0 to 100")
    return default if value is None else value


def _open(path: str):
    from keysync_jax.converters import model_directory
    from keysync_jax.core import assets

    return model_directory.load(assets.resolve(path), complete=False)


def _check_target(path: str | None, taken: dict[Path, str]) -> None:
    """Refuses, before hours of work, an output that could not be written or that would replace an input or another output."""
    if path is None:
        return
    target = Path(path).resolve()
    if target in taken:
        raise UsageError(f"{path} is named twice, as an output and as {taken[target]}; give another file")
    taken[check_target(path)] = path


def _write(path: str | None, report: dict) -> None:
    if path is not None:
        write_text(path, json.dumps(report, indent=1) + "\n")
