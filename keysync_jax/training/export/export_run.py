"""`keysync export`: training runs and model directories, in any mix, as one model directory or in the formats of PyTorch code."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from rich.console import Console

from keysync_jax.config import EXPORT_FORMATS, WEAK_PARTS, SpeechEncoderConfig, StageConfig
from keysync_jax.converters import assemble_audio, model_directory
from keysync_jax.converters import export as torch_formats
from keysync_jax.converters.byte_progress import byte_progress
from keysync_jax.converters.lazy import FLOAT_TYPES, Tensors, from_params
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.converters.parts import STAGES, Part, audio_part_name, audio_part_names, part_table
from keysync_jax.converters.staging import check_free
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import is_local
from keysync_jax.models.speech import log_mel, registry
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.export import model_card
from keysync_jax.training.start import runs, vae_scale
from keysync_jax.training.start.runs import RunWeights
from keysync_jax.training.start.stage_vae import located
from keysync_jax.training.state import Tree
from keysync_jax.training.trainables import of_run, read_run

_ORDER = (*STAGES, *WEAK_PARTS, "vae")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """How weights are chosen and written.

    Attributes:
      steps: checkpoint by part name ("" for every run); a run that is not named gives its last one.
      ema: take the averaged weights.
      format: "model" for a model directory, "keysync" or "diffusers" for PyTorch.
      dtype: "float32", "float16" or "bfloat16"; None keeps what there is.
      log_mel: mel bands of a log-mel encoder to add; None adds the one that the stages were trained with, or 80 bands to a VAE alone.
      latent_scale: of a VAE run; None measures it.
      scale_frames: how many training frames it is measured on.
      container, vae_copies, stages: see `converters.export.export`.
      force: replace an earlier export.
      card: see `model_card.CardOptions`.
    """

    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ema: bool = False
    format: str = "model"
    dtype: str | None = None
    log_mel: int | None = None
    latent_scale: float | None = None
    scale_frames: int = vae_scale.FRAMES
    container: str = "pt"
    vae_copies: bool = False
    stages: Sequence[str] | None = None
    force: bool = False
    card: model_card.CardOptions = model_card.CardOptions()

    def __post_init__(self):
        for what, value, allowed in (("format", self.format, EXPORT_FORMATS), ("dtype", self.dtype, (None, *FLOAT_TYPES))):
            if value not in allowed:
                raise UsageError(f"{what} {value!r}: choose one of {', '.join(a for a in allowed if a)}")
        unknown = [name for name in self.steps if name not in ("", *_ORDER)]
        if unknown:
            raise UsageError(f"--step {unknown[0]}=…: no such part; there are {', '.join(_ORDER)}")
        if self.log_mel is not None and self.log_mel < 1:
            raise UsageError(f"--log-mel is {self.log_mel}; it counts mel bands and must be at least 1")
        if self.format == "model" and (self.stages or self.vae_copies or self.container != "pt"):
            raise UsageError("--stage, --vae-copies and --container are for PyTorch formats; add --format keysync or diffusers")


class Collected(NamedTuple):
    """Parts on their way into one directory, the runs among their sources, and what was decided."""

    parts: dict[str, Part]
    runs: tuple[RunWeights, ...]
    notes: list[str]


def export(
    sources: Sequence[str | os.PathLike], output: str | os.PathLike, options: ExportOptions | None = None, *, console: Console | None = None
) -> str:
    """Writes `output` from runs (each gives the part it trained) and model directories (each gives all its parts).

    A stage run brings along the VAE of its `init.vae` and, where its directories hold it, its speech encoder, unless a source that is
    named gives them. The latent scale of a VAE run is measured on its training frames; beside stages it is theirs.

    Args:
      sources: workdirs of runs and model directories.
      output: folder to write, local or `gs://`.
      options: see `ExportOptions`.
      console: where progress and notes go; default stderr.

    Returns:
      The folder that was written.

    Raises:
      UsageError: two sources for one part, or an impossible option.
      KeySyncError: a source that is neither, a checkpoint that is not there, or parts that do not belong together. Nothing is written.
    """
    console = console or Console(stderr=True)
    options = options or ExportOptions()
    _check_sources(sources, options)
    # Before gigabytes are read.
    check_free(output, force=options.force, replaceable=_replaceable(options.format))
    if options.format != "model" and len(sources) == 1 and not runs.is_run(sources[0]):
        _for_torch(sources[0], output, options, console)  # nothing to put together first
        return os.fspath(output)
    collected = _collect(sources, options, console)
    parts = [collected.parts[name] for name in sorted(collected.parts, key=_rank)]
    model_directory.check(" + ".join(os.fspath(source) for source in sources), {part.name: part.config for part in parts}, complete=False)
    if options.dtype:
        parts = [dataclasses.replace(part, tensors=part.tensors.astype(FLOAT_TYPES[options.dtype])) for part in parts]
    for note in collected.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    made_from = [model_card.origin(run) for run in collected.runs]
    with contextlib.ExitStack() as stack:
        plain = options.format == "model"
        folder = output if plain else stack.enter_context(_scratch(output, sources))
        with byte_progress(console, "writing", sum(part.tensors.nbytes for part in parts)) as advance:
            directory = model_directory.save(
                folder, parts, sources=made_from, notes=collected.notes, force=options.force and plain, progress=advance
            )
        if not plain:
            _for_torch(folder, output, options, console)
        model_card.write(output, directory, collected.runs, options.card)
    if plain:
        _say_parts(console, directory)
    return os.fspath(output)


def _check_sources(sources: Sequence[str | os.PathLike], options: ExportOptions) -> None:
    """Refuses sources that do not exist (one on a hub is looked for when it is read), and options that no source heeds."""
    for source in (os.fspath(each) for each in sources):
        if not source.startswith("hub:") and not epath.Path(source).exists():
            raise KeySyncError(f"{source} does not exist; name the workdir of a run or a model directory")
    trained = [of_run(source).part for source in sources if runs.is_run(source)]
    if not trained and (options.steps or options.ema):
        raise UsageError(
            f"--step and --ema choose among the checkpoints of a run, and {' and '.join(os.fspath(source) for source in sources)} is none"
        )
    for name in options.steps:
        if name and name not in trained:
            raise UsageError(f"--step {name}=…: no source is a run of that part, but of {', '.join(trained)}")
    if not trained and len(sources) == 1 and options.format != "model" and (options.log_mel, options.latent_scale) != (None, None):
        raise UsageError("--log-mel and --latent-scale are for model directories, and a PyTorch format holds neither")


def _replaceable(format: str) -> Callable[[epath.Path], bool]:
    return model_directory.is_model_directory if format == "model" else torch_formats.is_export


def _for_torch(model: str | os.PathLike, output: str | os.PathLike, options: ExportOptions, console: Console) -> None:
    torch_formats.export(
        model, output, options.format, container=options.container, vae_copies=options.vae_copies, stages=options.stages,
        dtype=options.dtype, force=options.force, console=console,
    )  # fmt: skip


def _say_parts(console: Console, directory: ModelDirectory) -> None:
    for name, part in directory.parts.items():
        size = f"{part.weights.parameters:,} parameters, {part.weights.nbytes / 1e6:.1f} MB" if part.weights else "no weights"
        console.print(f"{directory.path}/{name}: {size}", highlight=False, soft_wrap=True, markup=False)


def _rank(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


@contextlib.contextmanager
def _scratch(output: str | os.PathLike, sources: Sequence[str | os.PathLike]) -> Iterator[str]:
    """A temporary folder on the disk of `output`, where there is room for a copy; errors name the sources in its place."""
    parent = os.path.dirname(os.path.abspath(output)) if is_local(output) else None
    if parent is not None and not os.path.isdir(parent):
        raise KeySyncError(f"{parent} does not exist; make the folder first")
    with tempfile.TemporaryDirectory(dir=parent, prefix=".keysync-export-") as folder:
        path = os.path.join(folder, "model")
        try:
            yield path
        except KeySyncError as error:
            raise type(error)(str(error).replace(path, " + ".join(os.fspath(source) for source in sources))) from error


# -- which parts --------------------------------------------------------------------------------------------------------------------


def _collect(sources: Sequence[str | os.PathLike], options: ExportOptions, console: Console) -> Collected:
    parts: dict[str, Part] = {}
    origins: dict[str, str] = {}
    found: list[RunWeights] = []
    notes: list[str] = []

    def add(part: Part, origin: str) -> None:
        if part.name in parts:
            raise UsageError(f"{origins[part.name]} and {origin} both hold {part.name}; give one of them")
        parts[part.name], origins[part.name] = part, origin

    for source in (os.fspath(each) for each in sources):
        if not runs.is_run(source):
            for part in parts_of(_open_directory(source)):
                add(part, source)
            continue
        name = of_run(source).part
        run = read_run(source, options.steps.get(name, options.steps.get("", -1)), options.ema)
        found.append(run)
        notes.append(f"{name}: {model_card.basename(source)} at step {run.step}{', averaged weights' * run.ema}")
        add(_part(run), source)
        if (weak := _weak_part(run, options)) is not None:
            add(weak, source)
            notes.append(f"{weak.name}: {model_card.basename(source)} at step {run.config.checkpoint.weak_at}, the worse network")
    _complete(parts, origins, found, notes, options.log_mel)
    _scale(parts, found, options, notes, console)
    _check_trained_with(parts, origins, found)
    _with_decoders(parts, found)
    _add_without_weights(parts, options, notes)
    return Collected(parts, tuple(found), notes)


def _open_directory(source: str) -> ModelDirectory:
    where = epath.Path(source) if not source.startswith("hub:") else None
    if where is not None and where.exists() and not model_directory.is_model_directory(where):
        raise KeySyncError(f"{source} is neither a training run nor a model directory")
    return model_directory.load(source, complete=False)


def parts_of(directory: ModelDirectory) -> list[Part]:
    """The parts of a model directory, to be written into another; tensors are read when they are written."""
    return [Part(name, part.config, directory.tensors(name), part.random, part.fresh) for name, part in directory.parts.items()]


def _part(run: RunWeights) -> Part:
    network = run.trainable.network
    if network is None:
        raise KeySyncError(f"{run.workdir} trains a {run.config.model}, which has no place in a model directory")
    return Part(run.part, network, from_params(part_table(network), run.params, run.workdir))


def _weak_part(run: RunWeights, options: ExportOptions) -> Part | None:
    """The worse network of a stage with autoguidance: the early checkpoint that its run has kept."""
    network, early = run.trainable.network, run.config.checkpoint.weak_at
    name = next((name for name, stage in WEAK_PARTS.items() if stage == run.part), None)
    if name is None or not isinstance(network, StageConfig) or network.guidance.kind != "auto" or not 0 < early < run.step:
        return None
    weak = read_run(run.workdir, early, options.ema)
    return Part(name, network, from_params(part_table(network, name=name), weak.params, run.workdir))


def _complete(parts: dict[str, Part], origins: dict[str, str], found: Sequence[RunWeights], notes: list[str], bands: int | None) -> None:
    """Adds the VAE and the speech encoders of the directories that the stage runs started from; no encoder of other tokens than the
    run's, and no log-mel one where its `bands` are asked for."""
    for run in found:
        stage = run.trainable.network
        if not isinstance(stage, StageConfig):
            continue
        wanted = [name for name in ("vae", *audio_part_names(stage)) if name not in parts]
        for path in _origins(run.config):
            if not wanted or not (path.startswith("hub:") or model_directory.is_model_directory(path)):
                continue
            directory = model_directory.load(path, complete=False)
            for part in parts_of(directory):
                if isinstance(part.config, SpeechEncoderConfig):
                    asked = bands is not None and part.name == audio_part_name("log_mel")
                    alone = len(stage.audio_encoders) == 1
                    if asked or (alone and part.config.hidden_size != stage.audio_feature_dim):
                        continue
                if part.name in wanted:
                    parts[part.name], origins[part.name] = part, path
                    wanted.remove(part.name)
                    notes.append(f"{part.name}: from {model_card.basename(path)}, with which the {run.part} run began")
        for name in wanted:
            if not registry.has_weights(name.removeprefix("audio/")):
                continue  # it is made, see `_add_without_weights`
            notes.append(_lacks(name))


