"""dataset_info.json and features.json, so that `tfds.builder_from_directory(DIR)` reads a column group without TensorFlow."""

from __future__ import annotations

import tempfile
from pathlib import Path

from keysync_jax.data_pipeline.dataset_layout import GroupFile
from keysync_jax.data_pipeline.records import CLIP_KEY, FRAME_KEY, Column

VERSION = "1.0.0"


def tfds_files(group_file: GroupFile) -> dict[str, str]:
    """Texts by file name. Needs tensorflow-datasets (extra "data"), not TensorFlow; equal groups give equal texts."""
    import numpy as np
    import tensorflow_datasets as tfds
    from etils import epath

    group = group_file.group

    def feature(column: Column):
        if column.is_jpeg:
            return tfds.features.Image(shape=column.shape, encoding_format="jpeg")
        return tfds.features.Tensor(shape=column.shape, dtype=np.dtype(column.dtype).type, encoding="bytes")

    features = tfds.features.FeaturesDict(
        {CLIP_KEY: tfds.features.Text(), FRAME_KEY: tfds.features.Scalar(np.int64), **{c.name: feature(c) for c in group.columns}}
    )
    with tempfile.TemporaryDirectory() as folder:
        version = tfds.core.Version(VERSION)
        identity = tfds.core.DatasetIdentity(name=group.dataset_name, version=version, data_dir=folder, module_name="")
        info = tfds.core.DatasetInfo(builder=identity, features=features, description="One record per video frame at 25 fps.")
        info.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
        splits = []
        for split in sorted({s.split for s in group_file.shards}):
            shards = [s for s in group_file.shards if s.split == split]
            template = tfds.core.ShardedFileTemplate(
                data_dir=epath.Path(folder), dataset_name=group.dataset_name, split=split, filetype_suffix="array_record",
                template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
            )  # fmt: skip
            lengths = [s.num_records for s in shards]
            splits.append(
                tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=sum(s.bytes for s in shards), filename_template=template)
            )
        info.set_splits(tfds.core.SplitDict(splits))
        info.write_to_directory(folder)
        return {path.name: path.read_text() for path in sorted(Path(folder).iterdir())}
