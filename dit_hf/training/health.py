"""Whether a run's numbers are still numbers, and where they stopped: a step is done again, every layer watched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from ..runs import RunFolder
from .ema import local_weights
from .step import TrainingStep

# Below this a loss scale has been halved seventeen times in a row, and hides no overflow of the scaling's own.
LOWEST_LOSS_SCALE = 1.0


def check_health(step: TrainingStep, done: int, run: Path) -> torch.Tensor:
    """The window's sums over all ranks, [2, 10] on the CPU, if all is well after `done` steps; waits for the device.

    Raises:
        ValueError: if a loss, a weight, or (without a loss scale) a gradient is not finite, or the loss scale has
            fallen as no passing overflow makes it fall; with the first layer, and the run's last good checkpoint.
    """
    accelerator, scaler = step.accelerator, step.accelerator.scaler
    sums = accelerator.reduce(step.window, "sum").cpu()
    broken = ~torch.stack(torch._foreach_norm(local_weights(step.model))).isfinite().all()
    skipped, problem = int(step.first_skipped), None
    if not sums.isfinite().all():
        problem = "the loss is not finite"
    elif accelerator.reduce(broken.float(), "sum") > 0:
        problem = "a weight is not finite"
    elif scaler is None and skipped >= 0:
        problem = "the gradient is not finite"
    elif scaler is not None and scaler.get_scale() < LOWEST_LOSS_SCALE:
        problem = f"the loss scale has fallen to {scaler.get_scale():g}"
    if problem is None:
        return sums
    redone = skipped if skipped >= 0 else done - 1
    layers = gather_object([first_overflow(step.transformer, lambda: step.accumulate(redone))])
    layer = next((layer for layer in layers if layer), "none, when the step is done again")
    standing = RunFolder(run).checkpoints()
    raise ValueError(
        f"{problem} at step {redone + 1}; first not finite: {layer}; "
        f"the last good checkpoint is {standing[-1] if standing else 'none'}"
    )


def first_overflow(model: nn.Module, step: Callable[[], Any]) -> str | None:
    """The first layer, in the order of computation, with a number that is not finite.

    Args:
        model: The transformer.
        step: Does forward and backward.

    Returns:
        Which layer, and whether in a weight, on the way forward, on the way backward or in a gradient; None if all is
        finite.
    """
    found: list[str] = []
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            return f"weight {name}"

    def watch(what: str, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, *tensors: Any) -> None:
            flat = [t for group in tensors for t in (group if isinstance(group, tuple) else (group,))]
            if not found and any(isinstance(t, torch.Tensor) and not torch.isfinite(t).all() for t in flat):
                found.append(f"{what} {name}")

        return hook

    hooks = []
    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            hooks.append(module.register_forward_hook(watch("forward of", name)))
            hooks.append(module.register_full_backward_hook(watch("backward of", name)))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code calls no hooks
            step()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        found += [f"gradient of {n}" for n, p in model.named_parameters() if _overflowed(p.grad)]
    return found[0] if found else None


def _overflowed(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and not bool(torch.isfinite(gradient).all())
