"""Checkpoints: everything a run needs to go on with the same bits, written so that none is ever half there."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..storage import new_folder, read_manifest, write_manifest

_NAME = re.compile(r"checkpoint-(\d+)")


def save_checkpoint(
    run: Path,
    state: dict[str, Any],
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    total_limit: int,
) -> Path:
    """Write `checkpoint-<state["step"]>` into `run`, then keep no more than `total_limit`, the newest.

    Checkpoints of later steps, left by a run that was gone back from, are removed first: `latest` must be this one.
    """
    folder = run / f"checkpoint-{state['step']}"
    with new_folder(folder) as partial:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, partial / "transformer.safetensors")
        save_file({k: v.contiguous() for k, v in ema.state_dict().items()}, partial / "ema.safetensors")
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        write_manifest(partial)
    standing = list_checkpoints(run)
    newest = standing.index(folder) + 1
    for superseded in standing[newest:] + standing[: max(0, newest - total_limit)]:
        shutil.rmtree(superseded)
    return folder


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find_checkpoint(run: Path, name: str) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names, checked by its hashes; None if `latest` finds none.

    A damaged newest checkpoint is named, and the one before it used.

    Raises:
        ValueError: if a checkpoint asked for by name is missing or damaged, or all are damaged.
    """
    if name != "latest":
        read_manifest(run / Path(name).name, hashes=True)
        return run / Path(name).name
    problems = []
    for folder in reversed(list_checkpoints(run)):
        try:
            read_manifest(folder, hashes=True)
        except ValueError as problem:
            problems.append(str(problem))
            continue
        if problems:
            print(f"{problems[0]}; going on from {folder.name}")
        return folder
    if problems:
        raise ValueError(f"no usable checkpoint: {'; '.join(problems)}")
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` was given."""
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def load_checkpoint(folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, average and optimizer state of a checkpoint in place."""
    model.load_state_dict(load_file(folder / "transformer.safetensors"))
    ema.load_state_dict(load_file(folder / "ema.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))


def check_same_recipe(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Refuse to go on from a checkpoint of another recipe.

    Raises:
        ValueError: naming every key that differs.
    """
    different = [
        f"{section}.{name} was {before.get(section, {}).get(name)!r}, now {value!r}"
        for section, values in now.items()
        for name, value in values.items()
        if before.get(section, {}).get(name) != value
    ]
    if different:
        raise ValueError(f"{folder} was trained with another recipe: {'; '.join(different)}")
