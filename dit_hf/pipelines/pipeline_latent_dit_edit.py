# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Attributes of given images changed, the rest kept: inverted to noise, and denoised for other attributes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .guidance import Attributes, GuidanceOptions
from .pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline

# How often each step of an inversion is predicted anew where the last prediction said it begins.
REVERSE_ITERATIONS = 2


class LatentDiTEditPipeline(LatentDiTImg2ImgPipeline):
    r"""
    Changes attributes of given images by DDIM inversion (https://arxiv.org/abs/2010.02502, section 4.3).

    An image is inverted under its own attributes to the noise that gives it, from which it is sampled again, led from
    its own attributes to those asked for. Made of the parts of a [`LatentDiTPipeline`]:
    `LatentDiTEditPipeline(**pipe.components)`, or by `LatentDiTEditPipeline.from_pipe(pipe)` and `from_pretrained`.
    Works by DDIM, whatever scheduler the pipeline has.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each of diffusers' pipelines has a call of its own
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        image: PipelineImageInput | None = None,
        edit: Attributes | Sequence[Attributes] | None = None,
        edit_strength: float = 1.0,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' spelling)
        **guidance_options: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Change attributes of images.

        Args:
            attributes: What the images have, one dict for all or a list with one for each; the more is given the more
                is kept. None where it is not known.
            image: One image or several; see [`LatentDiTImg2ImgPipeline`].
            edit: What to change, e.g. `{"Eyeglasses": True}`, one dict for all images or a list with one for each.
            edit_strength: 0 gives the image back, 1 leads from the image's own attributes to those asked for with
                the guidance that the pipeline samples with; more is more.
            strength: How far the image is inverted, 1 is all the way to noise; below 1 coarse shapes are kept.
            num_inference_steps: Steps in each direction, for a `strength` of 1.
            guidance_scale: Multiplies `edit_strength`; None is the value in the pipeline's config.
            output_type: See [`LatentDiTPipeline`], as for the other arguments.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: without image or edit, for unknown attributes, or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_image_inputs(image, strength)
        self._check_inputs(attributes, 1, output_type, callback_on_step_end_tensor_inputs)
        if not edit:
            raise ValueError("edit= is needed, e.g. {'Eyeglasses': True}")
        known = self.encode_images(image)
        rows, known = self._match(attributes, known, 1)
        edits, known = self._match(edit, known, 1)
        rows = rows * len(edits) if len(rows) == 1 else rows
        edited = [{**row, **change} for row, change in zip(rows, edits, strict=True)]
        scale = edit_strength * (self.config.guidance_scale if guidance_scale is None else guidance_scale)
        guidance_options.setdefault("negative_attributes", rows)
        guidance = self._prepare_guidance(edited, True, scale, **guidance_options)
        guidance.elsewhere = self.encode_attributes(rows).to(self._execution_device)

        # 2. To noise, and back again.
        with self._own_scheduler():
            latents = self._invert(known, rows, num_inference_steps, strength)
            timesteps = self._last_timesteps(num_inference_steps, strength)
            on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
            latents = self._denoise(latents, timesteps, guidance, 0.0, None, *on_step_end)

        # 3. Decode.
        return self._output(latents, output_type, return_dict)

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        attributes: Attributes | Sequence[Attributes] | None = None,
        num_inference_steps: int = 50,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """The noise, [images, channels, height, width], that as `latents` of a call gives the images back.

        So it does with the same attributes and number of steps, `guidance_scale=1` and a [`CosineLatentScheduler`] of
        `multistep=False`; of a `strength` below 1, [`LatentDiTImg2ImgPipeline`]'s level of noise instead.
        """
        self._check_image_inputs(image, strength)
        rows, known = self._match(attributes, self.encode_images(image), 1)
        with self._own_scheduler():
            latents = self._invert(known, rows, num_inference_steps, strength)
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def interpolate_images(
        self,
        image: PipelineImageInput,
        num_frames: int = 16,
        attributes: Attributes | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> list[Any]:
        """Frames from each of two or more images to the next, over the noises that give them; see `interpolate`.

        `attributes` is what all of the images have, if anything.
        """
        noises = self.invert(image, attributes, num_inference_steps)
        options: dict[str, Any] = {"num_inference_steps": num_inference_steps, "output_type": output_type}
        with self._own_scheduler():
            return self.interpolate(num_frames, noises, attributes=attributes, guidance_scale=1.0, **options)

    def reversible_scheduler(self) -> CosineLatentScheduler:
        """DDIM on the noise levels of the pipeline's scheduler, whatever that is."""
        betas, prediction_type = self.scheduler.betas.tolist(), self.scheduler.config.prediction_type
        return CosineLatentScheduler(len(betas), prediction_type=prediction_type, trained_betas=betas, multistep=False)

    def _invert(
        self, known: torch.Tensor, rows: list[Attributes], num_inference_steps: int, strength: float
    ) -> torch.Tensor:
        """Up the schedule from clean latents, each step the reverse of the one that leads back."""
        guidance = self._prepare_guidance(rows, False, 1.0)
        latents = known
        self._reset_caches(guidance)
        for timestep in self._last_timesteps(num_inference_steps, strength).flip(0):
            lower = latents
            for _ in range(REVERSE_ITERATIONS):
                output = self._predict(latents, timestep, guidance, 0.0)
                latents = self.scheduler.reverse_step(output, timestep, latents, lower)
        return latents

    @contextlib.contextmanager
    def _own_scheduler(self) -> Iterator[None]:
        """Steps by DDIM on the same schedule, which can be reversed."""
        kept: Any = self.scheduler
        self.scheduler = self.reversible_scheduler()
        try:
            yield
        finally:
            self.scheduler = kept
