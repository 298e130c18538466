"""Parts of a cache that are built apart, on machines that share no disk: which images each encodes, and its notes."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..storage import read_json, write_json
from .cache import CacheSpec, Part
from .shards import ShardNotes, plan_sizes

# In the folder of a part: what joining the parts needs beside their shards.
PART_FILE = "part.json"


def parse_part(text: str) -> Part:
    """Return `--part`, such as `3/8`.

    Raises:
        ValueError: if it is no number of a part.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"part={text}: expected K/N, part K of N, such as 3/8")
    return Part(int(match[1]), int(match[2]))


def take_part(rows: Dataset, part: Part, resolution: tuple[int, int]) -> Dataset:
    """Return the rows of a source that a part encodes: every n-th shard of the whole cache.

    Raises:
        ValueError: if the cache has fewer shards than parts.
    """
    size = plan_sizes(len(rows), resolution)[1]
    shards = -(-len(rows) // size)
    if part.of > shards:
        raise ValueError(
            f"part={part}: {len(rows):,} images make {shards} shards of {size}, so at most {shards} parts"
        )
    numbers = np.arange(len(rows))
    return rows.select(numbers[numbers // size % part.of == part.number - 1])


def write_part(folder: Path, spec: CacheSpec, notes: list[ShardNotes]) -> None:
    """Write what [`read_part`] reads."""
    plan = spec.source.plan
    content = {"plan": plan.as_dict(), "examples": plan.examples, "left_out": spec.source.left_out}
    write_json(folder / PART_FILE, {**content, "notes": [dataclasses.asdict(shard) for shard in notes]})


def read_part(folder: Path) -> dict[str, Any]:
    """Return of a part: `plan` and `examples` of the whole source's plan, `left_out` of the source, `notes` of shards.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    content = read_json(folder / PART_FILE, "build the part again", ["plan", "examples", "left_out", "notes"])
    left_out = [(image_id, reason) for image_id, reason in content["left_out"]]
    return {**content, "left_out": left_out, "notes": [ShardNotes(**shard) for shard in content["notes"]]}
