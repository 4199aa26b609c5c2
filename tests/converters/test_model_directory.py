"""The model directory: complete or refused by name, written whole or not at all."""

import json
import shutil
import types

import jax
import numpy as np
import pytest
from checkpoints import ENCODERS, STAGES, VAE, draw, same
from safetensors.numpy import load_file, save_file

from keysync_jax.converters import hub, model_directory
from keysync_jax.converters.initialize import initialize
from keysync_jax.converters.lazy import LazyTensor
from keysync_jax.converters.parts import Part, part_table
from keysync_jax.converters.staging import staged
from keysync_jax.core.errors import KeySyncError, UsageError


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path, **changes):
    values = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        inner = values
        for name in parents:
            inner = inner[name]
        inner[leaf] = value
    path.write_text(json.dumps(values))


def test_contents(tiny_model):
    directory = model_directory.load(tiny_model, verify=True)
    assert list(directory.parts) == ["keyframe", "interpolation", "vae", "audio/hubert", "audio/wavlm"]
    assert directory.random and directory.describe()["random"]
    assert (directory.stage("keyframe"), directory.stage("interpolation")) == (STAGES["keyframe"], STAGES["interpolation"])
    assert (directory.vae, directory.audio("hubert"), directory.audio("wavlm")) == (VAE, *ENCODERS)
    config = json.loads((tiny_model / "keyframe" / "config.json").read_text())
    assert config["random"] is True and len(config["weights"]["sha256"]) == 64
    # Each stage file is complete for the reference, decoder included, in its own names.
    stored = load_file(tiny_model / "interpolation" / "model.safetensors")
    expected = {e.torch_key for e in (*part_table(STAGES["interpolation"]), *part_table(VAE, ("decoder",)))}
    assert set(stored) == expected and "model.learned_mask" in stored
    decoder = directory.tensors("vae").select(e.torch_key for e in part_table(VAE, ("decoder",)))
    assert all(np.array_equal(stored[key], decoder[key]) for key in decoder)


def test_parameters_fit_the_modules(tiny_model):
    from keysync_jax.models.stage import abstract_params, abstract_vae_params

    directory = model_directory.load(tiny_model)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)

    assert shapes(directory.params("interpolation")) == shapes(abstract_params(STAGES["interpolation"]))
    assert shapes(directory.params("vae")) == shapes(abstract_vae_params(VAE))
    half = directory.params("vae", dtype=np.float16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(np.float16)}


def lose_part(name):
    return lambda model: shutil.rmtree(model / name)


def drop_from_index(name):
    def spoil(model):
        parts = json.loads((model / "model_index.json").read_text())["parts"]
        edit(model / "model_index.json", parts=[p for p in parts if p != name])

    return spoil


def swap_encoders(model):
    shutil.copy(model / "audio/hubert/config.json", model / "audio/wavlm/config.json")


