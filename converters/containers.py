"""Opens whatever weights come in: files and folders become `Source`s with lazily read tensors, recognised by what they hold.

Files: torch zip (`.pt`, `.ckpt`, `.bin`), safetensors, and the index of a sharded set. Folders: diffusers (SVD), Hugging Face speech
encoders, what DeepSpeed leaves, a hub cache. What trainers put around a state dict is taken off (`wrappers`). Safetensors may lie on `gs://`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from etils import epath

from keysync_jax.config import WEAK_PARTS, StageConfig
from keysync_jax.converters import diffusers, hub, safetensors_file, sgm, torch_file, weight_folders, wrappers
from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.converters.parts import DECODER, SELF_DESCRIPTION, PartConfig, described
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import is_local
from keysync_jax.models.speech import registry

# What a source can be, apart from a speech encoder -> how to say it.
_KINDS = {
    "keyframe": "KeySync keyframe checkpoint",
    "interpolation": "KeySync interpolation checkpoint",
    "interpolation_bad": "worse interpolation network of autoguidance",
    "svd": "Stable Video Diffusion in one file (sgm names)",
    "diffusers_unet": "Stable Video Diffusion U-Net (diffusers)",
    "diffusers_vae": "Stable Video Diffusion VAE (diffusers)",
    "unknown": "tensors of an unknown model",
}
# Who writes a state dict under this name, where that is said.
_WRITERS = {"module": "DeepSpeed", "state_dict": "Lightning", "model": "fairseq"}
_NETWORK = f"{sgm.UNET_PREFIX.split('.')[1]}."  # wherever it stands
_AUDIO_LINEAR = re.compile(r"conditioner\.embedders\.[123]\.linear\.")  # KeyFace's are 1 and 3
SIDECAR = "keysync.safetensors"  # beside unet/ and vae/ in our diffusers exports


def title(kind: str) -> str:
    """A kind of source in words."""
    return _KINDS.get(kind) or registry.published()[kind][1].title


@dataclasses.dataclass(frozen=True)
class Source:
    """One recognised set of tensors.

    Attributes:
      kind: what it is; `title` says it in words.
      path: the file or folder it was read from.
      container: what that is, in words.
      tensors: torch key -> array, wrappers and prefixes removed.
      config: the `config.json` beside it, or the `cfg` inside it; None if there is neither.
      files: the files that hold the tensors.
      preprocessor: a speech encoder's `preprocessor_config.json`.
      own: the config that a file of ours carries; it is in our names then.
      random: whether that file says that its weights are random.
      notes: what was left out or chosen on the way.
    """

    kind: str
    path: str
    container: str
    tensors: Tensors
    config: Mapping[str, Any] | None = None
    files: tuple[str, ...] = ()
    preprocessor: Mapping[str, Any] | None = None
    own: PartConfig | None = None
    random: bool = False
    notes: tuple[str, ...] = ()


def open_sources(path: str, *, ema: bool = False) -> list[Source]:
    """Everything that a path holds: one source, or two for a diffusers folder (U-Net and VAE).

    Args:
      path: file or folder, local or `gs://`, or `hub:owner/name[/inside][@revision]`.
      ema: take the running average where a checkpoint carries one, instead of the weights as trained.

    Raises:
      KeySyncError: nothing there, not a container of tensors, a torch file that is not local, or damaged; one line that names the file.
    """
    where = epath.Path(hub.resolve(str(path)))
    if not where.exists():
        raise KeySyncError(f"{where} does not exist")
    if where.is_file():
        return [_open_file(where, ema)]
    where = weight_folders.snapshot(where)
    if _is_ours(where):
        raise KeySyncError(f"{where} is a model directory already; name its parts (e.g. {where / 'vae'}) to use them in another one")
    if any((where / part).is_dir() for part in ("unet", "vae")):
        return _open_diffusers(where)
    if states := weight_folders.deepspeed_states(where):
        return [_open_deepspeed(where, states, ema)]
    return [_open_file(weight_folders.weights_in(where), ema)]


def _open_deepspeed(folder: epath.Path, states: Sequence[epath.Path], ema: bool) -> Source:
    """Stages 1 and 2 keep all weights in one file of states; a model cut into several, and stage 3's, have to be put together first."""
    together = "put it together first with the zero_to_fp32.py beside it, and give what that writes"
    if len(states) > 1:
        raise KeySyncError(f"{folder} is a DeepSpeed checkpoint cut into {len(states)} ({states[0].name} …); {together}")
    source = _open_file(states[0], ema)
    if not all(tensor.size for _, tensor in source.tensors.lazy_items()):
        raise KeySyncError(f"{folder}: {states[0].name} holds empty tensors, as DeepSpeed's stage 3 leaves them; {together}")
    kinds = Counter(str(tensor.dtype) for _, tensor in source.tensors.lazy_items())
    note = f"{folder}: the weights of {states[0].name} were taken as they are there ({kinds.most_common(1)[0][0]})"
    return dataclasses.replace(source, container=f"folder of DeepSpeed, {source.container}", notes=(*source.notes, note))


