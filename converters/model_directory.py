"""The model directory: everything a dub needs, in files that PyTorch and JAX both read.

    model_index.json                     format version, parts, where they came from
    keyframe/       config.json model.safetensors      the complete KeySync layout, decoder included
    interpolation/  config.json model.safetensors
    interpolation_bad/  …                               KeyFace: the worse network of autoguidance, its `model.*` tensors alone
    vae/            config.json model.safetensors      encoder, quant_conv and decoder under first_stage_model.
    audio/hubert/   config.json model.safetensors      one folder per speech encoder ("log_mel" has no weights)

Tensors keep the reference's names and torch's layout. Stage files repeat the VAE decoder, because the reference loads it from there;
only `vae/` is read when dubbing. Paths may be local, `gs://` or `hub:owner/name`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from keysync_jax import config as configs
from keysync_jax.config import AUDIO_ENCODERS, WEAK_PARTS, SpeechEncoderConfig, StageConfig, VAEConfig
from keysync_jax.converters import hub, safetensors_file
from keysync_jax.converters.lazy import Tensors, from_params
from keysync_jax.converters.parts import (
    DECODER,
    SELF_DESCRIPTION,
    STAGES,
    Part,
    PartConfig,
    audio_part_name,
    audio_part_names,
    config_class,
    describe,
    is_part_name,
    part_table,
)
from keysync_jax.converters.safetensors_file import Written
from keysync_jax.converters.shapes import check_encoders
from keysync_jax.converters.staging import staged
from keysync_jax.core.differences import compare
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import sha256
from keysync_jax.core.version import __version__
from keysync_jax.models.table import Table, to_flax

INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "model.safetensors"
FORMAT, VERSION = "keysync-jax", 1
C = TypeVar("C", bound=PartConfig)
_SYSTEMS = {"keysync": "KeySync", "keyface": "KeyFace"}


@dataclasses.dataclass(frozen=True)
class _Index:
    """What model_index.json holds."""

    format: str
    format_version: int
    parts: tuple[str, ...]
    converter: str = ""
    sources: tuple[dict[str, Any], ...] = ()
    random: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Weights:
    """The numbers of a weights file."""

    sha256: str
    tensors: int
    parameters: int
    bytes: int
    file: str = WEIGHTS


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a part's config.json holds."""

    part: str
    config: dict[str, Any]
    weights: _Weights | None = None
    random: bool = False
    fresh: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A part's `config.json`: its config, its file's numbers, and which of its tensors were drawn at random."""

    config: PartConfig
    weights: Written | None
    random: bool
    fresh: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """An opened model directory; weights are read when they are asked for.

    Attributes:
      path: where it is, downloads resolved.
      parts: part name ("keyframe", "interpolation", "vae", "audio/hubert", ...) -> what its config.json says.
      index: the contents of model_index.json.
    """

    path: str
    parts: Mapping[str, StoredPart]
    index: Mapping[str, Any]

    def stage(self, name: str) -> StageConfig:
        return self._config(name, StageConfig)

    @property
    def vae(self) -> VAEConfig:
        return self._config("vae", VAEConfig)

    def audio(self, encoder: str) -> SpeechEncoderConfig:
        """The config of a speech encoder, by its name, one of `config.AUDIO_ENCODERS`."""
        return self._config(audio_part_name(encoder), SpeechEncoderConfig)

    @property
    def random(self) -> bool:
        """Whether any part holds random weights instead of trained ones."""
        return any(part.random for part in self.parts.values())

    def table(self, part: str) -> Table:
        """Entries of the parameters of a part; a stage's decoder copy is not among them."""
        return part_table(self._part(part).config, name=part)

    def tensors(self, part: str) -> Tensors:
        """Every tensor of a part's file, in torch layout and the reference's names; none for a speech encoder without weights.

        Raises:
          KeySyncError: no such part or file, or the file holds other tensors than its config says (named).
        """
        stored = self._part(part)
        if stored.weights is None:
            return Tensors({}, self._file(part))
        tensors = safetensors_file.read(self._file(part))
        expected = {e.torch_key: e.torch_shape for e in self.table(part)}
        copy = [key for key in tensors if part in STAGES and key.startswith(DECODER)]
        if copy and "vae" in self.parts:
            expected |= {e.torch_key: e.torch_shape for e in part_table(self.vae, ("decoder",))}
        elif copy:  # nothing to compare it with
            expected |= {key: tensors.info(key).shape for key in copy}
        differences = compare(tensors.shapes, expected)
        if differences:
            raise KeySyncError(f"{self._file(part)} does not fit its config.json: {differences}; convert it again")
        return tensors

    def params(self, part: str, dtype: Any = np.float32) -> dict:
        """A part's Flax parameters as nested dicts of NumPy arrays, ready for `module.apply({"params": ...})`.

        Args:
          part: "keyframe", "interpolation", "vae" or "audio/<encoder>".
          dtype: type of all leaves; None keeps the file's.
        """
        params = to_flax(self.table(part), self.tensors(part), self._file(part), dtype)
        # Leaves that needed no change are still views of the file: copied, so that they can be written to and outlive it.
        return jax.tree.map(lambda leaf: leaf if leaf.flags.owndata and leaf.flags.writeable else np.array(leaf), params)

    def verify(self) -> None:
        """Hashes every weights file.

        Raises:
          KeySyncError: a file is not the one its config.json was written for.
        """
        for name, part in self.parts.items():
            if part.weights is not None:
                found = sha256(self._file(name))
                if found != part.weights.sha256:
                    wanted = part.weights.sha256
                    raise KeySyncError(f"{self._file(name)} has SHA-256 {found}, its config.json says {wanted}; download it again")

    def describe(self) -> dict[str, Any]:
        """Plain values for reports: path, converter, and per part its config and hash."""
        parts = {
            name: {"sha256": part.weights.sha256 if part.weights else None, "random": part.random, "config": configs.to_dict(part.config)}
            for name, part in self.parts.items()
        }
        return {"path": self.path, "converter": self.index.get("converter"), "random": self.random, "parts": parts}

    def save(self, path: str | os.PathLike, force: bool = False) -> ModelDirectory:
        """Writes a copy to `path`; see `save`."""
        parts = [Part(name, part.config, self.tensors(name), part.random, part.fresh) for name, part in self.parts.items()]
        return save(path, parts, sources=self.index.get("sources", ()), notes=self.index.get("notes", ()), force=force)

    def _part(self, name: str) -> StoredPart:
        if name not in self.parts:
            raise KeySyncError(f"model directory {self.path} has no part {name}; it has {', '.join(self.parts) or 'none'}")
        return self.parts[name]

    def _config(self, name: str, kind: type[C]) -> C:
        config = self._part(name).config
        if not isinstance(config, kind):
            raise KeySyncError(f"part {name} of {self.path} holds a {type(config).__name__}, not a {kind.__name__}")
        return config

    def _file(self, part: str) -> str:
        return str(epath.Path(self.path) / part / WEIGHTS)


