"""`keysync batch`."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from keysync_jax.cli import animate_verbs, dub_verbs
from keysync_jax.cli.verbs import add_verb, number, stop_on_sigterm
from keysync_jax.core import assets
from keysync_jax.core.errors import KeySyncError, UsageError

_EXAMPLES = """\
  keysync batch jobs.csv -o dubbed --model DIR                 jobs.csv: id,video,audio,output,seed,face,...
  keysync batch jobs.csv -o made --model keyface               rows of the kind animate: id,kind,image,audio,emotion,...
  keysync batch videos/ voices/ -o dubbed --model DIR          two folders, paired by name
  keysync batch jobs.csv -o dubbed --model DIR --dry-run       what would run, how long, how much disk
  keysync batch jobs.csv -o dubbed --model DIR --workers 8     one process for each of eight GPUs
  keysync batch jobs.csv -o /shared/dubbed --model DIR --shard $SLURM_ARRAY_TASK_ID/16
  keysync batch --status dubbed"""
_YES, _NO = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def add_batch(verbs) -> None:
    """Add `keysync batch`."""
    p = add_verb(verbs, "batch", _batch, "dub a list of clips and lose none: give the same command again to go on", _EXAMPLES)
    p.add_argument("jobs", nargs="*", metavar="JOBS", help=".csv or .jsonl list; or a folder of videos and a folder of voices")
    p.add_argument("-o", "--output", metavar="OUTDIR", help="folder for the outputs, the ledger and the reports")
    dub_verbs.add_model(p)
    run = p.add_argument_group("running")
    run.add_argument("--workers", type=int, default=1, metavar="N", help="processes on this host, GPUs shared out among them (default 1)")
    run.add_argument("--shard", metavar="I/N", help="only every N-th item from the I-th on; I counts from 0, as a Slurm array does")
    run.add_argument("--ledger", choices=("sqlite", "files"), help="files: for a folder that hosts share (default: by the file system)")
    run.add_argument("--item-timeout", type=number, metavar="S", help="seconds an item may take (default: by its length)")
    run.add_argument("--retry-failed", action="store_true", help="try failed items again")
    run.add_argument("--no-gate", action="store_true", help="do not measure the results: nothing is marked for review")
    run.add_argument(
        "--dry-run", action="store_true", help="list what would run, seconds of video, estimated time and disk; change nothing"
    )
    run.add_argument("--status", metavar="OUTDIR", help="how far the batch in OUTDIR is; writes its reports anew")
    run.add_argument("--quiet", action="store_true", help="no progress")
    dub_verbs.add_options(p)


def _batch(args) -> int:
    if args.status is not None:
        return _status(args)
    if not args.jobs or args.output is None:
        raise UsageError("batch needs JOBS and -o OUTDIR (or --status OUTDIR)")
    if args.model is None:
        raise UsageError(assets.NO_MODEL.replace("dub needs", "batch needs"))
    if args.workers < 1:
        raise UsageError(f"--workers is {args.workers}; it must be at least 1")
    if args.microbatch < 1:
        raise UsageError(f"--microbatch is {args.microbatch}; it must be at least 1")
    if args.item_timeout is not None and args.item_timeout <= 0:
        raise UsageError(f"--item-timeout is {args.item_timeout:g}; it must be above 0 seconds")
    dub_verbs.options_of(args)  # what is wrong on the command line is wrong for all
    from keysync_jax.batch.batch_report import table
    from keysync_jax.batch.batch_run import Shard, local, run_batch
    from keysync_jax.batch.dub_work import DubSettings, open_dub_work
    from keysync_jax.batch.folders import BatchFolder
    from keysync_jax.batch.job_list import check_outputs, read_jobs
    from keysync_jax.core.files import local_folder

    folder = BatchFolder(local_folder(args.output))
    shard = Shard.parse(args.shard) if args.shard else Shard()
    jobs = read_jobs(args.jobs, dub_columns(args))
    settings = DubSettings(args.model, args.dtype, args.microbatch, gated=not args.no_gate)
    if args.dry_run:
        from keysync_jax.batch.dry_run import dry_run

        check_outputs(jobs, folder.root)
        listing = dry_run(folder, jobs[shard.number :: shard.of], settings.model)
        print(listing.text)
        return 1 if listing.unfit else 0
    if args.model == assets.NAME:
        print(f"keysync: {assets.WARNING}", file=sys.stderr)
    stop_on_sigterm()
    with _bar(args.quiet) as tell:
        try:
            done = run_batch(
                folder, jobs, settings.recipe(), functools.partial(open_dub_work, settings), shard=shard, ledger_kind=args.ledger,
                item_timeout=args.item_timeout, retry_failed=args.retry_failed, engine=local(args.workers), tell=tell,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped; what was in hand is open again: give the same command to go on ({args.output})") from None
    print(table(done.status, done.entries, folder.root))
    return 1 if done.failed else 0


def _status(args) -> int:
    from keysync_jax.batch.batch_report import table
    from keysync_jax.batch.batch_run import status
    from keysync_jax.batch.folders import BatchFolder

    if args.jobs or args.output is not None:
        raise UsageError("--status OUTDIR stands alone: it reads the ledger in OUTDIR")
    if not Path(args.status).is_dir():
        raise KeySyncError(f"{args.status} is no folder; name the one that keysync batch -o was given")
    found = status(BatchFolder(Path(args.status)))
    print(table(found.status, found.entries, Path(args.status)))
    return 0


def _bar(quiet: bool):
    """A bar of finished items; gives what the driver tells its counts to."""
    from keysync_jax.core.progress import Bars

    @contextlib.contextmanager
    def shown():
        with Bars(quiet) as bars:
            task = bars.add_task("items", total=None)
            seen = 0

            def tell(progress) -> None:
                nonlocal seen
                counts = progress.counts
                finished = counts["done"] + counts["review"] + counts["failed"]
                bars.update(task, total=sum(counts.values()))
                bars.advance(task, finished - seen)
                seen = finished

            yield tell

    return shown()


class _Refusing(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def dub_columns(args: argparse.Namespace | None = None):
    """The options of `keysync dub`, and of `keysync animate`, as columns; what the command line says is the default of every row."""
    parsers = {}
    for kind, verbs in (("dub", dub_verbs), ("animate", animate_verbs)):
        parsers[kind] = _Refusing(add_help=False, allow_abbrev=False)
        verbs.add_options(parsers[kind])
    dub, animate = (parser.parse_args([]) for parser in parsers.values())
    given = {name: value for name, value in vars(dub if args is None else args).items() if vars(dub).get(name, value) != value}
    for name in set(given) & set(vars(animate)):  # said on the command line, and an option of both
        setattr(animate, name, given[name])
    columns = _columns(parsers["dub"], dub if args is None else args, dub_verbs.options_of)
    return columns._replace(animate=_columns(parsers["animate"], animate, animate_verbs.options_of))


def _columns(parser: argparse.ArgumentParser, args: argparse.Namespace, options_of: Callable[[argparse.Namespace], Any]):
    from keysync_jax.batch.job_list import Columns

    actions = {action.dest: action for action in parser._actions if action.option_strings}  # argparse has no public list of them

    def parse(row: Mapping[str, str]) -> dict[str, Any]:
        words: list[str] = []
        chosen = copy.copy(args)
        for name, value in row.items():
            if name.startswith("voice:"):
                words.append(f"{actions['voice'].option_strings[-1]}=id:{name.removeprefix('voice:')}={value}")
                continue
            action = actions[name]
            if action.nargs != 0:
                words.append(f"{action.option_strings[-1]}={value}")
            elif value.lower() in _YES:
                words.append(action.option_strings[-1])
            elif value.lower() in _NO:
                setattr(chosen, name, action.default)
            else:
                raise UsageError(f"{name} is {value!r}; write true or false")
        parser.parse_args(words, namespace=chosen)
        return dataclasses.asdict(options_of(chosen))

    return Columns(frozenset(actions), parse)
