"""torch.save files are read without torch, and nothing in them can run, reach outside the file or fill the memory."""

import argparse
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest

from keysync_jax.converters import torch_file, torch_write
from keysync_jax.converters.lazy import BFLOAT16, LazyTensor, Tensors, constant
from keysync_jax.core.errors import KeySyncError

DATA = Path(__file__).parent / "data"
BASE = np.arange(24, dtype=np.float32).reshape(4, 6)


def write_archive(path, data_pkl, storages=None, root="archive", compression=zipfile.ZIP_STORED, byteorder=b"little"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", data_pkl)
        if byteorder:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in (storages or {}).items():
            archive.writestr(f"{root}/data/{key}", data)
    return path


def pickled_tensor(numel=6, offset=0, shape=(2, 3), strides=(3, 1), storage="FloatStorage", key="0"):
    """A pickle of {"w": tensor} with any numbers in it, valid or not."""

    def plain(value):
        return pickle.dumps(value, protocol=2)[2:-1].replace(b"q\x00", b"").replace(b"q\x01", b"")

    persistent = b"(" + plain("storage") + b"ctorch\n" + storage.encode() + b"\n" + plain(key) + plain("cpu") + plain(numel) + b"tQ"
    arguments = persistent + plain(offset) + plain(shape) + plain(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}" + plain("w") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tRs."


def test_file_written_by_torch():
    saved = torch_file.load(DATA / "torch_2_13.pt")
    expected = {
        "plain": BASE,
        "transposed": BASE.T,
        "window": BASE[1:3, 2:5],
        "scalar": np.float32(3.5),
        "empty": np.zeros((0, 3), np.float32),
        "half": np.arange(5, dtype=np.float16),
        "brain": np.array([1.5, -2.0, 0.15625], BFLOAT16),
        "double": np.array([0.1]),
        "long": np.arange(4),
        "flag": np.array([True, False]),
        "step": np.arange(10)[1:8:3],
        "expanded": np.full((3, 1), 7, np.float32),
        "parameter": np.ones((2, 2), np.float32),
        "unsigned": np.array([1, 65535], np.uint16),
    }
    assert list(saved["module"]) == list(expected)
    for name, value in expected.items():
        tensor = saved["module"][name]
        assert isinstance(tensor, LazyTensor) and tensor.shape == np.shape(value) and tensor.dtype == np.asarray(value).dtype
        np.testing.assert_array_equal(tensor.read(), value)
    assert (saved["step"], saved["sizes"], saved["shape"], saved["none"], saved["name"]) == (70000, {1, 2}, (1, 2), None, "é")
    assert (saved["bytes"], saved["floats"], saved["device"]) == (b"ab\xff", [0.5, 1e-3], "cuda:1")
    assert saved["optimizer"]["param_groups"][0]["lr"] == 1e-3
    assert saved["metadata"]["weight"].shape == (1, 2)


def test_values_are_read_only_and_mapped():
    value = torch_file.load(DATA / "torch_2_13.pt")["module"]["window"].read()
    with pytest.raises(ValueError):
        value[0, 0] = 1
    base = value
    while not isinstance(base, np.memmap):
        base = base.base
    assert Path(base.filename).name == "torch_2_13.pt"


def test_legacy_file_needs_the_torch_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails, as where it is not installed
    with pytest.raises(KeySyncError, match=r"torch_legacy\.pt.*before torch 1\.6.*pip install 'keysync-jax\[torch\]'"):
        torch_file.load(DATA / "torch_legacy.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "x", b"y"], "b": (1, (2,))}, OrderedDict(x=1), {1, 2}, complex(1, 2)])
def test_plain_values_of_every_protocol(value, protocol, tmp_path):
    assert torch_file.load(write_archive(tmp_path / "x.pt", pickle.dumps(value, protocol))) == value


class Foreign:
    def __reduce__(self):
        return print, ("this must never run",)


class Instance:
    pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Foreign(), r"builtins\.print"),
        (sys.exit, r"sys\.exit"),
    ],
)
def test_foreign_names_are_refused_by_name_and_never_run(value, name, tmp_path, capsys):
    with pytest.raises(KeySyncError, match=name) as caught:
        torch_file.load(write_archive(tmp_path / "evil.pt", pickle.dumps({"module": value}, protocol=2)))
    assert "evil.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert "never" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", [2, 4])