def _is_ours(folder: epath.Path) -> bool:
    index = folder / "model_index.json"
    return index.is_file() and _read_json(index).get("format") == "keysync-jax"


def _open_diffusers(folder: epath.Path) -> list[Source]:
    parts = {name: _open_file(weight_folders.weights_in(folder / name)) for name in ("unet", "vae") if (folder / name).is_dir()}
    for name, source in parts.items():
        if source.kind != f"diffusers_{name}":
            raise KeySyncError(f"{folder / name} holds {title(source.kind)}, not a diffusers {name} of Stable Video Diffusion")
    sidecar = folder / SIDECAR
    if "unet" in parts and sidecar.is_file():
        parts["unet"] = _with_sidecar(parts["unet"], parts.get("vae"), sidecar)
    return list(parts.values())


def _with_sidecar(unet: Source, vae: Source | None, path: epath.Path) -> Source:
    """A KeySync stage that was exported to diffusers, with what diffusers has no place for and with the decoder beside it."""
    extra = _read_file(path)
    stage = described(extra.own, str(path))
    if not isinstance(stage, StageConfig):
        raise KeySyncError(f"{path} does not say which KeySync stage it belongs to; export again")
    tensors = diffusers.unet_to_sgm(unet.tensors, stage.unet).updated(dict(extra.tensors.lazy_items()))
    if vae is not None and vae.config is not None:
        decoder = diffusers.vae_to_sgm(vae.tensors, diffusers.vae_config_from_diffusers(vae.config, vae.path))
        tensors = tensors.updated({key: tensor for key, tensor in decoder.lazy_items() if key.startswith(DECODER)})
    return dataclasses.replace(
        unet,
        kind=stage.stage,
        container=f"{unet.container} with KeySync's sidecar",
        tensors=tensors,
        files=(*unet.files, *extra.files),
        own=stage,
        random=bool(extra.own.get("random")),
    )


def _open_file(path: epath.Path, ema: bool = False) -> Source:
    opened = _read_file(path, ema)
    if not opened.tensors:
        raise KeySyncError(f"{path} holds no tensors{''.join(f' ({note})' for note in opened.notes)}")
    config, beside = opened.config, path.parent / "config.json"
    if config is None and beside.is_file():
        found = _read_json(beside)
        # A config.json of ours describes the file that it names, and says nothing in diffusers' or transformers' terms.
        config = found if "_class_name" in found or "model_type" in found else None
    preprocessor = path.parent / "preprocessor_config.json"
    own = described(opened.own, str(path))
    return Source(
        kind=opened.own["part"] if isinstance(own, StageConfig) else _told_by_name(recognise(opened.tensors, config), path),
        path=str(path),
        container=opened.container,
        tensors=opened.tensors,
        config=config,
        files=opened.files,
        preprocessor=_read_json(preprocessor) if preprocessor.is_file() else None,
        own=own,
        random=own is not None and bool(opened.own.get("random")),
        notes=tuple(f"{path}: {note}" for note in opened.notes),
    )


