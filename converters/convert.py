"""`keysync convert`: any mix of PyTorch weights to one model directory.

Every tensor of every source is accounted for: it has a place in a table, or is a recognised optional copy, or is listed by name and
stops the conversion unless it is allowed, by name or by a pattern.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath
from rich.console import Console

from keysync_jax.config import WEAK_PARTS, MaskConfig, StageConfig, VAEConfig
from keysync_jax.converters import assemble_audio, assemble_stage, assemble_vae, model_directory
from keysync_jax.converters.byte_progress import byte_progress
from keysync_jax.converters.containers import Source, open_sources, title
from keysync_jax.converters.lazy import FLOAT_TYPES
from keysync_jax.converters.parts import STAGES, Part, PartConfig, audio_part_name
from keysync_jax.converters.staging import check_free
from keysync_jax.core.differences import Allowed, some
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.files import sha256
from keysync_jax.models.speech import registry


@dataclasses.dataclass(frozen=True)
class Options:
    """What the weights do not say.

    Attributes:
      allow_missing: tensors that may be missing or mis-shaped (they are drawn at random), or parts that may be left out; names or patterns.
      allow_unexpected: tensors that may be there and are ignored; names or patterns such as `loss.*`.
      ema: take the running average where a checkpoint carries one, instead of the weights as trained.
      encoders: stage -> the speech encoder that it was trained with ("hubert+wavlm" for two side by side); the others are released ones.
      bad: file with the worse interpolation network that autoguidance leads away from, where its name does not say it
        (`interpolation_bad…`).
      mask: kind of the mask that the stages were trained with.
      resolution: side of the face crop in pixels; None follows from the learned filler, or is 512.
      head_channels: width of an attention head, for U-Nets that are not SVD's size.
      dtype: "float32", "float16" or "bfloat16"; None keeps every tensor's own type.
      seed: of tensors that are drawn at random.
    """

    allow_missing: tuple[str, ...] = ()
    allow_unexpected: tuple[str, ...] = ()
    ema: bool = False
    encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bad: str | None = None
    mask: str = "box"
    resolution: int | None = None
    head_channels: int | None = None
    dtype: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The written directory and what was decided on the way."""

    directory: model_directory.ModelDirectory
    notes: tuple[str, ...]


