"""What every verb of the command line has in common."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Callable


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


def stop_on_sigterm() -> None:
    """From now on SIGTERM, a batch system's time limit, ends the process as Ctrl-C does: what is under way removes its scratch files."""
    with contextlib.suppress(ValueError):  # not the main thread, which is the one that signals reach
        signal.signal(signal.SIGTERM, signal.default_int_handler)
