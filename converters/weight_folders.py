"""Which file of a folder holds its weights: published folders with their variants, a trainer's folders, and a hub cache."""

from __future__ import annotations

import re
from collections.abc import Sequence

from etils import epath

from keysync_jax.core.errors import KeySyncError

_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
# Full precision first. Shards of a variant have had their index under both names.
_VARIANTS = ("", ".fp16", ".bf16")
WEIGHT_NAMES = tuple(
    name
    for variant in _VARIANTS
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    for end in (".safetensors", ".bin")
    for name in dict.fromkeys((f"{stem}{variant}{end}", f"{stem}{variant}{end}.index.json", f"{stem}{end}.index{variant}.json"))
)
_INDEX = re.compile(r"\.index(\.[A-Za-z0-9_]+)?\.json$")
_POINTER = b"version https://git-lfs"
_CACHED = "models--"


def is_index(path: epath.Path) -> bool:
    """Whether a file is called like the index of a sharded set."""
    return bool(_INDEX.search(path.name))


def pointer_size(head: bytes) -> int | None:
    """Bytes that a git-lfs pointer stands for, from the file's first bytes; None if it is none."""
    if not head.startswith(_POINTER):
        return None
    found = re.search(rb"^size (\d+)", head, re.MULTILINE)
    return int(found[1]) if found else 0


def refuse_pointer(path: epath.Path, head: bytes) -> None:
    """Raises KeySyncError for a git-lfs pointer."""
    size = pointer_size(head)
    if size is not None:
        stands = f" of {size:,} bytes" if size else ""
        raise KeySyncError(
            f"{path}: this is the git-lfs pointer, not the file: a few lines of text that stand for one{stands}; "
            "run git lfs pull in its repository, or download the file itself"
        )


def is_pointer(path: epath.Path) -> bool:
    with path.open("rb") as file:
        return pointer_size(file.read(200)) is not None


def weights_in(folder: epath.Path) -> epath.Path:
    """The file that holds a folder's weights. A pointer is passed over where a good file lies beside it.

    Raises:
      KeySyncError: none, or several that no rule chooses among.
    """
    named = [folder / name for name in WEIGHT_NAMES if (folder / name).is_file()]
    if good := next((path for path in named if not is_pointer(path)), None):
        return good
    files = sorted(p for p in folder.iterdir() if p.is_file() and (p.suffix in _SUFFIXES or is_index(p)))
    indexes = [path for path in files if is_index(path) and not is_pointer(path)]
    if len(indexes) == 1:
        return indexes[0]
    candidates = [path for path in files if not is_index(path) and not is_pointer(path)] or named or files
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        if is_pointer(candidates[0]):
            return candidates[0]  # which is then refused as what it is
        names = ", ".join(p.name for p in candidates[:6])
        raise KeySyncError(f"{folder} holds {len(candidates)} weight files ({names}); name the one you mean")
    raise KeySyncError(f"{folder} holds no weights (looked for {', '.join(WEIGHT_NAMES[:4])} and the like)")


def snapshot(path: epath.Path) -> epath.Path:
    """The files of a Hugging Face cache that is given by its top (`hub/`) or by a repository's (`models--owner--name/`); else `path`.

    Raises:
      KeySyncError: a cache of several repositories, or one whose download never ended.
    """
    if not path.is_dir():
        return path
    if (path / "hub").is_dir() and _repositories(path / "hub"):
        path = path / "hub"
    if not path.name.startswith(_CACHED) and (repositories := _repositories(path)):
        if len(repositories) > 1:
            names = ", ".join(p.name.removeprefix(_CACHED).replace("--", "/") for p in repositories[:8])
            raise KeySyncError(f"{path} is a Hugging Face cache with {len(repositories)} repositories ({names}); name one of its folders")
        path = repositories[0]
    if not ((path / "refs").is_dir() or (path / "blobs").is_dir()) or not (path / "snapshots").is_dir():
        return path
    held = sorted(p for p in (path / "snapshots").iterdir() if p.is_dir())
    main = path / "refs" / "main"
    if main.is_file() and (chosen := path / "snapshots" / main.read_text().strip()).is_dir():
        return chosen
    if len(held) == 1:
        return held[0]
    if not held:
        raise KeySyncError(f"{path} is a Hugging Face cache without a finished download; download it again")
    names = ", ".join(p.name[:12] for p in held[:6])
    raise KeySyncError(f"{path} is a Hugging Face cache with {len(held)} snapshots ({names}) and no refs/main; name a folder of snapshots/")


def _repositories(path: epath.Path) -> list[epath.Path]:
    return sorted(p for p in path.iterdir() if p.name.startswith(_CACHED) and (p / "snapshots").is_dir())


def deepspeed_states(folder: epath.Path) -> Sequence[epath.Path]:
    """The model states that DeepSpeed left in a folder, which it may name by `latest` or hold itself; [] for any other folder."""
    latest = folder / "latest"
    places = [folder / latest.read_text().strip()] if latest.is_file() and latest.stat().length < 300 else []
    for place in (*places, folder, folder / "checkpoint"):
        if place.is_dir() and (found := sorted(place.glob("*mp_rank_*_model_states.pt"))):
            return found
    return []
