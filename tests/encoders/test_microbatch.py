import numpy as np

from keysync_jax.encoders.microbatch import Microbatcher
from keysync_jax.parallel.mesh import data_mesh


def _double(params, settings, rows):
    return {"y": rows["x"] * params["w"] + settings}


def test_order_and_tail():
    batcher = Microbatcher(_double, {"w": np.float32(2)}, data_mesh(), size=3)
    items = [{"x": np.full((2,), i, np.float32)} for i in range(7)]
    out = [r["y"] for r in batcher(items, np.float32(0.5))]
    assert len(out) == 7
    np.testing.assert_array_equal(np.stack(out), np.stack([i["x"] * 2 + 0.5 for i in items]))


def test_no_items():
    assert list(Microbatcher(_double, {"w": np.float32(2)}, data_mesh())([], np.float32(0))) == []


def test_reads_no_further_than_two_groups():
    taken = []

    def source():
        for i in range(100):
            taken.append(i)
            yield {"x": np.zeros(2, np.float32)}

    results = iter(Microbatcher(_double, {"w": np.float32(1)}, data_mesh(), size=2)(source(), np.float32(0)))
    next(results)
    assert len(taken) <= 2 * 2 * data_mesh().devices.size