def _told_by_name(kind: str, path: epath.Path) -> str:
    """A worse network has the tensors of the good one: the released file's name is all that tells it."""
    weak = next((name for name, stage in WEAK_PARTS.items() if stage == kind and path.name.startswith(name)), None)
    return weak or kind


class _Opened(NamedTuple):
    tensors: Tensors
    container: str
    files: tuple[str, ...]
    config: Mapping[str, Any] | None  # a `cfg` inside the file
    own: Any  # our self-description inside the file
    notes: tuple[str, ...] = ()


def read_tensors(path: epath.Path) -> Tensors:
    """The tensors of one file, wrappers and prefixes removed, whatever model they are of. Raises KeySyncError where it cannot be read."""
    return _read_file(path).tensors


def _read_file(path: epath.Path, ema: bool = False) -> _Opened:
    """One file, by its content and not by its name."""
    opened = _read_container(path, ema)
    found = wrappers.averaged(opened.tensors)
    if found is None:
        return opened
    what = f"{len(found.names)} tensors {found.under}.* are a running average"
    if ema:
        return opened._replace(tensors=found.average, notes=(*opened.notes, f"{what}; they were taken instead of what they average"))
    return opened._replace(tensors=found.trained, notes=(*opened.notes, f"{what}; they were left out, --ema takes them"))


def _read_container(path: epath.Path, ema: bool) -> _Opened:
    try:
        size = path.stat().length
        with path.open("rb") as f:
            head = f.read(200)
    except OSError as error:
        raise KeySyncError(f"cannot read {path}: {error.strerror or error}") from None
    if size == 0:
        raise KeySyncError(f"{path} is empty")
    weight_folders.refuse_pointer(path, head)
    if weight_folders.is_index(path):
        return _read_shards(path)
    if safetensors_file.looks_like(head[:16], size):
        tensors = safetensors_file.read(path)
        return _Opened(_without_wrappers(tensors), "safetensors", (str(path),), None, _parse(tensors.metadata.get(SELF_DESCRIPTION), path))
    if not is_local(path):
        raise KeySyncError(f"{path} is not a safetensors file, or is truncated; torch files are read from a local disk, copy it there")
    if torch_file.is_torch_zip(path) or head[:4] == b"PK\x03\x04" or torch_file.is_legacy(path):
        return _read_torch(path, ema)
    if path.suffix == ".safetensors":
        raise KeySyncError(f"{path} is not a safetensors file, or is truncated")
    raise KeySyncError(f"{path} is not a weights file: neither a torch zip archive nor safetensors")


def _parse(text: str | None, path: epath.Path) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise KeySyncError(f"{path}: its header's {SELF_DESCRIPTION} entry is not JSON") from None


def _read_torch(path: epath.Path, ema: bool) -> _Opened:
    skipped: Counter[str] = Counter()
    saved = torch_file.load(path, skipped)
    container = "torch zip file" if torch_file.is_torch_zip(path) else "torch file from before 1.6"
    config = own = None
    tensors, notes = saved, []
    if skipped:
        names = ", ".join(f"{name} ({count})" for name, count in skipped.most_common(6))
        notes.append(f"what holds no tensor was skipped, and nothing of it was run: {names}")
    if isinstance(saved, dict):
        own = saved.get(SELF_DESCRIPTION)
        config = saved.get("cfg") if isinstance(saved.get("cfg"), dict) else None
        chosen = _state_dict(saved, path, ema, notes)
        if chosen is not None and chosen.path:
            tensors = chosen.values
            writer = _WRITERS.get(chosen.path[0]) if len(chosen.path) == 1 else None
            container = f'{container} ({writer + ", " if writer else ""}under "{".".join(chosen.path)}")'
    found = Tensors(torch_file.flatten(tensors, str(path)), str(path))
    return _Opened(_without_wrappers(found), container, (str(path),), config, own, tuple(notes))


