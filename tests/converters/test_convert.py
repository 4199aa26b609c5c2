"""`convert`: any mix of sources to a model directory, every tensor accounted for."""

import dataclasses
import json
import math

import numpy as np
import pytest
from checkpoints import (
    ENCODERS,
    HEADS,
    HUBERT,
    STAGES,
    SVD,
    VAE,
    WAVLM,
    draw,
    merged,
    same,
    save_hf_encoder,
    save_microsoft_wavlm,
    save_stage,
    save_svd_file,
    save_svd_folder,
    stage_tensors,
    svd_tensors,
)
from rich.console import Console

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.converters import assemble_stage, model_directory, safetensors_file, sgm, shapes, torch_write
from keysync_jax.converters.byte_progress import byte_progress
from keysync_jax.converters.containers import Source
from keysync_jax.converters.convert import Options, convert
from keysync_jax.converters.fresh import fresh
from keysync_jax.converters.lazy import BFLOAT16, LazyTensor, Tensors, constant
from keysync_jax.converters.parts import kl_table, part_table
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.models.speech import registry

DIFFUSION = "model.diffusion_model."


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """One good source of every kind."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        "keyframe": save_stage(folder / "keyframe_dub.pt", "keyframe"),
        "interpolation": save_stage(folder / "interpolation_dub.pt", "interpolation", seed=2),
        "svd": save_svd_folder(folder / "svd"),
        "svd_file": save_svd_file(folder / "svd.safetensors"),
        "hubert": save_hf_encoder(folder / "hubert", HUBERT, "bin"),
        "wavlm": save_hf_encoder(folder / "wavlm", WAVLM, parametrized=True),
        "wavlm_pt": save_microsoft_wavlm(folder / "WavLM-Base+.pt"),
    }


def run(sources, names, out, **options):
    options = {"head_channels": HEADS} | options
    return convert([str(sources.get(name, name)) for name in names], out, **options)


@pytest.mark.parametrize(
    "names",
    [
        ("keyframe", "interpolation", "svd", "hubert", "wavlm_pt"),
        ("wavlm", "svd_file", "interpolation", "hubert", "keyframe"),
    ],
)
def test_any_mix_gives_the_same_directory(names, sources, tmp_path):
    result = run(sources, names, tmp_path / "model")
    directory = model_directory.load(tmp_path / "model", verify=True)
    assert not directory.random
    for name, seed in (("keyframe", 1), ("interpolation", 2)):
        # The file does not say the resolution; the learned filler's size does. Everything else is the released models' way.
        assert directory.stage(name) == STAGES[name]
        assert same(directory.tensors(name), stage_tensors(name, seed=seed))
    assert (directory.audio("hubert"), directory.audio("wavlm")) == tuple(ENCODERS)
    for config in ENCODERS:
        assert same(directory.tensors(f"audio/{config.kind}"), draw(registry.audio_table(config), 5))
    if "svd" in names:
        assert directory.vae == VAE and same(directory.tensors("vae"), svd_tensors().select(e.torch_key for e in part_table(VAE)))
    else:
        # The single file has two encoders: the conditioner's comes with its quant_conv.
        assert any("VAE encoder and quant_conv taken from conditioner.embedders.3.encoder" in note for note in result.notes)
        kl = draw(kl_table(VAE), 8)
        np.testing.assert_array_equal(
            directory.tensors("vae")["first_stage_model.encoder.conv_in.weight"],
            kl["conditioner.embedders.0.encoder.encoder.conv_in.weight"],
        )
        assert "first_stage_model.quant_conv.weight" in directory.tensors("vae")
    frozen = sum(sgm.is_frozen(e.torch_key) for e in part_table(STAGES["keyframe"]))
    for name in STAGES:
        assert f"{name}: all {frozen} temporal tensors equal SVD's bit for bit" in result.notes
    assert any("does not say what it was trained with; assumed: wavlm features, box mask" in note for note in result.notes)


def test_sources_are_recorded(sources, tmp_path):
    import hashlib

    run(sources, ("keyframe", "interpolation", "svd", "hubert", "wavlm_pt"), tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    recorded = {source["file"]: source for source in index["sources"]}
    data = sources["wavlm_pt"].read_bytes()
    assert recorded["WavLM-Base+.pt"] == {"file": "WavLM-Base+.pt", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {"keyframe_dub.pt", "interpolation_dub.pt", "pytorch_model.bin"} <= set(recorded)
    assert index["converter"].startswith("keysync-jax ") and index["notes"]


def test_trained_temporal_layers_are_reported(sources, tmp_path):
    trained = save_stage(tmp_path / "trained.pt", "keyframe", frozen_from_svd=False)
    names = (str(trained), "interpolation", "svd", "hubert", "wavlm")
    notes = run(sources, names, tmp_path / "model").notes
    assert any(note.startswith("keyframe: ") and "temporal tensors differ from SVD's, so they were trained" in note for note in notes)
    assert any(note.startswith("interpolation: all ") for note in notes)


def test_half_precision_svd_is_compared_after_rounding(sources, tmp_path):
    for name in ("unet", "vae"):
        (tmp_path / "svd" / name).mkdir(parents=True)
        stored = safetensors_file.read(sources["svd"] / name / "diffusion_pytorch_model.safetensors")
        safetensors_file.write(tmp_path / "svd" / name / "diffusion_pytorch_model.fp16.safetensors", stored.astype(np.dtype(np.float16)))
        (tmp_path / "svd" / name / "config.json").write_bytes((sources["svd"] / name / "config.json").read_bytes())
    result = run(sources, ("keyframe", "interpolation", str(tmp_path / "svd"), "hubert", "wavlm"), tmp_path / "model")
    assert sum("temporal tensors equal SVD's after rounding to the narrower type" in note for note in result.notes) == 2
    # The encoder keeps the type of its source, the decoder is the checkpoints'.
    types = {key.split(".")[1]: t.dtype for key, t in result.directory.tensors("vae").lazy_items()}
    assert types == {"encoder": np.dtype(np.float16), "quant_conv": np.dtype(np.float16), "decoder": np.dtype(np.float32)}
    assert any("VAE decoder tensors differ" in note for note in result.notes)


def test_the_checkpoints_decoder_wins_and_is_reported(sources, tmp_path):
    own = save_stage(tmp_path / "keyframe.pt", "keyframe", decoder_seed=11)
    result = run(sources, (str(own), "interpolation", "svd", "hubert", "wavlm"), tmp_path / "model")
    decoder = [e.torch_key for e in part_table(VAE, ("decoder",))]
    assert any("interpolation_dub.pt and" in note and f"differ in {len(decoder)} VAE decoder tensors" in note for note in result.notes)
    assert same(result.directory.tensors("vae").select(decoder), svd_tensors().select(decoder))  # interpolation makes the final frames
    assert same(result.directory.tensors("keyframe"), stage_tensors("keyframe", decoder_seed=11))  # published as it was
    both = save_stage(tmp_path / "interpolation.pt", "interpolation", decoder_seed=11)
    result = run(sources, (str(own), str(both), "svd", "hubert", "wavlm"), tmp_path / "model2")
    assert any(
        f"interpolation.pt: {len(decoder)} of {len(decoder)} VAE decoder tensors differ from those of" in note for note in result.notes
    )
    assert same(result.directory.tensors("vae").select(decoder), draw(part_table(VAE, ("decoder",)), 11))


def spoiled(name, change, tmp_path):
    tensors = dict(stage_tensors(name).lazy_items())
    change(tensors)
    return str(save_stage(tmp_path / f"{name}_spoiled.pt", name, tensors=Tensors(tensors, "spoiled")))


ZERO = constant(np.zeros(3, np.float32))
SKIP = f"{DIFFUSION}out.2.weight"


def spoil_everything(tensors):
    del tensors[f"{DIFFUSION}time_embed.2.bias"], tensors["conditioner.embedders.2.linear.bias"]
    tensors["loss_fn.scale"] = ZERO
    tensors[f"{DIFFUSION}input_blocks.1.0.in_layers.2.bias"] = ZERO


def test_all_problems_are_named_at_once_and_nothing_is_written(sources, tmp_path):
    bad = spoiled("keyframe", spoil_everything, tmp_path)
    with pytest.raises(KeySyncError) as caught:
        run(sources, (bad, "interpolation", "svd", "hubert", "wavlm"), tmp_path / "model")
    line = str(caught.value)
    assert f"2 tensors missing: {DIFFUSION}time_embed.2.bias, conditioner.embedders.2.linear.bias" in line
    assert "1 tensor unexpected: loss_fn.scale" in line
    assert f"1 tensor of the wrong shape: {DIFFUSION}input_blocks.1.0.in_layers.2.bias is (3,), expected (32,)" in line
    assert "--allow-unexpected loss_fn.scale" in line and "\n" not in line
    assert not (tmp_path / "model").exists()


def test_each_is_allowed_by_its_own_name(sources, tmp_path):
    bad = spoiled("keyframe", spoil_everything, tmp_path)
    names = (bad, "interpolation", "svd", "hubert", "wavlm")
    missing = [
        f"{DIFFUSION}time_embed.2.bias",
        "conditioner.embedders.2.linear.bias",
        f"{DIFFUSION}input_blocks.1.0.in_layers.2.bias",
    ]
    for left_out in range(3):
        with pytest.raises(KeySyncError, match=missing[left_out].replace(".", r"\.")) as caught:
            run(
                sources,
                names,
                tmp_path / "model",
                allow_missing=missing[:left_out] + missing[left_out + 1 :],
                allow_unexpected=["loss_fn.scale"],
            )
        assert all(name not in str(caught.value) for name in missing if name != missing[left_out])
    with pytest.raises(KeySyncError, match=r"unexpected: loss_fn\.scale \(to go on .*--allow-unexpected loss_fn\.scale\)"):
        run(sources, names, tmp_path / "model", allow_missing=missing)
    result = run(sources, names, tmp_path / "model", allow_missing=missing, allow_unexpected=["loss_fn.scale", "never.there"])
    stored = result.directory.tensors("keyframe")
    assert set(result.directory.parts["keyframe"].fresh) == set(missing) and "loss_fn.scale" not in stored
    # Drawn as torch would draw them: uniform in the range of the layer's kernel.
    value, bound = stored["conditioner.embedders.2.linear.bias"], 1 / math.sqrt(32)
    assert 0.3 * bound < np.abs(value).max() <= bound
    assert any("drawn at random" in note and missing[0] in note for note in result.notes)
    assert any("allowed but not needed: never.there" in note for note in result.notes)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("interpolation", lambda t: t.pop("model.learned_mask"), r"missing: model\.learned_mask"),
        ("interpolation", lambda t: t.update({"model.learned_mask": constant(np.zeros((4, 16, 8), np.float32))}), r"16x8; only square"),
        ("keyframe", lambda t: t.pop("first_stage_model.decoder.conv_out.bias"), r"missing: first_stage_model\.decoder\.conv_out\.bias"),
        ("keyframe", lambda t: t.pop(f"{DIFFUSION}time_embed.0.weight"), r"time_embed\.0\.weight is missing, so the sizes"),
        ("keyframe", lambda t: t.update({f"{DIFFUSION}input_blocks.9.0.op.weight": ZERO}), r"levels of equal depth"),
        ("keyframe", lambda t: t.update({f"{DIFFUSION}input_blocks.1.0.extra": ZERO}), r"unexpected: .*input_blocks\.1\.0\.extra"),
    ],
)
def test_other_spoiled_checkpoints(name, change, words, sources, tmp_path):
    names = [n for n in ("keyframe", "interpolation", "svd", "hubert", "wavlm") if n != name]
    with pytest.raises(KeySyncError, match=words):
        run(sources, [spoiled(name, change, tmp_path), *names], tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_checkpoint_without_decoder_gets_svds(sources, tmp_path):
    def change(tensors):
        for key in [k for k in tensors if k.startswith("first_stage_model.")]:
            del tensors[key]

    path = spoiled("keyframe", change, tmp_path)
    result = run(sources, (path, "interpolation", "svd", "hubert", "wavlm"), tmp_path / "model")
    assert any("has no VAE decoder" in note for note in result.notes)
    assert same(result.directory.tensors("keyframe"), stage_tensors("keyframe"))


def test_optional_vae_copies_are_recognised(sources, tmp_path):
    copies = merged(draw(kl_table(VAE), 3), draw([e for e in part_table(VAE, ("encoder",)) if "quant_conv" not in e.torch_key], 4))
    full = save_stage(tmp_path / "interpolation.pt", "interpolation", tensors=merged(stage_tensors("interpolation"), copies))
    result = run(sources, (str(full), "keyframe", "svd", "hubert", "wavlm"), tmp_path / "model")
    assert any(f"{len(copies)} optional VAE copies were recognised and left out" in note for note in result.notes)
    assert same(result.directory.tensors("interpolation"), stage_tensors("interpolation"))
    # Without SVD, the first stage's own encoder serves; it has no quant_conv.
    result = run(sources, (str(full), "keyframe", "hubert", "wavlm"), tmp_path / "model2")
    assert not result.directory.vae.quant_conv
    np.testing.assert_array_equal(
        result.directory.tensors("vae")["first_stage_model.encoder.conv_in.weight"], copies["first_stage_model.encoder.conv_in.weight"]
    )
    # A key that only looks like a copy is unexpected.
    odd = {"conditioner.embedders.0.encoder.logvar": ZERO}
    path = save_stage(tmp_path / "odd.pt", "interpolation", tensors=merged(stage_tensors("interpolation"), copies).updated(odd))
    with pytest.raises(KeySyncError, match=r"unexpected: conditioner\.embedders\.0\.encoder\.logvar"):
        run(sources, (str(path), "keyframe", "svd", "hubert", "wavlm"), tmp_path / "model3")


def test_svd_alone_starts_a_training(sources, tmp_path):
    for source in ("svd", "svd_file"):
        result = run(sources, (source,), tmp_path / source)
        directory = result.directory
        expected = {
            "keyframe": [
                f"{DIFFUSION}label_emb.0.0.weight",
                "conditioner.embedders.2.linear.weight",
                "conditioner.embedders.2.linear.bias",
            ],
        }
        expected["interpolation"] = [f"{DIFFUSION}input_blocks.0.0.weight", *expected["keyframe"], "model.learned_mask"]
        svd = svd_tensors()
        for name, fresh_keys in expected.items():
            stored = directory.tensors(name)
            assert set(directory.parts[name].fresh) == set(fresh_keys)
            unchanged = [k for k in stored if k not in fresh_keys]
            assert same(stored.select(unchanged), svd.select(unchanged))
            assert any(
                f"{name}: {DIFFUSION}label_emb.0.0.weight is (128, 48) in SVD and (128, 32) in KeySync" in note for note in result.notes
            )
        # The reference's fresh layers: uniform in +-1/sqrt(fan in); the filler starts at zero.
        label = directory.tensors("keyframe")[f"{DIFFUSION}label_emb.0.0.weight"]
        assert 0.95 / math.sqrt(32) < np.abs(label).max() <= 1 / math.sqrt(32) and abs(label.mean()) < 0.01
        conv_in = directory.tensors("interpolation")[f"{DIFFUSION}input_blocks.0.0.weight"]
        assert conv_in.shape == (32, 9, 3, 3) and 0.95 / 9 < np.abs(conv_in).max() <= 1 / 9
        assert not directory.tensors("interpolation")["model.learned_mask"].any()
        assert {note for note in result.notes if "has no audio/" in note} == {
            "the directory has no audio/hubert, which a dub needs",
            "the directory has no audio/wavlm, which a dub needs",
        }
    with pytest.raises(KeySyncError, match="no part audio/hubert"):
        model_directory.load(tmp_path / "svd")


def test_a_stage_has_keysyncs_windows_whatever_svd_was_made_for():
    xt = dataclasses.replace(STAGES["keyframe"].unet, audio_cond_method="none", adm_in_channels=48, num_frames=25)
    assert shapes.with_audio(xt, "keyframe").num_frames == STAGES["keyframe"].num_frames == 14


def test_svd_with_a_hole_is_refused(sources, tmp_path):
    tensors = dict(svd_tensors().lazy_items())
    del tensors[f"{DIFFUSION}middle_block.0.in_layers.0.bias"]
    tensors[f"{DIFFUSION}extra.weight"] = ZERO
    safetensors_file.write(tmp_path / "svd.safetensors", Tensors(tensors, "svd"))
    with pytest.raises(
        KeySyncError, match=r"1 tensor missing: .*middle_block\.0\.in_layers\.0\.bias; 1 tensor unexpected: .*extra\.weight"
    ):
        run(sources, (str(tmp_path / "svd.safetensors"),), tmp_path / "model")


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (("keyframe", "svd", "hubert", "wavlm"), KeySyncError, r"no source for interpolation \(a KeySync checkpoint"),
        (("keyframe", "interpolation", "hubert", "wavlm"), KeySyncError, r"no source for vae \(Stable Video Diffusion's VAE"),
        (("keyframe", "interpolation", "svd", "wavlm"), KeySyncError, r"no source for audio/hubert.*keyframe stage was trained with"),
        (("keyframe", "keyframe"), UsageError, r"both KeySync keyframe checkpoint"),
        (("wavlm", "wavlm_pt"), UsageError, r"both WavLM"),
        (("svd", "svd_file"), UsageError, r"give one of them"),
    ],
)
def test_incomplete_and_doubled_sources(names, error, words, sources, tmp_path):
    with pytest.raises(error, match=words):
        run(sources, names, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_parts_can_be_left_out_by_name(sources, tmp_path):
    result = run(sources, ("keyframe", "svd", "hubert"), tmp_path / "model", allow_missing=["interpolation"])
    assert list(result.directory.parts) == ["keyframe", "vae", "audio/hubert"]
    assert "the directory has no interpolation, which a dub needs" in result.notes


def test_encoder_mask_and_type_can_be_said(sources, tmp_path):
    options = {"encoders": {"interpolation": "hubert"}, "mask": "mouth", "dtype": "bfloat16"}
    result = run(sources, ("keyframe", "interpolation", "svd", "hubert"), tmp_path / "model", **options)
    stage = model_directory.load(tmp_path / "model").stage("interpolation")
    assert (stage.audio_encoder, stage.mask.kind) == ("hubert", "mouth")
    assert {t.dtype for _, t in result.directory.tensors("keyframe").lazy_items()} == {BFLOAT16}
    with pytest.raises(KeySyncError, match="32 features per token, but the interpolation stage reads"):
        tensors = dict(stage_tensors("interpolation").lazy_items())
        tensors["conditioner.embedders.2.linear.weight"] = constant(np.zeros((32, 80), np.float32))
        path = save_stage(tmp_path / "wide.pt", "interpolation", tensors=Tensors(tensors, "x"))
        run(sources, ("keyframe", str(path), "svd", "hubert", "wavlm"), tmp_path / "model2")
    with pytest.raises(UsageError, match="dtype 'int8'"):
        run(sources, ("keyframe",), tmp_path / "model2", dtype="int8")
    with pytest.raises(UsageError, match="resolution 512 does not fit"):
        run(sources, ("keyframe", "interpolation", "svd"), tmp_path / "model2", resolution=512)
    with pytest.raises(KeySyncError, match="shapes do not show how wide the heads"):
        run(sources, ("keyframe", "interpolation", "svd", "hubert", "wavlm"), tmp_path / "model2", head_channels=None)


def test_log_mel_stages_need_no_encoder_file(sources, tmp_path):
    options = {"encoders": {"keyframe": "log_mel", "interpolation": "log_mel"}}
    result = run(sources, ("keyframe", "interpolation", "svd"), tmp_path / "model", **options)
    assert list(result.directory.parts) == ["keyframe", "interpolation", "vae", "audio/log_mel"]
    model_directory.load(tmp_path / "model")


def test_speech_encoder_problems(sources, tmp_path):
    folder = save_hf_encoder(tmp_path / "hubert", HUBERT)
    tensors = dict(safetensors_file.read(folder / "model.safetensors").lazy_items())
    head = Tensors({f"hubert.{k}": t for k, t in tensors.items()} | {"lm_head.weight": ZERO}, "ctc")
    (tmp_path / "ctc").mkdir()
    (tmp_path / "ctc" / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch_write.write(tmp_path / "ctc" / "pytorch_model.bin", head, wrapper=None)
    names = ("keyframe", "interpolation", "svd", str(tmp_path / "ctc"), "wavlm")
    with pytest.raises(KeySyncError, match=r"unexpected: lm_head\.weight"):
        run(sources, names, tmp_path / "model")
    result = run(sources, names, tmp_path / "model", allow_unexpected=["lm_head.weight"])
    assert same(result.directory.tensors("audio/hubert"), Tensors(tensors, "x"))
    (folder / "config.json").unlink()
    with pytest.raises(KeySyncError, match="needs the config.json that belongs beside it"):
        run(sources, ("keyframe", "interpolation", "svd", str(folder), "wavlm"), tmp_path / "model2")


def test_the_folder_is_checked_before_anything_is_read(sources, tmp_path, monkeypatch):
    def read(path):
        raise AssertionError(f"{path} was opened first")

    monkeypatch.setattr("keysync_jax.converters.convert.open_sources", read)
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    for out, words in ((used, "used is not empty"), (tmp_path / "no" / "model", "no does not exist; make the folder first")):
        with pytest.raises(KeySyncError, match=words):
            run(sources, ("keyframe",), out)
    with pytest.raises(KeySyncError, match="holds other files than ours"):
        run(sources, ("keyframe",), used, force=True)


def test_long_work_says_how_far_it_is_in_a_log_too(monkeypatch, capsys):
    monkeypatch.setattr("keysync_jax.core.progress.LINE_SECONDS", 0.0)
    for console, total, said in (
        (Console(stderr=True), 600 * 2**20, ["writing, MiB: 300/600 after"]),
        (Console(stderr=True), 600, []),  # done before it could be read
        (Console(quiet=True), 600 * 2**20, []),
    ):
        with byte_progress(console, "writing", total) as advance:
            advance(total // 2)
        assert [line[:27] for line in capsys.readouterr().err.splitlines()] == said


def test_unknown_tensors_and_no_sources(sources, tmp_path):
    safetensors_file.write(tmp_path / "net.safetensors", Tensors({"fc.weight": ZERO}, "net"))
    with pytest.raises(KeySyncError, match=r"net\.safetensors holds tensors of an unknown model \(fc\.weight\)"):
        run(sources, ("keyframe", str(tmp_path / "net.safetensors")), tmp_path / "model")
    with pytest.raises(KeySyncError, match="no weights to convert"):
        convert([], tmp_path / "model")


# -- the released layout, without its gigabytes: shapes only --------------------------------------------------------------------------


def announced(tensors_in_manifest) -> Tensors:
    """Tensors that have shapes and types and would fail if they were read."""

    def refuse():
        raise AssertionError("a shape-only test read a tensor")

    return Tensors({k: LazyTensor(tuple(t["shape"]), np.dtype(t["dtype"]), refuse) for k, t in tensors_in_manifest.items()}, "manifest")


@pytest.mark.parametrize(
    ("manifest", "name", "mapped", "copies", "parameters"),
    [
        ("keysync_keyframe", "keyframe", 1696, 0, 1_524_950_762),
        ("keysync_keyframe_with_encoder", "keyframe", 1696, 106, 1_524_950_762),
        ("keysync_interpolation", "interpolation", 1697, 248, 1_524_953_642),
    ],
)
def test_released_layout(manifest, name, mapped, copies, parameters, golden_dir):
    stored = json.loads((golden_dir / "manifests" / f"{manifest}.json").read_text())["tensors"]
    source = Source(name, "released.pt", "manifest", announced(stored))
    notes, used = [], set()
    part = assemble_stage.from_checkpoint(source, name, None, {}, Options(), notes, used)
    unet = UNetConfig(in_channels=9 if name == "interpolation" else 8)
    assert part.config == StageConfig(stage=name, unet=unet, audio_encoder="wavlm" if name == "interpolation" else "hubert")
    assert len(part.tensors) == mapped and not used and not part.fresh
    assert (f"released.pt: {copies} optional VAE copies were recognised and left out" in notes) == bool(copies)
    assert set(stored) - set(part.tensors) == {
        k for k in stored if k.startswith(("first_stage_model.encoder.", "conditioner.embedders.0."))
    }
    assert all(part.tensors.info(key).shape == tuple(stored[key]["shape"]) for key in part.tensors)
    assert sum(t.size for key, t in part.tensors.lazy_items() if key.startswith(DIFFUSION)) == parameters
    assert sum(sgm.is_frozen(key) for key in part.tensors) == 738
    assert sum(key.startswith(DIFFUSION) and not sgm.is_frozen(key) for key in part.tensors) == 690


def test_svd_at_full_size(golden_dir):
    """What a training on the released SVD starts from: the reference's re-initialised layers, and no others."""
    stored = json.loads((golden_dir / "manifests" / "svd_sgm_unet.json").read_text())["tensors"]
    source = Source("svd", "svd.safetensors", "manifest", announced(stored))
    settings = {"latent_size": 64, "resolution": 512}
    for name, drawn in (("keyframe", 3), ("interpolation", 5)):
        notes = []
        part = assemble_stage.from_svd(source, name, None, settings | {"audio_encoder": "hubert"}, Options(), notes, set())
        assert len(part.fresh) == drawn
        assert f"{name}: {DIFFUSION}label_emb.0.0.weight is (1280, 768) in SVD and (1280, 1024) in KeySync; drawn at random" in notes
        assert part.config.unet.num_head_channels == 64 and part.config.unet.context_dim == 1024
        weight = part.tensors[f"{DIFFUSION}label_emb.0.0.weight"]
        assert weight.shape == (1280, 1024) and np.abs(weight).max() <= 1 / 32


def test_random_tensors_are_those_of_the_models_own_initialisation():
    from keysync_jax.models.stage import init_params

    stage = STAGES["interpolation"]
    table = part_table(stage)
    ours = fresh(table, 4, zero_init=False, gain=1.5, constants={"mix_factor": 0.5, "learned_mask": 0.0})
    theirs = init_params(stage, 4, zero_init=False, gain=1.5)
    from keysync_jax.converters.lazy import from_params

    assert same(ours, from_params(table, theirs))
    assert SVD.label_dim == 48 and VAEConfig().downsample_factor == 8
