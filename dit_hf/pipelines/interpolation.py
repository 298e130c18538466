"""Interpolation between noises."""

from __future__ import annotations

import itertools

import torch


def slerp(start: torch.Tensor, end: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Interpolate on the arc between two noises (Shoemake 1985), so that all points are as likely as noise.

    Args:
        start: The noise at weight 0.
        end: The noise at weight 1, the same shape.
        weights: Between 0 and 1.

    Returns:
        One noise a weight, [len(weights), ...].
    """
    # The angle needs double precision, which not every device has: on the CPU.
    first, last = (noise.flatten().cpu().double() for noise in (start, end))
    angle = torch.nn.functional.cosine_similarity(first, last, dim=0).clamp(-1, 1).acos().to(start)
    weights = weights.to(start.dtype).reshape(-1, *[1] * start.ndim)
    # Between (nearly) equal noises the arc is a straight line, and its formula 0 / 0.
    if angle < 1e-4:
        return torch.lerp(start[None], end[None], weights)
    return (((1 - weights) * angle).sin() * start + (weights * angle).sin() * end) / angle.sin()


def interpolate_noises(noises: torch.Tensor, num_frames: int) -> torch.Tensor:
    """Interpolate on the arcs from each noise to the next.

    Args:
        noises: Two or more, [noises, ...].
        num_frames: Frames an arc, both ends included; a noise between two arcs appears once.

    Returns:
        The frames, [(noises - 1) * (num_frames - 1) + 1, ...].

    Raises:
        ValueError: for less than two frames or noises.
    """
    if num_frames < 2 or len(noises) < 2:
        raise ValueError(f"expected at least two noises and two frames, got {len(noises)} and {num_frames}")
    weights = torch.linspace(0, 1, num_frames, device=noises.device)
    # Each arc without its end, which is the start of the next one.
    arcs = [slerp(start, end, weights[:-1]) for start, end in itertools.pairwise(noises)]
    return torch.cat([*arcs, noises[-1:]])