def widen_encoder(model):
    edit(model / "audio/hubert/config.json", config__hidden_size=64)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose_part("vae"), r"lacks its part vae \(.*vae/config\.json is missing\)"),
        (lose_part("audio/wavlm"), r"lacks its part audio/wavlm"),
        (drop_from_index("keyframe"), r"has no part keyframe"),
        (drop_from_index("audio/hubert"), r"no part audio/hubert, which the keyframe stage was trained with \(it has audio/wavlm\)"),
        (lambda m: (m / "interpolation/model.safetensors").unlink(), r"lacks the weights of its part interpolation"),
        (lambda m: (m / "model_index.json").unlink(), r"is not a model directory: it has no model_index\.json"),
        (lambda m: edit(m / "model_index.json", format_version=2), r"format version 2, this program reads 1; update"),
        (lambda m: (m / "model_index.json").write_text('{"_class_name": "StableVideoDiffusionPipeline"}'), r"diffusers folder\?"),
        (lambda m: (m / "model_index.json").write_text("{"), r"not valid JSON"),
        (lambda m: edit(m / "model_index.json", colour="red"), r"unknown key colour"),
        (lambda m: edit(m / "model_index.json", parts=["../elsewhere"]), r"parts must be a list"),
        (lambda m: edit(m / "model_index.json", notes=5), r"model_index\.json: notes must be a list, not 5"),
        (lambda m: edit(m / "model_index.json", sources=["x.pt"]), r"model_index\.json: sources\[0\] must be a mapping, not 'x.pt'"),
        (lambda m: edit(m / "vae/config.json", fresh=5), r"vae/config\.json: fresh must be a list, not 5"),
        (lambda m: edit(m / "vae/config.json", fresh="proj_out"), r"fresh must be a list, not 'proj_out'"),
        (lambda m: edit(m / "vae/config.json", random="no"), r"vae/config\.json: random must be bool, not 'no'"),
        (lambda m: edit(m / "keyframe/config.json", config__sigma_max=700), r"keyframe/config\.json: unknown key sigma_max"),
        (lambda m: edit(m / "keyframe/config.json", config__unet__width=3), r"keyframe/config\.json: unet: unknown key width"),
        (lambda m: edit(m / "keyframe/config.json", config__latent_size="16"), r"latent_size must be int"),
        (lambda m: edit(m / "keyframe/config.json", config__stage="interpolation"), r"is for the interpolation stage, not for keyframe"),
        (lambda m: edit(m / "keyframe/config.json", config__resolution=256), r"keyframe stage has resolution 256.*128"),
        (lambda m: edit(m / "vae/config.json", config__latent_scale=0.13025), r"latent scale 0\.18215.*0\.13025"),
        (lambda m: edit(m / "vae/config.json", config__latent_channels=16), r"latent channels 4.*16"),
        (lambda m: edit(m / "keyframe/config.json", config__num_frames=28), r"num_frames is 28 for keyframes and 14"),
        (
            lambda m: edit(m / "interpolation/config.json", config__audio_encoder="hubert", config__audio_feature_dim=768),
            r"32 features.*768",
        ),
        (swap_encoders, r"audio/wavlm/config\.json describes 'audio/hubert'"),
        (
            lambda m: (swap_encoders(m), edit(m / "audio/wavlm/config.json", part="audio/wavlm")),
            r"is a hubert encoder; it belongs in audio/hubert",
        ),
        (widen_encoder, r"audio/hubert gives 64 features per token, but the keyframe stage reads 32"),
        (lambda m: edit(m / "vae/config.json", weights=None), r"lacks weights\.sha256"),
    ],
)
def test_what_does_not_belong_together_is_refused_by_name(spoil, words, model):
    spoil(model)
    with pytest.raises(KeySyncError, match=words) as caught:
        model_directory.load(model)
    assert "\n" not in str(caught.value)


def test_incomplete_directories_open_for_inspection(model):
    drop_from_index("vae")(model)
    assert "vae" not in model_directory.load(model, complete=False).parts
    with pytest.raises(KeySyncError, match="has no part vae; it has keyframe"):
        _ = model_directory.load(model, complete=False).vae


def change_file(model, part, change):
    path = model / part / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "model.diffusion_model.out.2.bias"


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("keyframe", lambda t: t.update({KEY: np.zeros(3, np.float32)}), rf"1 tensor of the wrong shape: {KEY} is \(3,\), expected \(4,\)"),
        ("keyframe", lambda t: t.pop(KEY), rf"1 tensor missing: {KEY}"),
        ("keyframe", lambda t: t.update({"extra.weight": np.zeros(1, np.float32)}), r"1 tensor unexpected: extra\.weight"),
        ("keyframe", lambda t: t.pop("first_stage_model.decoder.conv_in.bias"), r"missing: first_stage_model\.decoder\.conv_in\.bias"),
        ("interpolation", lambda t: t.update({"model.learned_mask": np.zeros((4, 16, 8), np.float32)}), r"learned_mask is \(4, 16, 8\)"),
        ("vae", lambda t: t.pop("first_stage_model.quant_conv.bias"), r"vae/model\.safetensors.*quant_conv\.bias"),
        ("audio/hubert", lambda t: t.update({"encoder.layer_norm.bias": np.zeros(5, np.float32)}), r"encoder\.layer_norm\.bias is \(5,\)"),
    ],
)
def test_weights_that_do_not_fit_are_named(part, change, words, model):
    change_file(model, part, change)
    with pytest.raises(KeySyncError, match=words):
        model_directory.load(model).params(part)


