"""What a run prints before its first step (what is trained, where it goes, whether it fits) and after its last."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..config import TrainConfig
from ..devices import free_memory
from ..models.transformer_latent_dit import height_and_width
from ..runs import read_log
from .step import TrainingStep

# Bytes that the backward pass keeps for each token, channel and block in half precision: 46 were measured on an H100
# with `recipes/celeba.yaml`, 39 with compiled blocks (batches of 67 to 255 images). In float32 twice as many.
ACTIVATION_BYTES, COMPILED_ACTIVATION_BYTES = 46, 39
# What a CPU takes of that: glibc does not reuse the memory of one micro-batch for the next, and wastes a quarter
# (measured with `recipes/celeba.yaml`, micro-batches of 4 to 10 images).
CPU_OVERHEAD = 2.5
# Share of the free memory that a run should need at most: estimates are not exact.
SAFE_SHARE = 0.9

PRECISIONS = {"no": "float32", "fp16": "fp16 mixed precision", "bf16": "bf16 mixed precision"}


def announce(
    step: TrainingStep, run: Path, checkpoint_bytes: int, grids_go_to: str | None, compiled: bool, online: bool = False
) -> list[str]:
    """Describe the run, in lines.

    Args:
        step: The optimizer step, which holds the recipe, the images and the model.
        run: The run's folder.
        checkpoint_bytes: Size of one checkpoint.
        grids_go_to: The tracker that receives image grids, or None.
        compiled: Whether the blocks are compiled.
        online: Whether that tracker sends them to a server.

    Raises:
        OSError: if weights, gradients, moments and EMAs alone do not fit into the memory.
    """
    accelerator, train = step.accelerator, step.config.train
    parameters = sum(p.numel() for p in step.transformer.parameters())
    epoch = len(step.reader) / train.global_batch_size
    ranks, parts = accelerator.num_processes, train.gradient_accumulation_steps
    micro_batch = step.micro_batch_size
    kept = train.checkpoints_total_limit + train.best_checkpoints_limit
    disk = (kept + 1) * checkpoint_bytes / 1e9  # a new checkpoint stands before an old one goes
    place = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    steps = train.max_train_steps
    lines = [
        f"model      {parameters / 1e6:,.1f} million parameters, {PRECISIONS[accelerator.mixed_precision]}, "
        f"{step.optimizer_name}",
        f"images     {len(step.reader):,}; an epoch is {_rounded(epoch)} steps, the run is {steps:,} steps or "
        f"{_rounded(steps / epoch)} epochs",
        f"batch      {train.global_batch_size} = {ranks} {'rank' if ranks == 1 else 'ranks'} x {parts} "
        f"{'micro-batch' if parts == 1 else 'micro-batches'} x {micro_batch} images",
        f"output     {run}: at most {kept} checkpoints of {checkpoint_bytes / 1e9:.2f} GB, {disk:.1f} GB in all "
        f"({shutil.disk_usage(place).free / 1e9:,.0f} GB free)",
    ]
    if grids_go_to:
        lines.append(f"tracker    {grids_go_to}, which also gets the sample grids")
    if online:
        offline = "WANDB_MODE=offline or " if grids_go_to == "wandb" else ""
        lines.append(
            f"privacy    sample grids, which may resemble training images, leave this machine; {offline}"
            "--train.report_to none keeps them"
        )
    return lines + memory_lines(step, train, parameters, micro_batch, compiled)


def _rounded(number: float) -> str:
    """Write a number with one digit after the point where that tells something."""
    return f"{number:,.0f}" if number >= 100 or number == round(number) else f"{number:.1f}"


def summary(run: Path) -> list[str]:
    """Describe a finished run: figures, and what can be done with it."""
    figures = ""
    for row in read_log(run)[-1:]:  # none if somebody has deleted the log
        figures = f": {int(row['step']):,} steps, loss {float(row['loss']):.4f}"
        if row["validation_loss"]:
            figures += f", validation loss {float(row['validation_loss']):.4f}"
    return [
        f"finished   {run}{figures}",
        f"next       dit-hf sample {run} --output_dir samples",
        f"           dit-hf evaluate {run}",
        f"           dit-hf app {run}",
        f"           dit-hf push {run} OWNER/NAME",
    ]


def memory_lines(
    step: TrainingStep, train: TrainConfig, parameters: int, micro_batch: int, compiled: bool
) -> list[str]:
    """Estimate the memory of a step against what there is.

    Raises:
        OSError: if what does not depend on the batch does not fit.
    """
    half = step.accelerator.mixed_precision in ("fp16", "bf16")
    moments = 1 if "Muon" in step.optimizer_name else 2
    # Weights, gradients, moments and EMAs in float32, and autocast's copy of the weights.
    fixed = parameters * (4 * (2 + moments + len(step.emas)) + (2 if half else 0))
    images = micro_batch * activation_bytes(step, half, compiled, train.gradient_checkpointing)
    images *= CPU_OVERHEAD if step.device.type == "cpu" else 1
    place, free = free_memory(step.device)
    if free is None:
        return []
    needed, available = f"{(fixed + images) / 2**30:.1f} GiB", f"{free / 2**30:.1f} GiB"
    line = f"memory     about {needed} of {place} needed, {available} free (an estimate)"
    if fixed > free:
        raise OSError(
            f"weights, gradients, optimizer and EMA alone need {fixed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of "
            f"{place} are free; train a smaller model (--model.preset)"
        )
    if fixed + images > SAFE_SHARE * free:
        # The fewest micro-batches that divide the batch and fit.
        most = (SAFE_SHARE * free - fixed) / (images / micro_batch)  # images
        of_a_rank = train.global_batch_size // step.accelerator.num_processes
        parts = [n for n in range(1, of_a_rank + 1) if of_a_rank % n == 0 and of_a_rank / n <= most]
        fits = f"--train.gradient_accumulation_steps {parts[0]} would fit" if parts else "a smaller model would fit"
        line += f": probably too little; {fits}"
    return [line]


def activation_bytes(step: TrainingStep, half: bool, compiled: bool, checkpointed: bool) -> float:
    """Estimate the bytes that the backward pass keeps for one image."""
    config = step.transformer.config
    height, width = height_and_width(config.sample_size)
    tokens = height * width / config.patch_size**2
    channels = config.num_attention_heads * config.attention_head_dim
    a_block = tokens * channels * (COMPILED_ACTIVATION_BYTES if compiled else ACTIVATION_BYTES) * (1 if half else 2)
    # With checkpointing a block keeps its input alone, and one block at a time everything.
    return (
        config.num_layers * tokens * channels * (2 if half else 4) + a_block
        if checkpointed
        else config.num_layers * a_block
    )
