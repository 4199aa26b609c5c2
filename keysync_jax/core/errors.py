"""The one exception type whose message is meant for the person at the keyboard."""


class KeySyncError(Exception):
    """Something the user can fix: a file, key, shape or setting that is wrong.

    The message is one line, names the offending thing and says what to do about it. The command line prints it without a
    traceback and exits with status 1; library callers catch it like any other exception.
    """


class UsageError(KeySyncError):
    """The command was put together wrongly (unknown name, impossible option value): exit status 2."""


def first_line(error: BaseException, limit: int = 500) -> str:
    """The first line of what an error says, at most `limit` characters of it; the name of its type where it says nothing."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:limit]


def in_one_line(error: BaseException, limit: int = 500) -> str:
    """What went wrong, for a report: our own words as they are, others after the name of their type."""
    needs_name = str(error).strip() and not isinstance(error, KeySyncError)
    return f"{type(error).__name__}: {first_line(error, limit)}"[:limit] if needs_name else first_line(error, limit)