def is_model_directory(path: str | os.PathLike) -> bool:
    """Whether there is a model index of ours at `path` (readable or not as a whole)."""
    index = epath.Path(path) / INDEX
    try:
        return index.exists() and json.loads(index.read_text()).get("format") == FORMAT
    except (ValueError, OSError, AttributeError):
        return False


def load(path: str | os.PathLike, *, complete: bool = True, verify: bool = False) -> ModelDirectory:
    """Opens a model directory and checks that its parts belong together; weights are not read yet.

    Args:
      path: local, `gs://` or `hub:owner/name[@revision]`.
      complete: refuse a directory that lacks a part that a dub needs; False for looking at one.
      verify: also hash the weights.

    Raises:
      KeySyncError: no model directory, a part missing, a config with an unknown key or a bad value, or parts that do not fit each other.
    """
    root = epath.Path(hub.resolve(os.fspath(path)))
    try:
        if not root.exists():
            raise KeySyncError(f"{root} does not exist; make a model directory with keysync convert or keysync init")
        if not (root / INDEX).exists():
            raise KeySyncError(f"{root} is not a model directory: it has no {INDEX}; make one with keysync convert or keysync init")
    except ImportError as error:
        raise KeySyncError(f"cannot open {root}: {error}") from None
    index = _read_json(root / INDEX)
    if index.get("format") != FORMAT:
        raise KeySyncError(f"{root / INDEX} is not ours (a diffusers folder?); keysync convert makes a model directory of it")
    if index.get("format_version") != VERSION:
        raise KeySyncError(f"{root} has format version {index.get('format_version')}, this program reads {VERSION}; update keysync-jax")
    names = configs.from_dict(_Index, index, str(root / INDEX)).parts
    if not all(map(is_part_name, names)):
        raise KeySyncError(f"{root / INDEX}: parts must be a list of keyframe, interpolation, vae and audio/<encoder>")
    directory = ModelDirectory(str(root), {name: _load_part(root, name) for name in names}, index)
    check(directory.path, {name: part.config for name, part in directory.parts.items()}, complete)
    if verify:
        directory.verify()
    return directory


