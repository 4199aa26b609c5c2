"""Process-wide settings of a command: the compile cache."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_compile_cache() -> None:
    """Keep compiled programs between runs, so that a second dub starts at once.

    The folder is `$JAX_COMPILATION_CACHE_DIR` if set (JAX reads it itself), else `~/.cache/keysync_jax/xla`. Every program is kept, however
    quickly it compiled: a dub has many small ones.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "keysync_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
