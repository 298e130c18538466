# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Guidance: the conditions that are predicted at a step, and how the predictions are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from .attributes import Attributes, attribute_rows, check_attributes


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
    """The conditions that the steps of a call predict; their weights depend on the guidance scale of each step.

    Args:
        condition_ids: The requested conditions, int64 [batch, conditions].
        negative_ids: Those that guidance steers away from; None if there is nothing to steer by.
        weighted: For each of `attribute_weights` the condition ids without that attribute, and its weight.
        outside_ids: Condition ids that are predicted outside the interval; None is `condition_ids`.
        transformer: The model that predicts for `negative_ids`; None is the pipeline's own.
        rescale: See `guidance_rescale` of [`GuidanceOptions`].
        start: See `guidance_start`.
        end: See `guidance_end`.
        edit_strength: Multiplies the guidance scale of an edit, which may then have any value; None for all else,
            where a scale of 1 or less turns guidance off, as in all of diffusers.
        guider: One of diffusers' guiders, which combines the predictions instead, with options of its own.
    """

    condition_ids: torch.Tensor
    negative_ids: torch.Tensor | None = None
    weighted: list[tuple[torch.Tensor, float]] = field(default_factory=list)
    outside_ids: torch.Tensor | None = None
    transformer: LatentDiTTransformer2DModel | None = None
    rescale: float = 0.0
    start: float = 0.0
    end: float = 1.0
    edit_strength: float | None = None
    guider: Any = None

    def predict(
        self,
        transformer: Any,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        step: int,
        progress: Sequence[float],
        scale: float,
    ) -> torch.Tensor:
        """Return the prediction of a step after guidance, the shape and precision of `model_input`.

        Args:
            transformer: The pipeline's model.
            model_input: Noisy latents, [batch, channels, height, width].
            timestep: The one of the step, a 0-d tensor.
            step: Its number.
            progress: Where each step of the call begins between noise (0) and image (1).
            scale: The guidance scale of the step.
        """
        if self.guider is not None:
            return self._predict_with_guider(transformer, model_input, timestep, step, len(progress))

        # 1. Outside the interval there is one prediction. The margin absorbs the rounding of `progress`; with an end
        #    of 1 no step is outside.
        if not self.start <= progress[step] + 1e-6 < self.end + 1e-6 * (self.end == 1):
            ids = self.condition_ids if self.outside_ids is None else self.outside_ids
            return _run(transformer, model_input, timestep, [ids])[0]

        # 2. What else is predicted, and with what weight. All weights add up to 1.
        scale = max(scale, 1.0) if self.edit_strength is None else self.edit_strength * scale
        others = [(ids, -scale * (weight - 1)) for ids, weight in self.weighted]
        weight = 1.0 - sum(weight for _, weight in others)
        weaker = None
        if self.negative_ids is not None and scale != 1:
            others.insert(0, (self.negative_ids, 1 - scale))
            weight += scale - 1
            weaker = self.transformer

        # 3. All predictions of the pipeline's own model in one batch, and before them that of the weaker model.
        own = others if weaker is None else others[1:]
        outputs = _run(transformer, model_input, timestep, [*(ids for ids, _ in own), self.condition_ids])
        requested = outputs.pop()
        if not others:
            return requested
        if weaker is not None:
            outputs = _run(weaker, model_input, timestep, [others[0][0]]) + outputs

        # 4. The weighted sum, as differences from the first: classifier-free guidance is written so, and rounds less.
        base = outputs[0]
        guided = base + weight * (requested - base)
        for output, (_, other_weight) in zip(outputs[1:], others[1:], strict=True):
            guided = guided + other_weight * (output - base)
        if not self.rescale:
            return guided
        # https://arxiv.org/abs/2305.08891, equations 15 and 16.
        ratio = requested.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
        return guided * (self.rescale * ratio + 1 - self.rescale)

    def _predict_with_guider(
        self, transformer: Any, model_input: torch.Tensor, timestep: torch.Tensor, step: int, num_steps: int
    ) -> torch.Tensor:
        """Return the prediction as the guider combines it from one prediction for each of its conditions.

        Raises:
            ValueError: if the guider does not work on images.
        """
        self.guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
        negative_ids = self.condition_ids if self.negative_ids is None else self.negative_ids
        batches = self.guider.prepare_inputs({"condition_ids": (self.condition_ids, negative_ids)})
        for batch in batches:
            # One by one: some guiders change the model for one of the predictions.
            self.guider.prepare_models(transformer)
            try:
                name = getattr(batch, self.guider._identifier_key)
                batch.noise_pred = _run(transformer, model_input, timestep, [batch.condition_ids], name)[0]
            finally:
                self.guider.cleanup_models(transformer)
        try:
            return self.guider(batches).pred
        except RuntimeError as error:
            shape = list(model_input.shape)
            raise ValueError(f"{type(self.guider).__name__} cannot combine predictions of {shape}: {error}") from error


