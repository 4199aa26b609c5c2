"""Which implementation runs where, and that they compute the same."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close

from keysync_jax.core.errors import UsageError
from keysync_jax.models import attention as module
from keysync_jax.models.attention import attention, select


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    for cached in (module._probe, module._note, module._warn):
        cached.cache_clear()


def draw(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def plain(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("blnd,bsnd->bnls", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnls,bsnd->blnd", weights / weights.sum(-1, keepdims=True), v)


def test_xla_and_chunked_are_plain_softmax_attention(monkeypatch):
    q, k, v = draw(2, 70, 3, 8), draw(2, 300, 3, 8, seed=1), draw(2, 300, 3, 8, seed=2)
    expected = plain(q, k, v)
    # Softmax, and a weighted mean of values of size `v`; the weights are positive, so the mean never cancels below them.
    scale, unscaled = float(jnp.abs(v).max()), plain(q * np.sqrt(8), k, v)
    close(attention(q, k, v), expected, 8, scale=scale, wrong=unscaled)
    close(module._chunked(q, k, v, 16), expected, 8, scale=scale, wrong=unscaled)
    monkeypatch.setattr(module, "MAX_LOGITS_BYTES", 100_000)
    sizes = []
    monkeypatch.setattr(module, "_chunked", lambda q, k, v, chunk: sizes.append(chunk) or q)
    attention(q, k, v)
    attention(q, k[:, :20], v[:, :20])  # few keys: never split
    assert sizes == [100_000 // (4 * 2 * 3 * 300)]


def test_chunked_gradient_keeps_no_logits():
    q = draw(1, 384, 1, 4)

    def residual_bytes(function):
        _, vjp = jax.vjp(lambda q: function(q, q, q), q)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))

    assert residual_bytes(module._xla) > 4 * 384 * 384
    assert residual_bytes(lambda q, k, v: module._chunked(q, k, v, 64)) < 384 * 384
    whole = jax.grad(lambda q: (module._xla(q, q, q) ** 2).sum())(q)
    parts = jax.grad(lambda q: (module._chunked(q, q, q, 100) ** 2).sum())(q)
    # Each is a sum over 384 queries, and in chunks the sum of sums. A chunk left out would change it by some per cent.
    without_first = jax.grad(lambda q: (module._chunked(q, q, q, 100)[:, 100:] ** 2).sum())(q)
    close(parts, whole, 2, terms=384, wrong=without_first)


def test_splash_agrees(monkeypatch):
    """The TPU kernel in Pallas' interpreter: scale, layout and block sizes."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    monkeypatch.setattr(kernels, "make_splash_mha", functools.partial(kernels.make_splash_mha, interpret=True))
    q, k, v = draw(1, 256, 1, 64), draw(1, 128, 1, 64, seed=1), draw(1, 128, 1, 64, seed=2)
    close(module._splash(q, k, v), plain(q, k, v), 8, scale=float(jnp.abs(v).max()), wrong=plain(8 * q, k, v))


LONG = ((28, 4096, 5, 64), 4096)


@pytest.mark.parametrize(
    ("platform", "shape", "keys", "dtype", "expected"),
    [
        ("cpu", *LONG, jnp.bfloat16, "xla"),
        ("gpu", *LONG, jnp.bfloat16, "cudnn"),
        ("cuda", *LONG, jnp.float16, "cudnn"),
        ("gpu", *LONG, jnp.float32, "xla"),
        ("gpu", (28, 64, 20, 64), 64, jnp.bfloat16, "xla"),
        ("gpu", (2, 57344, 5, 64), 14, jnp.bfloat16, "xla"),
        ("gpu", (14, 4096, 1, 512), 4096, jnp.bfloat16, "xla"),
        ("tpu", *LONG, jnp.bfloat16, "splash"),
        ("tpu", *LONG, jnp.float32, "xla"),
        ("tpu", (28, 256, 20, 64), 256, jnp.bfloat16, "xla"),
        ("tpu", (28, 1600, 10, 64), 1600, jnp.bfloat16, "xla"),
        ("tpu", (14, 4096, 1, 512), 4096, jnp.bfloat16, "xla"),
    ],
)
def test_choice_for_a_platform_that_is_not_here(platform, shape, keys, dtype, expected):
    assert select(shape, keys, dtype, "auto", platform) == expected


def test_choice_can_be_overridden(monkeypatch):
    assert select(*LONG, jnp.bfloat16, "splash") == "splash"
    assert select((28, 64, 20, 64), 64, jnp.bfloat16, "splash") == "xla"  # where the kernel takes the shape
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "cudnn")
    assert select(*LONG, jnp.bfloat16) == "cudnn"
    assert select(*LONG, jnp.bfloat16, "xla") == "xla"  # the argument wins
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "flash")
    with pytest.raises(UsageError, match="flash.*auto, xla, cudnn, splash"):
        select(*LONG, jnp.bfloat16)


def test_failing_kernel_falls_back_with_the_reason(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger=module.__name__)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    calls = []

    def broken(q, k, v):
        calls.append(q.shape)
        raise RuntimeError("cuDNN is not here")

    monkeypatch.setitem(module._KERNELS, "cudnn", broken)
    for _ in range(3):
        assert select(*LONG, jnp.bfloat16) == "xla"
    assert calls == [(1, 4096, 5, 64)]  # probed once
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "RuntimeError: cuDNN is not here" in warnings[0]
    monkeypatch.setitem(module._KERNELS, "cudnn", module._xla)
    assert select((28, 512, 5, 64), 512, jnp.bfloat16) == "cudnn"  # another shape: probed, compiles
    assert sum("1 queries" not in r.message and "cudnn" in r.message for r in caplog.records if r.levelno == logging.INFO) == 2


def test_a_bug_in_a_kernel_is_not_hidden(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(module._KERNELS, "cudnn", lambda q, k, v: q.no_such_attribute)
    with pytest.raises(AttributeError):
        select((28, 1024, 5, 64), 1024, jnp.bfloat16)
