"""Small checkpoints in every format that `keysync convert` reads, made without PyTorch."""

import json
import zlib
from pathlib import Path

import numpy as np

from keysync_jax.config import UNetConfig
from keysync_jax.converters import diffusers, safetensors_file, sgm, torch_write
from keysync_jax.converters.initialize import configurations
from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.converters.parts import kl_table, part_table
from keysync_jax.models.speech import registry, wavlm
from keysync_jax.models.table import prefixed

STAGES, VAE, ENCODERS = configurations("tiny")
HUBERT, WAVLM = ENCODERS
HEADS = STAGES["keyframe"].unet.num_head_channels
# A plain Stable Video Diffusion of the tiny sizes: `label_emb` reads 48 numbers, not audio tokens.
SVD = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=HEADS,
    context_dim=32,
    audio_cond_method="none",
    adm_in_channels=48,
)


def draw(table, seed=0, dtype=np.float32, source="drawn") -> Tensors:
    """A value for every entry, from its own stream: no two tensors share one."""

    def read(entry):
        rng = np.random.default_rng([seed, zlib.crc32(entry.torch_key.encode())])
        return rng.standard_normal(entry.torch_shape).astype(dtype)

    return Tensors({e.torch_key: LazyTensor(e.torch_shape, np.dtype(dtype), lambda e=e: read(e)) for e in table}, source)


def merged(*sets: Tensors) -> Tensors:
    out = Tensors({}, "merged")
    for each in sets:
        out = out.updated(dict(each.lazy_items()))
    return out


def svd_tensors(seed=7) -> Tensors:
    """U-Net and VAE of SVD in sgm names."""
    return merged(draw(prefixed(sgm.UNET, sgm.unet_table(SVD)), seed), draw(part_table(VAE), seed))


def stage_tensors(name, seed=1, decoder_seed=7, frozen_from_svd=True) -> Tensors:
    """A KeySync checkpoint: temporal layers and decoder are SVD's unless told otherwise."""
    own = merged(draw(part_table(STAGES[name]), seed), draw(part_table(VAE, ("decoder",)), decoder_seed))
    if frozen_from_svd:
        svd = svd_tensors()
        own = own.updated({key: svd.info(key) for key in own if sgm.is_frozen(key)})
    return own


def save_stage(path, name, wrapper="module", prefix="_forward_module.", tensors=None, **options) -> Path:
    """A checkpoint as DeepSpeed saves it (or Lightning, or bare); it does not say what it was trained with."""
    tensors = stage_tensors(name, **options) if tensors is None else tensors
    if str(path).endswith(".safetensors"):
        safetensors_file.write(path, tensors.prefixed(prefix))
    else:
        torch_write.write(path, tensors.prefixed(prefix), wrapper=wrapper)
    return Path(path)


def save_svd_file(path, seed=7) -> Path:
    """SVD in one sgm file, with the embedders that KeySync has no use for."""
    kl = {k.replace("embedders.0", "embedders.3"): t for k, t in draw(kl_table(VAE), seed + 1).lazy_items()}
    clip = {
        "conditioner.embedders.0.open_clip.model.ln_final.weight": LazyTensor((4,), np.dtype(np.float32), lambda: np.ones(4, np.float32))
    }
    tensors = svd_tensors(seed)
    encoder = Tensors({k: t for k, t in tensors.lazy_items() if "quant_conv" not in k}, "svd")  # the first stage has none
    safetensors_file.write(path, encoder.updated(kl).updated(clip))
    return Path(path)


def save_svd_folder(path, seed=7, unet=True, vae=True, variant="") -> Path:
    """SVD as a diffusers folder."""
    path, tensors = Path(path), svd_tensors(seed)
    for name, wanted, config, renamed in (
        ("unet", unet, diffusers.unet_config_to_diffusers(SVD, 16), diffusers.unet_to_diffusers(tensors, SVD)),
        ("vae", vae, diffusers.vae_config_to_diffusers(VAE, 128), diffusers.vae_to_diffusers(tensors, VAE)),
    ):
        if wanted:
            (path / name).mkdir(parents=True)
            (path / name / "config.json").write_text(json.dumps(config))
            safetensors_file.write(path / name / f"diffusion_pytorch_model{variant}.safetensors", renamed)
    return path


def hf_config(config) -> dict:
    return {
        "model_type": config.kind,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "conv_dim": list(config.conv_dim),
        "num_conv_pos_embeddings": config.conv_pos,
        "num_conv_pos_embedding_groups": config.conv_pos_groups,
        "num_buckets": config.num_buckets,
        "max_bucket_distance": config.max_distance,
    }


def save_hf_encoder(path, config, container="safetensors", parametrized=False) -> Path:
    """HuBERT or WavLM as a Hugging Face folder; `parametrized` as newer torch names weight norm."""
    path = Path(path)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(hf_config(config)))
    tensors = draw(registry.audio_table(config), 5)
    if config.kind == "wavlm":
        tensors = tensors.renamed({key: wavlm.to_hf_wavlm(key) for key in tensors})
    if parametrized:
        pairs = (("weight_g", "parametrizations.weight.original0"), ("weight_v", "parametrizations.weight.original1"))
        tensors = tensors.renamed({k: k.replace(old, new) for k in tensors for old, new in pairs if k.endswith(old)})
    if container == "safetensors":
        safetensors_file.write(path / "model.safetensors", tensors)
    else:
        torch_write.write(path / "pytorch_model.bin", tensors, wrapper=None)
    return path


def save_microsoft_wavlm(path) -> Path:
    layers = "[(16,10,5)] + [(16,3,2)] * 4 + [(16,2,2)] * 2"
    cfg = {
        "encoder_embed_dim": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 4,
        "encoder_ffn_embed_dim": 64,
        "conv_feature_layers": layers,
        "conv_pos": 16,
        "conv_pos_groups": 4,
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        "num_buckets": 320,
        "max_distance": 800,
        "normalize": False,
    }
    torch_write.write(path, draw(registry.audio_table(WAVLM), 5), wrapper="model", extra={"cfg": cfg})
    return Path(path)


def same(first, second) -> bool:
    """Whether two sets of tensors are bit-equal, names included."""
    return set(first) == set(second) and all(np.array_equal(np.asarray(first[k]), np.asarray(second[k])) for k in first)