def build_guidance(
    encode: Callable[[Sequence[Attributes]], torch.Tensor],
    rows: Sequence[Attributes],
    conditional: bool,
    num_images_per_row: int = 1,
    negative_attributes: Attributes | Sequence[Attributes] | None = None,
    attribute_weights: Mapping[str, float] | None = None,
    guidance_rescale: float = 0.0,
    guidance_start: float = 0.0,
    guidance_end: float = 1.0,
    guidance_transformer: LatentDiTTransformer2DModel | None = None,
) -> Guidance:
    """Return what the steps of a call predict.

    Args:
        encode: Rows of attributes to condition ids on the device.
        rows: The requested attributes, one row an image; images of the same row of the call follow each other.
        conditional: False if the call requests no attributes.
        num_images_per_row: Images for each row of the call.
        negative_attributes: This and the following arguments are [`GuidanceOptions`].

    Raises:
        ValueError: for unknown attributes, or options out of their range.
    """
    for name, value in (("rescale", guidance_rescale), ("start", guidance_start), ("end", guidance_end)):
        if not 0 <= value <= 1:
            raise ValueError(f"guidance_{name}={value} must be between 0 and 1")
    check_attribute_weights(attribute_weights)
    requested = encode(rows)
    guidance = Guidance(requested, rescale=guidance_rescale, start=guidance_start, end=guidance_end)

    # 1. Steer away from the negative attributes (none by default), or from the prediction of a weaker model.
    steerable = requested.shape[1] > 0 and (conditional or negative_attributes is not None)
    if guidance_transformer is not None or steerable:
        count = len(rows) // num_images_per_row
        check_attributes(negative_attributes, 1, "negative_attributes")
        negative_rows = attribute_rows(negative_attributes, count, num_images_per_row)
        # A weaker model predicts for the requested attributes, unless there are negative ones.
        if negative_attributes is None and guidance_transformer is not None:
            negative_rows = list(rows)
        if len(negative_rows) != len(rows):
            raise ValueError(f"{len(negative_rows)} rows of negative_attributes for {len(rows)} images")
        guidance.negative_ids = encode(negative_rows)
        guidance.transformer = guidance_transformer

    # 2. Scale the difference that each weighted attribute makes: predict once more without it.
    for name, weight in (attribute_weights or {}).items():
        without = [{key: value for key, value in row.items() if key != name} for row in rows]
        if without == list(rows):
            raise ValueError(f"attribute_weights has {name!r}, which is requested for no image")
        guidance.weighted.append((encode(without), weight))
    return guidance


def check_options_with_guider(guider: Any, options: Mapping[str, Any]) -> None:
    """Check that the options of a call leave guidance to a guider of diffusers.

    Raises:
        ValueError: for an option that a guider has itself, or a guider that works in another way.
    """
    name = type(guider).__name__
    for option, value in options.items():
        if option != "negative_attributes" and value is not None:
            raise ValueError(f"{option}={value!r} has no effect with a guider: set it on the {name}, or leave it out")
    foreign = {"pred_cond_stg", "pred_cond_modality"} & {*guider._input_predictions}
    if foreign:
        raise ValueError(f"{name} combines {', '.join(sorted(foreign))}, which models of video with sound predict")


def check_attribute_weights(attribute_weights: Mapping[str, float] | None) -> None:
    """Check that `attribute_weights` is None or a dict of numbers.

    Raises:
        ValueError: if it is not.
    """
    weights = {} if attribute_weights is None else attribute_weights
    if not isinstance(weights, Mapping) or not all(isinstance(weight, int | float) for weight in weights.values()):
        expected = "expected a dict of numbers like {'Smiling': 2.0}"
        raise ValueError(f"{expected}, got attribute_weights={attribute_weights!r}")


def _run(
    transformer: Any,
    model_input: torch.Tensor,
    timestep: torch.Tensor,
    condition_ids: list[torch.Tensor],
    name: str = "predictions",
) -> list[torch.Tensor]:
    """Return a prediction for each entry of `condition_ids`, without a learned sigma; `name` tells caches which.

    The model may have half precision. Latents, guidance and steps stay in float32, which costs next to nothing.
    """
    count = len(condition_ids)
    inputs = torch.cat([model_input] * count)  # [count * batch, channels, height, width]
    ids = torch.cat(condition_ids)  # [count * batch, conditions]
    timesteps = timestep.to(model_input.device).expand(len(inputs))  # [count * batch]
    # One context for each number of predictions, which differs outside the interval of guidance: the content of one of
    # diffusers' caches fits only a batch of the same size.
    with transformer.cache_context(f"{count} {name}"):
        output = transformer(inputs.to(transformer.dtype), timesteps, ids, return_dict=False)[0]
    # A learned sigma is in the channels after those of the latents.
    return list(output[:, : transformer.config.in_channels].to(model_input.dtype).chunk(count))
