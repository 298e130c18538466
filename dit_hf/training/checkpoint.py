"""Checkpoints: all that a run needs to resume with the same bits, written so that none is ever half there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..config import Config
from ..devices import on_first_rank
from ..runs import (
    FORMAT_VERSION,
    LOG,
    OPTIMIZER_GROUPS,
    OPTIMIZER_STATE,
    STATE,
    WEIGHTS,
    RunFolder,
    read_state,
)
from ..storage import (
    new_folder,
    read_json,
    read_manifest,
    read_tensors,
    remove_folder,
    write_manifest,
    write_text,
)
from .ema import EMA

# Unsharded and on the CPU: checkpoints are the same files for any number of ranks.
_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingTensors:
    """The large tensors of a run: weights, EMAs and the optimizer's moments; the same files for any number of ranks.

    Args:
        model: The transformer itself, replicated on every rank or sharded by FSDP2.
        emas: By the name of their file.
        optimizer: torch's, apex's or ours.
    """

    def __init__(self, model: nn.Module, emas: dict[str, EMA], optimizer: torch.optim.Optimizer):
        self.model, self.emas, self.optimizer = model, emas, optimizer

    def bytes(self) -> int:
        """Estimate the size of a checkpoint in bytes."""
        values = sum(parameter.numel() for parameter in self.model.parameters())
        # All is float32: the weights, two moments each (Muon has one: a little less), and the EMAs.
        return 4 * values * (3 + len(self.emas))

    def weights(self) -> dict[str, Any]:
        """Return the model's weights, unsharded, on the CPU; on ranks other than the first the dict may be empty."""
        return get_model_state_dict(self.model, options=_FULL_STATE)

    def ema_weights(self, name: str) -> dict[str, Any]:
        """Return the weights of an EMA in the same way."""
        # Cloned inside the block: on a CPU the state dict shares memory with the model, which is swapped back.
        with self.emas[name].swapped_in():
            return {key: value.clone() for key, value in self.weights().items()}

    def gather(self) -> dict[str, dict[str, Any]]:
        """Return the contents of a checkpoint by file name; call it on all ranks."""
        contents: dict[str, Any] = {WEIGHTS: self.weights()}
        contents |= {f"{name}.safetensors": self.ema_weights(name) for name in self.emas}

        # The optimizer's tensors go into one flat safetensors file under `<weight>/<moment>`, its settings into JSON.
        optimizer: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=_FULL_STATE)
        moments = {
            f"{key}/{name}": x for key, state in optimizer.get("state", {}).items() for name, x in state.items()
        }
        return {
            **contents,
            OPTIMIZER_STATE: moments,
            OPTIMIZER_GROUPS: {"param_groups": optimizer.get("param_groups", [])},
        }

    def load(self, folder: Path) -> None:
        """Load the checkpoint `folder` into the model, the EMAs and the optimizer; call it on all ranks.

        Raises:
            OSError: if a file is missing.
        """
        # The first rank reads, and sends the others what they need: their shards, or all.
        several = PartialState().num_processes > 1
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)

        # EMAs first: each is loaded through the model's own weights, which are overwritten last.
        for name, ema in self.emas.items():
            with ema.swapped_in():
                self._load_weights(folder / f"{name}.safetensors", options)
        self._load_weights(folder / WEIGHTS, options)
        optimizer = on_first_rank(lambda: self._read_optimizer(folder)) or {}
        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=options)

    def _load_weights(self, file: Path, options: StateDictOptions) -> None:
        weights: dict[str, Any] = on_first_rank(lambda: {**read_tensors(file)}) or {}
        set_model_state_dict(self.model, weights, options=options)

    def _read_optimizer(self, folder: Path) -> dict[str, Any]:
        """Read the state of an optimizer, with the settings of this one."""
        # The optimizer's moments, from `<weight>/<moment>` back to one dict a weight.
        state: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in read_tensors(folder / OPTIMIZER_STATE).items():
            weight, _, name = key.rpartition("/")
            state.setdefault(weight, {})[name] = value

        # Version 0.1.0 kept apex's step count in the group; every version since keeps one for each weight, as torch.
        saved = read_json(folder / OPTIMIZER_GROUPS, keys=["param_groups"])["param_groups"]
        for group in saved:
            if "step" in group:
                for weight in group["params"]:
                    state[weight]["step"] = torch.tensor(float(group["step"]))

        # Settings come from the recipe; the saved ones may be those of another optimizer (apex's of torch's run).
        groups = [{**own, "params": g["params"]} for own, g in zip(self.optimizer.param_groups, saved, strict=True)]
        for group, before in zip(groups, saved, strict=True):
            if group.get("muon"):  # a run keeps the blocks that it began with; version 0.1.0 had whole matrices
                group["blocks"] = before.get("blocks") or [(1, 1)] * len(before["params"])
        return {"state": state, "param_groups": groups}