def _load_part(root: epath.Path, name: str) -> StoredPart:
    path = root / name / CONFIG
    if not path.exists():
        raise KeySyncError(f"model directory {root} lacks its part {name} ({path} is missing); copy it there or convert again")
    record = configs.from_dict(_Part, _read_json(path), str(path))
    if record.part != name:
        raise KeySyncError(f"{path} describes {record.part!r}, not {name}")
    config = configs.from_dict(config_class(name), record.config, str(path))
    if isinstance(config, StageConfig) and config.stage != WEAK_PARTS.get(name, name):
        raise KeySyncError(f"{path} is for the {config.stage} stage, not for {name}")
    if isinstance(config, SpeechEncoderConfig) and audio_part_name(config.kind) != name:
        raise KeySyncError(f"{path} is a {config.kind} encoder; it belongs in {audio_part_name(config.kind)}")
    weights = None
    if part_table(config):
        if record.weights is None:
            raise KeySyncError(f"{path} lacks weights.sha256, tensors, parameters or bytes")
        weights = Written(record.weights.sha256, record.weights.tensors, record.weights.parameters, record.weights.bytes)
        if not (root / name / WEIGHTS).exists():
            raise KeySyncError(f"model directory {root} lacks the weights of its part {name} ({root / name / WEIGHTS}); convert again")
    return StoredPart(config, weights, record.random, record.fresh)


def check(where: str, parts: Mapping[str, PartConfig], complete: bool = True) -> None:
    """Whether parts can dub together.

    Raises:
      KeySyncError: a needed part is missing (if `complete`), a stage's speech encoder is another one or has another width, or sizes of
        VAE and stages differ.
    """
    for name in (*STAGES, "vae"):
        if complete and name not in parts:
            raise KeySyncError(f"model directory {where} has no part {name}; convert again with a source for it")
    vae = parts.get("vae")
    stages = {name: config for name in STAGES if isinstance(config := parts.get(name), StageConfig)}
    if len(systems := {name: stage.system for name, stage in stages.items()}) > 1 and len(set(systems.values())) > 1:
        which = " and ".join(f"the {name} stage is {_SYSTEMS[system]}'s" for name, system in systems.items())
        raise KeySyncError(f"{where}: {which}; they do not belong together")
    for name, stage in WEAK_PARTS.items():
        weak, good = parts.get(name), stages.get(stage)
        if isinstance(weak, StageConfig) and good is not None and (weak.unet, weak.latent_size) != (good.unet, good.latent_size):
            raise KeySyncError(
                f"{where}: {name} has another network than {stage}, which it is a worse version of; give one of the same sizes"
            )
    speech = {name: config for name, config in parts.items() if isinstance(config, SpeechEncoderConfig)}
    for name, stage in stages.items():
        columns = [encoder for encoder in stage.audio_encoders if encoder not in AUDIO_ENCODERS]
        if complete and columns:
            raise KeySyncError(
                f"model directory {where}: the {name} stage was trained on {columns[0]} tokens, which only keysync prepare "
                f"computes; it cannot dub. Dubbing runs {', '.join(AUDIO_ENCODERS)}"
            )
        encoders = audio_part_names(stage)
        check_encoders(stage, {encoder: speech[encoder] for encoder in encoders if encoder in speech}, where)
        if complete and (lacking := [encoder for encoder in encoders if encoder not in speech]):
            has = f" (it has {', '.join(speech)})" if speech else ""
            raise KeySyncError(
                f"model directory {where} has no part {lacking[0]}, which the {name} stage was trained with{has}; convert again with it"
            )
        if not isinstance(vae, VAEConfig):
            continue
        for what, ours, theirs in (
            ("latent channels", stage.unet.out_channels, vae.latent_channels),
            ("latent scale", stage.latent_scale, vae.latent_scale),
            ("resolution", stage.resolution, stage.latent_size * vae.downsample_factor),
        ):
            if ours != theirs:
                raise KeySyncError(f"{where}: the {name} stage has {what} {ours}, its latent size and the VAE make it {theirs}")
    if len(stages) == len(STAGES):
        first, second = stages.values()
        # Keyframes from an image network come one by one, whatever the segments between them hold.
        for field in ("resolution", "latent_size", *(("num_frames",) if first.num_frames > 1 else ())):
            values = getattr(first, field), getattr(second, field)
            if values[0] != values[1]:
                raise KeySyncError(f"{where}: {field} is {values[0]} for keyframes and {values[1]} for interpolation")


