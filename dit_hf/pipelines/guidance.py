# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Guidance: what is predicted at a step, for what is asked and for what it is led away from, and how it adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel

AttributeValue = bool | int | str | None
Attributes = Mapping[str, AttributeValue]


class GuidanceOptions(TypedDict, total=False):
    """What `guidance_scale` can be refined by, as further keywords of a call.

    Args:
        negative_attributes: What to steer away from, a dict or one an image; it takes the place of asking for nothing
            in classifier-free guidance.
        attribute_weights: Attributes that count more or less than 1: the difference that leaving one out makes is
            multiplied (as concepts are weighed in https://arxiv.org/abs/2206.01714). Each costs one more prediction.
        guidance_rescale: 0 to 1, how far the guided prediction is brought back to the standard deviation of the
            unguided one (https://arxiv.org/abs/2305.08891, section 3.4).
        guidance_start: Where guidance begins on the way from noise (0) to image (1), in timesteps
            (https://arxiv.org/abs/2404.07724).
        guidance_end: Where it ends; steps without guidance cost half.
        guidance_transformer: Autoguidance (https://arxiv.org/abs/2406.02070): a smaller or earlier model of the same
            conditions, from whose prediction guidance leads away.
    """

    negative_attributes: Attributes | Sequence[Attributes] | None
    attribute_weights: Mapping[str, float] | None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    guidance_transformer: LatentDiTTransformer2DModel | None


@dataclass
class Guidance:
    """How the predictions of a step are added up: each with a share, the shares adding up to 1.

    Args:
        asked: Condition ids of what is asked for, int64 [batch, conditions].
        share: That prediction's share where there is guidance; elsewhere it is the only one.
        others: Condition ids and share of each further prediction.
        elsewhere: Condition ids that are predicted for outside of the interval; None is `asked`.
        transformer: Makes the first of `others`; None is the pipeline's own.
        rescale: See `guidance_rescale`.
        start: See `guidance_start`.
        end: See `guidance_end`.
    """

    asked: torch.Tensor
    share: float = 1.0
    others: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    elsewhere: torch.Tensor | None = None
    transformer: LatentDiTTransformer2DModel | None = None
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def at(self, progress: float) -> tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]:
        """`asked` and `others` of a step; `progress` is how far from noise to image it begins."""
        if self.start <= progress + 1e-6 < self.end + 1e-6 * (self.end == 1):
            return self.asked, self.others
        return self.asked if self.elsewhere is None else self.elsewhere, []

    def combine(self, others: list[torch.Tensor], asked: torch.Tensor) -> torch.Tensor:
        """The guided prediction, of those for `others` and for `asked`, each [batch, channels, height, width]."""
        # As differences from the first, which is how the formula is written, and which rounds less.
        base = others[0]
        guided = base + self.share * (asked - base)
        for output, (_, share) in zip(others[1:], self.others[1:], strict=True):
            guided = guided + share * (output - base)
        if not self.rescale:
            return guided
        # https://arxiv.org/abs/2305.08891, equations 15 and 16.
        ratio = asked.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)
