"""The one exception type whose message is meant for the person at the keyboard."""


class KeySyncError(Exception):
    """Something the user can fix: a file, key, shape or setting that is wrong.

    The message is one line, names the offending thing and says what to do about it. The command line prints it without a
    traceback and exits with status 1; library callers catch it like any other exception.
    """


class UsageError(KeySyncError):
    """The command was put together wrongly (unknown name, impossible option value): exit status 2."""


def in_one_line(error: BaseException) -> str:
    """What went wrong, for a report: our own words as they are, others after the name of their type."""
    text = str(error) if isinstance(error, KeySyncError) else f"{type(error).__name__}: {error}"
    return text.splitlines()[0][:500]
