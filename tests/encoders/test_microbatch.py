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


def test_items_of_another_structure_get_a_batch_and_a_program_of_their_own():
    programs = []

    def scaled(params, settings, rows):
        programs.append(sorted(rows))
        return rows["x"] * params["w"] + rows.get("bias", 0)

    batcher = Microbatcher(scaled, {"w": np.float32(2)}, data_mesh(), size=4)
    items = [{"x": np.float32(i)} | ({"bias": np.float32(0.5)} if i in (2, 3) else {}) for i in range(6)]
    assert [float(y) for y in batcher(items)] == [0, 2, 4.5, 6.5, 8, 10]
    assert batcher.calls == 3 and programs == [["x"], ["bias", "x"]]  # traced once each, though one comes back


def test_parameters_are_read_with_the_first_item_and_once():
    read = []

    def params():
        read.append(1)
        return {"w": np.float32(3)}

    batcher = Microbatcher(_double, params, data_mesh())
    assert list(batcher([], np.float32(0))) == [] and not read
    for _ in range(2):
        (result,) = batcher([{"x": np.ones(2, np.float32)}], np.float32(0))
    assert read == [1] and (result["y"] == 3).all()
