"""A speech encoder that the library does not know goes all the way beside one that it does: stored, prepared, trained with, dubbed with."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_starts
import tiny_talker_model
from bounds import close

from keysync_jax import KeySyncPipeline
from keysync_jax.config import AUDIO_ENCODERS, SpeechEncoderConfig, StageConfig
from keysync_jax.converters import assemble_audio, model_directory
from keysync_jax.converters.containers import open_sources
from keysync_jax.converters.convert import Options
from keysync_jax.converters.inspect_weights import inspect
from keysync_jax.converters.lazy import from_params
from keysync_jax.converters.parts import Part
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.prepare.run import prepare
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import WindowReader, source_config
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.inference.options import DubOptions
from keysync_jax.media import audio, video
from keysync_jax.models.speech import registry
from keysync_jax.models.speech.random_params import init_params
from keysync_jax.models.speech.speech_encoder import Geometry, Published, SpeechEncoder
from keysync_jax.models.table import conv
from keysync_jax.training.config import DataConfig
from keysync_jax.training.export.export_run import export, parts_of
from keysync_jax.training.loop import train
from keysync_jax.training.start import check

BANDS, WIDTH, FRAMES = tiny_talker_model.BANDS, 8, 30


@dataclasses.dataclass(frozen=True)
class EnergyConfig(SpeechEncoderConfig):
    """How loud a learned band of each hop is; a configuration of its own."""

    kind: str = "energy"
    hidden_size: int = WIDTH
    hop: int = 320


class Energy(nn.Module):
    config: EnergyConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.bands = nn.Conv(self.config.hidden_size, (self.config.hop,), (self.config.hop,), padding="VALID", dtype=self.dtype)

    def __call__(self, waveform):
        features = self.features(waveform)
        return self.encode(features, jnp.full(len(features), features.shape[1]))

    def features(self, waveform, moments=None):
        return jnp.square(self.bands(waveform[..., None]))

    def encode(self, features, count):
        return jnp.log(features + 1e-3)


ENCODER = SpeechEncoder(
    name="energy",
    title="band energies",
    config=EnergyConfig,
    module=Energy,
    geometry=lambda config: Geometry(config.hop, config.hop),
    table=lambda config: list(conv("bands", "conv1d", 1, config.hidden_size, (config.hop,))),
    published=(Published("energy", "band energies", lambda keys, config: "bands.weight" in keys, lambda key, config: key),),
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    registry.register(ENCODER)
    yield
    AUDIO_ENCODERS.remove("energy")
    del registry.ENCODERS["energy"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, registered):
    """The model directory for drawn talkers, with stages that read log-mel and the new encoder's tokens side by side."""
    config = EnergyConfig()
    tensors = from_params(registry.audio_table(config), init_params(config, np.random.default_rng(0)), "energy")
    return tiny_talker_model.make(tmp_path_factory.mktemp("outside") / "model", beside=Part("audio/energy", config, tensors, random=True))


@pytest.fixture(scope="module")
def dataset(model, tmp_path_factory):
    """A drawn clip, prepared with that model: its encoders' columns."""
    folder = tmp_path_factory.mktemp("prepared")
    synth_dataset(1, folder / "videos", SynthSettings(frames=FRAMES, size=128), quiet=True)
    items = read_inputs(folder / "videos" / "manifest.csv")
    prepare(items, folder / "data", str(model), Curation(crop_size=64), Output(columns=()), quiet=True)
    return folder / "data"


@pytest.fixture(scope="module")
def trained(model, dataset, tmp_path_factory):
    """Two steps of the keyframe stage from there, exported with what it began with."""
    folder = tmp_path_factory.mktemp("trained")
    stage = model_directory.load(model).stage("keyframe")
    data = DataConfig(datasets=(str(dataset),), batch_size=1, validation_split="", threads=1, prefetch=1, min_spacing=2)
    config = dataclasses.replace(tiny_starts.recipe(data=data, init=tiny_starts.start_from("model", model)), stage=stage)
    config = check.resolve(config)[0].config
    assert train(config, str(folder / "run")) == 2
    rest = [part for part in parts_of(model_directory.load(model)) if part.name == "interpolation"]
    model_directory.save(folder / "rest", rest)
    export([folder / "run", folder / "rest"], folder / "model")
    return folder / "model"


def test_stored_and_read_back(model):
    directory = model_directory.load(model, verify=True)
    assert directory.audio("energy") == EnergyConfig()
    assert directory.stage("keyframe").audio_encoders == ("log_mel", "energy")
    kernel = directory.tensors("audio/energy")["bands.weight"]
    assert kernel.shape == (WIDTH, 1, 320)
    np.testing.assert_array_equal(directory.params("audio/energy")["bands"]["kernel"], kernel.transpose(2, 1, 0))


