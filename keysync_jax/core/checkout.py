"""Where `keysync_jax.configs`, `.converters` and `.data_pipeline` lie in a checkout.

They are installed inside the package, so that no folder of a general name lands in anybody's site-packages. In the repository they
stand beside it, at the top level. There, this finder leads Python to them, and to nothing else that lies beside the package.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

FOLDERS = ("configs", "converters", "data_pipeline")

_PACKAGE = Path(__file__).resolve().parents[1]


class _Beside(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE.name or name not in FOLDERS:
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [str(_PACKAGE.parent)], target)


def find_folders_beside_the_package() -> None:
    """Make the three folders importable in a checkout; an installed package holds them itself, and nothing is done."""
    if not all((_PACKAGE / name).is_dir() for name in FOLDERS):
        sys.meta_path.append(_Beside())
