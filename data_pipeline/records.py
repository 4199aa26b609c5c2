"""One record per video frame: the columns a frame may have, and how they are written as `tf.train.Example` bytes.

The wire format is exactly that of a TensorFlow Datasets feature `Tensor(..., encoding="bytes")`, so that tfds reads the shards, but
neither TensorFlow nor tfds is needed here: the five protobuf messages are declared below, in a pool of their own. Reading through
them takes a quarter of the time of tfds's decoder (docs/data_format.md).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from keysync_jax.core.errors import KeySyncError

LATENT = "latent"
LANDMARKS = "landmarks"
SOUND = "samples"  # the 40 ms of the voice that belong to a frame
AUDIO_PREFIX = "audio_"
JPEG = "jpeg"
CLIP_KEY = "clip"  # every record names its clip and frame, so that a misplaced record is noticed when it is read
FRAME_KEY = "frame"

_DTYPES = ("float16", "float32", "bool", "uint8", "int16", "int32", "int64", JPEG)
_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclasses.dataclass(frozen=True)
class Column:
    """A quantity stored for every frame.

    Attributes:
      name: lower-case identifier, unique in a dataset.
      dtype: "float16", "float32", "bool", "uint8", "int16", "int32", "int64", or "jpeg" (an encoded picture as bytes).
      shape: of one frame's value; `()` for a number, (H, W, 3) of the decoded picture for "jpeg".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if not _NAME.fullmatch(self.name) or self.name in (CLIP_KEY, FRAME_KEY):
            raise KeySyncError(f"column name {self.name!r} must be lower-case letters, digits and '_', and not {CLIP_KEY!r}, {FRAME_KEY!r}")
        if self.dtype not in _DTYPES:
            raise KeySyncError(f"column {self.name!r} has dtype {self.dtype!r}; choose one of {', '.join(_DTYPES)}")
        if any(n <= 0 for n in self.shape):
            raise KeySyncError(f"column {self.name!r} has shape {self.shape}; every axis must be at least 1")

    @property
    def is_jpeg(self) -> bool:
        return self.dtype == JPEG

    @property
    def numpy_dtype(self) -> np.dtype:
        """Little-endian, as on the wire."""
        return np.dtype(object) if self.is_jpeg else np.dtype(self.dtype).newbyteorder("<")

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


def latent_column(height: int, width: int, channels: int = 4) -> Column:
    """VAE latents of one frame `[h, w, C]`: posterior sample times the latent scale."""
    return Column(LATENT, "float16", (height, width, channels))


def audio_column(encoder: str, dim: int) -> Column:
    """The two audio tokens `[2, D]` of one 40 ms frame, as column `audio_ENCODER`."""
    return Column(AUDIO_PREFIX + encoder, "float16", (2, dim))


def landmarks_column() -> Column:
    """68 landmarks `[68, 2]`, (x, y) in pixels of the crop."""
    return Column(LANDMARKS, "float32", (68, 2))


def jpeg_column(height: int, width: int) -> Column:
    """The crop itself as an encoded picture."""
    return Column(JPEG, JPEG, (height, width, 3))


class Record(NamedTuple):
    """One decoded frame. Arrays are read-only views of the record's bytes; "jpeg" columns are bytes."""

    clip: str
    frame: int
    values: dict[str, Any]


