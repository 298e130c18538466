"""Checkpoints: everything a run needs to go on with the same bits, written so that none is ever half there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..config import Config
from ..runs import FORMAT_VERSION, OPTIMIZER_GROUPS, OPTIMIZER_STATE, STATE, WEIGHTS, RunFolder, read_state
from ..storage import new_folder, read_manifest, write_manifest, write_text
from .ema import EMA

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingTensors:
    """The large things of a run: weights, averages, and the optimizer's moments; the same on any number of ranks.

    Args:
        model: The transformer itself, replicated on every rank or sharded by FSDP2.
        averages: By the name of their file.
        optimizer: torch's, apex's or ours.
    """

    def __init__(self, model: nn.Module, averages: dict[str, EMA], optimizer: torch.optim.Optimizer):
        self.model, self.averages, self.optimizer = model, averages, optimizer

    def bytes(self) -> int:
        """What a checkpoint of them takes, about."""
        values = sum(parameter.numel() for parameter in self.model.parameters())
        return 4 * values * (3 + len(self.averages))

    def weights(self) -> dict[str, Any]:
        """The model's weights, whole, on the CPU; on other ranks than the first perhaps nothing."""
        return get_model_state_dict(self.model, options=_WHOLE)

    def ema_weights(self, name: str) -> dict[str, Any]:
        """Likewise those of an average."""
        with self.averages[name].swapped_in():
            return {key: value.clone() for key, value in self.weights().items()}

    def gather(self) -> dict[str, dict[str, Any]]:
        """What a checkpoint holds by the name of its file; to be called on all ranks."""
        contents: dict[str, Any] = {WEIGHTS: self.weights()}
        contents |= {f"{name}.safetensors": self.ema_weights(name) for name in self.averages}
        optimizer: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        moments = {
            f"{key}/{name}": x for key, state in optimizer.get("state", {}).items() for name, x in state.items()
        }
        return {
            **contents,
            OPTIMIZER_STATE: moments,
            OPTIMIZER_GROUPS: {"param_groups": optimizer.get("param_groups", [])},
        }

    def load(self, folder: Path) -> None:
        """Put what a checkpoint holds in place; to be called on all ranks."""
        options = StateDictOptions(full_state_dict=True)
        for name, average in self.averages.items():
            with average.swapped_in():
                set_model_state_dict(self.model, {**load_file(folder / f"{name}.safetensors")}, options=options)
        set_model_state_dict(self.model, {**load_file(folder / WEIGHTS)}, options=options)
        state: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in load_file(folder / OPTIMIZER_STATE).items():
            weight, _, name = key.rpartition("/")
            state.setdefault(weight, {})[name] = value
        saved = json.loads((folder / OPTIMIZER_GROUPS).read_text(encoding="utf-8"))["param_groups"]
        for group in saved:
            if "step" in group:  # version 0.1.0 kept apex's count there
                for weight in group["params"]:
                    state[weight]["step"] = torch.tensor(float(group["step"]))
        # Settings are the recipe's; what was saved may be those of another optimizer (apex's of torch's run).
        groups = [{**own, "params": g["params"]} for own, g in zip(self.optimizer.param_groups, saved, strict=True)]
        optimizer: dict[str, Any] = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)


def make_room(run: Path, needed: int) -> None:
    """Remove what saves that were cut short have left, and see whether another checkpoint fits the disk.

    Raises:
        OSError: if not.
    """
    for kind in ("partial", "replaced"):
        for left in run.glob(f".checkpoint-*.{kind}"):
            shutil.rmtree(left)
    free = shutil.disk_usage(run).free
    if needed > free:
        raise OSError(
            f"train.output_dir {run}: a checkpoint needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free"
        )


