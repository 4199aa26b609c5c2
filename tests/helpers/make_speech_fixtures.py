"""Writes fixtures/speech_hf.safetensors: tiny random speech encoders of the transformers library with their outputs.

They cover what the parity cases do not: transformers' own spelling of WavLM, and the "layer" variants (a layer norm after each
convolution, biases, pre-norm layers, an odd position kernel, no layer norm on the features). Needs the `torch` extra:

    python tests/helpers/make_speech_fixtures.py

Contents: `{case}/{state dict key}` weights, `{case}/out` last hidden state, and the configurations as JSON in the metadata.
The input is `test_audio_encoders.waveform`, computed, not stored.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from test_audio_encoders import FIXTURE, waveform

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "conv_dim": [8, 8, 12],
    "conv_kernel": [10, 9, 8],
    "conv_stride": [5, 8, 8],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
LAYER = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True, "num_conv_pos_embeddings": 15}
CASES = {
    "wavlm_group": ("wavlm", {"num_buckets": 32, "max_bucket_distance": 40}),
    "wavlm_layer": ("wavlm", {**LAYER, "num_buckets": 24, "max_bucket_distance": 50, "layer_norm_eps": 1e-4}),
    "hubert_layer": ("hubert", {**LAYER, "feat_proj_layer_norm": False, "mask_time_prob": 0.0}),
}
MODELS = {
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
}


def main() -> None:
    tensors, configs = {}, {}
    for seed, (case, (kind, values)) in enumerate(CASES.items()):
        values = SIZES | values
        configs[case] = {"model_type": kind, **values}
        config_class, model_class = MODELS[kind]
        model = model_class(config_class(**values, attn_implementation="eager")).eval()
        rng = np.random.default_rng(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):  # nothing stays at a special initial value
                parameter += 0.1 * torch.from_numpy(rng.standard_normal(tuple(parameter.shape)).astype(np.float32))
            out = model(torch.from_numpy(waveform()[None])).last_hidden_state
        tensors |= {f"{case}/{key}": value.numpy() for key, value in model.state_dict().items()}
        tensors[f"{case}/out"] = out[0].numpy()
    pathlib.Path(FIXTURE).parent.mkdir(exist_ok=True)
    save_file(tensors, FIXTURE, {"configs": json.dumps(configs), "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
