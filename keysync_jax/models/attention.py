"""One attention for every network, on every backend.

Long sequences run a fused kernel that never writes the S x S matrix: cuDNN's flash attention on NVIDIA, splash attention on TPU.
Short ones, float32 and other backends run plain XLA. Each kernel fails somewhere (driver, head size, shape), so the first use of a
(backend, shape) compiles it once on its own and falls back to XLA, saying why, when that fails.

`KEYSYNC_ATTENTION={auto,xla,cudnn,splash}` decides where the caller says "auto".
"""

from __future__ import annotations

import functools
import logging
import os
from typing import cast

import jax
import jax.numpy as jnp

from keysync_jax.config import ATTENTION
from keysync_jax.core.errors import UsageError, in_one_line

Array = jax.Array

ENVIRONMENT_VARIABLE = "KEYSYNC_ATTENTION"

# Below these numbers of keys the whole matrix of logits is small and XLA's fused softmax is as good.
MIN_KEYS = {"cudnn": 256, "splash": 512}
_KERNEL_TYPES = {"cudnn": (jnp.bfloat16, jnp.float16), "splash": (jnp.bfloat16,)}
# Logits of the XLA path beyond this are computed for some queries at a time, so that a CPU or an old GPU needs no S x S matrix.
MAX_LOGITS_BYTES = 256 * 2**20
# Only long sequences are split: with few keys the logits are no larger than the queries themselves.
MIN_KEYS_TO_CHUNK = 256
_LANES = 128  # TPU vector registers; splash blocks are multiples of it

# What a kernel that does not exist here, or does not take this shape, raises while it is traced, lowered or compiled.
_PROBE_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ImportError)

log = logging.getLogger(__name__)


def attention(q: Array, k: Array, v: Array, implementation: str = "auto", platform: str | None = None) -> Array:
    """Softmax attention, scaled by 1 / sqrt(D), with logits and softmax in float32.

    Args:
      q: queries `[B, L, N, D]` (N heads of size D).
      k: keys `[B, S, N, D]`.
      v: values `[B, S, N, D]`.
      implementation: "auto", "xla", or the kernel to use wherever it takes the shape ("cudnn", "splash"; without a probe).
      platform: backend to choose for ("cpu", "gpu", "tpu"); None is the one JAX runs on. Give it, or name the kernel, when
        compiling for devices that are not here.

    Returns:
      `[B, L, N, D]`, in the type of `q`.

    Raises:
      UsageError: an unknown implementation, here or in `KEYSYNC_ATTENTION`.
    """
    chosen = select(q.shape, k.shape[1], q.dtype, implementation, platform)
    return _KERNELS[chosen](q, k, v)


def select(
    q_shape: tuple[int, ...], num_keys: int, dtype: jax.typing.DTypeLike, implementation: str = "auto", platform: str | None = None
) -> str:
    """Which of "xla", "cudnn" and "splash" `attention` runs for queries `[B, L, N, D]` and this many keys. See there."""
    requested = implementation if implementation != "auto" else os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if requested not in ATTENTION:
        known = ", ".join(ATTENTION)
        raise UsageError(f"attention {requested!r} is unknown; choose one of {known} (argument or {ENVIRONMENT_VARIABLE})")
    backend = jax.default_backend()
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform or backend, platform or backend)
    wanted = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla") if requested == "auto" else requested
    _, length, heads, head_dim = q_shape
    shape = f"{length} queries x {num_keys} keys, {heads} heads of {head_dim}, {jnp.dtype(dtype).name}"
    if wanted == "xla":
        _note(f"attention on {platform} for {shape}: xla")
        return "xla"
    reason = _unsuitable(wanted, length, num_keys, head_dim, jnp.dtype(dtype))
    if not reason and requested == "auto" and platform == backend:
        reason = _probe(wanted, length, num_keys, heads, head_dim, jnp.dtype(dtype).name)
        if reason:
            _warn(f"attention on {platform} for {shape}: {wanted} does not compile ({reason}); using xla")
    _note(f"attention on {platform} for {shape}: " + (f"xla ({wanted}: {reason})" if reason else wanted))
    return "xla" if reason else wanted


