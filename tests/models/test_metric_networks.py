"""The metrics' networks at full size: every tensor of the published files has a place and a shape, without computing anything."""

import json
import re
from pathlib import Path

import pytest

from keysync_jax.models.metrics import clip_vision, i3d, inception, lip_reader, syncnet, topiq

_MANIFESTS = Path(__file__).parents[1] / "golden" / "manifests"
_NETWORKS = {
    "clip_vit_l14_336_vision": (lambda: clip_vision.clip_vision_table(clip_vision.ClipVisionConfig()), r"(?!)"),
    "fid_inception": (inception.inception_table, r"fc\."),
    "i3d_pretrained_400": (i3d.i3d_table, r"(?!)"),
    "lipscore_encoder": (lambda: lip_reader.lip_reader_table(lip_reader.LipReaderConfig()), r"(?!)"),
    "syncnet_v2": (syncnet.syncnet_table, r"(?!)"),
    "topiq_nr_res50": (topiq.topiq_table, topiq.UNUSED.pattern),
}


@pytest.mark.parametrize("name", sorted(_NETWORKS))
def test_every_published_tensor_has_its_place(name):
    table, unused = _NETWORKS[name]
    tensors = json.loads((_MANIFESTS / f"metric_{name}.json").read_text())["tensors"]
    counted = re.compile(rf"(?:{unused})|.*num_batches_tracked$")
    published = {key: tuple(tensor["shape"]) for key, tensor in tensors.items() if not counted.match(key)}
    assert {entry.torch_key: entry.torch_shape for entry in table()} == published
