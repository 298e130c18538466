"""Noises between noises."""

from __future__ import annotations

import itertools

import torch


def slerp(start: torch.Tensor, end: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Points on the arc between two noises (Shoemake 1985), [len(weights), ...]: noises as likely as they are.

    Args:
        start: The noise at weight 0.
        end: The noise at weight 1, the same shape.
        weights: Between 0 and 1.
    """
    # In double precision, which not every device has.
    first, last = (noise.flatten().cpu().double() for noise in (start, end))
    angle = torch.nn.functional.cosine_similarity(first, last, dim=0).clamp(-1, 1).acos().to(start)
    weights = weights.to(start.dtype).reshape(-1, *[1] * start.ndim)
    if angle < 1e-4:
        return torch.lerp(start[None], end[None], weights)
    return (((1 - weights) * angle).sin() * start + (weights * angle).sin() * end) / angle.sin()


def interpolate_noises(noises: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Points on the arcs from each noise to the next, `num_frames` an arc with both ends, which are not repeated.

    Raises:
        ValueError: for less than two frames or noises.
    """
    if num_frames < 2 or len(noises) < 2:
        raise ValueError(f"{len(noises)} noises and {num_frames} frames; at least two of both are needed")
    weights = torch.linspace(0, 1, num_frames, device=noises.device)
    arcs = [slerp(start, end, weights[:-1]) for start, end in itertools.pairwise(noises)]
    return torch.cat([*arcs, noises[-1:]])