def test_a_stage_without_the_decoder_still_loads(model):
    """The reference needs the decoder in a stage's file; dubbing reads it from vae/ alone."""
    before = model_directory.load(model).params("keyframe")

    def change(tensors):
        for key in [k for k in tensors if k.startswith("first_stage_model.")]:
            del tensors[key]

    change_file(model, "keyframe", change)
    jax.tree.map(np.testing.assert_array_equal, model_directory.load(model).params("keyframe"), before)


def test_hashes_are_checked_on_request(model):
    change_file(model, "vae", lambda t: t["first_stage_model.decoder.conv_out.bias"].__iadd__(1))
    model_directory.load(model)
    with pytest.raises(KeySyncError, match=r"vae/model\.safetensors has SHA-256"):
        model_directory.load(model, verify=True)


def test_log_mel_has_a_config_and_no_weights(tmp_path):
    from keysync_jax.converters.assemble_audio import without_weights

    stage = STAGES["keyframe"].__class__(**{**STAGES["keyframe"].__dict__, "audio_encoder": "log_mel"})
    parts = [Part("keyframe", stage, draw(part_table(stage))), *without_weights([stage], {})]
    directory = model_directory.save(tmp_path / "model", parts)
    assert [p.name for p in (tmp_path / "model/audio/log_mel").iterdir()] == ["config.json"]
    assert directory.params("audio/log_mel") == {} and directory.audio("log_mel").hidden_size == 32
    assert directory.parts["audio/log_mel"].weights is None


# -- writing ------------------------------------------------------------------------------------------------------------------------


def vae_part(tensors=None):
    return Part("vae", VAE, draw(part_table(VAE)) if tensors is None else tensors)


def test_the_warning_about_random_weights_names_the_folder_as_it_is(monkeypatch, tmp_path, capsys):
    saved = types.SimpleNamespace(path=str(tmp_path / "tiny[bold]"))
    monkeypatch.setattr("keysync_jax.converters.initialize.model_directory.save", lambda *args, **kwargs: saved)
    initialize("tiny", saved.path)
    assert f"{saved.path} holds RANDOM weights" in capsys.readouterr().err


def test_random_weights_of_a_negative_seed(tmp_path):
    with pytest.raises(UsageError, match="seed is -1; it must not be negative"):
        initialize("tiny", tmp_path / "tiny", seed=-1)
    assert not (tmp_path / "tiny").exists()


def test_nothing_half_written_remains(tmp_path):
    tensors = draw(part_table(VAE))
    calls = []

    def fail():
        calls.append(sorted(p.name for p in tmp_path.iterdir()))
        raise OSError("disk full")

    last = list(tensors)[-1]
    broken = tensors.updated({last: LazyTensor(tensors.info(last).shape, np.dtype(np.float32), fail)})
    with pytest.raises(OSError, match="disk full"):
        model_directory.save(tmp_path / "model", [vae_part(broken)])
    assert len(calls) == 1 and calls[0] != ["model"] and calls[0] != []  # it was being written beside its place
    assert list(tmp_path.iterdir()) == []


def test_overwriting(tmp_path):
    target = tmp_path / "model"
    target.mkdir()  # an empty folder is fine
    model_directory.save(target, [vae_part()])
    with pytest.raises(KeySyncError, match="is not empty; .*--force"):
        model_directory.save(target, [vae_part()])
    other = draw(part_table(VAE), seed=1)
    (target / "vae" / "left-over.txt").write_text("x")
    assert same(model_directory.save(target, [vae_part(other)], force=True).tensors("vae"), other)
    assert not (target / "vae" / "left-over.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(KeySyncError, match="holds other files than ours"):
        model_directory.save(precious, [vae_part()], force=True)
    assert (precious / "thesis.txt").exists()
    with pytest.raises(KeySyncError, match="is a file"):
        model_directory.save(precious / "thesis.txt", [vae_part()])
    with pytest.raises(KeySyncError, match="nowhere does not exist"):
        model_directory.save(tmp_path / "nowhere" / "model", [vae_part()])


def test_a_failed_replacement_keeps_the_old_one(tmp_path):
    old = draw(part_table(VAE))
    model_directory.save(tmp_path / "model", [vae_part(old)])
    with pytest.raises(RuntimeError), staged(tmp_path / "model", force=True, replaceable=model_directory.is_model_directory):
        raise RuntimeError("stopped")
    assert same(model_directory.load(tmp_path / "model", complete=False).tensors("vae"), old)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_save_pretrained_copies_everything(tiny_model, tmp_path):
    directory = model_directory.load(tiny_model)
    copy = directory.save(tmp_path / "copy")
    for name in directory.parts:
        if directory.parts[name].weights:
            assert (tmp_path / "copy" / name / "model.safetensors").read_bytes() == (tiny_model / name / "model.safetensors").read_bytes()
    assert copy.parts == directory.parts and copy.index == directory.index


# -- hub ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parsed"),
    [
        ("hub:owner/name", ("owner/name", "", None)),
        ("hub:owner/name@v1.0", ("owner/name", "", "v1.0")),
        ("hub:owner/name@refs/pr/1", ("owner/name", "", "refs/pr/1")),
        ("hub:owner/name/checkpoints/keyframe_dub.pt@main", ("owner/name", "checkpoints/keyframe_dub.pt", "main")),
        ("hub:owner/name/vae/", ("owner/name", "vae", None)),
    ],
)
def test_hub_paths(path, parsed):
    assert hub.parse(path) == parsed


