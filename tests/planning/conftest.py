"""Programs of these tests are compiled in a hurry: that is what takes their time, and their networks are too small to run longer for it."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def compiled_in_a_hurry():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
