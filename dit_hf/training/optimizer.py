"""The optimizer, its learning rate as a function of the step, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .config import OptimConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimConfig, device: torch.device
) -> tuple[torch.optim.Optimizer, str]:
    """Fused Adam with decoupled weight decay, and its name: apex's on CUDA where there is one, else torch's."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    if device.type == "cuda":
        try:
            from apex.optimizers import FusedAdam
        except ImportError:  # apex is optional, and the PyPI package of that name is another one
            pass
        else:
            return FusedAdam(list(parameters), adam_w_mode=True, **options), "apex FusedAdam"
    return torch.optim.AdamW(list(parameters), fused=True, **options), "torch AdamW (fused)"


def learning_rate(config: OptimConfig, step: int, max_train_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0): a pure function, so that a resume needs no state."""
    rate = config.learning_rate * min(1.0, (step + 1) / max(1, config.lr_warmup_steps))
    left = 1 - step / max_train_steps
    if config.lr_scheduler == "cosine":
        return rate * 0.5 * (1 - math.cos(math.pi * left))
    if config.lr_scheduler == "linear":
        return rate * min(1.0, left / max(config.lr_decay_ratio, 1e-9))
    return rate


class EMA:
    """Exponential moving average of a model's weights, kept in float32 in a model of its own that can be sampled.

    Args:
        model: The model in training.
        decay: The average's decay, approached by (1 + step) / (10 + step).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._averages: list[torch.Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, found_inf: torch.Tensor | None = None) -> None:
        """Take in the weights after step `step` (from 0); where `found_inf` is 1 the average stands still."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        weights = [parameter.detach().float() for parameter in model.parameters()]
        difference = list(torch._foreach_sub(weights, self._averages))
        torch._foreach_mul_(difference, weight if found_inf is None else weight * (1 - found_inf))
        torch._foreach_add_(self._averages, difference)
