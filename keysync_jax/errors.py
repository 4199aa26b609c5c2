"""The one exception type whose message is meant for the person at the keyboard."""


class KeySyncError(Exception):
    """Something the user can fix: a file, key, shape or setting that is wrong.

    The message is one line, names the offending thing and says what to do about it. The command line prints it without a
    traceback and exits with status 1; library callers catch it like any other exception.
    """


class UsageError(KeySyncError):
    """The command was put together wrongly (unknown name, impossible option value): exit status 2."""