def _lacks(name: str) -> str:
    return f"the directory has no {name}, which a dub needs; name a model directory that holds it as a further source"


def _origins(config: TrainConfig) -> Iterator[str]:
    """Directories that a run began from, its own VAE first; a run that began from another run goes on with that one's."""
    seen: set[str] = set()
    while True:
        init = located(config.init)
        yield from filter(None, (init.vae, init.path))
        if init.kind != "run" or init.path in seen or not runs.is_run(init.path):
            return
        seen.add(init.path)
        config = runs.read_config(init.path)


def _scale(parts: dict[str, Part], found: Sequence[RunWeights], options: ExportOptions, notes: list[str], console: Console) -> None:
    """Gives the VAE of a run its latent scale."""
    run = next((run for run in found if run.part == "vae"), None)
    if run is None:
        if options.latent_scale is not None:
            raise UsageError("--latent-scale is for a VAE run; a model directory has its own, and stages were trained with it")
        return
    stages = [part for name in STAGES if (part := parts.get(name))]
    scales = {part.name: part.config.latent_scale for part in stages if isinstance(part.config, StageConfig)}
    if options.latent_scale is not None:
        scale, how = options.latent_scale, "as given"
        if not 0 < scale < math.inf:
            raise UsageError(f"--latent-scale is {scale}; it must be positive and finite")
    elif scales:
        scale, how = next(iter(scales.values())), f"which the {next(iter(scales))} stage was trained with"
    else:
        measured = vae_scale.measure_run(run.config, run.params, options.scale_frames, console)
        scale, how = measured.scale, f"measured: {measured.frames} training frames have latents {measured.mean:.4g} ± {measured.std:.5g}"
    notes.append(f"vae: latent scale {scale:g}, {how}")
    parts["vae"] = dataclasses.replace(parts["vae"], config=dataclasses.replace(parts["vae"].config, latent_scale=float(scale)))


