"""`configs/*.py` by name or path, with overrides from the command line."""

from __future__ import annotations

import ast
import contextlib
import importlib.resources
import importlib.util
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import read_object
from keysync_jax.training.config import with_defaults

_CONFIGS = "keysync_jax.configs"
# Names under which recipes written for version 0.1.0 import: the shipped recipes, and our errors.
_FORMER_NAMES = {"configs": _CONFIGS, "keysync_jax.errors": "keysync_jax.core.errors"}


def names() -> list[str]:
    """Recipes that ship with the package."""
    files = importlib.resources.files(_CONFIGS).iterdir()
    return sorted(f.name.removesuffix(".py") for f in files if f.name.endswith(".py") and not f.name.startswith("_"))


def presets(name: str) -> tuple[str, ...]:
    """The presets of a shipped recipe, its default first; () if it has none."""
    return tuple(getattr(_module(importlib.resources.files(_CONFIGS) / f"{name}.py"), "PRESETS", ()))


def load(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The recipe `name` (shipped) or the file it points to, with `--config.x.y=value` overrides applied and then locked.

    Args:
      name: a shipped recipe, a .py file that defines `get_config()`, or the `config.json` that a run left in its workdir. A recipe that
        lists `PRESETS` is also called `name:preset`, which hands the preset to its `get_config`.
      overrides: `--config.KEY=VALUE`. A list is written `a,b` (one value is a list of one), true and false in either case; what comes later
        prevails.

    Raises:
      UsageError: no such recipe or preset; an override that names no existing key or has the wrong type.
      KeySyncError: the file defines no `get_config()`, or cannot be read.
    """
    base, _, preset = name.rpartition(":") if ":" in name and not Path(name).is_file() else (name, "", "")
    if base in names():
        config = _from_python(importlib.resources.files(_CONFIGS) / f"{base}.py", preset)
    elif name.endswith(".json") and Path(name).is_file():
        config = _from_json(Path(name))
    elif Path(base).is_file():
        config = _from_python(Path(base), preset)
    else:
        raise UsageError(f"no recipe {name!r}; shipped ones are {', '.join(names())}, or give the path of a .py or config.json file")
    for override in overrides:
        _apply(config, override)
    config.lock()
    return config


def _from_python(path: Any, preset: str = "") -> ConfigDict:
    module = _module(path)
    known = getattr(module, "PRESETS", ())
    if preset and preset not in known:
        raise UsageError(f"{path} has no preset {preset!r}; it has {', '.join(known) or 'none'}")
    try:
        with _former_names():
            config = module.get_config(preset) if preset else module.get_config()
    except Exception as error:  # as in `_module`
        raise _failed(path, error) from error
    if not isinstance(config, ConfigDict):
        raise KeySyncError(f"{path}: get_config() returns {type(config).__name__}; it must return an ml_collections.ConfigDict")
    return config


def _failed(path: Any, error: Exception) -> KeySyncError:
    if isinstance(error, KeySyncError):
        return error
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f", line {lines[-1]}" if lines else ""
    return KeySyncError(f"{path}{where}: {type(error).__name__}: {error}")


def _module(path: Any) -> Any:
    spec = importlib.util.spec_from_file_location(f"keysync_recipe_{Path(str(path)).stem}", str(path))
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no recipe; give a .py or config.json file")
    module = importlib.util.module_from_spec(spec)
    try:
        with _former_names():
            spec.loader.exec_module(module)
    except SyntaxError as error:
        raise KeySyncError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # a recipe is a program: whatever it raises is its own mistake
        raise _failed(path, error) from error
    if not hasattr(module, "get_config"):
        raise KeySyncError(f"{path} defines no get_config(); see the shipped recipes for the form")
    return module


@contextlib.contextmanager
def _former_names() -> Iterator[None]:
    """While a recipe runs, `from configs import ...` means the shipped recipes, as it did when they were installed under that name."""
    before = _known_by_former_names()
    sys.modules.update({old: importlib.import_module(new) for old, new in _FORMER_NAMES.items()})
    try:
        yield
    finally:
        for name in _known_by_former_names():
            del sys.modules[name]
        sys.modules.update(before)


def _known_by_former_names() -> dict[str, ModuleType]:
    inside = tuple(f"{name}." for name in _FORMER_NAMES)
    return {name: module for name, module in sys.modules.items() if name in _FORMER_NAMES or name.startswith(inside)}


def _from_json(path: Path) -> ConfigDict:
    values = read_object(path, "name a recipe, or the config.json of a run")
    return ConfigDict(with_defaults(values))  # keys that an older version did not write can be set too


def _apply(config: ConfigDict, override: str) -> None:
    key, separator, text = override.removeprefix("--config.").partition("=")
    if not separator:
        raise UsageError(f"override {override!r} has no value; write --config.{key}=VALUE")
    *parents, leaf = key.split(".")
    parent: Any = config
    for name in (*parents, leaf):
        if not isinstance(parent, ConfigDict) or name not in parent:
            known = f"; there are {', '.join(parent)}" if isinstance(parent, ConfigDict) else ""
            raise UsageError(f"config has no key {key!r}{known}")
        parent, owner = parent[name], parent
    current: Any = owner[leaf]
    value = _parse(text, current)
    if isinstance(current, ConfigDict) and (current or not isinstance(value, dict)):
        keys = ", ".join(f"{key}.{name}" for name in current) or "a mapping such as {'quality': 0.5}"
        raise UsageError(f"config key {key!r} is a section; set one of {keys}")
    try:
        owner[leaf] = ConfigDict(value) if isinstance(value, dict) else value
    except (TypeError, ValueError):
        raise UsageError(f"config key {key!r} is {current!r}; {text!r} is no {type(current).__name__}") from None


def _parse(text: str, current: Any) -> Any:
    """`text` as a value of the type that the key has now."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # a bare word is a string
    if isinstance(current, list | tuple):
        if isinstance(value, list | tuple):
            values = list(value)
        elif isinstance(value, str):
            values = [_literal(part.strip()) for part in value.split(",") if part.strip()]
        else:
            values = [value]
        return type(current)(values)
    if isinstance(current, str):
        return value if isinstance(value, str) else text
    if isinstance(current, bool) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if isinstance(current, int) and not isinstance(current, bool) and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e5 steps
    return value


def _literal(text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, int | float | str) else text
