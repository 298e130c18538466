"""Where numbers stopped being numbers: found by doing a step again with every layer watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Below this a loss scale has been halved seventeen times in a row, and hides no overflow of the scaling's own.
LOWEST_LOSS_SCALE = 1.0


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
        step()
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        found += [f"gradient of {n}" for n, p in model.named_parameters() if _overflowed(p.grad)]
    return found[0] if found else None


def _overflowed(gradient: torch.Tensor | None) -> bool:
    return gradient is not None and not bool(torch.isfinite(gradient).all())