def _check_trained_with(parts: Mapping[str, Part], origins: Mapping[str, str], found: Sequence[RunWeights]) -> None:
    """Refuses a VAE that is not the one whose decoder a stage's pixel loss used: latents of one mean nothing to another."""
    if "vae" not in parts:
        return
    for run in found:
        if run.decoder is None:
            continue
        if differs := _other_decoder(parts["vae"], run.decoder):
            raise KeySyncError(
                f"the {run.part} run {run.workdir} was trained with another VAE than that of {origins['vae']} ({differs}); "
                f"give the one in its init.vae, {run.config.init.vae or run.config.init.path}"
            )


def _other_decoder(vae: Part, decoder: Tree) -> str:
    """In which tensor a decoder is not that of the VAE, "" if in none."""
    table = part_table(vae.config, ("decoder",))
    try:
        own = from_params(table, decoder, "its decoder")
    except KeySyncError as error:
        return str(error)
    if (count := len(jax.tree.leaves(decoder))) != len(table):
        return f"its decoder has {count} tensors, not {len(table)}"
    return next((f"{key} differs" for key in own if not _equal(own[key], vae.tensors[key])), "")


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    """Bit for bit, or after rounding to half precision, in which a VAE may have been stored in between."""
    if np.array_equal(first, second):
        return True
    with np.errstate(over="ignore"):
        return np.array_equal(np.asarray(first).astype(np.float16), np.asarray(second).astype(np.float16))


