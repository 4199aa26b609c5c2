"""A worker imports neither torch nor tensorflow, Windows can import every module, and the media room knows no JAX."""

import subprocess
import sys

_WALK = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(({absent})))
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


def _import_all(roots, banned, at_least, absent=()):
    lists = {"roots": roots, "banned": banned, "absent": absent}
    code = _WALK.format(at_least=at_least, **{key: "".join(f"{name!r}," for name in names) for key, names in lists.items()})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_torch_no_tensorflow_and_nothing_that_only_posix_has():
    _import_all(
        ("keysync_jax", "keysync_jax.converters", "keysync_jax.data_pipeline", "keysync_jax.configs"),
        ("torch", "tensorflow", "transformers", "diffusers"),
        40,
        absent=("fcntl", "resource", "pwd", "grp", "termios"),
    )


def test_media_knows_no_jax():
    _import_all(("keysync_jax.media",), ("jax", "flax", "torch"), 8)
