"""The released checkpoint's layout at its real size, through the real zip format, without torch. Minutes and about 10 GB of disk."""

import json
import subprocess
import sys

import numpy as np
import pytest

from keysync_jax.converters import sgm, torch_write
from keysync_jax.converters.fresh import VAE_CONSTANTS, fresh, stage_constants
from keysync_jax.converters.initialize import configurations
from keysync_jax.converters.parts import part_table

pytestmark = pytest.mark.slow

# Runs apart, so that its peak memory is its own; refuses torch, so that nothing can lean on it.
CONVERT = """
import json, resource, sys
sys.modules["torch"] = None
from keysync_jax.converters.convert import convert
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
*sources, out = sys.argv[1:]
result = convert(sources, out, allow_missing=["interpolation", "audio/hubert"])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
part = result.directory.parts["keyframe"]
print(json.dumps({"grown": peak - start, "tensors": part.weights.tensors, "parameters": part.weights.parameters, "notes": result.notes}))
"""


def test_keyframe_checkpoint(tmp_path, golden_dir):
    stages, vae, _ = configurations("full")
    stage = stages["keyframe"]
    tensors = fresh(part_table(stage), 0, constants=stage_constants(stage))
    vae_tensors = fresh(part_table(vae), 0, constants=VAE_CONSTANTS)
    decoder = {e.torch_key: vae_tensors.info(e.torch_key) for e in part_table(vae, ("decoder",))}
    checkpoint = tensors.updated(decoder).astype(np.dtype(np.float16)).prefixed("_forward_module.")
    torch_write.write(tmp_path / "keyframe_dub.pt", checkpoint)  # 3.2 GB
    size = (tmp_path / "keyframe_dub.pt").stat().st_size
    assert size > 3.1e9
    save_full_vae(tmp_path / "svd", vae, vae_tensors)

    command = [sys.executable, "-c", CONVERT, tmp_path / "keyframe_dub.pt", tmp_path / "svd", tmp_path / "model"]
    done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"memory grew by {done['grown']:.0f} MB for a file of {size / 2**20:.0f} MB")
    manifest = json.loads((golden_dir / "manifests" / "keysync_keyframe.json").read_text())
    assert (done["tensors"], done["parameters"]) == (1696, manifest["meta"]["n_elements"])
    assert done["grown"] < 600
    assert not any("drawn at random" in note for note in done["notes"])

    from keysync_jax.converters import model_directory

    stored = model_directory.load(tmp_path / "model", complete=False, verify=True).tensors("keyframe")
    assert {key: list(t.shape) for key, t in stored.lazy_items()} == {k: t["shape"] for k, t in manifest["tensors"].items()}
    for key in list(stored)[::200]:
        np.testing.assert_array_equal(stored[key], tensors.updated(decoder)[key].astype(np.float16))
    unet = [key for key in stored if key.startswith("model.diffusion_model.")]
    assert sum(stored.info(key).size for key in unet) == 1_524_950_762
    assert (sum(map(sgm.is_frozen, unet)), sum(not sgm.is_frozen(key) for key in unet)) == (738, 690)


def save_full_vae(folder, config, tensors):
    from keysync_jax.converters import diffusers, safetensors_file

    (folder / "vae").mkdir(parents=True)
    (folder / "vae" / "config.json").write_text(json.dumps(diffusers.vae_config_to_diffusers(config, 512)))
    renamed = diffusers.vae_to_diffusers(tensors.astype(np.dtype(np.float16)), config)
    safetensors_file.write(folder / "vae" / "diffusion_pytorch_model.safetensors", renamed)