def remove_partial_checkpoints(run: Path) -> None:
    """Remove what interrupted saves left in `run`."""
    for kind in ("partial", "replaced"):  # the names that `new_folder` gives
        for leftover in run.glob(f".checkpoint-*.{kind}"):
            # Of a link only the link.
            shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def check_disk_space(run: Path, needed: int) -> None:
    """Check that `needed` more bytes fit on the disk of `run`.

    Raises:
        OSError: if not.
    """
    free = shutil.disk_usage(run).free
    if needed > free:
        raise OSError(
            f"train.output_dir {run}: a checkpoint needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB "
            "are free; make room, or name a folder on another disk"
        )


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    contents: dict[str, dict[str, Any]],
    total_limit: int,
    best_limit: int,
    log: bytes | None = None,
) -> Path:
    """Write `checkpoint-<state["step"]>` with `contents` and the `log` into `run`, then remove superseded checkpoints.

    The newest `total_limit` stay, and the `best_limit` with the lowest `state["validation_loss"]`. Checkpoints of
    later steps, left by a run that resumed from an earlier one, are removed too: `latest` must be this one.

    Raises:
        OSError: if it cannot be written; earlier checkpoints are good.
    """
    # The folder appears under its name only when all files and the manifest are written and synced.
    folder = RunFolder(run).checkpoint(state["step"])
    with new_folder(folder) as partial:
        if log is not None:
            (partial / LOG).write_bytes(log)
        for name, content in {**contents, STATE: {"format": FORMAT_VERSION, **state}}.items():
            if name.endswith(".safetensors"):
                save_file({key: value.contiguous() for key, value in content.items()}, partial / name)
            else:
                (partial / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_manifest(partial)

    # Remove old ones only now, when the new one is good.
    remove_superseded(run, folder, total_limit, best_limit)
    return folder


def remove_superseded(run: Path, last: Path, total_limit: int, best_limit: int) -> None:
    """Remove the checkpoints that `save_checkpoint` does not keep once `last` stands, and write `best.json`."""
    # Those of later steps are no candidates for the best.
    checkpoints = RunFolder(run).checkpoints()
    count = checkpoints.index(last) + 1
    newest = checkpoints[max(0, count - total_limit) : count]
    best = [run / entry["checkpoint"] for entry in _validated(checkpoints[:count])[:best_limit]]
    for superseded in {*checkpoints} - {*newest, *best}:
        remove_folder(superseded)
    _write_best(run, best_limit)


def is_best(run: Path, step: int) -> bool:
    """Whether the checkpoint of `step` has the lowest validation loss of those that `best.json` lists."""
    path = RunFolder(run).best
    listed = read_json(path, keys=["checkpoints"])["checkpoints"] if path.is_file() else []
    return bool(listed) and listed[0]["checkpoint"] == RunFolder(run).checkpoint(step).name


def _write_best(run: Path, limit: int) -> None:
    """Write `best.json`: the `limit` best of the existing checkpoints, with their validation losses."""
    best = _validated(RunFolder(run).checkpoints())[:limit]
    if best:
        write_text(
            RunFolder(run).best, json.dumps({"metric": "validation_loss", "checkpoints": best}, indent=2) + "\n"
        )


def _validated(folders: list[Path]) -> list[dict[str, Any]]:
    """Summaries of those checkpoints that were validated, best first.

    Only losses of as many images as the newest one's are compared: others say nothing about which is better.
    """
    states = []
    for folder in folders:
        try:
            states.append((folder, read_state(folder)))
        except (OSError, ValueError):  # a damaged checkpoint is not a good one; resuming from it reports the damage
            continue
    validated = [(folder, state) for folder, state in states if state.get("validation_loss") is not None]
    if not validated:
        return []
    images = validated[-1][1].get("validation_images")
    names = ("step", "validation_loss", "validation_loss_by_noise_level")
    entries = [
        {"checkpoint": folder.name, **{name: state[name] for name in names}}
        for folder, state in validated
        if images is None or state.get("validation_images", images) == images
    ]
    return sorted(entries, key=lambda entry: entry["validation_loss"])


def find_checkpoint(run: Path, name: str, log: Callable[[str], None] = print) -> Path | None:
    """Find the checkpoint that `resume_from_checkpoint` names and check its hashes.

    Args:
        run: The run's folder.
        name: A checkpoint's name, or `latest`: the newest that is not damaged.
        log: Receives a line about newer checkpoints that are damaged.

    Returns:
        Its folder; None if `latest` has no checkpoint to choose from.

    Raises:
        ValueError: if the named checkpoint is missing or damaged, or with `latest` all are damaged.
    """
    if name != "latest":
        folder = _named_checkpoint(run, name)
        read_manifest(folder, hashes=True)
        return folder

    problems = []
    for folder in reversed(RunFolder(run).checkpoints()):
        try:
            read_manifest(folder, hashes=True)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if problems:
            log(f"{'; '.join(problems)}; resuming from {folder.name}")
        return folder
    # Starting at step 0 instead would overwrite a run that somebody may still repair.
    if problems:
        raise ValueError(f"no usable checkpoint: {'; '.join(problems)}")
    return None


def _named_checkpoint(run: Path, name: str) -> Path:
    """Return the checkpoint of `run` that `name` names, which may be given with its folder, as a shell completes it.

    Raises:
        ValueError: if it is another run's, or no checkpoint's name.
    """
    path, own = Path(name), RunFolder(run).checkpoints()
    if len(path.parts) > 1 and path.resolve().parent != run.resolve():
        raise ValueError(
            f"train.resume_from_checkpoint {name} is not in train.output_dir {run}; --model.init_from {name} starts a "
            "new run from its weights"
        )
    if path.name not in [checkpoint.name for checkpoint in own]:
        there = ", ".join(checkpoint.name for checkpoint in own[-5:]) or "none"
        raise ValueError(
            f"train.resume_from_checkpoint {name}: expected latest or the name of a checkpoint in {run} "
            f"(there: {there})"
        )
    return run / path.name


def agreed_checkpoint(run: Path, name: str, log: Callable[[str], None] = print) -> Path | None:
    """Return the checkpoint that the first rank finds (see `find_checkpoint`); call it on all ranks.

    Raises:
        ValueError: on all ranks, if the first finds no usable checkpoint, or another rank does not see the same one.
        OSError: on all ranks, if the first cannot read one.
    """
    # Only the first rank reads every byte to check the hashes.
    choice: list[Path | None] = [None]

    def choose() -> None:
        choice[0] = find_checkpoint(run, name, log)

    on_first_rank(choose)
    (chosen,) = broadcast_object_list(choice)
    if chosen is None:
        return None

    # The others compare manifests: machines that do not share the folder would resume from different weights.
    seen = gather_object([_manifest(run / chosen.name)])
    differing = [str(rank) for rank, manifest in enumerate(seen) if manifest != seen[0]]
    if differing:
        raise ValueError(
            f"{chosen} differs on rank {', '.join(differing)}; train.output_dir must be a folder that every machine "
            "can read"
        )
    return run / chosen.name


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's manifest; None if the checkpoint is not complete."""
    try:
        return read_manifest(folder)
    except ValueError:
        return None


def check_same_recipe(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to resume from a checkpoint of another recipe.

    Args:
        before: The checkpoint's recipe.
        now: The run's.
        folder: The checkpoint, for the message.

    Raises:
        ValueError: naming every key that differs.
    """
    # An option that is newer than the checkpoint had its default value when the checkpoint was saved.
    defaults = Config().resume_keys()
    before = {section: {**defaults.get(section, {}), **before.get(section, {})} for section in now}

    # The section "found" has no defaults: what an older version did not record is not compared. The optimizer's name
    # follows from the recipe and the machine, and torch's and apex's Adam resume each other's runs.
    different = [
        f"{section}.{name} was {before[section].get(name)!r}, now {value!r}"
        for section, values in now.items()
        for name, value in values.items()
        if before[section].get(name) != value
        and (section != "found" or (name in before[section] and name != "optimizer"))
    ]
    if different:
        raise ValueError(
            f"{folder} was trained with another recipe: {'; '.join(different)}; give its own values, or name a new "
            "--train.output_dir"
        )
