"""SyncNet v2, the network behind LSE-C and LSE-D (Chung and Zisserman 2016), under the names of `syncnet_v2.model`."""

from __future__ import annotations

import flax.linen as nn
import jax

from keysync_jax.models.metrics.metric_layers import FrozenBatchNorm, max_pool, network_table
from keysync_jax.models.table import Table

SIDE = 224
FRAMES = 5  # of a window of lips, at 25 fps
CEPSTRA = 20  # columns of a window of sound, at 100 a second


class SyncNet(nn.Module):
    """Windows of five frames and of .2 s of sound to features of 1,024 numbers that lie close where lips and sound agree."""

    @nn.compact
    def __call__(self, frames: jax.Array, cepstra: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both features, of `[N, 5, 224, 224, 3]` and `[N, 13, 20, 1]`."""
        return self.lips(frames), self.sound(cepstra)

    @nn.compact
    def lips(self, x: jax.Array) -> jax.Array:
        """`[N, 1024]` of windows `[N, 5, 224, 224, 3]`, BGR, 0 to 255."""
        step = (1, 2, 2)
        x = self._unit(x, "netcnnlip", 0, 96, (5, 7, 7), step)
        x = max_pool(x, (1, 3, 3), step)
        x = self._unit(x, "netcnnlip", 4, 256, (1, 5, 5), step, 1)
        x = max_pool(x, (1, 3, 3), step, (0, 1, 1))
        for number in (8, 11, 14):
            x = self._unit(x, "netcnnlip", number, 256, (1, 3, 3), pad=1)
        x = max_pool(x, (1, 3, 3), step)
        x = self._unit(x, "netcnnlip", 18, 512, (1, 6, 6))
        return self._head(x, "netfclip")

    @nn.compact
    def sound(self, x: jax.Array) -> jax.Array:
        """`[N, 1024]` of cepstra `[N, 13, 20, 1]`."""
        x = self._unit(x, "netcnnaud", 0, 64, (3, 3), pad=1)
        x = self._unit(x, "netcnnaud", 4, 192, (3, 3), pad=1)
        x = max_pool(x, (3, 3), (1, 2))
        for number, features in ((8, 384), (11, 256), (14, 256)):
            x = self._unit(x, "netcnnaud", number, features, (3, 3), pad=1)
        x = max_pool(x, (3, 3), (2, 2))
        x = self._unit(x, "netcnnaud", 18, 512, (5, 4))
        return self._head(x, "netfcaud")

    def _unit(
        self, x, stack: str, number: int, features: int, kernel: tuple[int, ...], strides: int | tuple[int, ...] = 1, pad: int = 0
    ) -> jax.Array:
        """Convolution, batch norm and ReLU; `pad` on both sides of every axis on which the kernel has an extent."""
        padding = [(pad, pad) if k > 1 else (0, 0) for k in kernel]
        x = nn.Conv(features, kernel, strides, padding=padding, name=f"{stack}_{number}")(x)
        return nn.relu(FrozenBatchNorm(name=f"{stack}_{number + 1}")(x))

    def _head(self, x: jax.Array, stack: str) -> jax.Array:
        x = nn.Dense(512, name=f"{stack}_0")(x.reshape(len(x), -1))
        return nn.Dense(1024, name=f"{stack}_3")(nn.relu(FrozenBatchNorm(name=f"{stack}_1")(x)))


def syncnet_table() -> Table:
    return network_table(SyncNet(), (1, FRAMES, SIDE, SIDE, 3), (1, 13, CEPSTRA, 1), numbered=True)
