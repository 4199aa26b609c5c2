import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.records import (
    Column,
    audio_column,
    decode,
    encode_clip,
    jpeg_column,
    landmarks_column,
    latent_column,
    record_bytes,
)

COLUMNS = (
    latent_column(4, 6), audio_column("wavlm", 5), landmarks_column(), Column("arousal", "float32", ()), Column("occluder", "bool", (4, 6)),
    Column("phoneme", "int32", (1,)), Column("samples", "int16", (640,)), jpeg_column(8, 8),
)  # fmt: skip


def values(n=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "latent": rng.standard_normal((n, 4, 6, 4)),
        "audio_wavlm": rng.standard_normal((n, 2, 5)).astype(np.float32),
        "landmarks": rng.random((n, 68, 2)) * 512,
        "arousal": rng.random(n),
        "occluder": rng.random((n, 4, 6)) > 0.5,
        "phoneme": rng.integers(0, 40, (n, 1)),
        "samples": rng.integers(-32768, 32767, (n, 640)),
        "jpeg": [b"\xff\xd8picture%d" % i for i in range(n)],
    }


def test_round_trip_keeps_every_column():
    given = values()
    records = list(encode_clip(COLUMNS, "video/ü 1", 100, given))
    assert len(records) == 3
    for row, record in enumerate(records):
        got = decode(record, COLUMNS)
        assert (got.clip, got.frame) == ("video/ü 1", 100 + row)
        for column in COLUMNS:
            value = got.values[column.name]
            if column.is_jpeg:
                assert value == given["jpeg"][row]
            else:
                assert value.dtype == np.dtype(column.dtype) and value.shape == column.shape
                np.testing.assert_array_equal(value, given[column.name][row].astype(column.dtype))


def test_a_subset_of_columns_can_be_read_and_others_cannot():
    record = next(encode_clip(COLUMNS, "a", 0, values()))
    assert set(decode(record, COLUMNS[2:4]).values) == {"landmarks", "arousal"}
    with pytest.raises(KeySyncError, match="no 'audio_hubert'; it holds arousal, audio_wavlm"):
        decode(record, [audio_column("hubert", 5)])
    with pytest.raises(KeySyncError, match=r"'latent' has 192 bytes, not 128"):
        decode(record, [latent_column(4, 4)])


def test_equal_values_give_equal_bytes():
    first, second = list(encode_clip(COLUMNS, "a", 0, values())), list(encode_clip(COLUMNS[::-1], "a", 0, dict(reversed(values().items()))))
    assert first == second
    assert first != list(encode_clip(COLUMNS, "a", 0, values(seed=1)))


def test_bytes_are_those_of_tfds():
    """Our messages are its messages: tfds decodes what we write, and we decode what it serializes."""
    import tensorflow_datasets as tfds

    columns = [c for c in COLUMNS if not c.is_jpeg]
    tensor = {c.name: tfds.features.Tensor(shape=c.shape, dtype=np.dtype(c.dtype).type, encoding="bytes") for c in columns}
    features = tfds.features.FeaturesDict({"clip": tfds.features.Text(), "frame": tfds.features.Scalar(np.int64), **tensor})
    given = {k: v for k, v in values().items() if k != "jpeg"}
    record = next(encode_clip(columns, "a", 70, given))
    theirs = features.deserialize_example_np(record)
    assert theirs["clip"] == b"a" and theirs["frame"] == 70
    example = {c.name: given[c.name][0].astype(c.dtype) if c.shape else np.array(given[c.name][0], c.dtype) for c in columns}
    for name, value in example.items():
        np.testing.assert_array_equal(theirs[name], value)
    ours = decode(features.serialize_example({"clip": "a", "frame": 70, **example}), columns)
    for name, value in example.items():
        np.testing.assert_array_equal(ours.values[name], value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65505.0, -70000.0])
def test_values_that_float16_cannot_hold_name_clip_frame_and_column(bad):
    given = values()
    given["latent"][1, 2, 3, 0] = bad
    with pytest.raises(KeySyncError, match=r"clip 'v7' frame 41: column 'latent' holds .* float16 cannot store"):
        list(encode_clip(COLUMNS, "v7", 40, given))


def test_the_largest_float16_is_kept():
    given = {"latent": np.full((1, 1, 1, 1), 65504.0)}
    assert decode(next(encode_clip([latent_column(1, 1, 1)], "a", 0, given)), [latent_column(1, 1, 1)]).values["latent"].item() == 65504


@pytest.mark.parametrize(
    "change, message",
    [
        ({"latent": np.zeros((3, 4, 4, 4))}, r"'latent' has shape \(3, 4, 4, 4\), expected \('frames', 4, 6, 4\)"),
        ({"arousal": np.zeros(2)}, "different numbers of frames"),
        ({"landmarks": np.full((3, 68, 2), np.nan)}, "frame 0: column 'landmarks' holds nan"),
        ({"occluder": np.zeros((3, 4, 6), np.uint8)}, "'occluder' is uint8, which does not fit bool"),
        ({"phoneme": np.full((3, 1), 2**40)}, "column 'phoneme' holds"),
        ({"jpeg": [b"\xff\xd8", b"\x89PNG", b"\xff\xd8"]}, "frame 1: column 'jpeg' is not an encoded JPEG"),
        ({"valence": np.zeros(3)}, r"unknown \['valence'\]"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(KeySyncError, match=message):
        list(encode_clip(COLUMNS, "a", 0, values() | change))


def test_missing_column_is_named():
    given = values()
    del given["audio_wavlm"]
    with pytest.raises(KeySyncError, match=r"missing \['audio_wavlm'\]"):
        list(encode_clip(COLUMNS, "a", 0, given))


def test_damaged_record():
    with pytest.raises(KeySyncError, match="no tf.train.Example"):
        decode(b"\xff" * 40, COLUMNS)
    with pytest.raises(KeySyncError, match="it holds nothing"):
        decode(b"", COLUMNS)


@pytest.mark.parametrize("bad", [("Latent", "float16", (2,)), ("clip", "float16", (2,)), ("x", "float64", ()), ("x", "bool", (0,))])
def test_bad_columns(bad):
    with pytest.raises(KeySyncError, match="column"):
        Column(*bad)


def test_record_bytes_is_the_real_size():
    columns = (latent_column(64, 64), audio_column("hubert", 768), landmarks_column())
    # The names of the columns and the lengths in front of them are the rest.
    assert record_bytes(columns) == pytest.approx(64 * 64 * 4 * 2 + 2 * 768 * 2 + 68 * 2 * 4, rel=0.01)
    assert record_bytes((jpeg_column(8, 8),), jpeg_bytes=5000) - record_bytes((jpeg_column(8, 8),), jpeg_bytes=4000) == 1000
