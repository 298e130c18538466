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
        decay: EMA decay in [0, 1), reached gradually by (1 + step) / (10 + step); 0 is the weights themselves.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._model = model
        # Both lists are this rank's shards, in the order of the model's parameters. Without decay they stay empty, and
        # swapping them in leaves the model as it is.
        self._weights = local_weights(model) if decay else []
        self._ema = [weight.float().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self, step: int, found_inf: torch.Tensor) -> None:
        """Include the weights after step `step` (from 0); where `found_inf` is 1 nothing changes.

        `found_inf` is a tensor, so that a skipped step is noticed without waiting for the device.
        """
        if not self.decay:
            return
        weight = (1 - min(self.decay, (1 + step) / (10 + step))) * (1 - found_inf)
        # Few kernels for all parameters, with weights that stay on the device. `_foreach_lerp_` is not documented
        # (read in torch 2.13).
        torch._foreach_lerp_(self._ema, self._weights, [weight] * len(self._weights))

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Make the EMA the model's weights while the block runs; afterwards every bit is as before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        _reshard(self._model)
        # Weight by weight, which needs memory for one more weight and not for one more model.
        for weight, ema in zip(self._weights, self._ema, strict=True):
            before = weight.clone()
            weight.copy_(ema)
            ema.copy_(before)


def local_weights(model: nn.Module) -> list[torch.Tensor]:
    """Return the model's weights, or this rank's shards of them, detached and sharing the model's memory."""
    _reshard(model)
    weights = [parameter.detach() for parameter in model.parameters()]
    return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]


def _reshard(model: nn.Module) -> None:
    """Free the unsharded weights that FSDP2 may hold after a forward: a changed shard would not show in them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
