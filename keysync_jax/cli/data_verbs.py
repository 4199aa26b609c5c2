"""`keysync data`: drawn talkers, their shards and figures, and what a dataset holds and gives."""

from __future__ import annotations

import json

from keysync_jax.cli.verbs import add_group, add_verb, check_remote, number
from keysync_jax.config import MASK_KINDS, STAGES
from keysync_jax.core.errors import UsageError


def add_data(verbs) -> None:
    """Add `keysync data` and its verbs."""
    parts = add_group(
        verbs, "data", "make drawn talkers, look into a dataset",
        "  keysync data synth -n 500 -o talkers\n  keysync data inspect data",
    )  # fmt: skip
    for add in (_add_synth, _add_inspect, _add_shards, _add_figures, _add_benchmark):
        add(parts)


def _add_synth(parts) -> None:
    p = add_verb(
        parts, "synth", _synth, "draw talking heads with their own voices, exact landmarks and truth",
        "  keysync data synth -n 500 -o talkers\n  keysync data synth -n 24 --size 256 --occluders 0.3 --emotion 0.5 -o talkers",
    )  # fmt: skip
    p.add_argument("-n", "--clips", type=int, required=True, metavar="N", help="number of clips; a larger number extends a folder")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="local folder; what is finished there is kept")
    p.add_argument("--frames", type=int, default=180, metavar="N", help="frames per clip at 25 fps (default 180)")
    p.add_argument("--size", type=int, default=128, metavar="PX", help="side of the frames (default 128)")
    p.add_argument("--speakers", type=int, metavar="N", help="different faces (default: a new one for each clip)")
    p.add_argument("--seed", type=int, default=0, help="another seed is another set (default 0)")
    p.add_argument("--silent", type=number, default=0.06, metavar="P", help="share of clips without speech (default 0.06)")
    p.add_argument("--laughter", type=number, default=0.0, metavar="P", help="share of clips with laughter-like sounds")
    p.add_argument("--occluders", type=number, default=0.0, metavar="P", help="share of clips with a hand or microphone and exact masks")
    p.add_argument("--emotion", type=number, default=0.0, metavar="P", help="share of clips with valence and arousal expressions")
    p.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1); the result does not depend on it")
    p.add_argument("--arrays", action="store_true", help="write frames and voice as .npy (9 MB a clip) instead of .mp4")
    p.add_argument("--quiet", action="store_true", help="no progress")


def _synth(args) -> int:
    from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset

    settings = SynthSettings(
        seed=args.seed, frames=args.frames, size=args.size, speakers=args.speakers, silent_share=args.silent,
        laughter_share=args.laughter, occluder_share=args.occluders, emotion_share=args.emotion, suffix=".npy" if args.arrays else ".mp4",
    )  # fmt: skip
    made = synth_dataset(args.clips, args.output, settings, workers=args.workers, quiet=args.quiet)
    print(f"{args.clips} clips, {made.seconds:.0f} s of video ({made.made} made now, {made.kept} kept): {made.manifest}")
    return 0


def _add_inspect(parts) -> None:
    p = add_verb(
        parts, "inspect", _inspect, "say what a dataset holds; draw one clip with mask and sound",
        "  keysync data inspect data\n  keysync data inspect data --clip talker_000003 -o clip.png",
    )  # fmt: skip
    p.add_argument("data", metavar="DIR", help="dataset directory, local or gs://")
    p.add_argument("--clip", metavar="ID", help="a clip's id or the beginning of it")
    p.add_argument("-o", "--output", metavar="PNG", help="draw that clip as a picture strip")
    p.add_argument("--mask", choices=MASK_KINDS, default=MASK_KINDS[0], help="kind of mask to draw")
    p.add_argument("--json", action="store_true", help="machine-readable")


def _inspect(args) -> int:
    from keysync_jax.config import MaskConfig
    from keysync_jax.data_pipeline.prepare.inspect_dataset import draw_clip, print_summary

    if args.output and not args.clip:
        raise UsageError("-o draws one clip: name it with --clip ID")
    check_remote(args.data)
    if args.output:  # first: whatever is wrong with it is the only thing that is said
        draw_clip(args.data, args.clip, args.output, MaskConfig(kind=args.mask))
    print_summary(args.data, args.clip, args.json)
    if args.output:
        print(args.output)
    return 0


