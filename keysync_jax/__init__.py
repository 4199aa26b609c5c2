"""KeySync lip-sync in JAX: dub a video with a new voice track."""

from typing import TYPE_CHECKING

from keysync_jax.core import checkout
from keysync_jax.core.version import __version__

if TYPE_CHECKING:
    from keysync_jax.inference.pipeline import KeySyncPipeline

__all__ = ["KeySyncPipeline", "__version__"]

checkout.find_folders_beside_the_package()


def __getattr__(name: str):
    # Imported on first use: `import keysync_jax` itself stays free of JAX.
    if name == "KeySyncPipeline":
        from keysync_jax.inference.pipeline import KeySyncPipeline

        return KeySyncPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