def convert(
    sources: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    *,
    force: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Conversion:
    """Reads `sources`, checks every tensor, and writes a model directory.

    With Stable Video Diffusion alone, both stages are initialised from it for training, as the reference does: what has another shape
    there (`label_emb.0.0.weight`, interpolation's `input_blocks.0.0.weight`) or does not exist (audio projection, learned filler) is
    drawn at random and reported by name.

    Args:
      sources: files and folders, recognised by what they hold; local or `hub:owner/name[/inside]`.
      out: model directory to write, local or `gs://`.
      allow_missing: see `Options`.
      allow_unexpected: see `Options`.
      force: replace an existing model directory.
      console: where progress and the summary go; default stderr.
      **options: further fields of `Options`.

    Raises:
      KeySyncError: a source that cannot be read or recognised, tensors that are missing, unexpected or mis-shaped, a part without a
        source, or parts that do not belong together. Nothing is written then.
      UsageError: two sources for one part, or an option with an impossible value or one that contradicts a file of ours.
    """
    console = console or Console(stderr=True)
    settings = _settings(Options(tuple(allow_missing), tuple(allow_unexpected), **options))
    # Said before gigabytes are downloaded, compared and hashed, not after.
    check_free(out, force=force, replaceable=model_directory.is_model_directory)
    opened = [source for path in sources for source in open_sources(os.fspath(path), ema=settings.ema)]
    if settings.bad is not None:
        opened += [_as_weak(source) for source in open_sources(settings.bad, ema=settings.ema)]
    by_role = _by_role(opened)
    _refuse_contradictions(by_role, options)
    parts, notes, used = _assemble(by_role, settings)
    used |= _refuse_incomplete(parts, _for_training(by_role), settings, notes)
    notes[:0] = [note for source in opened for note in source.notes]
    given = dict.fromkeys((*settings.allow_missing, *settings.allow_unexpected))
    unused = [pattern for pattern in given if not any(name in Allowed([pattern]) for name in used)]
    if unused:
        notes.append(f"allowed but not needed: {some(unused)}")
    if settings.dtype:
        parts = [dataclasses.replace(part, tensors=part.tensors.astype(FLOAT_TYPES[settings.dtype])) for part in parts]
    with byte_progress(console, "hashing sources", sum(epath.Path(f).stat().length for s in opened for f in s.files)) as advance:
        hashes = [_hash(epath.Path(file), advance) for source in opened for file in source.files]
    with byte_progress(console, "writing", sum(part.tensors.nbytes for part in parts)) as advance:
        directory = model_directory.save(out, parts, sources=hashes, notes=notes, force=force, progress=advance)
    for note in notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    for name, part in directory.parts.items():
        size = f"{part.weights.tensors} tensors, {part.weights.parameters:,} parameters" if part.weights else "no weights"
        console.print(f"{directory.path}/{name}: {size}", highlight=False, soft_wrap=True, markup=False)
    return Conversion(directory, tuple(notes))


def _as_weak(source: Source) -> Source:
    """A source of an interpolation network as a worse version of it."""
    fitting = source.kind == "unknown" and any("diffusion_model." in key for key in source.tensors)  # inside a running engine
    weak = next((name for name, stage in WEAK_PARTS.items() if fitting or source.kind in (name, stage)), None)
    if weak is None:
        raise UsageError(f"--bad {source.path} holds {title(source.kind)}; give an interpolation network")
    return dataclasses.replace(source, kind=weak)


def _settings(options: Options) -> Options:
    if options.dtype not in (None, *FLOAT_TYPES):
        raise UsageError(f"dtype {options.dtype!r}: choose one of {', '.join(FLOAT_TYPES)}")
    unknown = set(options.encoders) - set(STAGES)
    if unknown:
        raise UsageError(f"encoders: {', '.join(sorted(unknown))} is no stage; there are {', '.join(STAGES)}")
    return options


def _refuse_contradictions(by_role: Mapping[str, Source], given: Mapping[str, Any]) -> None:
    """What a file of ours says of itself holds; an option that says otherwise is refused rather than ignored."""
    for stage in STAGES:
        own = by_role[stage].own if stage in by_role else None
        if not isinstance(own, StageConfig):
            continue
        for option, asked, says in (
            (f"encoder {stage}=", given.get("encoders", {}).get(stage), own.audio_encoder),
            ("mask ", given.get("mask"), own.mask.kind),
            ("resolution ", given.get("resolution"), own.resolution),
            ("head-channels ", given.get("head_channels"), own.unet.num_head_channels),
        ):
            if asked not in (None, says):
                raise UsageError(f"--{option}{asked}: {by_role[stage].path} says of itself that this is {says}; leave the option out")


# Which role a kind of source plays, apart from a speech encoder; "svd" plays two.
_ROLES = {
    "keyframe": ("keyframe",),
    "interpolation": ("interpolation",),
    **{name: (name,) for name in WEAK_PARTS},
    "svd": ("svd_unet", "svd_vae"),
    "diffusers_unet": ("svd_unet",),
    "diffusers_vae": ("svd_vae",),
}


def _roles(kind: str) -> tuple[str, ...]:
    """A speech encoder plays itself, in whatever form it was published."""
    return _ROLES[kind] if kind in _ROLES else (registry.published()[kind][0].name,)


def _by_role(opened: Sequence[Source]) -> dict[str, Source]:
    by_role: dict[str, Source] = {}
    for source in opened:
        if source.kind == "unknown":
            names = some(sorted(source.tensors), 3)
            raise KeySyncError(f"{source.path} holds tensors of an unknown model ({names}); docs/convert.md lists what is read")
        for role in _roles(source.kind):
            if role == "svd_unet" and source.kind == "svd" and not assemble_stage.has_unet(source):
                continue
            if role == "svd_vae" and source.kind == "svd" and not assemble_vae.has_vae(source):
                continue
            if role == "svd_vae" and role in by_role and assemble_vae.same_encoder(by_role[role], source):
                continue
            if role in by_role:
                hint = ", or name the worse one of a KeyFace model with --bad" if role in WEAK_PARTS.values() else ""
                raise UsageError(f"{by_role[role].path} and {source.path} are both {title(source.kind)}; give one of them{hint}")
            by_role[role] = source
    return by_role


def _assemble(by_role: Mapping[str, Source], options: Options) -> tuple[list[Part[PartConfig]], list[str], set[str]]:
    """(parts, notes, keys whose allowance was used)."""
    notes: list[str] = []
    used: set[str] = set()
    training = _for_training(by_role)
    checkpoints = [by_role[stage] for stage in reversed(STAGES) if stage in by_role]
    vae = assemble_vae.assemble(by_role.get("svd_vae"), checkpoints, options, notes, used)
    config = vae.config if vae else None
    settings = _stage_settings(by_role, config, options)
    stages: list[Part[StageConfig]] = []
    for name in STAGES:
        stage_settings = {**settings, "audio_encoder": options.encoders.get(name)}
        if name in by_role:
            stages.append(assemble_stage.from_checkpoint(by_role[name], name, vae, stage_settings, options, notes, used))
        elif training:
            stages.append(assemble_stage.from_svd(by_role["svd_unet"], name, vae, stage_settings, options, notes, used))
    if "svd_unet" in by_role:
        for part in stages:
            if part.name in by_role:
                notes.append(assemble_stage.compare_frozen(part, by_role["svd_unet"]))
        unet_only = by_role["svd_unet"]
        if not training and unet_only.kind == "diffusers_unet":
            notes.append(f"{unet_only.path} is not part of the result: both stages come from KeySync checkpoints")
    audio = [assemble_audio.assemble(by_role[kind], options, used) for kind in registry.ENCODERS if kind in by_role]
    audio += assemble_audio.without_weights([part.config for part in stages], {part.name: part for part in audio})
    weak = [_weak(by_role[name], name, stages, notes) for name in WEAK_PARTS if name in by_role]
    for part in stages:
        if part.config.guidance.kind == "auto" and part.name not in {WEAK_PARTS[each.name] for each in weak}:
            notes.append(f"the directory has no {part.name}_bad, the worse network of its autoguidance: its keysync animate goes without")
    return [*stages, *weak, *([vae] if vae else []), *audio], notes, used


def _weak(source: Source, name: str, stages: Sequence[Part[StageConfig]], notes: list[str]) -> Part[StageConfig]:
    good = next((part for part in stages if part.name == WEAK_PARTS[name]), None)
    if good is None:
        raise KeySyncError(f"{source.path} is a worse version of an {WEAK_PARTS[name]} network that is not there; give that one, too")
    return assemble_stage.weak_network(source, name, good, notes)


def _stage_settings(by_role: Mapping[str, Source], vae: VAEConfig | None, options: Options) -> dict[str, Any]:
    """Fields of `StageConfig` that both stages share and the weights of one may not show."""
    factor = (vae or VAEConfig()).downsample_factor
    latent = assemble_stage.filler_size(by_role.get("interpolation"))
    if latent is None:
        latent = (options.resolution or StageConfig.resolution) // factor
    if options.resolution not in (None, latent * factor):
        raise UsageError(f"resolution {options.resolution} does not fit the learned filler and the VAE, which make it {latent * factor}")
    settings = {"latent_size": latent, "resolution": latent * factor, "mask": MaskConfig(options.mask)}
    return settings | ({"latent_scale": vae.latent_scale} if vae else {})


def _for_training(by_role: Mapping[str, Source]) -> bool:
    """Whether there is Stable Video Diffusion but no KeySync checkpoint: the result is a start for training."""
    return "svd_unet" in by_role and not any(stage in by_role for stage in STAGES)


def _refuse_incomplete(parts: Sequence[Part[PartConfig]], training: bool, options: Options, notes: list[str]) -> set[str]:
    """A dub needs both stages, the VAE and each stage's encoder; whatever is left out must be allowed by name (those are returned)."""
    names = {part.name for part in parts}
    needed = {stage: "a KeySync checkpoint of that stage" for stage in STAGES}
    needed["vae"] = "Stable Video Diffusion's VAE, as a diffusers folder or a single file"
    for part in parts:
        if isinstance(part.config, StageConfig):
            for encoder in part.config.audio_encoders:
                needed[audio_part_name(encoder)] = f"the {encoder} encoder that the {part.name} stage was trained with"
    lacking = [name for name in needed if name not in names]
    # A directory to start training from needs no speech encoders: features are computed beforehand.
    fatal = [name for name in lacking if name not in Allowed(options.allow_missing) and not (training and name.startswith("audio/"))]
    if not parts:
        raise KeySyncError("no weights to convert were given")
    if fatal:
        lines = "; ".join(f"{name} ({needed[name]})" for name in fatal)
        raise KeySyncError(f"no source for {lines}; add it, or allow each with --allow-missing {fatal[0]}")
    notes.extend(f"the directory has no {name}, which a dub needs" for name in lacking)
    return set(lacking)


def _hash(path: epath.Path, advance: Callable[[int], object]) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().length, "sha256": sha256(path, advance)}
