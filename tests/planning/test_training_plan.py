import argparse
import dataclasses
import json

import pytest
import tiny
from bounds import approx

from keysync_jax.cli import plan_verbs
from keysync_jax.config import VAEConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.planning import recipe_plan as plans
from keysync_jax.training.config import DataConfig, InitConfig, MeshConfig, OptimizerConfig, TrainConfig

UNET = dataclasses.replace(tiny.UNET, attention_resolutions=(1,), num_head_channels=8, num_frames=2)
TINY = TrainConfig(
    stage=dataclasses.replace(tiny.KEYFRAME, unet=UNET, resolution=16, latent_size=4, num_frames=2, audio_feature_dim=16),
    vae=dataclasses.replace(tiny.VAE, channel_mult=(1, 1, 1)),
    remat="none", data=DataConfig(batch_size=16), mesh=MeshConfig(data=2, fsdp=4),
)  # fmt: skip


def make(config=TINY, topology="v5e:2x4"):
    return plans.make_plan(config, plans.parse_topology(topology))


@pytest.fixture(scope="module")
def tiny():
    return make()


@pytest.mark.parametrize(
    "text, kind, devices",
    [("v5e:4x4", "v5e", 16), ("v5p:2x2x2", "v5p", 8), ("h200x8", "h200", 8), ("cpu:8", "cpu", 8), ("h100", "h100", 1)],
)
def test_topologies(text, kind, devices):
    assert plans.parse_topology(text)[1:] == (kind, devices)


@pytest.mark.parametrize("text", ["v9:2x2", "h200x", "v5e:4x", "cpu:0", ""])
def test_unknown_topologies(text):
    with pytest.raises(UsageError, match="topology"):
        plans.parse_topology(text)


def test_batch_and_flops_scale(tiny):
    twice = make(dataclasses.replace(TINY, data=DataConfig(batch_size=32)))
    # Positions of the frames are the same for all samples, so a little is shared.
    assert twice.flops.total == pytest.approx(2 * tiny.flops.total, rel=0.01)
    assert twice.memory.activations > 1.5 * tiny.memory.activations  # parameters in the compute type are the same for both
    assert twice.memory.state == tiny.memory.state
    halves = make(dataclasses.replace(TINY, data=DataConfig(batch_size=32), optimizer=OptimizerConfig(accumulate=2)))
    assert halves.flops.total == approx(2 * tiny.flops.total)
    assert halves.memory.activations == tiny.memory.activations
    # The sum so far and a microbatch's own are alive together.
    assert halves.memory.gradients == 2 * tiny.memory.gradients == 2 * twice.memory.gradients > 0


def test_rematerialisation_trades_memory_for_work(tiny):
    found = {remat: make(dataclasses.replace(TINY, remat=remat)) for remat in ("names", "full")}
    assert tiny.flops.recompute == 0 < found["names"].flops.recompute < found["full"].flops.recompute
    assert tiny.memory.residuals > found["names"].memory.residuals > found["full"].memory.residuals > 0
    assert found["full"].flops.model == tiny.flops.model


def test_pixel_loss_is_an_item(tiny):
    with_pixels = make(dataclasses.replace(TINY, loss=LossConfig(pixel_weight=1.0)))
    assert tiny.flops.pixels == 0 < with_pixels.flops.pixels
    assert with_pixels.flops.pixels_recompute > 0
    assert with_pixels.flops.forward == tiny.flops.forward
    assert with_pixels.parameters["frozen"] > tiny.parameters["frozen"]


def test_the_topology_is_one_slice(tiny):
    """Two slices of four chips are planned as eight chips, in every figure."""
    two = make(dataclasses.replace(TINY, mesh=MeshConfig(data=2, fsdp=4, slices=2)), "v5e:2x2")
    assert two.devices == tiny.devices == 8 and two.topology.devices == 4
    for name in ("mesh", "rows", "flops", "memory", "compute_seconds", "update_seconds", "steps_per_second"):
        assert getattr(two, name) == getattr(tiny, name)
    filled = make(dataclasses.replace(TINY, mesh=MeshConfig(data=-1, fsdp=4, slices=2)), "h200x4")
    assert filled.mesh == {"data": 2, "fsdp": 4, "tensor": 1}


def test_the_decoder_that_is_planned_with_is_named(tmp_path):
    loss, gone = LossConfig(pixel_weight=1.0), str(tmp_path / "gone")
    named = dataclasses.replace(TINY, loss=loss, init=InitConfig(vae=gone))
    assert make(named).notes == (f"decoder of the pixel loss: planned with config.vae; no VAE is found at config.init.vae {gone}",)
    svd = plans._notes(dataclasses.replace(named, vae=VAEConfig(), init=InitConfig(kind="svd", path=gone)))
    assert svd == (f"decoder of the pixel loss: planned with that of Stable Video Diffusion; no VAE is found at config.init.path {gone}",)
    assert plans._notes(dataclasses.replace(TINY, loss=loss))[0].endswith("config.init names none")
    assert plans._notes(dataclasses.replace(TINY, loss=loss, init=InitConfig(vae="demo"))) == ()
    assert plans._notes(dataclasses.replace(named, loss=LossConfig())) == ()


def test_lpips_needs_no_weights():
    l2 = make(dataclasses.replace(TINY, loss=LossConfig(pixel_weight=1.0)))
    both = make(dataclasses.replace(TINY, loss=LossConfig(pixel_weight=1.0, pixel_losses=("l2", "lpips")), lpips="/nowhere"))
    # Two images of 16 x 16 through VGG-16, forward, again for the backward pass, and back (to the images only).
    groups = zip(
        (16, 8, 4, 2, 1), (3 * 64 + 64**2, 64 * 128 + 128**2, 128 * 256 + 2 * 256**2, 256 * 512 + 2 * 512**2, 3 * 512**2), strict=True
    )
    once = sum(2 * 2 * side**2 * 9 * products for side, products in groups)
    assert 2.4 * once < (both.flops.total - l2.flops.total) / 16 < 3.1 * once
    assert both.parameters == l2.parameters


