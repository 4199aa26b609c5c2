"""The columns of networks in PyTorch's formats: wav2vec2 and Whisper tokens, and masks that SAM 2 follows. Slow because of its imports:

pip install 'keysync-jax[torch,data]' && pip install --no-deps sam2==1.1.0
pytest -m slow -n 0 tests/data_pipeline/test_prepare_torch.py
"""

import functools
import json

import numpy as np
import pytest

from keysync_jax.converters import assemble_audio
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.groups import plan_features
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.prepare.run import prepare
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import InterpolationWindows
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.models.speech import registry, torch_encoder
from keysync_jax.models.speech.registry import COLUMNS
from keysync_jax.models.table import to_flax

pytestmark = pytest.mark.slow

FRAMES = 30


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory):
    """Folder with a tiny random wav2vec2 in Hugging Face's layout."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("wav2vec2")
    transformers.Wav2Vec2Model(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """Folder with a tiny random Whisper."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=48,
        decoder_ffn_dim=48, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("whisper")
    transformers.WhisperModel(config).save_pretrained(path)
    return path


def encoder_of(folder):
    """wav2vec2 as this package runs it."""
    part, _ = assemble_audio.open_encoder("wav2vec2", str(folder))
    return AudioFeatures(part.config, to_flax(registry.audio_table(part.config), part.tensors))


def voice(seconds, seed=0):
    rng = np.random.default_rng(seed)
    return (0.2 * np.sin(np.cumsum(0.05 + 0.02 * rng.standard_normal(round(16000 * seconds))))).astype(np.float32)


def test_wav2vec2_tokens_are_what_transformers_gives(wav2vec2):
    import torch
    import transformers

    samples = voice(2.0)
    tokens = encoder_of(wav2vec2)(samples)
    assert tokens.shape == (50, 2, 32) and tokens.dtype == np.float32
    processed = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)(samples, sampling_rate=16000, return_tensors="pt").input_values
    with torch.inference_mode():
        expected = transformers.Wav2Vec2Model.from_pretrained(wav2vec2).eval()(processed).last_hidden_state[0].numpy()
    assert len(expected) == 99  # a token of 20 ms needs 25 ms: the last one is missing
    np.testing.assert_allclose(tokens.reshape(100, 32)[:99], expected, atol=2e-3)
    assert not tokens[-1, 1].any() and tokens[:-1].any(axis=-1).all()