def save_checkpoint(
    run: Path, state: dict[str, Any], contents: dict[str, dict[str, Any]], total_limit: int, best_limit: int
) -> Path:
    """Write `checkpoint-<state["step"]>` with `contents` into `run`, then remove those that have had their day.

    Kept are the newest `total_limit`, and the `best_limit` with the lowest `state["validation_loss"]`. Checkpoints of
    later steps, left by a run that was gone back from, are removed too: `latest` must be this one.

    Raises:
        OSError: if it cannot be written; those before are whole.
    """
    folder = RunFolder(run).checkpoint(state["step"])
    with new_folder(folder) as partial:
        for name, content in {**contents, STATE: {"format": FORMAT_VERSION, **state}}.items():
            if name.endswith(".safetensors"):
                save_file({key: value.contiguous() for key, value in content.items()}, partial / name)
            else:
                (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        write_manifest(partial)
    standing = RunFolder(run).checkpoints()
    newest = standing.index(folder) + 1
    best = [run / entry["checkpoint"] for entry in _validated(standing[:newest])[:best_limit]]
    for superseded in {*standing} - {*standing[max(0, newest - total_limit) : newest], *best}:
        shutil.rmtree(superseded)
    write_best(run, best_limit)
    return folder


def write_best(run: Path, limit: int) -> None:
    """Write `best.json`: the `limit` best of the checkpoints that stand, with their validation losses."""
    best = _validated(RunFolder(run).checkpoints())[:limit]
    if best:
        write_text(
            RunFolder(run).best, json.dumps({"metric": "validation_loss", "checkpoints": best}, indent=2) + "\n"
        )


def _validated(folders: list[Path]) -> list[dict[str, Any]]:
    """What is known of the checkpoints that were validated, best first."""
    entries = []
    for folder in folders:
        try:
            state = read_state(folder)
        except (OSError, ValueError):  # a damaged one is no good one; who resumes from it is told
            continue
        if state.get("validation_loss") is not None:
            names = ("step", "validation_loss", "validation_loss_by_noise_level")
            entries.append({"checkpoint": folder.name, **{name: state[name] for name in names}})
    return sorted(entries, key=lambda entry: entry["validation_loss"])


def find_checkpoint(run: Path, name: str, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, checked by its hashes; None if `latest` finds none.

    A damaged newest checkpoint is named through `say`, and the one before it used.

    Raises:
        ValueError: if a checkpoint asked for by name is missing or damaged, or all are damaged.
    """
    if name != "latest":
        read_manifest(run / Path(name).name, hashes=True)
        return run / Path(name).name
    problems = []
    for folder in reversed(RunFolder(run).checkpoints()):
        try:
            read_manifest(folder, hashes=True)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if problems:
            say(f"{'; '.join(problems)}; going on from {folder.name}")
        return folder
    if problems:
        raise ValueError(f"no usable checkpoint: {'; '.join(problems)}")
    return None


def agreed_checkpoint(run: Path, name: str, say: Callable[[str], None] = print) -> Path | None:
    """`find_checkpoint` of the first rank, which every rank must see; to be called on all of them.

    Raises:
        ValueError: on all ranks, if the first finds none that can be used, or another does not see what it found.
        OSError: likewise, if the first may not read one.
    """
    choice: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            choice = [find_checkpoint(run, name, say)]
        except (ValueError, OSError) as error:
            choice = [error]
    (chosen,) = broadcast_object_list(choice)
    if isinstance(chosen, Exception):
        raise chosen
    if chosen is None:
        return None
    seen = gather_object([_manifest(run / chosen.name)])
    blind = [str(rank) for rank, manifest in enumerate(seen) if manifest != seen[0]]
    if blind:
        raise ValueError(
            f"{chosen} is not what rank {', '.join(blind)} finds there; train.output_dir must be a folder that every "
            "machine can read"
        )
    return run / chosen.name


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Of a checkpoint whose files are all there; None if they are not."""
    try:
        return read_manifest(folder)
    except ValueError:
        return None


def check_same_recipe(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on from a checkpoint of another recipe.

    An option that is newer than the checkpoint was at its default; what was not looked for then is not compared. The
    optimizer's name follows from the recipe and the machine: torch's and apex's Adam resume each other's runs.

    Raises:
        ValueError: naming every key that differs.
    """
    defaults = Config().resume_keys()
    before = {section: {**defaults.get(section, {}), **before.get(section, {})} for section in now}
    different = [
        f"{section}.{name} was {before[section].get(name)!r}, now {value!r}"
        for section, values in now.items()
        for name, value in values.items()
        if before[section].get(name) != value
        and (section != "found" or (name in before[section] and name != "optimizer"))
    ]
    if different:
        raise ValueError(f"{folder} was trained with another recipe: {'; '.join(different)}")