def _add_shards(parts) -> None:
    p = add_verb(
        parts, "shards", _shards, "drawn talkers to training shards in one process, without a video codec",
        "  keysync data synth -n 1000 --arrays -o talkers\n  keysync data shards talkers/manifest.csv -o data --model vae_model",
    )  # fmt: skip
    p.add_argument("manifest", metavar="MANIFEST", help="manifest.csv of keysync data synth --arrays")
    p.add_argument("-o", "--output", required=True, metavar="DIR", help="dataset directory")
    p.add_argument("--model", required=True, metavar="DIR", help="model directory with a VAE and speech encoders, or demo")
    p.add_argument("--microbatch", type=int, default=64, metavar="N", help="frames encoded at once (default 64)")
    p.add_argument("--seed", type=int, default=0, help="of the posterior samples (default 0)")
    p.add_argument("--quiet", action="store_true", help="no progress")


def _shards(args) -> int:
    from keysync_jax.core import assets
    from keysync_jax.data_pipeline.synthetic.talker_shards import write_shards

    if args.microbatch < 1 or args.seed < 0:
        raise UsageError(f"--microbatch {args.microbatch} --seed {args.seed}: at least one frame, and no negative seed")
    model = assets.resolve(args.model)
    count = write_shards(args.manifest, args.output, model, microbatch=args.microbatch, seed=args.seed, progress=not args.quiet)
    print(f"{count} clips: {args.output}")
    return 0


def _add_figures(parts) -> None:
    p = add_verb(
        parts, "figures", _figures, "figures about the drawn talkers: what leaks, how well mouths are measured, what the sound holds",
        "  keysync data figures\n  keysync data figures -n 40 --detection",
    )  # fmt: skip
    p.add_argument("-n", type=int, default=24, metavar="CLIPS", help="clips per figure (default 24)")
    p.add_argument("--detection", action="store_true", help="also the face detector's rates (minutes)")


def _figures(args) -> int:
    from keysync_jax.data_pipeline.synthetic.talker_figures import MAX_CLIPS, report_lines

    if not 1 <= args.n <= MAX_CLIPS:
        raise UsageError(f"-n is {args.n}; choose 1 to {MAX_CLIPS} clips")
    for line in report_lines(args.n, detection=args.detection):
        print(line, flush=True)
    return 0


def _add_benchmark(parts) -> None:
    p = add_verb(
        parts, "benchmark", _benchmark, "how many training windows per second a dataset gives on this machine",
        "  keysync data benchmark DIR --stage keyframe\n"
        "  keysync data benchmark DIR --make 110 --latent 64                           write 110 clips of noise first\n"
        "  keysync data benchmark DIR --make 110 --latent 16 --jpeg --pixels 14        with pictures of a drawn talker",
    )  # fmt: skip
    p.add_argument("directory", metavar="DIR", help="dataset directory")
    p.add_argument("--stage", choices=STAGES, default="keyframe")
    p.add_argument("--split", default="train")
    p.add_argument("--encoder", default="hubert", help="audio column to read")
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--workers", type=int, default=0)
    p.add_argument("--pixels", type=int, default=0, metavar="N", help="also decode N JPEGs of each window")
    p.add_argument("--seconds", type=float, default=5.0)
    make = p.add_argument_group("a dataset of noise")
    make.add_argument("--make", type=int, default=0, metavar="N", help="first write N clips of noise there")
    make.add_argument("--latent", type=int, default=64, metavar="H", help="latent side (default 64)")
    make.add_argument("--jpeg", action="store_true", help="pictures, too")
    make.add_argument("--options", metavar="OPTIONS", help="ArrayRecord writer options (default: those of every dataset)")


def _benchmark(args) -> int:
    from keysync_jax.data_pipeline.source.benchmark import benchmark

    written = {}
    if args.make:
        from keysync_jax.data_pipeline.synthetic.noise_shards import write_noise  # brings JAX, which reading does without

        options = {} if args.options is None else {"options": args.options}
        written = {"written": write_noise(args.directory, args.make, args.latent, jpeg=args.jpeg, **options)}
    measured = benchmark(
        args.directory, args.stage, args.split, args.encoder, pixels=args.pixels, batch_size=args.batch, seconds=args.seconds,
        threads=args.threads, workers=args.workers,
    )  # fmt: skip
    print(json.dumps({"stage": args.stage, **written, **measured}))
    return 0
