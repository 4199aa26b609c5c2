"""What every verb of the command line has in common."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
from collections.abc import Callable

from keysync_jax.core.errors import KeySyncError


def add_verb(verbs, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str) -> argparse.ArgumentParser:
    """Add a verb.

    Args:
      verbs: what `ArgumentParser.add_subparsers` returned.
      name: the verb.
      run: called with the parsed arguments; returns the exit status.
      summary: one line for the list of verbs; the verb's own help begins with it.
      example: lines shown at the end of the verb's help, indented by two.
    """
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say what is chosen and why (-vv: everything)")
    parser.set_defaults(run=run)
    return parser


def add_group(verbs, name: str, summary: str, example: str):
    """Add a verb that has verbs of its own; returns what these are added to. The arguments are those of `add_verb`."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}\n\nkeysync {name} VERB --help explains a verb.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help=argparse.SUPPRESS)
    return parser.add_subparsers(title="verbs", metavar="VERB", required=True)


def stop_on_sigterm() -> None:
    """From now on SIGTERM, a batch system's time limit, ends the process as Ctrl-C does: what is under way removes its scratch files."""
    with contextlib.suppress(ValueError):  # not the main thread, which is the one that signals reach
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def number(text: str) -> float:
    """A finite number, as `type=` of an option. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value


def check_remote(path: str) -> None:
    """Raises KeySyncError where the package that speaks gs:// is not installed."""
    if "://" in path:
        from etils import epath  # a third of the time that --help takes

        try:
            epath.Path(path).exists()
        except ImportError as error:
            raise KeySyncError(f"cannot open {path}: {error}") from None
