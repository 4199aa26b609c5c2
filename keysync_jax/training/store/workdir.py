"""Where a run lies, and what becomes of a run that cannot write there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from etils import epath

from keysync_jax.core.files import is_local


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The workdir as Orbax wants it, whatever the current folder. `epath.Path.resolve` would make a local folder `gs:` of `gs://`."""
    path = epath.Path(workdir)
    return path.resolve() if is_local(path) else path


@contextlib.contextmanager
def as_os_error(path: epath.PathLike) -> Iterator[None]:
    """Makes an OSError, which names the path, of whatever an object store fails with: gcsfs, aiohttp and google-auth have errors of their
    own. A package that is missing stays an ImportError.

    Raises:
      OSError: what is done within failed.
    """
    try:
        yield
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def beside_training(path: epath.PathLike, say: Callable[[str], None]) -> Iterator[None]:
    """Around whatever writes what the training can do without (logs, pictures, profiles): `say` is told in a line where it fails, for
    want of room, because the store does not answer or because a package is missing, and the run goes on."""
    try:
        with as_os_error(path):
            yield
    except (OSError, ImportError) as error:
        say(f"[red]{path} cannot be written ({getattr(error, 'strerror', None) or error}); the run goes on without it[/red]")
