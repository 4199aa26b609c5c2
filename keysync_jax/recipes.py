"""`configs/*.py` by name or path, with overrides from the command line."""

from __future__ import annotations

import ast
import importlib.resources
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from keysync_jax.errors import KeySyncError, UsageError


def names() -> list[str]:
    """Recipes that ship with the package."""
    files = importlib.resources.files("configs").iterdir()
    return sorted(f.name.removesuffix(".py") for f in files if f.name.endswith(".py") and not f.name.startswith("_"))


def load(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The recipe `name` (shipped) or the file it points to, with `--config.x.y=value` overrides applied and then locked.

    Raises:
      UsageError: no such recipe; an override that names no existing key or has the wrong type.
      KeySyncError: the file defines no `get_config()`.
    """
    if name in names():
        path = importlib.resources.files("configs") / f"{name}.py"
    else:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no recipe {name!r}; shipped ones are {', '.join(names())}, or give the path of a .py file")
    spec = importlib.util.spec_from_file_location(f"keysync_recipe_{Path(str(path)).stem}", str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise KeySyncError(f"{path} defines no get_config(); see the shipped recipes for the form")
    config = module.get_config()
    for override in overrides:
        _apply(config, override)
    config.lock()
    return config


def _apply(config: ConfigDict, override: str) -> None:
    key, separator, text = override.removeprefix("--config.").partition("=")
    if not separator:
        raise UsageError(f"override {override!r} has no value; write --config.{key}=VALUE")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word is a string
    *parents, leaf = key.split(".")
    parent = config
    for name in (*parents, leaf):
        if not isinstance(parent, ConfigDict) or name not in parent:
            known = f"; there are {', '.join(parent)}" if isinstance(parent, ConfigDict) else ""
            raise UsageError(f"config has no key {key!r}{known}")
        parent, owner = parent[name], parent
    try:
        owner[leaf] = value
    except TypeError as error:
        raise UsageError(f"config key {key!r}: {error}") from None
