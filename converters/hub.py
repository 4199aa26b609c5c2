"""Paths of the form `hub:owner/name[/inside][@revision]`, downloaded through huggingface-hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from keysync_jax.core.errors import KeySyncError, UsageError, first_line

PREFIX = "hub:"
_PATTERN = re.compile(r"hub:(?P<repo>[^/@\s]+/[^/@\s]+)(?:/(?P<inside>[^@\s]+?))?/?(?:@(?P<revision>\S+))?")


class HubPath(NamedTuple):
    repo: str  # "owner/name"
    inside: str  # file or folder in the repository; "" is all of it
    revision: str | None  # branch, tag or commit; None is the default branch


def parse(path: str) -> HubPath:
    """
    >>> parse("hub:toninio19/keysync/keyframe_dub.pt@main")
    HubPath(repo='toninio19/keysync', inside='keyframe_dub.pt', revision='main')

    Raises:
      UsageError: not of that form.
    """
    match = _PATTERN.fullmatch(path)
    if not match or ".." in (match["inside"] or "").split("/"):
        raise UsageError(f"{path} is not a Hugging Face path; write hub:owner/name, hub:owner/name/folder or hub:owner/name@revision")
    return HubPath(match["repo"], match["inside"] or "", match["revision"])


def resolve(path: str, patterns: Sequence[str] | None = None) -> str:
    """The local path of a `hub:` path, downloaded to huggingface-hub's cache if need be; any other path unchanged.

    Args:
      path: local, `gs://` or `hub:` path.
      patterns: glob patterns of the wanted files, relative to what the path names; None is everything.

    Raises:
      UsageError: a malformed `hub:` path.
      KeySyncError: no such repository, revision or file, no access, or no network and not in the cache.
    """
    if not path.startswith(PREFIX):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    where = parse(path)
    wanted = None
    if where.inside:
        wanted = [where.inside, *(f"{where.inside}/{p}" for p in patterns or ["*"])]
    elif patterns is not None:
        wanted = list(patterns)
    try:
        folder = snapshot_download(where.repo, revision=where.revision, allow_patterns=wanted)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise KeySyncError(f"cannot download {path}: {first_line(error)} (check the name and the network, or give a local path)") from None
    from etils import epath

    found = epath.Path(folder) / where.inside
    if not found.exists():
        raise KeySyncError(f"{where.repo} has no file or folder {where.inside}{f' at {where.revision}' if where.revision else ''}")
    return str(found)
