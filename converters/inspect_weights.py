"""`keysync inspect`: what a weights file, folder or model directory holds, and what is missing or unexpected in it."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from etils import epath
from rich.console import Console, Group
from rich.table import Table as RichTable
from rich.text import Text

from keysync_jax import config as configs
from keysync_jax.config import StageConfig, UNetConfig
from keysync_jax.converters import assemble_audio, assemble_stage, diffusers, hub, model_directory, sgm, shapes, weight_folders
from keysync_jax.converters.containers import Source, open_sources, title
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import DECODER, STAGES, PartConfig, part_table
from keysync_jax.core.differences import Differences, compare
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech import registry

# Tensors are counted by module; these names alone would lump too much together.
_OUTER = r"model\.diffusion_model|first_stage_model|conditioner\.embedders\.\d+|encoder|decoder|feature_extractor"
_GROUP = re.compile(rf"^((?:{_OUTER})\.)?[^.]+")


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """Plain values that describe `path`; see `render`.

    Returns:
      `{"path", "what", "items": [...]}`; each item has "name", "kind", "what", "container", "tensors" (name -> shape and type),
      "parameters", "bytes", "types", "groups", and where it is recognised "config", "missing", "unexpected" and "wrong_shape". A model
      directory also has "random", "converter", "notes" and "problem" (why it cannot dub, or None).

    Raises:
      KeySyncError: nothing there, no container of tensors, or damaged: one line that says which.
    """
    if model_directory.is_model_directory(where := _resolved(path)):
        return _inspect_directory(where)
    sources = open_sources(where)
    return {"path": where, "what": " and ".join(title(s.kind) for s in sources), "items": [_inspect_source(s) for s in sources]}


def _resolved(path: str | os.PathLike) -> str:
    return os.fspath(weight_folders.snapshot(epath.Path(hub.resolve(os.fspath(path)))))


def _inspect_directory(path: str) -> dict[str, Any]:
    directory = model_directory.load(path, complete=False)
    problem = None
    try:
        model_directory.check(path, {name: part.config for name, part in directory.parts.items()})
    except KeySyncError as error:
        problem = str(error)
    items = []
    for name, part in directory.parts.items():
        try:
            tensors, wrong = directory.tensors(name), None
        except KeySyncError as error:
            tensors, wrong = Tensors({}, path), str(error)
        items.append(
            {
                "name": name,
                "kind": name,
                "what": f"{name}{', RANDOM weights' if part.random else ''}",
                "container": "safetensors" if part.weights else "no weights",
                **_numbers(tensors),
                "config": configs.to_dict(part.config),
                "sha256": part.weights.sha256 if part.weights else None,
                "fresh": list(part.fresh),
                "problem": wrong,
            }
        )
    return {
        "path": path,
        "what": f"KeySync-JAX model directory{', RANDOM weights' if directory.random else ''}",
        "random": directory.random,
        "converter": directory.index.get("converter"),
        "notes": list(directory.index.get("notes", ())),
        "problem": problem or next((item["problem"] for item in items if item["problem"]), None),
        "items": items,
    }


def _inspect_source(source: Source) -> dict[str, Any]:
    item = {"name": source.path, "kind": source.kind, "what": title(source.kind), "container": source.container, **_numbers(source.tensors)}
    try:
        config, found, optional = _account(source)
    except KeySyncError as error:  # e.g. a size-giving tensor is missing, or no config.json beside
        return item | {"problem": str(error)}
    if config is not None:
        item["config"] = configs.to_dict(config)
        if source.kind in STAGES and source.own is None:
            item["config"] = _shown_by_shapes(item["config"])
    if found is not None:
        wrong = {key: {"found": list(a), "expected": list(b)} for key, (a, b) in found.wrong.items()}
        item |= {"missing": list(found.missing), "unexpected": list(found.unexpected), "wrong_shape": wrong, "optional_copies": optional}
    return item


def _shown_by_shapes(config: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint without a description of itself really says: `convert` assumes the rest."""
    unet = {k: v for k, v in config["unet"].items() if k not in ("num_head_channels", "num_frames", "merge_strategy", "merge_factor")}
    return {"stage": config["stage"], "audio_feature_dim": config["audio_feature_dim"], "unet": unet}


def _account(source: Source) -> tuple[PartConfig | UNetConfig | None, Differences | None, int]:
    """(config, differences from its table, number of optional VAE copies) of a source; None where there is nothing to compare with."""
    if source.kind in STAGES:
        return _account_stage(source)
    if source.kind in registry.published():
        config, tensors = assemble_audio.read(source)
        return config, compare(tensors.shapes, {e.torch_key: e.torch_shape for e in part_table(config)}), 0
    if source.kind == "diffusers_unet" and source.config is not None:
        unet = diffusers.unet_config_from_diffusers(source.config, source.path)
        names = diffusers.unet_map(unet)
        sizes = {e.torch_key: e.torch_shape for e in diffusers.sgm.unet_table(unet)}
        return unet, compare(source.tensors.shapes, {theirs: sizes[ours] for theirs, ours in names.items()}), 0
    if source.kind == "diffusers_vae" and source.config is not None:
        vae = diffusers.vae_config_from_diffusers(source.config, source.path)
        found = compare(diffusers.vae_to_sgm(source.tensors, vae).shapes, {e.torch_key: e.torch_shape for e in part_table(vae)})
        return vae, found, 0
    return None, None, 0


