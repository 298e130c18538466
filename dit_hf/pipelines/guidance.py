# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Guidance: the conditions that are predicted at a step, and how the predictions are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from .attributes import Attributes, attribute_rows


class GuidanceOptions(TypedDict, total=False):
    """Further keywords of a pipeline's call, which refine `guidance_scale`.

    Args:
        negative_attributes: Attributes to steer away from, a dict or one an image; they replace the unconditional
            prediction of classifier-free guidance.
        attribute_weights: Attributes that count more or less than 1: the difference between the predictions with and
            without an attribute is multiplied (as concepts are weighted in https://arxiv.org/abs/2206.01714). Each
            costs one more prediction a step.
        guidance_rescale: 0 to 1, how far the guided prediction is brought back to the standard deviation of the
            unguided one (https://arxiv.org/abs/2305.08891, section 3.4).
        guidance_start: Where guidance begins on the way from noise (0) to image (1), in timesteps
            (https://arxiv.org/abs/2404.07724).
        guidance_end: Where it ends; steps without guidance cost half.
        guidance_transformer: A smaller or earlier model with the same conditions, from whose prediction guidance
            steers away (autoguidance, https://arxiv.org/abs/2406.02070).
    """

    negative_attributes: Attributes | Sequence[Attributes] | None
    attribute_weights: Mapping[str, float] | None
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    guidance_transformer: LatentDiTTransformer2DModel | None


@dataclass
class Guidance:
    """The predictions of a step and their weights, which add up to 1.

    Args:
        condition_ids: The requested conditions, int64 [batch, conditions].
        weight: Weight of their prediction inside the interval; outside of it there is no other.
        others: Condition ids and weight of each further prediction.
        outside_ids: Condition ids that are predicted outside the interval; None is `condition_ids`.
        transformer: The model that makes the first prediction of `others`; None is the pipeline's own.
        rescale: See `guidance_rescale` of [`GuidanceOptions`].
        start: See `guidance_start`.
        end: See `guidance_end`.
    """

    condition_ids: torch.Tensor
    weight: float = 1.0
    others: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    outside_ids: torch.Tensor | None = None
    transformer: LatentDiTTransformer2DModel | None = None
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0

    def at(self, progress: float) -> tuple[torch.Tensor, list[tuple[torch.Tensor, float]]]:
        """Return the condition ids and the further predictions of a step that begins at `progress`, 0 to 1."""
        # The margin absorbs the rounding of `progress`; with an end of 1 no step is outside.
        if self.start <= progress + 1e-6 < self.end + 1e-6 * (self.end == 1):
            return self.condition_ids, self.others
        return self.condition_ids if self.outside_ids is None else self.outside_ids, []

    def predict(
        self, transformer: Any, model_input: torch.Tensor, timestep: torch.Tensor, progress: float
    ) -> torch.Tensor:
        """Return the prediction of a step after guidance, the shape and precision of `model_input`.

        Args:
            transformer: The pipeline's model.
            model_input: Noisy latents, [batch, channels, height, width].
            timestep: The one of the step, a 0-d tensor.
            progress: Where the step begins between noise (0) and image (1).
        """
        # 1. All predictions of the pipeline's own model in one batch.
        requested_ids, others = self.at(progress)
        own = others if self.transformer is None else others[1:]
        outputs = _run(transformer, model_input, timestep, [*(ids for ids, _ in own), requested_ids])
        if not others:
            return outputs[0]
        requested = outputs.pop()

        # 2. The prediction of the weaker model, which is the first of `others`.
        if len(own) < len(others):
            outputs = _run(self.transformer, model_input, timestep, [others[0][0]]) + outputs
        return self.combine(outputs, requested)

    def combine(self, others: list[torch.Tensor], requested: torch.Tensor) -> torch.Tensor:
        """Return the guided prediction, the weighted sum of those for `others` and for the requested conditions.

        All are [batch, channels, height, width].
        """
        # As differences from the first, which is how classifier-free guidance is written and rounds less than a sum.
        base = others[0]
        guided = base + self.weight * (requested - base)
        for output, (_, weight) in zip(others[1:], self.others[1:], strict=True):
            guided = guided + weight * (output - base)
        if not self.rescale:
            return guided
        # https://arxiv.org/abs/2305.08891, equations 15 and 16.
        ratio = requested.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)


