"""Features of many images, batch by batch, on many ranks; what a killed call has finished is not done again."""

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

from ..sampling.generate import batches
from ..storage import hash_json, new_file, write_text
from .features import FeatureNet

IDENTITY = "identity.json"


@dataclass(frozen=True)
class Collected:
    """Features of images.

    Attributes:
        features: float32 [count, dim].
        rows: int64 [count], which images these are.
        pixels_sha256: Of the images themselves, batch by batch.
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
    """Features of the images of `rows`; to be called on all ranks, each of which does some of the batches.

    Args:
        folder: Where each batch is kept as one file until all are there, in a folder of what decides the features.
        net: The feature network.
        read: Rows to images, uint8 [n, height, width, 3], and the rows they are of (some may be broken).
        rows: All rows.
        batch_size: Images at once; batch k is the same whoever does it.
        identity: What decides the features, beside network, batches and number of images.
        what: The pictures' name, for the progress bar.
    """
    state = ranks()
    identity = {**identity, "features": net.identity(), "batch_size": batch_size, "count": len(rows)}
    folder = folder / hash_json(identity)[:12]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / IDENTITY, json.dumps(identity, indent=2) + "\n")
    state.wait_for_everyone()
    mine = batches(len(rows), batch_size, state.process_index, state.num_processes)
    total, missing = sum(map(len, mine)), [part for part in mine if not _file(folder, part).is_file()]
    done = total - sum(map(len, missing))
    with tqdm(
        total=total, initial=done, desc=what, unit="pictures", disable=not state.is_main_process or not missing
    ) as bar:
        for part in missing:
            pictures, kept = read([int(rows[place]) for place in part])
            features = net(pictures) if len(kept) else np.empty((0, net.dim), np.float32)
            _save(_file(folder, part), features, np.asarray(kept), hashlib.sha256(pictures.tobytes()).hexdigest())
            bar.update(len(part))
    state.wait_for_everyone()
    return _join([_file(folder, part) for part in batches(len(rows), batch_size)])


def _file(folder: Path, part: range) -> Path:
    return folder / f"from-{part.start:08d}.safetensors"


def _save(path: Path, features: np.ndarray, rows: np.ndarray, pixels_sha256: str) -> None:
    with new_file(path) as partial:
        save_file({"features": features, "rows": rows.astype(np.int64)}, partial, {"pixels_sha256": pixels_sha256})


def _join(files: list[Path]) -> Collected:
    features, rows, pixels = [], [], hashlib.sha256()
    for file in files:
        with safe_open(file, "numpy") as opened:
            features.append(opened.get_tensor("features"))
            rows.append(opened.get_tensor("rows"))
            pixels.update(opened.metadata()["pixels_sha256"].encode())
    return Collected(np.concatenate(features), np.concatenate(rows), pixels.hexdigest())