def test_foreign_objects_without_tensors_are_skipped_and_counted(protocol, tmp_path):
    space = argparse.Namespace(path=Path("x"), scale=np.arange(3), one=np.float32(2), own=Instance(), kind=Instance)
    skipped = Counter()
    saved = torch_file.load(write_archive(tmp_path / "x.pt", pickle.dumps({"step": 3, "hyper": space}, protocol)), skipped)
    assert saved["step"] == 3 and not hasattr(saved["hyper"], "path")
    assert skipped["argparse.Namespace"] == 1 and skipped["test_torch_file.Instance"] == 1
    assert any(name.startswith("pathlib") for name in skipped) and any(name.startswith("numpy") for name in skipped)


def test_tensors_in_a_foreign_object_are_not_lost_without_a_word(tmp_path):
    # A module saved whole: BUILD gives an instance of a foreign class a dict with a tensor.
    tensor = pickled_tensor()
    body = tensor[2 : tensor.rindex(b".")]
    data = b"\x80\x02cmy.models\nNet\n)\x81" + body + b"b."
    with pytest.raises(KeySyncError, match=r"foreign classes.*my\.models\.Net \(1 tensor\).*state_dict"):
        torch_file.load(write_archive(tmp_path / "net.pt", data, {"0": STORAGE}))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"(S'echo'\nios\nsystem\n.", "os.system"),  # constructs without REDUCE
        (b"(cos\nsystem\nS'echo'\no.", "os.system"),
        (b"\x80\x02ctorch\nSize\n)\x81.", "damaged"),  # an allowed name, but no class
        (b"\x80\x02ctorch\nSize\n)}\x92.", "damaged"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02ctorch\nfloat32\n)R.", "torch.float32"),  # a name that may be named but not called
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x08\x00\x00\x00__call__K\x01s\x86b.", "pickle is damaged"),  # BUILD on a global
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n}X\x05\x00\x00\x00_callK\x01sb.", "pickle is damaged"),
        (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "memo"),  # an index that would make the unpickler allocate gigabytes
        (b"\x80\x02}q\x00", "damaged"),  # no end
        (b"\x80\x02K\x01Q.", "not a storage"),
        (b"\x80\x02cos.path\nexists\n.", "os.path.exists"),
        (b"not a pickle", "damaged|uses"),
        (b"", "damaged"),
    ],
)
def test_crafted_pickles(data, word, tmp_path):
    with pytest.raises(KeySyncError, match=word):
        torch_file.load(write_archive(tmp_path / "x.pt", data))


def test_copies_cannot_fill_the_memory(tmp_path):
    # One list of 20,000 items, copied 1,000 times by a file of 70 kB.
    items = b"(" + b"K\x01" * 20_000 + b"l"
    data = b"\x80\x02" + items + b"q\x00](" + b"c__builtin__\nset\nh\x00\x85R" * 1_000 + b"e."
    with pytest.raises(KeySyncError, match="more memory"):
        torch_file.load(write_archive(tmp_path / "x.pt", data))


STORAGE = np.arange(6, dtype=np.float32).tobytes()


def test_crafted_tensor_is_read_when_valid(tmp_path):
    path = write_archive(tmp_path / "x.pt", pickled_tensor(), {"0": STORAGE})
    np.testing.assert_array_equal(torch_file.load(path)["w"].read(), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ({"shape": (2, 4), "strides": (4, 1)}, "element 7 of a storage of 6"),
        ({"offset": 1}, "element 6"),
        ({"offset": -1}, "offset -1"),
        ({"strides": (-3, 1)}, "strides"),
        ({"shape": (2, -3)}, "shape"),
        ({"shape": (2, 3, 1)}, "strides"),
        ({"shape": (2.0, 3)}, "shape"),
        ({"shape": (10**6, 10**6), "strides": (0, 0)}, "larger than the whole file"),
        ({"shape": (1,) * 40, "strides": (1,) * 40}, "shape"),
        ({"numel": 7}, "storage 0 has 24 bytes"),
        ({"numel": -1}, "-1"),
        ({"storage": "DoubleStorage"}, "24 bytes for 6 x float64"),
        ({"storage": "QUInt8Storage"}, "torch.QUInt8Storage"),
        ({"key": "1"}, "archive/data/1 is missing"),
        ({"key": "../data.pkl"}, "storage '../data.pkl'"),
    ],
)
def test_tensors_cannot_leave_their_storage(numbers, word, tmp_path):
    path = write_archive(tmp_path / "x.pt", pickled_tensor(**numbers), {"0": STORAGE})
    with pytest.raises(KeySyncError, match=word):
        torch_file.load(path)


