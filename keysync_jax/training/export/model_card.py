"""The model card of an export, and its publication on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from etils import epath

from keysync_jax.config import to_dict
from keysync_jax.converters import hub
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.core.errors import KeySyncError, UsageError, first_line
from keysync_jax.core.files import is_local
from keysync_jax.core.version import __version__
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.start.runs import RunWeights
from keysync_jax.training.store import jsonl

CARD, RECORDS = "README.md", "training"
COMMANDS, METRICS = "commands.jsonl", "metrics.jsonl"
# Figures in metrics.jsonl that say how a run went, not what came of it.
_NO_RESULT = {
    "step", "time", "finite", "skipped", "steps_per_s", "clips_per_s", "data_wait", "learning_rate", "eta_s", "tflops_per_s", "mfu",
    "device_peak_gib", "rss_peak_gib", "nonfinite",
}  # fmt: skip
# What the weights began from decides first under which terms they may be passed on.
_BEGAN = {
    "scratch": "Trained from random weights. Terms: what the training data allow.",
    "svd": "Initialised from Stable Video Diffusion, whose licence (Stability AI, community or commercial) applies to derived weights; "
    "so do the terms of the training data.",
    "model": "Initialised from another model, whose terms apply to derived weights; so do the terms of the training data.",
    "run": "Initialised from another training run; its terms apply, and those of the training data.",
}


@dataclasses.dataclass(frozen=True)
class CardOptions:
    """What a card says that the runs do not know.

    Attributes:
      licence: identifier of the licence that the publisher gives the weights ("apache-2.0", ...); "other" leaves it to the text.
      title: heading; empty takes the folder's name.
    """

    licence: str = "other"
    title: str = ""


def basename(path: str | os.PathLike) -> str:
    """Last part of a path: what may be published of where something lay."""
    text = os.fspath(path)
    if text.startswith("hub:"):
        return text
    *_, folder, name = ("", "", *text.rstrip("/").split("/"))
    return f"{folder}/{name}" if folder and name.endswith(".csv") else name  # every manifest has the same name


def origin(run: RunWeights) -> dict[str, Any]:
    """Which run a part comes from, for the index of a model directory."""
    return {"part": run.part, "run": basename(run.workdir), "step": run.step, "weights": "ema" if run.ema else "last"}


def write(folder: str | os.PathLike, directory: ModelDirectory, runs: Sequence[RunWeights], options: CardOptions) -> None:
    """Writes the card and, for each run, its recipe and metrics under `training/PART/`; nothing if no part comes from a run.

    Args:
      folder: the export.
      directory: its parts.
      runs: where they come from.
      options: see `CardOptions`.
    """
    if not runs:
        return
    root = epath.Path(folder)
    for run in runs:
        records = root / RECORDS / run.part
        records.mkdir(parents=True, exist_ok=True)
        (records / "config.json").write_text(json.dumps(_public(run.config), indent=1) + "\n")
        lines = _lines(run, METRICS)
        if lines:
            (records / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines if line.get("step", 0) <= run.step))
    (root / CARD).write_text(text(options.title or basename(folder), directory, runs, options))


def text(title: str, directory: ModelDirectory, runs: Sequence[RunWeights], options: CardOptions) -> str:
    """The card: front matter that the hub reads, then parts, data, steps, metrics, licence, and how it was made."""
    lines = ["---", "library_name: keysync-jax", f"license: {options.licence}", "tags:", "- lip-sync", "- jax", "---", ""]
    lines += [f"# {title}", "", _summary(directory), ""]
    lines += ["| part | parameters | from | step | weights |", "| --- | --- | --- | --- | --- |"]
    by_part = {run.part: run for run in runs}
    for name, part in directory.parts.items():
        count = f"{part.weights.parameters:,}" if part.weights else "none"
        run = by_part.get(name)
        made = [basename(run.workdir), str(run.step), "averaged (EMA)" if run.ema else "last"] if run else ["another model", "", ""]
        if part.weights is None:
            made = ["", "", ""]
        lines.append(f"| {name} | {count} | {' | '.join(made)} |")
    for run in runs:
        lines += ["", *_section(run)]
    terms = [_BEGAN[run.config.init.kind] for run in runs]
    lines += ["", "## Licence", "", f"`{options.licence}`", "", *dict.fromkeys(terms), ""]
    lines += [f"Made with keysync-jax {__version__}. Full recipes and metrics: `{RECORDS}/`.", ""]
    return "\n".join(lines)


def _summary(directory: ModelDirectory) -> str:
    if {"keyframe", "interpolation", "vae"} <= set(directory.parts):
        return "Lip-sync weights: a model directory that `keysync dub --model` reads."
    return "Weights of a lip-sync system; alone they do not make a dub, parts are missing."


def _section(run: RunWeights) -> list[str]:
    config = run.config
    data = config.data
    began = config.init.kind + (f" ({basename(config.init.path)})" if config.init.path else "")
    shares = f", weights {', '.join(map(str, data.weights))}" if data.weights else ""
    out = [
        f"## {run.part}",
        "",
        f"- data: {', '.join(map(basename, data.datasets)) or 'not recorded'} (split {data.split}{shares})",
        f"- steps: {run.step} of {config.num_steps}, batch {data.batch_size}, seed {config.seed}, {config.dtype}",
        f"- start: {began}",
        f"- learning rate {config.optimizer.learning_rate:g}, EMA {config.optimizer.ema_decay:g}",
    ]
    latest: dict[str, tuple[float, int]] = {}
    for line in _lines(run, METRICS):
        if line.get("step", 0) <= run.step:
            numbers = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name not in _NO_RESULT}
            latest |= {name: (value, line["step"]) for name, value in numbers.items()}
    if latest:
        out += ["", "| metric | value | step |", "| --- | --- | --- |"]
        out += [f"| {name} | {value:.5g} | {step} |" for name, (value, step) in sorted(latest.items())]
    commands = [line["command"] for line in _lines(run, COMMANDS) if "command" in line]
    command = _public_command(commands[-1]) if commands else f"keysync train --config {RECORDS}/{run.part}/config.json --workdir DIR"
    return [*out, "", "```", command, "```"]


def _public_command(command: str) -> str:
    """A command with local folders reduced to their names: what lay where is nobody's business."""

    def short(word: str) -> str:
        key, separator, value = word.rpartition("=")
        return f"{key}{separator}{','.join(basename(part) if '/' in part else part for part in value.split(','))}"

    return shlex.join(map(short, shlex.split(command)))