@pytest.mark.parametrize("samples", [640 * 7, 640 * 7 - 200, 640 * 7 + 1])
def test_frames_are_counted_as_everywhere(wav2vec2, whisper, samples):
    frames = -(-samples // 640)
    for encode, width in ((encoder_of(wav2vec2), 32), (COLUMNS["whisper"].open(str(whisper)), 24)):
        tokens = encode(voice(1.0)[:samples])
        assert tokens.shape == (frames, 2, width) and np.isfinite(tokens).all()


def test_whisper_tokens_follow_the_sound_over_thirty_seconds(whisper):
    import torch
    import transformers

    assert torch_encoder.look(COLUMNS["whisper"], str(whisper))[0] == 24
    samples = voice(32.0, seed=1)
    encode = COLUMNS["whisper"].open(str(whisper))
    tokens = encode(samples)
    assert tokens.shape == (800, 2, 24)
    extractor = transformers.WhisperFeatureExtractor(feature_size=80)
    model = transformers.WhisperModel.from_pretrained(whisper).get_encoder().eval()
    for part, at in ((samples[:480000], 0), (samples[480000:], 750)):
        mel = extractor(part, sampling_rate=16000, return_tensors="pt").input_features
        with torch.inference_mode():
            expected = model(mel).last_hidden_state[0].numpy()
        count = len(part) // 320
        np.testing.assert_allclose(tokens[at : at + count // 2].reshape(count, 24), expected[:count], atol=1e-5)
    # The window does not matter to what is heard in it: the second one is the same as that sound by itself.
    np.testing.assert_allclose(tokens[750:], encode(samples[480000:]), atol=1e-5)


def test_other_folders_are_refused(wav2vec2, whisper, tmp_path):
    with pytest.raises(KeySyncError, match="holds a 'wav2vec2' model"):
        torch_encoder.look(COLUMNS["whisper"], str(wav2vec2))
    (tmp_path / "config.json").write_text((whisper / "config.json").read_text())
    with pytest.raises(KeySyncError, match="holds no weights"):
        torch_encoder.look(COLUMNS["whisper"], str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(KeySyncError) as caught:
        COLUMNS["whisper"].open(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_weights_that_are_missing_are_not_made_up(whisper, tmp_path):
    from safetensors.numpy import load_file, save_file

    weights = load_file(whisper / "model.safetensors")
    (tmp_path / "config.json").write_text((whisper / "config.json").read_text())
    kept = {name: value for name, value in weights.items() if "encoder.layers.1.fc1" not in name}
    assert len(weights) - len(kept) == 2
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(KeySyncError, match=r"lacks 2 weights of whisper, the first is encoder\.layers\.1\.fc1\.bias"):
        COLUMNS["whisper"].open(str(tmp_path))


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    """Folder of two drawn talkers."""
    folder = tmp_path_factory.mktemp("talkers")
    synth_dataset(2, folder, SynthSettings(frames=FRAMES, size=128), quiet=True)
    return folder


def test_both_columns_in_a_dataset(talkers, tiny_model, wav2vec2, whisper, tmp_path):
    weights = {"wav2vec2": str(wav2vec2), "whisper": str(whisper)}
    target = Output(columns=("wav2vec2", "whisper", "sound"), weights=weights, split_fractions={"train": 1.0})
    items = read_inputs(talkers / "manifest.csv")
    prepare(items, tmp_path / "data", str(tiny_model), Curation(crop_size=128), target, quiet=True)
    store = FrameStore(tmp_path / "data")
    clip = store.clips[0]
    stored = store.read(clip, list(range(FRAMES)), ["audio_wav2vec2", "audio_whisper", "samples"])
    samples = np.concatenate(stored["samples"]).astype(np.float32) / 32768
    for name, encode in (("wav2vec2", encoder_of(wav2vec2)), ("whisper", COLUMNS["whisper"].open(str(whisper)))):
        tokens = encode(samples)
        np.testing.assert_allclose(np.stack(stored[f"audio_{name}"]).astype(np.float32), tokens, atol=0.02)
        reader = WindowReader(SourceConfig((DatasetChoice(str(tmp_path / "data")),), InterpolationWindows(), audio_encoder=name))
        batch = reader.read([reader.sample(0, 0, 1)])
        assert batch["audio"].shape == (1, 14, 2, tokens.shape[-1]) and batch["audio"].std() > 0.01


@pytest.fixture(scope="module")
def sam2_weights(tmp_path_factory):
    """A random SAM 2.1 (tiny) in the format of the published checkpoints."""
    import torch
    from sam2.build_sam import build_sam2_video_predictor

    torch.manual_seed(0)
    model = build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml", None, device="cpu")
    state = model.state_dict()
    state["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] += 10  # at random it may find that there is no object, and no mask
    path = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": state}, path)
    return path


def test_clicks_become_an_occluder_column_and_open_the_mask(tiny_model, sam2_weights, tmp_path, monkeypatch):
    """As few frames as an interpolation window takes; the package's network, but at 256 pixels instead of 512 to save time."""
    from keysync_jax.cli.main import main
    from keysync_jax.data_pipeline.prepare import occluder
    from keysync_jax.segmentation.segmenters import open_segmenter

    monkeypatch.setattr(occluder, "open_segmenter", functools.partial(open_segmenter, size=256))
    from keysync_jax.media.crop import Crop
    from keysync_jax.media.masks import downsample

    count = 16
    folder = tmp_path / "talkers"
    synth_dataset(2, folder, SynthSettings(frames=count, size=128), quiet=True)
    clicked = sorted(folder.glob("*.mp4"))[0]
    points = [{"frame": 0, "x": 64, "y": 80}, {"frame": 2, "x": 60, "y": 90}, {"frame": 2, "x": 5, "y": 5, "inside": False}]
    clicked.with_suffix(".occluder.json").write_text(json.dumps({"points": points}))
    words = ["prepare", folder, "-o", tmp_path / "data", "--model", tiny_model, "--columns", "occluder", "--min-frames", count, "--quiet"]
    assert (
        main(
            [str(w) for w in [*words, "--column-weights", f"occluder={sam2_weights}", "--occlusion-backend", "sam2", "--splits", "train=1"]]
        )
        == 0
    )

    store = FrameStore(tmp_path / "data")
    masks = {c.video: np.stack(store.read(c, list(range(count)), ["occluder"])["occluder"]) for c in store.clips}
    assert len(masks) == 2 and {(m.shape, m.dtype) for m in masks.values()} == {((count, 16, 16), np.dtype(bool))}
    followed = masks.pop(clicked.name)
    assert followed.any() and not any(m.any() for m in masks.values())  # without clicks no occluder
    clip = next(c for c in store.clips if c.video == clicked.name)
    item = next(i for i in read_inputs(folder) if i.name == clicked.name)
    crops = occluder.ClickMasker(str(sam2_weights), "sam2")(item, np.arange(count), Crop(*clip.extra["crop"]), 128)
    np.testing.assert_array_equal(downsample(crops.astype(np.uint8) * 255, (16, 16)) > 127, followed)

    for use in (False, True):
        reader = WindowReader(SourceConfig((DatasetChoice(str(tmp_path / "data")),), InterpolationWindows(), use_occluder=use, seed=1))
        batch = reader.read([reader.sample(0, row, 8) for row in range(8)])
        rows = [i for i in range(8) if reader.stores[0].clips[batch["clip"][i]].video == clicked.name]
        assert rows
        for i in rows:
            covered = followed[batch["frames"][i]]
            assert batch["mask"][i, ..., 0][covered].any() == (not use)
    plan = plan_features(str(tiny_model), Output(columns=("occluder",), weights={"occluder": str(sam2_weights)}), 128)
    assert len(plan.groups[1].info["occluder"]["weights"]) == 64
