"""Muon for the matrices of the blocks, Adam for everything else, as one optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

MOMENTUM = 0.95
# Of the quintic iteration, from https://kellerjordan.github.io/posts/muon/: steep at 0, so that five steps are enough.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class MuonAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (torch's fused one), and Muon for the groups with `muon=True`.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) moves a matrix along its Nesterov momentum with
    all singular values made equal. A step is scaled by `0.2 sqrt(max(rows, columns))` (Liu et al.,
    https://arxiv.org/abs/2502.16982, section 2.2), which makes it as long as one of Adam's, so that both share a
    learning rate. Matrices of one shape are computed as one batch. One optimizer, so that where a gradient overflows
    everything stands still together: it understands `found_inf` as torch's fused optimizers do, and nothing waits for
    the device.

    Args:
        groups: Parameter groups; those with `muon=True` hold matrices only.
        lr: Learning rate.
        betas: Adam's.
        eps: Added to Adam's denominator.
        dtype: What the singular values are made equal in: half precision where that is fast, it need not be exact.
    """

    _step_supports_amp_scaling = True  # read by torch's GradScaler; gradients have to be unscaled before the step

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype = torch.bfloat16,
    ):
        # By `fused` torch knows, when a state is loaded, that Adam's count of steps belongs on the device.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False, "fused": True}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move the weights, unless `found_inf` (0 or 1, set by the gradient scaler or the training step) is 1."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self._adam_step(group, parameters, found_inf)
                continue
            for shape in dict.fromkeys(p.shape for p in parameters):
                self._muon_step(group, [p for p in parameters if p.shape == shape], found_inf)

    def _adam_step(
        self, group: dict[str, Any], parameters: list[torch.Tensor], found_inf: torch.Tensor | None
    ) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                zeros = torch.zeros_like(parameter)
                step = torch.zeros((), device=parameter.device)
                self.state[parameter] |= {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _muon_step(self, group: dict[str, Any], matrices: list[torch.Tensor], found_inf: torch.Tensor | None) -> None:
        """One step of matrices of one shape; sharded ones are gathered for it, as no shard knows singular values."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradient = torch.stack([_whole(matrix.grad) for matrix in matrices if matrix.grad is not None])
        momentum = torch.stack([_whole(buffer) for buffer in buffers])
        moves = torch.ones((), device=gradient.device) if found_inf is None else 1 - found_inf
        gradient = torch.where(moves > 0, gradient, 0.0)
        momentum = momentum.lerp(gradient, (1 - MOMENTUM) * moves)
        direction = orthogonalize(gradient.lerp(momentum, MOMENTUM), self.dtype)
        length = 0.2 * math.sqrt(max(matrices[0].shape)) * group["lr"] * moves
        kept = 1 - group["lr"] * group["weight_decay"] * moves
        for matrix, buffer, new, move in zip(matrices, buffers, momentum, direction * length, strict=True):
            buffer.copy_(_like(buffer, new))
            matrix.mul_(kept).sub_(_like(matrix, move))


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Each of `matrices` [n, rows, columns] with singular values, but for those near 0, brought near 1; float32."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """`whole`, or where `tensor` is sharded this rank's part of it."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