def _lines(run: RunWeights, name: str) -> list[dict[str, Any]]:
    return jsonl.read(epath.Path(run.workdir) / name)


def _public(config: TrainConfig) -> dict[str, Any]:
    """The recipe with local folders reduced to their names."""
    values = to_dict(config)

    def short(section: dict[str, Any], *names: str) -> None:
        for name in names:
            value = section[name]
            section[name] = [basename(v) for v in value] if isinstance(value, list) else basename(value) if value else value

    short(values, "lpips")
    short(values["data"], "datasets", "validation")
    short(values["init"], "path", "vae")
    return values


# -- publication --------------------------------------------------------------------------------------------------------------------


def check_target(target: str) -> str:
    """`owner/name` of a `hub:owner/name` target, before any work is done.

    Raises:
      UsageError: not of that form.
    """
    where = hub.parse(target)
    if where.inside:
        raise UsageError(f"--push {target}: name a repository, hub:owner/name, without a folder inside it")
    return where.repo


def push(folder: str | os.PathLike, target: str, *, private: bool = False, message: str = "") -> str:
    """Uploads an export to the hub, making the repository if need be.

    Args:
      folder: local folder.
      target: `hub:owner/name[@branch]`.
      private: of a repository that is made.
      message: of the commit.

    Returns:
      The address of the commit.

    Raises:
      UsageError: malformed target, or a folder that is not local.
      KeySyncError: no access or no network.
    """
    from huggingface_hub import HfApi

    repo, revision = check_target(target), hub.parse(target).revision
    if not is_local(folder):
        raise UsageError(f"--push uploads from a local disk; write the export to a local folder, not to {folder}")
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=os.fspath(folder), repo_type="model", revision=revision, commit_message=message or "keysync export"
        )
    except (OSError, ValueError) as error:  # the hub's HTTP errors are OSErrors
        raise KeySyncError(
            f"cannot push to {target}: {first_line(error)} (log in with `hf auth login`, check the name and the network)"
        ) from None
    return str(getattr(commit, "commit_url", commit))


def record_command(workdir: str | os.PathLike, command: str, when: str) -> None:
    """Notes how a run was started, for its card."""
    path = epath.Path(workdir) / COMMANDS
    path.parent.mkdir(parents=True, exist_ok=True)
    jsonl.JsonLines(path).add({"time": when, "command": command})