def encode_clip(columns: Sequence[Column], clip: str, first_frame: int, values: Mapping[str, Any]) -> Iterator[bytes]:
    """Records of consecutive frames of one clip.

    The same values always give the same bytes (map keys are written in sorted order).

    Args:
      columns: what to store; `values` must have exactly these keys.
      clip: clip id.
      first_frame: frame number of the first row.
      values: per column an array `[n, *shape]` of any real dtype that fits (floats are rounded to the column's precision), or for
        "jpeg" columns a sequence of n byte strings.

    Yields:
      Serialized `Example`, one per frame.

    Raises:
      KeySyncError: missing or unknown columns, wrong shape or length, values that are not finite or overflow the column's type. Names
        the clip and the first bad frame.
    """
    names = [c.name for c in columns]
    if set(values) != set(names):
        missing, unknown = sorted(set(names) - set(values)), sorted(set(values) - set(names))
        raise KeySyncError(f"clip {clip!r}: columns do not fit the dataset (missing {missing or 'none'}, unknown {unknown or 'none'})")
    arrays = {c.name: _checked(c, clip, first_frame, values[c.name]) for c in columns}
    lengths = {name: len(a) for name, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise KeySyncError(f"clip {clip!r}: columns have different numbers of frames: {lengths}")
    key = clip.encode()
    for row in range(next(iter(lengths.values()), 0)):
        example = _Example()
        feature = example.features.feature
        feature[CLIP_KEY].bytes_list.value.append(key)
        feature[FRAME_KEY].int64_list.value.append(first_frame + row)
        for column in columns:
            value = arrays[column.name][row]
            feature[column.name].bytes_list.value.append(value if column.is_jpeg else value.tobytes())
        yield example.SerializeToString(deterministic=True)


def decode(record: bytes, columns: Sequence[Column]) -> Record:
    """The named columns of one record; others that it holds are passed over.

    Raises:
      KeySyncError: not an `Example`, or a column is missing or has another size. The message does not know the file; callers add it.
    """
    try:
        feature = _Example.FromString(record).features.feature
    except DecodeError as error:
        raise KeySyncError(f"record is no tf.train.Example ({error})") from None

    def only(key: str, kind: str) -> Any:
        stored = getattr(feature[key], kind).value if key in feature else ()
        if len(stored) != 1:
            raise KeySyncError(f"record has no {key!r}; it holds {', '.join(sorted(feature)) or 'nothing'}")
        return stored[0]

    out = {}
    for column in columns:
        data = only(column.name, "bytes_list")
        if not column.is_jpeg:
            expected = column.numpy_dtype.itemsize * int(np.prod(column.shape, dtype=np.int64))
            if len(data) != expected:
                raise KeySyncError(f"column {column.name!r} has {len(data)} bytes, not {expected} for {column.dtype}{list(column.shape)}")
            data = np.frombuffer(data, column.numpy_dtype).reshape(column.shape)
        out[column.name] = data
    return Record(only(CLIP_KEY, "bytes_list").decode(), only(FRAME_KEY, "int64_list"), out)


def record_bytes(columns: Sequence[Column], jpeg_bytes: int = 0) -> int:
    """Serialized size of one frame in bytes, for clip ids of 32 letters; each "jpeg" column counts `jpeg_bytes`."""
    picture = b"\xff\xd8" + bytes(max(0, jpeg_bytes - 2))
    values = {c.name: [picture] if c.is_jpeg else np.zeros((1, *c.shape), c.numpy_dtype) for c in columns}
    return len(next(encode_clip(columns, "c" * 32, 1000, values)))


def _checked(column: Column, clip: str, first_frame: int, value: Any) -> Any:
    """Array `[n, *shape]` in the column's dtype, or a list of n byte strings, after every check."""
    if column.is_jpeg:
        pictures = list(value)
        for row, data in enumerate(pictures):
            if not isinstance(data, bytes) or not data.startswith(b"\xff\xd8"):
                raise KeySyncError(f"clip {clip!r} frame {first_frame + row}: column {column.name!r} is not an encoded JPEG")
        return pictures
    array = np.asarray(value)
    if array.shape[1:] != column.shape or array.ndim == 0:
        raise KeySyncError(f"clip {clip!r}: column {column.name!r} has shape {array.shape}, expected {('frames', *column.shape)}")
    dtype = column.numpy_dtype
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise KeySyncError(f"clip {clip!r}: column {column.name!r} is {array.dtype}, which does not fit {column.dtype}")
    if dtype.kind == "b":
        return array
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    good = (array >= limits.min) & (array <= limits.max)  # false for NaN too
    if not good.all():
        row = int(np.argmax(~good.reshape(len(array), -1).all(axis=1)))
        bad = array[row][~good[row]].flat[0] if column.shape else array[row]
        where = f"clip {clip!r} frame {first_frame + row}"
        raise KeySyncError(f"{where}: column {column.name!r} holds {bad}, which {column.dtype} cannot store; check what computed it")
    return array.astype(dtype)


def _example_class() -> type:
    """`tf.train.Example` from its published field numbers, in a private descriptor pool (no clash with TensorFlow's own)."""
    field = descriptor_pb2.FieldDescriptorProto
    package = "keysync_records"
    file = descriptor_pb2.FileDescriptorProto(name="keysync_jax/records.proto", package=package, syntax="proto3")

    def message(name: str, *fields: tuple, parent=file.message_type):
        proto = parent.add(name=name)
        for number, (field_name, kind, repeated) in enumerate(fields, start=1):
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                proto.field.add(name=field_name, number=number, label=label, type=field.TYPE_MESSAGE, type_name=f".{package}.{kind}")
            else:
                proto.field.add(name=field_name, number=number, label=label, type=kind)
        return proto

    message("BytesList", ("value", field.TYPE_BYTES, True))
    message("FloatList", ("value", field.TYPE_FLOAT, True))
    message("Int64List", ("value", field.TYPE_INT64, True))
    feature = message("Feature", ("bytes_list", "BytesList", False), ("float_list", "FloatList", False), ("int64_list", "Int64List", False))
    feature.oneof_decl.add(name="kind")
    for member in feature.field:
        member.oneof_index = 0
    features = message("Features", ("feature", "Features.FeatureEntry", True))
    entry = message("FeatureEntry", ("key", field.TYPE_STRING, False), ("value", "Feature", False), parent=features.nested_type)
    entry.options.map_entry = True
    message("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Example"))


_Example = _example_class()
