"""Features of many pictures, batch by batch, on many ranks; what a killed call has finished is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from ..sampling import batches
from ..storage import new_file, write_text
from .features import FeatureNet

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Collected:
    """Features of pictures.

    Attributes:
        features: float32 [count, dim].
        rows: int64 [count], which pictures these are.
        pixels_sha256: Of the pictures themselves, batch by batch.
    """

    features: np.ndarray
    rows: np.ndarray
    pixels_sha256: str


def ranks() -> PartialState:
    """This process among the others; they may wait long for each other, as a rank may have much more to do."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def collect(
    folder: Path,
    net: FeatureNet,
    read: Callable[[Sequence[int]], tuple[np.ndarray, np.ndarray]],
    rows: Sequence[int],
    batch_size: int,
    identity: dict[str, Any],
    what: str,
) -> Collected:
    """Features of the pictures of `rows`; to be called on all ranks, each of which does some of the batches.

    Args:
        folder: Where each batch is kept until all are there, as one file.
        net: The feature network.
        read: Rows to pictures, uint8 [n, height, width, 3], and the rows they are of (some may be broken).
        rows: All rows.
        batch_size: Pictures at once; batch k is the same whoever does it.
        identity: What decides the features; a folder of other ones is refused.
        what: The pictures' name, for the progress bar.

    Raises:
        FileExistsError: if `folder` holds features of something else, naming what differs.
    """
    state = ranks()
    identity = {**identity, "features": net.identity(), "batch_size": batch_size, "count": len(rows)}
    if state.is_main_process:
        _check_identity(folder, identity)
    state.wait_for_everyone()
    mine = batches(len(rows), batch_size, state.process_index, state.num_processes)
    total, missing = sum(map(len, mine)), [part for part in mine if not _file(folder, part).is_file()]
    done = total - sum(map(len, missing))
    with tqdm(
        total=total, initial=done, desc=what, unit="pictures", disable=not state.is_main_process or not missing
    ) as bar:
        for part in missing:
            pictures, kept = read([int(rows[place]) for place in part])
            _save(_file(folder, part), net(pictures), np.asarray(kept), hashlib.sha256(pictures.tobytes()).hexdigest())
            bar.update(len(part))
    state.wait_for_everyone()
    return _join([_file(folder, part) for part in batches(len(rows), batch_size)])


def _check_identity(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / IDENTITY
    if path.is_file():
        before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(identity))
        different = _differences(before, now)
        if different:
            raise FileExistsError(
                f"{folder} holds features of something else ({'; '.join(different)}); name a new folder"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(identity, indent=2) + "\n")


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What of `now` was otherwise, a short text each."""
    if isinstance(before, dict) and isinstance(now, dict):
        found = [_differences(before.get(key), now.get(key), f"{name}.{key}") for key in {**before, **now}]
        return [text for part in found for text in part]
    return [] if before == now else [f"{name[1:]} {str(before)[:40]}, now {str(now)[:40]}"]


def _file(folder: Path, part: range) -> Path:
    return folder / f"from-{part.start:08d}.safetensors"


def _save(path: Path, features: np.ndarray, rows: np.ndarray, pixels_sha256: str) -> None:
    with new_file(path) as partial:
        save_file({"features": features, "rows": rows.astype(np.int64)}, partial, {"pixels_sha256": pixels_sha256})


def _join(files: list[Path]) -> Collected:
    features, rows, digest = [], [], hashlib.sha256()
    for file in files:
        with safe_open(file, "numpy") as opened:
            features.append(opened.get_tensor("features"))
            rows.append(opened.get_tensor("rows"))
            digest.update(opened.metadata()["pixels_sha256"].encode())
    return Collected(np.concatenate(features), np.concatenate(rows), digest.hexdigest())
