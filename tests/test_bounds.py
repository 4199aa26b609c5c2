"""The bounds themselves: rounding passes, the smallest mistake does not."""

import numpy as np
import pytest
from bounds import approx, close, eps, spread


def test_rounding_passes_and_a_mistake_does_not():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(10_000)
    exact, rounded = values.sum(), values.astype(np.float32).sum()
    close(rounded, exact, 1, scale=np.abs(values).max(), terms=values.size)
    with pytest.raises(AssertionError, match="sum"):
        close(values[:-1].sum(), exact, 1, scale=1, terms=values.size, err_msg="sum")
    product = rng.standard_normal((32, 32)).astype(np.float32)
    low = product.astype(np.float16).astype(np.float32) @ product
    with pytest.raises(AssertionError):  # half precision, as of TF32
        close(low, product @ product, 8, terms=32)


def test_a_bound_that_would_let_a_mistake_pass_fails():
    close(1.0, 1.0, 4, wrong=[1.001, np.array([2.0])])
    with pytest.raises(AssertionError, match="a mistake misses the bound"):
        close(1.0, 1.0, 4, wrong=1 + 8 * eps())


def test_shapes_and_values_that_are_not_finite():
    with pytest.raises(AssertionError):
        close(np.zeros(3), np.zeros((2, 3)), 4)
    with pytest.raises(AssertionError):
        close([1.0, np.nan], [1.0, 2.0], 4)
    close([np.inf, np.nan], [np.inf, np.nan], 4)
    with pytest.raises(AssertionError):
        close(1e-30, 0.0, 4)  # what is nothing has no size: say what cancelled
    close(1e-8, 0.0, 4, scale=1)


def test_each_value_has_its_own_size_where_asked():
    close([1000, 1.0], [1000, 1.0 + 1e-5], 4)
    with pytest.raises(AssertionError):
        close([1000, 1.0], [1000, 1.0 + 1e-5], 4, scale="each")
    close([1000, 1.0], [1000, 1.0 + 1e-5], 4, scale=[1000, 100])


def test_scalars_and_precisions():
    assert 0.1 + 0.2 == approx(0.3) and not 0.3 * (1 + 1e-14) == approx(0.3)
    assert float(np.float32(0.1)) == approx(0.1, 1, dtype=np.float32)
    assert 1e-17 == approx(0, scale=1) and not 1e-17 == approx(0)
    assert (eps(np.float64), eps(), eps(np.float16), eps("bfloat16")) == (2**-52, 2**-23, 2**-10, 2**-7)
    assert spread(1, 10_000) == approx(0.04)