def test_damaged_archives(tmp_path):
    good = (DATA / "torch_2_13.pt").read_bytes()
    for length in (20, 1000, len(good) - 30):
        (tmp_path / "cut.pt").write_bytes(good[:length])
        with pytest.raises(KeySyncError, match=r"cut\.pt is a truncated"):
            torch_file.load(tmp_path / "cut.pt")
    # The directory at the end survives, but points past where its entries now are.
    start = good.rfind(b"PK\x01\x02", 0, good.find(b"PK\x05\x06"))
    assert start > 0
    (tmp_path / "hole.pt").write_bytes(good[:200] + good[1200:])
    with pytest.raises(KeySyncError, match=r"hole\.pt.*(damaged|truncated)"):
        torch_file.load(tmp_path / "hole.pt")


def test_archives_of_another_kind(tmp_path):
    pkl = pickled_tensor()
    with pytest.raises(KeySyncError, match="compressed"):
        torch_file.load(write_archive(tmp_path / "a.pt", pkl, {"0": STORAGE}, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(KeySyncError, match="big-endian"):
        torch_file.load(write_archive(tmp_path / "b.pt", pkl, {"0": STORAGE}, byteorder=b"big"))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(KeySyncError, match="not one written by torch.save"):
        torch_file.load(tmp_path / "c.zip")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/constants.pkl", b"\x80\x02).")
    with pytest.raises(KeySyncError, match="TorchScript"):
        torch_file.load(tmp_path / "d.pt")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("m/data.pkl", b"\x80\x02}.")
        archive.writestr("m/data.pkl", b"\x80\x02].")
    with pytest.raises(KeySyncError, match="twice"):
        torch_file.load(tmp_path / "e.pt")
    (tmp_path / "f.pt").write_text("just text")
    with pytest.raises(KeySyncError, match="not a torch file"):
        torch_file.load(tmp_path / "f.pt")
    with pytest.raises(KeySyncError, match=r"missing\.pt"):
        torch_file.load(tmp_path / "missing.pt")


def test_local_header_is_checked(tmp_path):
    path = write_archive(tmp_path / "x.pt", pickled_tensor(), {"0": STORAGE})
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("archive/data/0").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 28 : offset + 30] = struct.pack("<H", 60000)  # a huge extra field would put the data past the end
    path.write_bytes(data)
    with pytest.raises(KeySyncError, match="truncated"):
        torch_file.load(path)["w"].read()


def test_byteorder_and_prefix_are_optional(tmp_path):
    for root in ("archive", "keyframe_dub", "a/b"):
        path = write_archive(tmp_path / "x.pt", pickled_tensor(), {"0": STORAGE}, root=root, byteorder=None)
        assert torch_file.load(path)["w"].shape == (2, 3)


