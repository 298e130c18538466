"""Changing recipes and precision of runs; reading and comparing what they wrote."""

import csv
import dataclasses
from pathlib import Path

import torch
from accelerate.optimizer import patch_optimizer_step
from accelerate.utils import convert_to_fp32
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


def half_precision(trainer, init_scale):
    """Let a trainer compute as accelerate does for fp16 on a GPU, and return its loss scaler.

    On a CPU accelerate trains in float32 instead; its `Accelerator.mixed_precision` must say fp16 from the beginning.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=4)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = trainer.step.prepared_optimizer.scaler = scaler
    optimizer = trainer.step.prepared_optimizer
    optimizer._accelerate_step_called = False
    optimizer._optimizer_original_step_method = optimizer.optimizer.step
    optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)
    model = trainer.transformer
    forward = torch.autocast("cpu", torch.float16)(model.forward)
    model.forward = lambda *args, **kwargs: convert_to_fp32(forward(*args, **kwargs))
    return scaler
