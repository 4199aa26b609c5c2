"""What we write is read by PyTorch itself, strictly. Slow because of its imports, and needs the torch extra:

pip install 'keysync-jax[torch]' && pytest -m slow tests/converters/test_against_torch.py
"""

import json

import numpy as np
import pytest
from checkpoints import STAGES, VAE, WAVLM, draw, merged, same, save_hf_encoder, save_microsoft_wavlm

from keysync_jax.converters import containers, model_directory, torch_file
from keysync_jax.converters.convert import convert
from keysync_jax.converters.export import export
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import part_table
from keysync_jax.models.speech import registry

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_load(mmap, tiny_model, tmp_path):
    import torch

    export(tiny_model, tmp_path / "out", "keysync", vae_copies=True)
    directory = model_directory.load(tiny_model)
    for name in STAGES:
        state = torch.load(tmp_path / "out" / f"{name}_dub.pt", weights_only=True, mmap=mmap)["module"]
        stored = directory.tensors(name)
        assert set(stored) <= set(state)
        for key in stored:
            assert state[key].dtype == torch.float32
            np.testing.assert_array_equal(state[key].numpy(), stored[key])


@pytest.mark.parametrize("protocol", [2, 4])
def test_torch_save(protocol, tmp_path):
    import torch

    tensors = merged(draw(part_table(STAGES["interpolation"])), draw(part_table(VAE, ("decoder",))))
    state = {f"_forward_module.{key}": torch.nn.Parameter(torch.tensor(np.array(value))) for key, value in tensors.items()}
    extra = {
        "ds_version": "0.16",
        "ds_config": {"zero": {"stage": 1}},
        "sparse_tensor_module_names": set(),
        "param_shapes": [torch.Size([2])],
    }
    torch.save({"module": state, "optimizer": None, **extra}, tmp_path / "interpolation_dub.pt", pickle_protocol=protocol)
    (source,) = containers.open_sources(str(tmp_path / "interpolation_dub.pt"))
    assert source.kind == "interpolation" and same(source.tensors, tensors)


def test_legacy_files_go_through_torch(tmp_path):
    import torch

    tensors = draw(part_table(STAGES["keyframe"]))
    state = {key: torch.tensor(np.array(value)) for key, value in tensors.items()} | {"half": torch.tensor([1.5]).bfloat16()}
    torch.save({"state_dict": state}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    found = torch_file.flatten(torch_file.load(tmp_path / "old.ckpt")["state_dict"], "old")
    assert float(found.pop("half").read()[0]) == 1.5
    assert same(Tensors(found, "old"), tensors)


def test_diffusers_classes_load_strictly(tiny_model, tmp_path):
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    export(tiny_model, tmp_path / "out", "diffusers")
    for name in STAGES:
        for part, cls in (("unet", UNetSpatioTemporalConditionModel), ("vae", AutoencoderKLTemporalDecoder)):
            model, report = cls.from_pretrained(tmp_path / "out" / name, subfolder=part, output_loading_info=True)
            assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
            expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
            (source,) = containers.open_sources(str(tmp_path / "out" / name / part))
            assert {key: t.shape for key, t in source.tensors.lazy_items()} == expected


def test_transformers_folders(tmp_path):
    """HuBERT and WavLM as transformers saves them today, and our WavLM as it reads them."""
    from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
    }
    hubert, wavlm = HubertModel(HubertConfig(**sizes)), WavLMModel(WavLMConfig(**sizes))
    hubert.save_pretrained(tmp_path / "hubert")
    wavlm.save_pretrained(tmp_path / "wavlm")
    parts = ["keyframe", "interpolation", "vae"]
    result = convert([tmp_path / "hubert", tmp_path / "wavlm"], tmp_path / "model", allow_missing=parts)
    stored = result.directory.tensors("audio/hubert")
    assert np.array_equal(
        stored["encoder.layers.1.feed_forward.output_dense.weight"], hubert.encoder.layers[1].feed_forward.output_dense.weight.detach()
    )
    assert len(stored) == len(hubert.state_dict())
    assert len(result.directory.tensors("audio/wavlm")) == len(wavlm.state_dict())
    folder = save_hf_encoder(tmp_path / "ours", WAVLM)
    _, report = WavLMModel.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    (microsoft,) = containers.open_sources(str(save_microsoft_wavlm(tmp_path / "WavLM.pt")))
    assert same(microsoft.tensors, draw(registry.audio_table(WAVLM), 5)) and json.dumps(microsoft.config)
