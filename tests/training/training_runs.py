"""Reading and comparing what runs wrote."""

import csv
import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file


def rows(run):
    with open(Path(run) / "training_log.csv") as file:
        return list(csv.DictReader(file))


def comparable(run):
    varying = ("images_per_second", "mfu", "peak_memory_gib")
    return [{k: v for k, v in row.items() if k not in varying} for row in rows(run)]


def assert_same_bits(first, second):
    for name in ("transformer.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def changed(config, **sections):
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    )