def save(
    path: str | os.PathLike,
    parts: Sequence[Part],
    *,
    sources: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    force: bool = False,
    progress: Any = None,
) -> ModelDirectory:
    """Writes a model directory: all of it, or nothing.

    Args:
      path: local or `gs://` folder; must not exist, be empty, or, with `force`, be a model directory to replace.
      parts: what goes in; tensors are read one at a time. Need not be complete.
      sources: file name, size and SHA-256 of what the parts were made from.
      notes: what was decided on the way, for the index.
      progress: called with the bytes written after each tensor.

    Raises:
      KeySyncError: the folder is in use, or parts that do not belong together.
    """
    check(os.fspath(path), {part.name: part.config for part in parts}, complete=False)
    with staged(path, force=force, replaceable=is_model_directory) as folder:
        for part in parts:
            (folder / part.name).mkdir(parents=True, exist_ok=True)
            written = None
            if part.tensors:
                # So that the file still says what it is when it is alone.
                own = {SELF_DESCRIPTION: json.dumps(describe(part.name, part.config, part.random))}
                written = safetensors_file.write(folder / part.name / WEIGHTS, part.tensors, own, progress)
            _write_json(folder / part.name / CONFIG, _describe_part(part, written))
        index = {
            "format": FORMAT,
            "format_version": VERSION,
            "converter": f"keysync-jax {__version__}",
            "parts": [part.name for part in parts],
            "random": any(part.random for part in parts),
            "sources": [dict(source) for source in sources],
            "notes": list(notes),
        }
        _write_json(folder / INDEX, index)  # last: a folder without it is no model directory
    return load(path, complete=False)


def save_params(
    path: str | os.PathLike,
    configurations: Mapping[str, PartConfig],
    params: Mapping[str, Mapping],
    *,
    random: bool = False,
    force: bool = False,
    notes: Sequence[str] = (),
) -> ModelDirectory:
    """A model directory from Flax parameters, e.g. restored from an Orbax checkpoint.

    Args:
      path: folder to write.
      configurations: part name -> config.
      params: part name -> nested dict of arrays; speech encoders without weights need none. Stage files get the decoder of "vae", if that
        is given.
      random: mark the weights as random.
      force: see `save`.
      notes: see `save`.
    """
    decoder = None
    if "vae" in configurations:
        decoder = from_params(part_table(configurations["vae"], ("decoder",)), params["vae"], "vae")
    parts = []
    for name, config in configurations.items():
        tensors = from_params(part_table(config, name=name), params.get(name, {}), name)
        if name in STAGES and decoder is not None:
            tensors = tensors.updated(dict(decoder.lazy_items()))
        parts.append(Part(name, config, tensors, random))
    return save(path, parts, notes=notes, force=force)


def _describe_part(part: Part, written: Written | None) -> dict[str, Any]:
    weights = None
    if written:
        weights = {
            "file": WEIGHTS,
            "sha256": written.sha256,
            "tensors": written.tensors,
            "parameters": written.parameters,
            "bytes": written.nbytes,
        }
    values = {**describe(part.name, part.config, part.random), "weights": weights}
    return values | ({"fresh": list(part.fresh)} if part.fresh else {})


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise KeySyncError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise KeySyncError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise KeySyncError(f"{path} is not a JSON object")
    return values


def _write_json(path: epath.Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n")
