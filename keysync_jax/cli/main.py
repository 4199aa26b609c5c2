"""The `keysync` command: which verbs it has, and the one place that turns errors into exit codes.

Everything heavy is imported inside the verb that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
from collections.abc import Sequence

from keysync_jax.cli import (
    animate_verbs,
    batch_verbs,
    bench_verbs,
    data_verbs,
    doctor_verbs,
    dub_verbs,
    evaluate_verbs,
    fetch_verbs,
    plan_verbs,
    prepare_verbs,
    train_verbs,
    weights_verbs,
)
from keysync_jax.core import cpu
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.version import __version__

_EXAMPLES = """\
examples:
  keysync demo -o demo                               see it run: makes a short drawn clip and dubs it
  keysync dub talk.mp4 voice.wav -o dubbed.mp4 --model DIR
  keysync convert keyframe_dub.pt interpolation_dub.pt svd/ hubert/ WavLM-Base+.pt -o DIR
  keysync export DIR --format diffusers -o svd_out   back to PyTorch
  keysync train --config keyframe --workdir runs/keyframe --config.data.datasets=data

exit status: 0 done, 1 failed, 2 wrong usage.   keysync VERB --help explains a verb."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status."""
    argv = _with_joined_overrides(_with_dashed_names(sys.argv[1:] if argv is None else list(argv)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: a file name or a dash that the terminal's encoding lacks must not fail a job that is done.
        sys.stdout.reconfigure(errors="backslashreplace")
    # `--config.key=value` names any key of a recipe, which argparse cannot enumerate.
    overrides = [a for a in argv if a.startswith("--config.")]
    parser = _parser()
    args = parser.parse_args([a for a in argv if not a.startswith("--config.")])
    if overrides and not (getattr(args, "config", None) or getattr(args, "takes_overrides", False)):
        parser.error(f"{overrides[0]} needs --config NAME before it")
    args.overrides = overrides
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(args.verbose, 2)]
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    cpu.prepare()
    try:
        _refuse_twice(overrides)
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
    except KeyboardInterrupt as stop:
        return _fail(str(stop) or "stopped", 1)


def _refuse_twice(overrides: Sequence[str]) -> None:
    """Raises UsageError where a key is given twice with different values, of which one would be lost without a word."""
    given: dict[str, str] = {}
    for override in overrides:
        key = override.partition("=")[0]
        if given.setdefault(key, override) != override:
            raise UsageError(f"{key} is given twice ({given[key]} and {override}); give it once, a list as {key}=a,b")


def _with_joined_overrides(argv: list[str]) -> list[str]:
    """`--config.KEY VALUE` as `--config.KEY=VALUE`."""
    out: list[str] = []
    for word in argv:
        if out and out[-1].startswith("--config.") and "=" not in out[-1] and not word.startswith("--"):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _with_dashed_names(argv: list[str]) -> list[str]:
    """File names that begin with a dash as paths, which no parser takes for options."""
    words = list(argv)
    for index, word in enumerate(argv):
        if index > 0 and argv[index - 1] == "--emotion" and re.match(r"-[\d.]", word):  # two numbers, the first one negative
            words[index - 1 : index + 1] = ["--emotion=" + word, ""]
            continue
        names_output = index > 0 and argv[index - 1] in ("-o", "--output", "--report")
        if re.fullmatch(r"-[^/]*\.\w+", word) and (names_output or os.path.lexists(word)):
            words[index] = os.path.join(os.curdir, word)
    return [word for word, given in zip(words, argv, strict=True) if word or not given]


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
    evaluate_verbs.add_demo(verbs)
    fetch_verbs.add_fetch(verbs)
    dub_verbs.add_dub(verbs)
    dub_verbs.add_detect(verbs)
    animate_verbs.add_animate(verbs)
    batch_verbs.add_batch(verbs)
    weights_verbs.add_verbs(verbs)
    prepare_verbs.add_prepare(verbs)
    data_verbs.add_data(verbs)
    train_verbs.add_train(verbs)
    evaluate_verbs.add_evaluate(verbs)
    train_verbs.add_ablate(verbs)
    plan_verbs.add_plan(verbs)
    doctor_verbs.add_doctor(verbs)
    bench_verbs.add_bench(verbs)
    return parser