@functools.cache
def _note(message: str) -> None:
    """Logs a choice the first time it is made."""
    log.info(message)


@functools.cache
def _warn(message: str) -> None:
    log.warning(message)


def _unsuitable(kernel: str, length: int, num_keys: int, head_dim: int, dtype: jnp.dtype) -> str:
    """Why a kernel is not for this shape, "" if it is."""
    if num_keys < MIN_KEYS[kernel] or length < MIN_KEYS[kernel]:
        return "short sequence"
    if dtype not in _KERNEL_TYPES[kernel]:
        return f"not for {dtype.name}"  # float32 is asked for where precision matters, which these kernels do not promise
    if kernel == "cudnn":
        if head_dim > 128 or head_dim % 8:
            return "head size above 128 or not a multiple of 8"
    elif length % _LANES or num_keys % _LANES:
        return f"sequence not a multiple of {_LANES}"
    elif head_dim > 256:
        return "head size above 256"
    return ""


@functools.cache
def _probe(kernel: str, length: int, num_keys: int, heads: int, head_dim: int, dtype: str) -> str:
    """Compiles a kernel, forward and backward, for one shape on the present backend. Returns why it fails, "" if it does not."""

    def loss(q, k, v):
        return _KERNELS[kernel](q, k, v).astype(jnp.float32).sum()

    q, kv = (jax.ShapeDtypeStruct((1, n, heads, head_dim), dtype) for n in (length, num_keys))
    try:
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv).compile()
    except _PROBE_ERRORS as error:
        return in_one_line(error, 200)
    return ""


def _xla(q: Array, k: Array, v: Array) -> Array:
    b, length, heads, _ = q.shape
    num_keys = k.shape[1]
    bytes_per_query = 4 * b * heads * num_keys
    if num_keys < MIN_KEYS_TO_CHUNK or bytes_per_query * length <= MAX_LOGITS_BYTES:
        return jax.nn.dot_product_attention(q, k, v, implementation="xla")
    return _chunked(q, k, v, max(1, MAX_LOGITS_BYTES // bytes_per_query))


def _chunked(q: Array, k: Array, v: Array, chunk: int) -> Array:
    """Plain attention for `chunk` queries at a time; each query's softmax is its own, so the result is the same.

    Queries are split, not the batch, so that a batch sharded over devices stays so; recomputed in the backward pass, which would
    otherwise keep the logits of all chunks.
    """
    b, length, heads, head_dim = q.shape
    padded = jnp.pad(q, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    blocks = padded.reshape(b, -1, chunk, heads, head_dim).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(lambda block: jax.nn.dot_product_attention(block, k, v, implementation="xla")), blocks)
    return out.swapaxes(0, 1).reshape(padded.shape)[:, :length]


def _cudnn(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def _splash(q: Array, k: Array, v: Array) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _splash_local(q, k, v)
    # The partitioner cannot split a Pallas kernel: run it per device on its share of the batch and the heads.
    rows, used = q.shape[0], []
    for name in ("data", "fsdp"):
        if name in mesh.shape and rows % mesh.shape[name] == 0:
            rows //= mesh.shape[name]
            used.append(name)
    tensor = "tensor" if "tensor" in mesh.shape and q.shape[2] % mesh.shape["tensor"] == 0 else None
    spec = jax.sharding.PartitionSpec(tuple(used), None, tensor, None)
    return jax.shard_map(_splash_local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


def _splash_local(q: Array, k: Array, v: Array) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, head_dim = q.shape
    num_keys = k.shape[1]
    block_q, block_kv = (next(size for size in (512, 256, 128) if n % size == 0) for n in (length, num_keys))
    sizes = kernels.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    mask = masks.MultiHeadMask([masks.FullMask((length, num_keys))] * heads)
    kernel = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    scaled = q * (head_dim**-0.5)  # a power of two for the U-Net's 64, so bfloat16 loses nothing
    out = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled.astype(q.dtype), k, v)))
    return cast(jax.Array, out).swapaxes(1, 2).astype(q.dtype)


_KERNELS = {"xla": _xla, "cudnn": _cudnn, "splash": _splash}