def test_a_file_cut_while_open_is_noticed(tmp_path):
    path = write_archive(tmp_path / "x.pt", pickled_tensor(), {"0": STORAGE})
    tensor = torch_file.load(path)["w"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(KeySyncError, match="became shorter"):
        tensor.read()


def test_flatten_joins_names_and_refuses_loops():
    leaf = constant(np.zeros(2))
    assert list(torch_file.flatten({"a": {"b": leaf, "c": 3}, "d": leaf, "e": [leaf]}, "x")) == ["a.b", "d"]
    with pytest.raises(KeySyncError, match="twice"):
        torch_file.flatten({"a": {"b": leaf}, "a.b": leaf}, "x")
    with pytest.raises(KeySyncError, match="too large"):
        torch_file.flatten({str(i): i for i in range(100)}, "x", limit=50)
    loop = {"w": leaf}
    loop["loop"] = loop
    assert len(torch_file.flatten(loop, "x", limit=10_000)) < 4096


# -- writing ------------------------------------------------------------------------------------------------------------------------

VALUES = {
    "matrix": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32),
    "scalar": np.float32(2.5).reshape(()),
    "brain": np.arange(7).astype(BFLOAT16),
    "half": np.ones(1, np.float16),
    "empty": np.zeros((0, 2), np.float32),
    "count": np.arange(300),
    "view": np.arange(12, dtype=np.float32).reshape(3, 4).T,  # not contiguous
}


def values():
    return Tensors({k: constant(v) for k, v in VALUES.items()}, "memory")


@pytest.mark.parametrize("wrapper", ["module", "state_dict", None])
def test_written_files_are_read_back(wrapper, tmp_path):
    extra = {"step": 70000, "config": {"x": [1, 2.5, "é", None, True]}} if wrapper else None
    torch_write.write(tmp_path / "w.pt", values(), wrapper=wrapper, extra=extra)
    saved = torch_file.load(tmp_path / "w.pt")
    state = saved[wrapper] if wrapper else saved
    assert list(state) == list(VALUES)
    for key, value in VALUES.items():
        assert state[key].dtype == value.dtype
        np.testing.assert_array_equal(state[key].read(), value)
    assert not wrapper or (saved["step"], saved["config"]) == (70000, extra["config"])


def test_written_entries_look_like_torchs(tmp_path):
    torch_write.write(tmp_path / "w.pt", values())
    raw = (tmp_path / "w.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "w.pt") as archive, zipfile.ZipFile(DATA / "torch_2_13.pt") as genuine:
        assert archive.testzip() is None
        assert archive.namelist()[:2] == ["w/data.pkl", "w/byteorder"]
        assert "torch_2_13/data.pkl" in genuine.namelist() and "torch_2_13/byteorder" in genuine.namelist()
        assert archive.read("w/version") == genuine.read("torch_2_13/version")
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            names, extra = struct.unpack("<HH", raw[info.header_offset + 26 : info.header_offset + 30])
            assert (info.header_offset + 30 + names + extra) % 64 == 0


def test_writing_refuses_what_torch_lacks_and_what_is_not_finite(tmp_path):
    with pytest.raises(KeySyncError, match="bad has type"):
        torch_write.write(tmp_path / "x.pt", Tensors({"bad": constant(np.array(["text"]))}, "memory"))
    with pytest.raises(KeySyncError, match="nan holds values that are not finite"):
        torch_write.write(tmp_path / "x.pt", Tensors({"nan": constant(np.array([1, np.nan], np.float32))}, "memory"))


def test_copying_a_file_holds_one_tensor_at_a_time(tmp_path):
    """96 MB in 16 tensors, torch file to safetensors to torch file: memory grows by a few tensors at most."""
    script = """
import resource, sys
import numpy as np
from keysync_jax.converters import safetensors_file, torch_file, torch_write
from keysync_jax.converters.lazy import LazyTensor, Tensors
folder = sys.argv[1]
big = LazyTensor((1_500_000,), np.dtype(np.float32), lambda: np.ones(1_500_000, np.float32))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak()
torch_write.write(f"{folder}/a.pt", Tensors({f"t{i}": big for i in range(16)}, "made"))
state = torch_file.flatten(torch_file.load(f"{folder}/a.pt"), "a.pt")
safetensors_file.write(f"{folder}/a.safetensors", Tensors(state, "a.pt"))
torch_write.write(f"{folder}/b.pt", safetensors_file.read(f"{folder}/a.safetensors"), wrapper="module")
print(peak() - start)
"""
    grown = float(subprocess.run([sys.executable, "-c", script, tmp_path], check=True, capture_output=True, text=True).stdout)
    assert grown < 40, f"memory grew by {grown:.0f} MB"
    assert (tmp_path / "a.pt").stat().st_size > 96e6