def test_columns_are_what_the_encoders_say(model, dataset):
    store = FrameStore(dataset)
    (clip,) = store.clips
    read = store.read(clip, list(range(FRAMES)), ["audio_energy", "audio_log_mel"])
    directory = model_directory.load(model)
    samples = audio.load_audio(next((dataset.parent / "videos").glob("*.mp4"))).samples[: FRAMES * 640]
    for name, width in (("energy", WIDTH), ("log_mel", BANDS)):
        tokens = AudioFeatures(directory.audio(name), directory.params(f"audio/{name}"))(samples)
        assert tokens.shape == (FRAMES, 2, width) and tokens.std() > 0.1
        # Stored in half precision; small values are rounded less than the networks, in other blocks, round them before.
        size = np.abs(tokens)
        close(np.stack(read[f"audio_{name}"]), tokens, 1, scale=size + size.max() / 64, dtype=np.float16)


def test_training_reads_the_columns_side_by_side(model, dataset):
    stage = model_directory.load(model).stage("keyframe")
    store = FrameStore(dataset)
    reader = WindowReader(source_config(stage, [DatasetChoice(str(dataset))], {"min_spacing": 2}))
    assert reader.audio_dim == BANDS + WIDTH
    batch = reader.read([reader.sample(0, 0, 1)])
    numbers = batch["frames"][0].tolist()
    read = store.read(store.clips[0], numbers, ["audio_energy", "audio_log_mel"])
    np.testing.assert_array_equal(batch["audio"][0, ..., :BANDS], np.stack(read["audio_log_mel"]))
    np.testing.assert_array_equal(batch["audio"][0, ..., BANDS:], np.stack(read["audio_energy"]))


def test_trained_exported_and_dubbed_with(model, trained, talker, tmp_path):
    before, after = model_directory.load(model), model_directory.load(trained)
    assert set(after.parts) == {"keyframe", "interpolation", "vae", "audio/log_mel", "audio/energy"}
    key = "conditioner.embedders.2.linear.weight"  # reads the joined tokens
    moved = np.abs(after.tensors("keyframe")[key] - before.tensors("keyframe")[key]).max(axis=0)
    assert moved.shape == (BANDS + WIDTH,) and (moved[:BANDS] > 0).any() and (moved[BANDS:] > 0).any()

    voice, seen = tmp_path / "voice.wav", 6
    audio.save_wav(voice, audio.load_audio(talker / "voice.wav").samples[: 640 * seen], 16000)
    pipe = KeySyncPipeline(after)

    def dub(name):
        result = pipe(talker / "clip.mp4", voice, tmp_path / name, options=DubOptions(lossless=True, seed=3))
        assert result.report["frames_dubbed"] == seen
        return np.stack([frame.rgb() for frame, _ in zip(video.read(tmp_path / name), range(seen), strict=False)]).astype(int)

    # The new encoder's tokens arrive at the picture: with louder bands, the mouth is another one.
    pictures = dub("dubbed.mov")
    louder = AudioFeatures(EnergyConfig(), jax.tree.map(lambda leaf: 50 * leaf, after.params("audio/energy")))
    pipe.encoders["energy"] = louder
    assert np.abs(pictures - dub("louder.mov")).max() > 0


def test_its_published_weights_are_recognised_and_read(model):
    file = model / "audio" / "energy" / "model.safetensors"
    (source,) = open_sources(str(file))
    part = assemble_audio.assemble(source, Options(), set())
    assert (source.kind, part.name, part.config) == ("energy", "audio/energy", EnergyConfig())
    (item,) = inspect(file)["items"]
    assert item["what"] == "band energies" and not item["missing"] and not item["unexpected"]
    assert registry.recognise(["feature_extractor.conv_layers.0.conv.weight"]) == "hubert"


@pytest.mark.parametrize(
    ("name", "message"),
    [("energy+energy", "different ones side by side"), ("log_mel+", "choose one of"), ("energy+loud", "choose one of .*energy")],
)
def test_sums_that_mean_nothing_are_refused(name, message):
    with pytest.raises(KeySyncError, match=message):
        StageConfig(audio_encoder=name)


def test_a_width_that_does_not_add_up_is_refused(model):
    parts = {part.name: part.config for part in parts_of(model_directory.load(model))}
    parts["audio/energy"] = EnergyConfig(hidden_size=9)
    with pytest.raises(KeySyncError, match=r"audio/log_mel and audio/energy give 89 features per token, but the keyframe stage reads 88"):
        model_directory.check("here", parts)
    del parts["audio/energy"]
    with pytest.raises(KeySyncError, match=r"has no part audio/energy, which the keyframe stage was trained with \(it has audio/log_mel\)"):
        model_directory.check("here", parts)


def test_names_are_taken_once():
    with pytest.raises(KeySyncError, match="there is a speech encoder 'energy' already"):
        registry.register(ENCODER)
    with pytest.raises(KeySyncError, match="cannot be called 'a\\+b'"):
        registry.register(dataclasses.replace(ENCODER, name="a+b"))