def build_guidance(
    encode: Callable[[Sequence[Attributes]], torch.Tensor],
    rows: Sequence[Attributes],
    conditional: bool,
    guidance_scale: float,
    num_images_per_row: int = 1,
    negative_attributes: Attributes | Sequence[Attributes] | None = None,
    attribute_weights: Mapping[str, float] | None = None,
    guidance_rescale: float = 0.0,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    guidance_transformer: LatentDiTTransformer2DModel | None = None,
) -> Guidance:
    """Return the predictions of every step of a call and their weights.

    Args:
        encode: Rows of attributes to condition ids on the device.
        rows: The requested attributes, one row an image; images of the same row of the call follow each other.
        conditional: False if the call requests no attributes.
        guidance_scale: 1 is none.
        num_images_per_row: Images for each row of the call.
        negative_attributes: This and the following arguments are [`GuidanceOptions`].

    Raises:
        ValueError: for unknown attributes, or options out of their range.
    """
    for name, value in (("rescale", guidance_rescale), ("start", guidance_start), ("end", guidance_end)):
        if not 0 <= value <= 1:
            raise ValueError(f"guidance_{name}={value} must be between 0 and 1")
    requested = encode(rows)
    guidance = Guidance(requested, rescale=guidance_rescale, start=guidance_start, end=guidance_end)

    # 1. Steer away from the negative attributes (none by default), or from the prediction of a weaker model. That must
    #    be the first of the others: `predict` makes the first one with the weaker model.
    steerable = requested.shape[1] > 0 and (conditional or negative_attributes is not None)
    if guidance_scale != 1 and (guidance_transformer is not None or steerable):
        negative_rows = attribute_rows(negative_attributes, len(rows) // num_images_per_row, num_images_per_row)
        # A weaker model predicts for the requested attributes, unless there are negative ones.
        if negative_attributes is None and guidance_transformer is not None:
            negative_rows = list(rows)
        if len(negative_rows) != len(rows):
            raise ValueError(f"{len(negative_rows)} rows of negative_attributes for {len(rows)} images")
        guidance.weight = guidance_scale
        guidance.transformer = guidance_transformer
        guidance.others.append((encode(negative_rows), 1 - guidance_scale))

    # 2. Scale the difference that each weighted attribute makes: predict once more without it.
    for name, weight in (attribute_weights or {}).items():
        without = [{key: value for key, value in row.items() if key != name} for row in rows]
        if without == list(rows):
            raise ValueError(f"attribute_weights has {name!r}, which is requested for no image")
        extra = guidance_scale * (weight - 1)
        guidance.weight += extra
        guidance.others.append((encode(without), -extra))
    return guidance


def _run(
    transformer: Any, model_input: torch.Tensor, timestep: torch.Tensor, condition_ids: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Return a prediction for each entry of `condition_ids`, without a learned sigma.

    The model may have half precision. Latents, guidance and steps stay in float32, which costs next to nothing.
    """
    count = len(condition_ids)
    inputs = torch.cat([model_input] * count)  # [count * batch, channels, height, width]
    ids = torch.cat(condition_ids)  # [count * batch, conditions]
    timesteps = timestep.to(model_input.device).expand(len(inputs))  # [count * batch]
    # One context for each number of predictions, which differs outside the interval of guidance: the content of one of
    # diffusers' caches fits only a batch of the same size.
    with transformer.cache_context(f"{count} predictions"):
        output = transformer(inputs.to(transformer.dtype), timesteps, ids, return_dict=False)[0]
    # A learned sigma is in the channels after those of the latents.
    return list(output[:, : transformer.config.in_channels].to(model_input.dtype).chunk(count))