def _state_dict(saved: dict[str, Any], path: epath.Path, ema: bool, notes: list[str]) -> wrappers.StateDict | None:
    """The dict of a saved object whose names are a known model's, else the one under a name that is known; None for all of it."""
    found = wrappers.state_dicts(saved)
    kinds = [recognise(_without_wrappers(Tensors(torch_file.flatten(each.values, str(path)), str(path)))) for each in found]
    known = [each for each, kind in zip(found, kinds, strict=True) if kind != "unknown"]
    trained = [each for each in known if not each.is_average]
    if averages := [each for each in known if each.is_average]:
        name = ".".join(averages[0].path)
        if ema or not trained:
            notes.append(f'the running average under "{name}" was taken')
            return averages[0]
        notes.append(f'a running average under "{name}" was left out, --ema takes it')
    if trained:
        return trained[0]
    return next((each for each in found if len(each.path) == 1 and each.path[0] in _WRITERS), None)


def _read_shards(index: epath.Path) -> _Opened:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KeySyncError(f"{index} is not the index of a sharded checkpoint: it has no weight_map")
    shards: dict[str, _Opened] = {}
    items: dict[str, LazyTensor] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or name.endswith(".json"):
            raise KeySyncError(f"{index}: {key} is said to be in {name!r}, which is not a weights file beside the index")
        if name not in shards:
            shards[name] = _read_file(index.parent / name)
        if key not in shards[name].tensors:
            raise KeySyncError(f"{index.parent / name} lacks {key}, which {index.name} says is there")
        items[key] = shards[name].tensors.info(key)
    files = tuple(str(index.parent / name) for name in shards)
    return _Opened(_without_wrappers(Tensors(items, str(index))), f"sharded checkpoint ({len(files)} files)", files, None, None)


def _without_wrappers(tensors: Tensors) -> Tensors:
    """Where there is a network, names are known only with it, all the way down to its first layers."""
    first = (f"{sgm.UNET_PREFIX}input_blocks.", f"{sgm.UNET_PREFIX}time_embed.")
    has_network = any(_NETWORK in key for key in tensors)

    def known(candidate: Tensors) -> bool:
        return any(key.startswith(first) for key in candidate) if has_network else recognise(candidate) != "unknown"

    return wrappers.without_wrappers(tensors, known)


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        weight_folders.refuse_pointer(path, text[:200].encode())
        value = json.loads(text)
    except OSError as error:
        raise KeySyncError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise KeySyncError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise KeySyncError(f"{path} is not a JSON object")
    return value


def recognise(tensors: Tensors, config: Mapping[str, Any] | None = None) -> str:
    """The kind of a set of tensors, from its names and shapes (and the `model_type` beside it, for speech encoders)."""
    unet = sgm.UNET_PREFIX
    if any(key.startswith(unet) for key in tensors):
        return _stage_kind(tensors)
    if any(key.startswith(sgm.VAE_PREFIX) for key in tensors):
        return "svd"
    if any(key.startswith(("down_blocks.", "up_blocks.")) for key in tensors):
        return "diffusers_unet"
    if any(key.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for key in tensors):
        return "diffusers_vae"
    return registry.recognise(tensors, config) or "unknown"


def _stage_kind(tensors: Tensors) -> str:
    """KeySync adds an audio projection and reads audio tokens in `label_emb`; interpolation has a learned filler and a ninth channel."""

    def width(key: str, axis: int) -> int | None:
        info = tensors.info(key) if key in tensors else None
        return info.shape[axis] if info and len(info.shape) > axis else None

    unet = sgm.UNET_PREFIX
    inputs, outputs = width(f"{unet}input_blocks.0.0.weight", 1), width(f"{unet}out.2.weight", 0)
    if "model.learned_mask" in tensors or (inputs and outputs and inputs == 2 * outputs + 1):
        return "interpolation"
    label = width(f"{unet}label_emb.0.0.weight", 1)
    contexts = {width(key, 1) for key in tensors if key.startswith(unet) and key.endswith("attn2.to_k.weight")}
    if any(_AUDIO_LINEAR.match(key) for key in tensors) or (label is not None and contexts == {label}):
        return "keyframe"
    return "svd"