def _with_decoders(parts: dict[str, Part], found: Sequence[RunWeights]) -> None:
    """A stage's file repeats the decoder, since the reference loads it from there."""
    if "vae" not in parts:
        return
    decoder = {e.torch_key: parts["vae"].tensors.info(e.torch_key) for e in part_table(parts["vae"].config, ("decoder",))}
    for run in found:
        if isinstance(run.trainable.network, StageConfig):
            parts[run.part] = dataclasses.replace(parts[run.part], tensors=parts[run.part].tensors.updated(decoder))


def _add_without_weights(parts: dict[str, Part], options: ExportOptions, notes: list[str]) -> None:
    """Speech encoders without weights follow from the width of a stage's tokens; log-mel's bands can be given."""
    name = audio_part_name("log_mel")

    def add_log_mel(bands: int) -> None:
        parts[name] = Part(name, log_mel.of_width(bands), Tensors({}, "log_mel"))

    if options.log_mel is not None:
        if name in parts:
            raise UsageError(f"--log-mel {options.log_mel}: a source already holds {name}")
        add_log_mel(options.log_mel)
    stages = [part.config for part in parts.values() if isinstance(part.config, StageConfig)]
    for part in assemble_audio.without_weights(stages, parts):
        parts[part.name] = part
    wanted = {each: encoder for stage in stages for each, encoder in zip(audio_part_names(stage), stage.audio_encoders, strict=True)}
    notes += [_lacks(each) for each, encoder in wanted.items() if each not in parts and not registry.has_weights(encoder)]
    if not stages and not any(each.startswith("audio/") for each in parts):
        add_log_mel(log_mel.BANDS)
        notes.append(f"{name}: {log_mel.BANDS} mel bands, so that keysync prepare has a speech encoder (--log-mel N changes it)")


def parse_steps(texts: Sequence[str]) -> dict[str, int]:
    """`--step` options as `ExportOptions.steps`: `4000` for every run, `keyframe=4000` for one.

    Raises:
      UsageError: not of that form.
    """
    steps: dict[str, Any] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not number.isdecimal():
            raise UsageError(f"--step {text}: write a number, or PART=NUMBER when several runs are exported")
        if name in steps:
            raise UsageError(f"--step {text}: there is --step {f'{name}=' if name else ''}{steps[name]} already; give it once")
        steps[name] = int(number)
    return steps