@pytest.mark.parametrize("path", ["hub:", "hub:owner", "hub:owner/", "hub:a b/c", "hub:owner/name/../../etc"])
def test_malformed_hub_paths(path):
    with pytest.raises(UsageError, match="hub:owner/name"):
        hub.parse(path)


def test_hub_download(tiny_model, monkeypatch):
    import huggingface_hub

    calls = []

    def fake(repo, revision=None, allow_patterns=None):
        calls.append((repo, revision, allow_patterns))
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    assert model_directory.load("hub:owner/tiny@v2").vae == VAE
    assert hub.resolve("hub:owner/tiny/vae") == str(tiny_model / "vae")
    assert calls == [("owner/tiny", "v2", None), ("owner/tiny", None, ["vae", "vae/*"])]
    with pytest.raises(KeySyncError, match="owner/tiny has no file or folder missing.pt at v2"):
        hub.resolve("hub:owner/tiny/missing.pt@v2")
    assert hub.resolve("/some/local/path") == "/some/local/path"


def test_hub_without_a_network_is_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(KeySyncError, match=r"cannot download hub:owner/absent: .*network") as caught:
        model_directory.load("hub:owner/absent")
    assert "\n" not in str(caught.value)


@pytest.fixture
def bucket(tmp_path):
    """`gs://` paths land in a folder, and the folder's own files cannot be mapped or renamed through them."""
    from etils.epath import testing

    root = tmp_path / "store"
    root.mkdir()

    def local(path):
        return str(root / str(path).removeprefix("gs://")) if str(path).startswith("gs://") else str(path)

    def forwarded(original, path, *args, **kwargs):
        return original(local(path), *args, **kwargs)

    def refused(original, path, *args, **kwargs):
        raise AssertionError("an object store renames no folders")

    names = ("exists", "isdir", "listdir", "makedirs", "mkdir", "open", "remove", "rmtree", "stat")
    with testing.mock_epath(**{name: forwarded for name in names}, rename=refused, replace=refused):
        yield root


def test_remote_directories(tiny_model, bucket, tmp_path):
    from keysync_jax.converters.export import export

    local = model_directory.load(tiny_model)
    remote = local.save("gs://bucket/model")
    assert (bucket / "bucket/model/keyframe/model.safetensors").is_file()
    remote.verify()
    for name in ("keyframe", "audio/wavlm"):
        jax.tree.map(np.testing.assert_array_equal, remote.params(name), local.params(name))
    with pytest.raises(KeySyncError, match="gs://bucket/model is not empty"):
        local.save("gs://bucket/model")
    assert list(local.save("gs://bucket/model", force=True).parts) == list(local.parts)
    export("gs://bucket/model", "gs://bucket/out", "diffusers", stages=["keyframe"])
    assert same(model_directory.load(tiny_model).tensors("vae"), remote.tensors("vae"))
    with pytest.raises(KeySyncError, match="torch files are written to a local disk"):
        export("gs://bucket/model", "gs://bucket/pt", "keysync")
    assert sorted(p.name for p in (bucket / "bucket").iterdir()) == ["model", "out"]  # nothing half-written there either


def test_remote_paths_without_their_package_are_one_clear_line():
    with pytest.raises(KeySyncError, match=r"gs://bucket/model"):
        model_directory.load("gs://bucket/model")
