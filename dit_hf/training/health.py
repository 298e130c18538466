"""Check that a run's numbers are finite, and find the first layer where they are not by repeating the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from ..runs import RunFolder
from .ema import local_weights
from .step import TrainingStep

# torch's loss scale starts at 2^16. Below 1 it has been halved seventeen times in a row: scaling no longer causes the
# overflow, the gradients themselves do.
LOWEST_LOSS_SCALE = 1.0


def check_health(step: TrainingStep, done: int, run: Path) -> torch.Tensor:
    """Check losses, weights and gradients since the last row of the log; call it on all ranks.

    This waits for the device.

    Args:
        step: Holds the sums of its window.
        done: Optimizer steps done.
        run: The run's folder.

    Returns:
        float32 [2, NOISE_LEVELS] on the CPU: sum of the losses and number of images by noise level, over all ranks.

    Raises:
        ValueError: if a loss, a weight, or (without a loss scale) a gradient is not finite, or the loss scale has
            fallen below 1. It names the first layer with such a number, and the run's last good checkpoint.
    """
    accelerator, scaler = step.accelerator, step.accelerator.scaler
    sums = accelerator.reduce(step.window, "sum").cpu()
    # A norm is finite only if all of its values are. `torch._foreach_norm` is not documented (read in torch 2.13).
    broken = ~torch.stack(torch._foreach_norm(local_weights(step.model))).isfinite().all()
    broken_anywhere = accelerator.reduce(broken.float(), "sum") > 0
    skipped = int(step.first_skipped)

    # Every rank comes to the same verdict: losses and weights are reduced, gradients and the scale are common to all.
    # A weight comes first: it is why losses are not finite, and they do not tell where.
    # With a loss scale single overflows are normal, and their steps are skipped.
    problem = None
    if broken_anywhere:
        problem = "a weight is not finite"
    elif not sums.isfinite().all():
        problem = "the loss is not finite"
    elif scaler is None and skipped >= 0:
        problem = "the gradient is not finite"
    elif scaler is not None and scaler.get_scale() < LOWEST_LOSS_SCALE:
        problem = f"the loss scale has fallen to {scaler.get_scale():g}"
    if problem is None:
        return sums

    # Find the layer by repeating the first skipped step, or else the last one: a step's random numbers are a function
    # of its number alone.
    redone = skipped if skipped >= 0 else done - 1
    layer = first_overflow(step.transformer, lambda: step.accumulate(redone), accelerator)
    checkpoints = RunFolder(run).checkpoints()
    raise ValueError(
        f"{problem} at step {redone + 1}; first not finite: {layer or 'none, when the step is repeated'}; "
        f"the last good checkpoint is {checkpoints[-1] if checkpoints else 'none'}"
    )


def first_overflow(model: nn.Module, step: Callable[[], Any], accelerator: Accelerator) -> str | None:
    """Find the first layer, in the order of computation and over all ranks, with a number that is not finite.

    Call it on all ranks: each takes part in every collective operation, whatever it finds itself.

    Args:
        model: The transformer.
        step: Computes forward and backward.
        accelerator: Of the run.

    Returns:
        "weight NAME", "forward of NAME", "backward of NAME" or "gradient of NAME"; None if all is finite.
    """
    # Weights first: one that is not finite spoils everything after it.
    weights = dict(model.named_parameters())
    if name := _first_not_finite(weights, accelerator):
        return f"weight {name}"

    # Forward and backward hooks of every leaf module. All ranks call them in the same order, so that a number tells
    # which rank was first.
    calls = 0
    first: tuple[int, str] | None = None

    def watch(direction: str, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, *tensors: Any) -> None:
            nonlocal calls, first
            calls += 1
            # Inputs and outputs, or their gradients: tensors, tuples of tensors, and None where there is no gradient.
            flat = [t for group in tensors for t in (group if isinstance(group, tuple) else (group,))]
            if first is None and any(isinstance(t, torch.Tensor) and not torch.isfinite(t).all() for t in flat):
                first = calls, f"{direction} {name}"

        return hook

    hooks = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            hooks.append(module.register_forward_hook(watch("forward of", name)))
            hooks.append(module.register_full_backward_hook(watch("backward of", name)))

    # Uncompiled, since compiled code calls no hooks.
    try:
        with torch.compiler.set_stance("force_eager"):
            step()
    finally:
        for hook in hooks:
            hook.remove()
    found = [call for call in gather_object([first]) if call is not None]
    if found:
        return min(found)[1]

    # What hooks do not see: gradients of parameters that are in no leaf module, or that only became infinite when they
    # were summed over micro-batches.
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    name = _first_not_finite(gradients, accelerator)
    return f"gradient of {name}" if name else None


def _first_not_finite(tensors: Mapping[str, torch.Tensor], accelerator: Accelerator) -> str | None:
    """Return the first of `tensors`, replicated or sharded, that is not finite on some rank; call it on all ranks."""
    if not tensors:
        return None
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values()]
    broken = torch.stack([~torch.isfinite(tensor).all() for tensor in local]).float()  # [tensors]
    broken = accelerator.reduce(broken, "sum")
    return next((name for name, count in zip(tensors, broken.tolist(), strict=True) if count > 0), None)
