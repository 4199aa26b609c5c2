"""Opens whatever weights come in: files and folders become `Source`s with lazily read tensors, recognised by what they hold.

Files: torch zip (`.pt`, `.ckpt`, `.bin`), safetensors, and the index of a sharded set. Folders: diffusers (SVD), Hugging Face speech
encoders. The wrapper that a trainer puts around a state dict is taken off, and so are its key prefixes. Safetensors may lie on `gs://`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from etils import epath

from keysync_jax.config import WEAK_PARTS, StageConfig
from keysync_jax.converters import diffusers, hub, safetensors_file, sgm, torch_file
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
_WRAPPERS = {"module": "DeepSpeed", "state_dict": "Lightning", "model": "fairseq"}
# What trainers put before or into parameter names: DeepSpeed under Lightning, torch.compile.
_PREFIXES = ("_forward_module.", "_orig_mod.")
# Full precision first.
_WEIGHT_NAMES = tuple(
    f"{stem}{variant}{end}"
    for variant in ("", ".fp16", ".bf16")
    for stem in ("diffusion_pytorch_model", "model", "pytorch_model")
    for end in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
)
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


def open_sources(path: str) -> list[Source]:
    """Everything that a path holds: one source, or two for a diffusers folder (U-Net and VAE).

    Args:
      path: file or folder, local or `gs://`, or `hub:owner/name[/inside][@revision]`.

    Raises:
      KeySyncError: nothing there, not a container of tensors, a torch file that is not local, or damaged; one line that names the file.
    """
    where = epath.Path(hub.resolve(str(path)))
    if not where.exists():
        raise KeySyncError(f"{where} does not exist")
    if where.is_file():
        return [_open_file(where)]
    if _is_ours(where):
        raise KeySyncError(f"{where} is a model directory already; name its parts (e.g. {where / 'vae'}) to use them in another one")
    if any((where / part).is_dir() for part in ("unet", "vae")):
        return _open_diffusers(where)
    return [_open_file(_weights_in(where))]


def _is_ours(folder: epath.Path) -> bool:
    index = folder / "model_index.json"
    return index.is_file() and _read_json(index).get("format") == "keysync-jax"


def _open_diffusers(folder: epath.Path) -> list[Source]:
    parts = {name: _open_file(_weights_in(folder / name)) for name in ("unet", "vae") if (folder / name).is_dir()}
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


def _weights_in(folder: epath.Path) -> epath.Path:
    for name in _WEIGHT_NAMES:
        if (folder / name).is_file():
            return folder / name
    candidates = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".ckpt", ".bin"))
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ", ".join(p.name for p in candidates[:6])
        raise KeySyncError(f"{folder} holds {len(candidates)} weight files ({names}); name the one you mean")
    raise KeySyncError(f"{folder} holds no weights (looked for {', '.join(_WEIGHT_NAMES[:4])} and the like)")


def _open_file(path: epath.Path) -> Source:
    opened = _read_file(path)
    if not opened.tensors:
        raise KeySyncError(f"{path} holds no tensors")
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


def read_tensors(path: epath.Path) -> Tensors:
    """The tensors of one file, wrappers and prefixes removed, whatever model they are of. Raises KeySyncError where it cannot be read."""
    return _read_file(path).tensors


def _read_file(path: epath.Path) -> _Opened:
    """One file, by its content and not by its name."""
    try:
        size = path.stat().length
        with path.open("rb") as f:
            head = f.read(16)
    except OSError as error:
        raise KeySyncError(f"cannot read {path}: {error.strerror or error}") from None
    if size == 0:
        raise KeySyncError(f"{path} is empty")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if safetensors_file.looks_like(head, size):
        tensors = safetensors_file.read(path)
        return _Opened(_without_prefixes(tensors), "safetensors", (str(path),), None, _parse(tensors.metadata.get(SELF_DESCRIPTION), path))
    if not is_local(path):
        raise KeySyncError(f"{path} is not a safetensors file, or is truncated; torch files are read from a local disk, copy it there")
    if torch_file.is_torch_zip(path) or head[:4] == b"PK\x03\x04" or torch_file.is_legacy(path):
        return _read_torch(path)
    if path.suffix == ".safetensors":
        raise KeySyncError(f"{path} is not a safetensors file, or is truncated")
    raise KeySyncError(f"{path} is not a weights file: neither a torch zip archive nor safetensors")


def _parse(text: str | None, path: epath.Path) -> Any:
    try:
        return json.loads(text) if text else None
    except ValueError:
        raise KeySyncError(f"{path}: its header's {SELF_DESCRIPTION} entry is not JSON") from None


def _read_torch(path: epath.Path) -> _Opened:
    saved = torch_file.load(path)
    container = "torch zip file" if torch_file.is_torch_zip(path) else "torch file from before 1.6"
    config = own = None
    tensors = saved
    if isinstance(saved, dict):
        own = saved.get(SELF_DESCRIPTION)
        config = saved.get("cfg") if isinstance(saved.get("cfg"), dict) else None
        for wrapper, writer in _WRAPPERS.items():
            if isinstance(saved.get(wrapper), dict) and torch_file.flatten(saved[wrapper], str(path)):
                tensors, container = saved[wrapper], f'{container} ({writer}, under "{wrapper}")'
                break
    found = Tensors(torch_file.flatten(tensors, str(path)), str(path))
    return _Opened(_without_prefixes(found), container, (str(path),), config, own)


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
    return _Opened(_without_prefixes(Tensors(items, str(index))), f"sharded checkpoint ({len(files)} files)", files, None, None)


def _without_prefixes(tensors: Tensors) -> Tensors:
    names = {}
    for key in tensors:
        new = key
        for prefix in _PREFIXES:
            new = new.replace(prefix, "")
        names[key] = new
    return tensors.renamed(names)


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
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
