"""Muon for the matrices of the blocks, Adam for everything else, as one optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

MOMENTUM = 0.95
# a, b, c of the quintic iteration, from https://kellerjordan.github.io/posts/muon/. Steep at 0, so that five
# iterations are enough.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Into how many blocks of rows and of columns a matrix is cut.
Blocks = tuple[int, int]


class MuonAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (torch's fused one), and Muon for the groups with `muon=True`.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/) moves a matrix along its Nesterov momentum with
    all singular values made equal. A step is scaled by `0.2 sqrt(max(rows, columns))` (Liu et al.,
    https://arxiv.org/abs/2502.16982, section 2.2), which makes it as long as one of Adam's, so that both share a
    learning rate. A matrix may be cut into blocks, each orthogonalized as a matrix of its own: the projections into
    and out of attention heads, head by head. Blocks of one shape are computed as one batch.

    Both are one optimizer, so that an overflowing gradient skips the step of both: it reads `found_inf` as torch's
    fused optimizers do, and nothing waits for the device.

    Args:
        groups: Parameter groups. Those with `muon=True` hold matrices only, and in `blocks` for each of them into how
            many blocks of rows and of columns it is cut; `(1, 1)` leaves it whole.
        lr: Learning rate.
        betas: Adam's.
        eps: Added to Adam's denominator.
        dtype: Precision of the orthogonalization, which need not be exact. float16 where that is fast: singular values
            are at most about 1, and bfloat16 is some seven times as coarse.
    """

    # Read by torch's GradScaler (2.13): `step` takes `found_inf` itself. Gradients must be unscaled before it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype = torch.float16,
    ):
        # By `fused` torch knows, when it loads a state, that Adam's step count belongs on the parameters' device.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False, "fused": True}
        super().__init__(groups, defaults)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights, unless `found_inf` (0 or 1, set by the gradient scaler or the training step) is 1.

        Args:
            closure: Must be None; torch's signature.
        """
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            if not group["muon"]:
                self._adam_step(group, [p for p in group["params"] if p.grad is not None], found_inf)
                continue
            # A batch for each shape and cut, in the order in which they first appear.
            batches: dict[tuple[torch.Size, Blocks], list[torch.Tensor]] = {}
            for parameter, blocks in zip(group["params"], group["blocks"], strict=True):  # lists, once loaded
                if parameter.grad is not None:
                    batches.setdefault((parameter.shape, tuple(blocks)), []).append(parameter)
            for (_, blocks), matrices in batches.items():
                self._muon_step(group, matrices, blocks, found_inf)

    def _adam_step(
        self, group: dict[str, Any], parameters: list[torch.Tensor], found_inf: torch.Tensor | None
    ) -> None:
        """Update `parameters` by torch's fused AdamW."""
        # State as torch.optim.AdamW keeps it, created at the first step.
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
            [],  # AMSGrad's, which is off
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

    def _muon_step(
        self, group: dict[str, Any], matrices: list[torch.Tensor], blocks: Blocks, found_inf: torch.Tensor | None
    ) -> None:
        """Update `matrices`, all of one shape; sharded ones are gathered, as singular values are of whole blocks."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        buffers = [_local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        gradients = [_local(matrix.grad) for matrix in matrices if matrix.grad is not None]

        # 1. Nesterov momentum, in place. In a skipped step each buffer is interpolated with itself, which leaves its
        #    bits as they are; a factor of zero would not do, since zero times infinity is not a number.
        #    `torch._foreach_lerp` is not documented (read in torch 2.13).
        if found_inf is not None:
            gradients = [torch.where(found_inf > 0, b, g) for b, g in zip(buffers, gradients, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        directions = torch._foreach_lerp(gradients, buffers, MOMENTUM)

        # 2. All blocks of this shape at once: few large products instead of many small ones. In a skipped step the
        #    length is zero.
        whole = torch.stack([_gather(d, like=matrix) for d, matrix in zip(directions, matrices, strict=True)])
        parts = _cut(whole, blocks)
        orthogonal = _join(orthogonalize(parts, self.dtype), blocks)
        moves = torch.ones((), device=whole.device) if found_inf is None else 1 - found_inf
        length = (0.2 * math.sqrt(max(parts.shape[-2:])) * group["lr"]) * moves

        # 3. The weights, decayed and moved, shard by shard.
        for matrix, direction in zip(matrices, orthogonal, strict=True):
            weight = _local(matrix)
            if group["weight_decay"]:
                weight.mul_(1 - group["lr"] * group["weight_decay"] * moves)
            weight.addcmul_(_shard(direction, like=matrix), length, value=-1)


def _cut(matrices: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Cut matrices [n, rows, columns] into blocks, [n * blocks, rows / row blocks, columns / column blocks]."""
    rows, columns = blocks
    parts = matrices.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # [n, row blocks, r, column blocks, c]
    return parts.transpose(2, 3).flatten(0, 2)


def _join(parts: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """Undo `_cut`."""
    matrices = parts.unflatten(0, (-1, *blocks)).transpose(2, 3)  # [n, row blocks, r, column blocks, c]
    return matrices.flatten(3, 4).flatten(1, 2)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Bring the singular values of each matrix near 1, except those near 0, by five Newton-Schulz iterations.

    An iteration is `X <- (a I + b G + c G²) X` with the Gram matrix `G = X Xᵀ`. Several iterations together are one
    product of polynomials in the first G, which is cheaper where X is much longer than wide.

    Args:
        matrices: [n, rows, columns].
        dtype: Of the computation and of the result.

    Returns:
        [n, rows, columns].
    """
    # Frobenius norm 1, so that no singular value is above 1, where the iteration would diverge. Computed in the
    # matrices' own precision and rounded to `dtype` in the same pass.
    rows, columns = matrices.shape[-2:]
    norm = matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = torch.div(matrices, norm, out=torch.empty_like(matrices, dtype=dtype))

    # G holds squared singular values: after more than three iterations on it the small ones are rounded away, so it is
    # computed again after three. Near squares save nothing by it and compute it every time.
    for iterations in (3, 2) if max(rows, columns) >= 2 * min(rows, columns) else (1,) * 5:
        x = _newton_schulz(x, iterations)
    return x


def _newton_schulz(x: torch.Tensor, iterations: int) -> torch.Tensor:
    """Apply `iterations` of `orthogonalize` to `x` [n, rows, columns], on the Gram matrix of its shorter side."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    gram = x.mT @ x if tall else x @ x.mT  # [n, short, short]

    # Each iteration multiplies X by `factor`; X itself is multiplied once, by the product of all of them.
    product = gram  # replaced in the first iteration
    for i in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G²
        factor.diagonal(dim1=-2, dim2=-1).add_(a)  # a I
        product = factor @ product if i else factor
        if i + 1 < iterations:
            # The Gram matrix of the next X. Written without transposes: polynomials in one matrix commute.
            gram = factor @ (gram @ factor)
    return x @ product if tall else product @ x


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of `tensor`, or the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(shard: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Gather the whole tensor of which this rank has `shard`, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return shard
    placed = DTensor.from_local(shard, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return placed.full_tensor()


def _shard(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's shard of `whole`, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return whole
    # Every rank has computed the same `whole`, so nothing needs to be sent (`src_data_rank=None`).
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
