"""A folder in the place of `gs://`, with what an object store lacks: as in gcsfs, opening to append overwrites."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem


def mount(root: Path, monkeypatch) -> Path:
    """`gs://NAME/...` lies in `root/NAME/...` until the test ends."""

    class Bucket(LocalFileSystem):
        cachable = False  # fsspec would hand the bucket of one test to the next

        @classmethod
        def _strip_protocol(cls, path):
            text = str(path)
            for scheme in ("gs://", "gcs://"):
                text = f"{root}/{text.removeprefix(scheme)}" if text.startswith(scheme) else text
            return LocalFileSystem._strip_protocol(text)

        def open(self, path, mode="rb", **options):
            return super().open(path, mode=mode.replace("a", "w"), **options)

    bucket, disk = Bucket(auto_mkdir=True), fsspec.filesystem("file")
    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: bucket if str(path).startswith("gs://") else disk)
    return root


class HttpError(Exception):
    """As gcsfs raises: no OSError."""


@contextlib.contextmanager
def refusing(monkeypatch) -> Iterator[None]:
    """While within, the store answers no request to read or write."""

    def refuse(*_, **__):
        raise HttpError("503 [try again]")

    with monkeypatch.context() as during:
        during.setattr(backend.fsspec_backend, "open", refuse)
        yield
