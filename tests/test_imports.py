"""A worker imports neither torch nor tensorflow, and the media room knows no JAX."""

import subprocess
import sys

_WALK = """
import importlib, pkgutil, sys
names = []
for root in ({roots}):
    package = importlib.import_module(root)
    names += [root] + [m.name for m in pkgutil.walk_packages(package.__path__, root + ".")]
for name in names:
    importlib.import_module(name)
loaded = sorted(m for m in ({banned}) if m in sys.modules)
assert not loaded, loaded
assert len(names) > {at_least}, names
"""


def _import_all(roots, banned, at_least):
    code = _WALK.format(roots="".join(f"{r!r}," for r in roots), banned="".join(f"{b!r}," for b in banned), at_least=at_least)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_torch_and_no_tensorflow_anywhere():
    _import_all(
        ("keysync_jax", "keysync_jax.converters", "keysync_jax.data_pipeline", "keysync_jax.configs"),
        ("torch", "tensorflow", "transformers", "diffusers"),
        40,
    )


def test_media_knows_no_jax():
    _import_all(("keysync_jax.media",), ("jax", "flax", "torch"), 8)
