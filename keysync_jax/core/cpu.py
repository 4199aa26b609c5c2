"""Settings of XLA and of the C library without which the networks run at little over half their speed on a CPU.

Measured on one AVX2 core, the training step of `configs/demo_keyframe.py` with two windows in float32 (jax 0.10.2): 1.17 windows/s as
installed, 2.04 with both settings (docs/training.md).

* XLA hands convolutions and matrix products to its YNN kernels, which need 1.2 times as long as the Eigen kernels for a convolution and
  3.7 times for the gradient of its weights. For sums they are the faster ones, so they keep those. jax 0.11.2 and 0.12.0 are as 0.10.2
  there: gradient of the weights of a 3x3 convolution (4 x 32 x 32 pixels, 128 channels) 52 ms as installed, 34 with the flag.
* glibc gives the working memory of every step back to the kernel, which clears it page by page for the next one.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os

_YNN = "xla_cpu_experimental_ynn_fusion_type"
# XLA ends the process over a flag that it does not know, and what a flag does was measured with these versions.
_YNN_VERSIONS = ("0.10.", "0.11.", "0.12.")
_ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm60_plugin", "jax_rocm7_plugin", "libtpu")

# mallopt's parameters, from glibc's malloc.h: one pool for all threads, since only that one can grow beyond 64 MiB; blocks of up to 2 GiB
# from it; and it is not given back.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
_LARGEST = 2**31 - 1
_MALLOC = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, 64 << 20))


def prepare() -> bool:
    """Makes the settings for this process and (XLA's) for those it starts, before JAX is used and before there are other threads.

    What the user has set in `XLA_FLAGS` prevails. With an accelerator's plugin installed nothing is done: there the host only reads
    data, in many threads that would wait for each other in one pool.

    Returns:
      Whether this process computes on a CPU, and the settings were made.
    """
    if os.environ.get("JAX_PLATFORMS", "") != "cpu" and any(importlib.util.find_spec(name) for name in _ACCELERATORS):
        return False
    flags = os.environ.get("XLA_FLAGS", "")
    if _YNN not in flags and importlib.metadata.version("jaxlib").startswith(_YNN_VERSIONS):
        os.environ["XLA_FLAGS"] = f"{flags} --{_YNN}=LIBRARY_FUSION_TYPE_REDUCE".strip()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # not on macOS
        for parameter, value in _MALLOC:
            mallopt(parameter, value)
    return True
