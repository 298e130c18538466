"""The exponential moving average (EMA) of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class EMA:
    """Exponential moving average of a model's weights, in float32, sharded as the weights are.

    Args:
        model: The model in training, as accelerate prepared it.
        decay: The average's decay, approached by (1 + step) / (10 + step); 0 is the weights themselves.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._model = model
        self._weights = local_weights(model) if decay else []
        self._averages = [weight.float().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int, found_inf: torch.Tensor) -> None:
        """Take in the weights after step `step` (from 0); where `found_inf` is 1 the average stands still."""
        if not self.decay:
            return
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - found_inf)
        torch._foreach_lerp_(self._averages, self._weights, [weight] * len(self._weights))

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The averages as the model's weights while the block runs; bit for bit undone afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        _reshard(self._model)
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def local_weights(model: nn.Module) -> list[torch.Tensor]:
    """The weights, or this rank's shards of them, without their history."""
    _reshard(model)
    weights = [parameter.detach() for parameter in model.parameters()]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]


def _reshard(model: nn.Module) -> None:
    """Sharded models may hold weights whole after a forward; where shards are read or changed they must not."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