def test_stand_in_lpips_is_vgg16():
    stand_in = plans._stand_in_lpips()
    sizes = [x.size for group in stand_in.convolutions for layer in group for x in layer]
    assert sum(sizes) == 14_714_688 and len(sizes) == 2 * 13
    assert [x.size for x in stand_in.linear] == [64, 128, 256, 512, 512]


def test_memory_adds_up(tiny):
    memory = tiny.memory
    assert memory.total == sum(memory) - memory.residuals
    assert memory.state == sum(row.bytes_per_device for row in tiny.rows)
    latents = 2 * 4 * 4
    assert memory.batch == 16 // 8 * 4 * (latents * 4 + 2 * 2 * 16 + latents + 4 * 4 * 4)
    wide = make(dataclasses.replace(TINY, mesh=MeshConfig(data=1, fsdp=8)))
    assert wide.memory.state < memory.state < make(dataclasses.replace(TINY, mesh=MeshConfig(data=8))).memory.state


def test_time_has_a_floor(tiny):
    assert tiny.compute_seconds == approx(tiny.flops.total / (8 * 197e12))
    assert tiny.update_seconds == approx(4 * 7 * tiny.parameters["trained"] / 4 / 0.82e12)
    assert tiny.steps_per_second == approx(1 / (tiny.compute_seconds + tiny.update_seconds))
    assert make(topology="cpu:8").steps_per_second is None


def test_misfits_are_named():
    with pytest.raises(KeySyncError, match="mesh data 2 x fsdp 4 x tensor 1 does not make up the 16 devices"):
        make(topology="v5e:4x4")
    with pytest.raises(
        KeySyncError, match=r"does not make up the 16 devices; .* \(the topology, v5e:2x4, is one of mesh.slices=2 slices\)"
    ):
        make(dataclasses.replace(TINY, mesh=dataclasses.replace(TINY.mesh, slices=2)))
    with pytest.raises(KeySyncError, match="data 1 is not a multiple of mesh.slices 2"):
        make(dataclasses.replace(TINY, mesh=MeshConfig(data=1, fsdp=8, slices=2)), "v5e:2x2")
    with pytest.raises(KeySyncError, match="data.batch_size 12"):
        make(dataclasses.replace(TINY, data=DataConfig(batch_size=12)))


def command(*words):
    parser = argparse.ArgumentParser()
    plan_verbs.add_plan(parser.add_subparsers())
    args = parser.parse_args(["plan", *(w for w in words if not w.startswith("--config."))])
    args.overrides = [w for w in words if w.startswith("--config.")]
    return args.run(args)


SMALL = (
    "--config", "keyframe", "--config.stage.unet.model_channels=32", "--config.stage.unet.channel_mult=1,",
    "--config.stage.unet.num_head_channels=8", "--config.stage.unet.num_res_blocks=1", "--config.loss.pixel_weight=0.0",
    "--config.stage.latent_size=8", "--config.stage.resolution=64", "--config.mesh.fsdp=8", "--config.mesh.data=1",
)  # fmt: skip


def test_command_prints_every_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert command(*SMALL, "--topology", "h200x8") == 0
    text = capsys.readouterr().out
    for words in ("8 x H200", "fsdp 8", "are trained", "recomputed by the backward pass", "exact, from the shardings", "steps/s", "H200"):
        assert words in text


def test_command_says_what_it_takes_for_granted(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--config.loss.pixel_weight=1.0", "--config.init.vae=/nowhere", "--config.optimizer.accumulate=2", "--config.mesh.slices=2")
    more = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    assert command(*SMALL, *words, *more, "--topology", "h200x4") == 0
    text = capsys.readouterr().out
    assert "8 x H200, 131 GiB each (2 slices of h200x4); mesh data 2 x fsdp 4" in text
    assert "planned with that of Stable Video Diffusion; no VAE is found at config.init.vae /nowhere" in text
    assert "laid out as the parameters, twice: their sum and a microbatch's" in text


def test_command_json(capsys):
    assert command(*SMALL, "--topology", "cpu:8", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert found["flops"]["model"] == found["flops"]["forward"] + found["flops"]["backward"]
    assert found["flops_per_sample"]["forward"] * found["batch_size"] == approx(found["flops"]["forward"])
    assert found["memory"]["state"] == sum(row["bytes_per_device"] for row in found["rows"])


def test_compile_needs_a_topology_of_tpus_or_gpus():
    with pytest.raises(UsageError, match="v5e:4x4 or h200x8, not cpu:8"):
        command(*SMALL, "--topology", "cpu:8", "--compile")


@pytest.mark.slow
def test_full_size_recipe():
    """The reference's recipe: 46.7 TFLOP per sample without the pixel loss, and the default policy recomputes little."""
    config = TrainConfig(loss=LossConfig(pixel_weight=1.0), data=DataConfig(batch_size=16), mesh=MeshConfig(data=1, fsdp=16))
    found = make(config, "v5e:4x4")
    per_sample = found.flops.scaled(1 / 16)
    assert per_sample.forward + per_sample.backward == pytest.approx(46.7e12, rel=0.05)
    assert 4.5e12 < per_sample.pixels < 7e12
    assert per_sample.recompute < 0.05 * (per_sample.forward + per_sample.backward)
    assert found.parameters["trained"] == 869_661_380
    assert found.memory.state < 0.9 * 2**30
