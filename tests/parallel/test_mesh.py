import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from keysync_jax.core.errors import KeySyncError
from keysync_jax.parallel import mesh as meshes
from keysync_jax.parallel.mesh import MeshConfig
from keysync_jax.parallel.sharding import data_share


def devices(count, slices=1, hosts=1, platform="tpu"):
    """Devices as `mesh_utils` sees them: a line of chips within each slice."""
    each = count // slices
    return [
        types.SimpleNamespace(
            id=i, platform=platform, device_kind="some chip", slice_index=i // each, process_index=i * hosts // count, core_on_chip=0,
            coords=(i % each, 0, 0),
        )
        for i in range(count)
    ]  # fmt: skip


def test_axes_are_auto():
    """Explicit axes, the default of `jax.make_mesh`, break linen convolutions."""
    mesh = meshes.train_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes, count, shape", [((-1, 1, 1), 8, (8, 1, 1)), ((1, -1, 2), 8, (1, 4, 2)), ((2, 2, 2), 8, (2, 2, 2))])
def test_sizes(sizes, count, shape):
    assert meshes.mesh_shape(sizes, count) == shape


@pytest.mark.parametrize("sizes, count", [((-1, 3, 1), 8), ((2, 2, 1), 8), ((16, 1, 1), 8), ((-1, 16, 1), 8)])
def test_devices_that_do_not_divide(sizes, count):
    with pytest.raises(KeySyncError, match=rf"mesh data {sizes[0]} x fsdp {sizes[1]} x tensor 1 .* {count} devices"):
        meshes.mesh_shape(sizes, count)


def test_batch_that_does_not_divide():
    mesh = AbstractMesh((2, 4, 1), meshes.AXES)
    meshes.check_batch(mesh, 16, 2)
    with pytest.raises(KeySyncError, match=r"mesh data 2 x fsdp 4: data.batch_size 12 .* 8 devices"):
        meshes.check_batch(mesh, 12)
    with pytest.raises(KeySyncError, match=r"microbatch .*16 / 4 = 4.* 8 devices.*multiple of 32"):
        meshes.check_batch(mesh, 16, 4)
    meshes.check_batch(AbstractMesh((2, 1, 4), meshes.AXES), 2)  # `tensor` does not share the batch


def test_slices_lie_along_data():
    array = meshes.device_array(MeshConfig(data=4, fsdp=2, slices=2), devices(8, slices=2))
    assert array.shape == (4, 2, 1)
    assert [[d.slice_index for d in row] for row in array[:, :, 0]] == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_hosts_are_the_slices_of_gpus():
    array = meshes.device_array(MeshConfig(data=2, fsdp=4, slices=2), devices(8, hosts=2, platform="gpu"))
    assert [{d.process_index for d in row} for row in array[:, :, 0]] == [{0}, {1}]


def test_slices_that_do_not_fit():
    with pytest.raises(KeySyncError, match="mesh.slices is 2 but the 8 devices lie in 1 slices"):
        meshes.device_array(MeshConfig(data=4, fsdp=2, slices=2), devices(8))
    with pytest.raises(KeySyncError, match="data 1 is not a multiple of mesh.slices 2"):
        meshes.device_array(MeshConfig(data=1, fsdp=8, slices=2), devices(8, slices=2))


def share(shape, hosts, here, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: here)
    array = np.array(devices(8, hosts=hosts), object).reshape(shape)
    return data_share(types.SimpleNamespace(devices=array, shape=dict(zip(meshes.AXES, shape, strict=True))))


def test_hosts_read_different_samples(monkeypatch):
    assert [share((2, 4, 1), 4, i, monkeypatch) for i in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_hosts_of_one_tensor_group_read_the_same_samples(monkeypatch):
    assert [share((2, 1, 4), 4, i, monkeypatch) for i in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_shares_that_overlap(monkeypatch):
    array = np.array(devices(6, hosts=2), object)[[0, 3, 1, 4, 2, 5]].reshape(3, 1, 2)
    array[0, 0, 1] = array[0, 0, 0]  # host 0 alone has row 0, both have the others
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    with pytest.raises(KeySyncError, match="overlap"):
        data_share(types.SimpleNamespace(devices=array, shape={"data": 3, "fsdp": 1, "tensor": 2}))