def _account_stage(source: Source) -> tuple[StageConfig, Differences, int]:
    tensors = source.tensors
    # The head width is not in the shapes, nor do names and shapes depend on it: any that divides the width will do.
    own = source.own if isinstance(source.own, StageConfig) else None
    config = own or shapes.stage_config(tensors, source.kind, shapes.model_channels(tensors))
    expected = {e.torch_key: e.torch_shape for e in part_table(config)}
    vae = None
    if any(key.startswith(DECODER) for key in tensors):
        vae = shapes.vae_config(tensors, sgm.VAE_PREFIX, quant_conv=False)
        expected |= {e.torch_key: e.torch_shape for e in part_table(vae, ("decoder",))}
    copies = assemble_stage.optional_copies(tensors, vae) & set(tensors) | {key for key in tensors if key.startswith(f"{sgm.LPIPS}.")}
    return config, compare(tensors.select(key for key in tensors if key not in copies).shapes, expected), len(copies)


def _numbers(tensors: Tensors) -> dict[str, Any]:
    groups: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for key, tensor in tensors.lazy_items():
        group = found[0] if (found := _GROUP.match(key)) else key
        groups[group] += 1
        sizes[group] += tensor.size
    return {
        "count": len(tensors),
        "parameters": tensors.parameters,
        "bytes": tensors.nbytes,
        "types": dict(Counter(str(tensor.dtype) for _, tensor in tensors.lazy_items())),
        "groups": {name: {"tensors": groups[name], "parameters": sizes[name]} for name in groups},
        "tensors": {key: {"shape": list(tensor.shape), "type": str(tensor.dtype)} for key, tensor in tensors.lazy_items()},
    }


def show(path: str | os.PathLike, *, tensors: bool = False, as_json: bool = False, console: Console | None = None) -> None:
    """Prints what `inspect` finds.

    Args:
      path: file, folder, model directory or `hub:` path.
      tensors: list every tensor.
      as_json: print JSON instead of tables.
      console: where to; default stdout.
    """
    found = inspect(path)
    if as_json:
        if not tensors:
            for item in found["items"]:
                del item["tensors"]
        print(json.dumps(found, indent=1))
        return
    (console or Console()).print(render(found, tensors), highlight=False, soft_wrap=True)


def render(found: Mapping[str, Any], tensors: bool = False) -> Group:
    """`inspect`'s result for a terminal."""
    lines: list[Any] = [Text(f"{found['path']}: {found['what']}", style="bold")]
    for item in found["items"]:
        lines += _render_item(item, tensors)
    if found.get("random"):
        lines.append(Text("the weights are RANDOM: good for trying the tools, not for dubbing", style="bold yellow"))
    lines += [Text(f"note: {note}") for note in found.get("notes", ())]
    if found.get("problem"):
        lines.append(Text(found["problem"], style="red"))
    elif "problem" in found:
        lines.append(Text("complete: nothing that a dub needs is missing", style="green"))
    return Group(*lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out = []
    for name, value in values.items():
        out += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return out


def _render_item(item: Mapping[str, Any], tensors: bool) -> list[Any]:
    types = ", ".join(f"{count} {name}" for name, count in item["types"].items())
    table = RichTable(title=f"{item['what']} · {item['container']}", title_justify="left", show_footer=True)
    table.add_column("under", footer="all", overflow="fold")
    table.add_column("tensors", footer=f"{item['count']:,}", justify="right")
    table.add_column("parameters", footer=f"{item['parameters']:,}", justify="right")
    for name, numbers in item["groups"].items():
        table.add_row(name, f"{numbers['tensors']:,}", f"{numbers['parameters']:,}")
    lines: list[Any] = [table, Text(f"{item['bytes'] / 2**20:,.1f} MiB; {types or 'no tensors'}")]
    if item.get("config"):
        lines.append(Text("config: " + ", ".join(f"{name} {value}" for name, value in _flat(item["config"]))))
    if "missing" in item:
        if item.get("optional_copies"):
            lines.append(Text(f"{item['optional_copies']} optional VAE copies"))
        complete = not (item["missing"] or item["unexpected"] or item["wrong_shape"])
        lines.append(Text("nothing missing, nothing unexpected", style="green") if complete else Text(""))
        lines += [Text(f"missing: {key}", style="red") for key in item["missing"]]
        lines += [Text(f"unexpected: {key}", style="red") for key in item["unexpected"]]
        lines += [Text(f"wrong shape: {k} is {v['found']}, expected {v['expected']}", style="red") for k, v in item["wrong_shape"].items()]
    if item.get("problem"):
        lines.append(Text(item["problem"], style="red"))
    if tensors:
        lines += [Text(f"{key}  {tuple(info['shape'])}  {info['type']}") for key, info in item["tensors"].items()]
    return lines
