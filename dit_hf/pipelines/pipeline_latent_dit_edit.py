# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline that edits attributes of images: it inverts them to noise and denoises that for other attributes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..schedulers.accuracy import check_num_inference_steps
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .attributes import Attributes, check_attributes
from .exclusive import exclusive
from .guidance import Guidance, GuidanceOptions
from .pipeline_latent_dit import LatentDiTPipeline
from .pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from .preprocessing import ImageInput, InputRange

# Predictions for each step of an inversion, each at the sample that the previous one led to.
REVERSE_ITERATIONS = 2


class LatentDiTEditPipeline(LatentDiTImg2ImgPipeline):
    r"""
    Edits attributes of images by DDIM inversion (https://arxiv.org/abs/2010.02502, section 4.3).

    An image is inverted under its own attributes to the noise that generates it. From that noise it is sampled again,
    with guidance from its own attributes to the requested ones. This works by DDIM, whatever scheduler the pipeline
    has.

    It has the components of a [`LatentDiTPipeline`]: make it by `LatentDiTEditPipeline(**pipe.components)`,
    `LatentDiTEditPipeline.from_pipe(pipe)` or `from_pretrained`.
    """

    @exclusive
    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each of diffusers' pipelines has a call of its own
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        image: ImageInput | None = None,
        edit: Attributes | Sequence[Attributes] | None = None,
        edit_strength: float = 1.0,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' spelling)
        input_range: InputRange | None = None,
        **guidance_options: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Edit attributes of images.

        Args:
            attributes: The attributes of the images, one dict for all or a list with one for each; the more are given,
                the more is kept. None if they are unknown.
            image: One image or several; see [`LatentDiTImg2ImgPipeline`].
            edit: The attributes to change, e.g. `{"Eyeglasses": True}`, one dict for all images or a list with one for
                each.
            edit_strength: 0 returns the image, 1 guides from the image's own attributes to the requested ones as
                strongly as the pipeline guides when it samples; values above 1 are possible.
            strength: How far the image is inverted, 1 is all the way to noise; below 1 coarse shapes are kept.
            input_range: See [`LatentDiTImg2ImgPipeline`].
            num_inference_steps: Steps in each direction, for a `strength` of 1.
            guidance_scale: Multiplies `edit_strength`; None is the value in the pipeline's config.
            output_type: See [`LatentDiTPipeline`] for this and the other arguments.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: without image or edit, for unknown attributes, or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_image(image)
        self._check_strength(strength)
        self._check_inputs(attributes, 1, output_type, callback_on_step_end_tensor_inputs)
        check_num_inference_steps(self.reversible_scheduler(), num_inference_steps)
        self._check_edit(edit)

        # 2. Encode the images, invert them to noise, and denoise.
        latents = self._edit(
            self.encode_images(image, input_range),
            attributes,
            edit,
            edit_strength,
            strength,
            num_inference_steps,
            guidance_scale,
            guidance_options,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Decode.
        return self._output(latents, output_type, return_dict)

    def _edit(
        self,
        image_latents: torch.Tensor,
        attributes: Attributes | Sequence[Attributes] | None,
        edit: Attributes | Sequence[Attributes] | None,
        edit_strength: float,
        strength: float,
        num_inference_steps: int,
        guidance_scale: float | None,
        guidance_options: GuidanceOptions,
        **step_options: Any,
    ) -> torch.Tensor:
        """Return edited latents of images; see `__call__`, and `_denoise` for the rest."""
        # 1. Bring attributes and edits to one for each image.
        rows, image_latents = self._match(attributes, image_latents, 1)
        edits, image_latents = self._match(edit, image_latents, 1)
        rows = rows * len(edits) if len(rows) == 1 else rows
        edited = [{**row, **change} for row, change in zip(rows, edits, strict=True)]

        # 2. Guide away from the image's own attributes. Outside the interval of guidance these are predicted too:
        #    the image stays as it is.
        guidance_options = {"negative_attributes": rows, **guidance_options}
        guidance = self._prepare_guidance(edited, True, guidance_scale, **guidance_options)
        if guidance.guider is not None and edit_strength != 1:
            raise ValueError(f"edit_strength={edit_strength} has no effect with a guider: set its guidance_scale")
        guidance.edit_strength = edit_strength
        guidance.outside_ids = self.encode_attributes(rows).to(self._execution_device)

        # 3. Invert to noise, and denoise.
        with self._with_reversible_scheduler():
            timesteps = self._set_timesteps(num_inference_steps, strength)
            latents = self._invert(image_latents, rows, timesteps)
            return self._denoise(latents, timesteps, guidance, **step_options)

    @exclusive
    @torch.no_grad()
    def invert(
        self,
        image: ImageInput,
        attributes: Attributes | Sequence[Attributes] | None = None,
        num_inference_steps: int = 50,
        strength: float = 1.0,
        input_range: InputRange | None = None,
    ) -> torch.Tensor:
        """Invert images to the noise that generates them, [images, channels, height, width].

        As `latents` of a call with the same attributes and number of steps, `guidance_scale=1` and a
        [`CosineLatentScheduler`] with `multistep=False`, it returns the images. With a `strength` below 1 the result
        is the images at the noise level of [`LatentDiTImg2ImgPipeline`]'s `strength` instead.

        Args:
            image: One image or several; see [`LatentDiTImg2ImgPipeline`].
            attributes: The attributes of the images, one dict for all or a list with one for each.
            num_inference_steps: Steps of an inversion all the way to noise.
            strength: How far the images are inverted.
            input_range: See [`LatentDiTImg2ImgPipeline`].

        Raises:
            ValueError: without an image, or for unknown attributes.
        """
        self._check_image(image)
        self._check_strength(strength)
        rows, image_latents = self._match(attributes, self.encode_images(image, input_range), 1)
        with self._with_reversible_scheduler():
            latents = self._invert(image_latents, rows, self._set_timesteps(num_inference_steps, strength))
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def interpolate_images(
        self,
        image: ImageInput,
        num_frames: int = 16,
        attributes: Attributes | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        input_range: InputRange | None = None,
    ) -> list[Any]:
        """Generate the frames of a film between images, by way of the noises that generate them; see `interpolate`.

        Args:
            image: Two or more images.
            num_frames: Frames from one image to the next, both ends included.
            attributes: The attributes that all of the images have, if any.
            num_inference_steps: Steps in each direction.
            output_type: See [`LatentDiTPipeline`].
            input_range: See [`LatentDiTImg2ImgPipeline`].
        """
        noises = self.invert(image, attributes, num_inference_steps, input_range=input_range)
        # By the steps that the inversion reversed, or the images would not come back.
        reversing = LatentDiTPipeline(**{**self.components, "scheduler": self.reversible_scheduler()})
        reversing.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        frames = reversing.interpolate(
            num_frames,
            noises,
            attributes=attributes,
            guidance_scale=1.0,
            num_inference_steps=num_inference_steps,
            output_type=output_type,
        )
        self.maybe_free_model_hooks()
        return frames

    def reversible_scheduler(self) -> CosineLatentScheduler:
        """Return DDIM on the noise levels of the pipeline's scheduler, of whatever class that is."""
        betas = self.scheduler.betas.tolist()
        prediction_type = self.scheduler.config.prediction_type
        return CosineLatentScheduler(len(betas), prediction_type=prediction_type, trained_betas=betas, multistep=False)

    def _check_edit(self, edit: Attributes | Sequence[Attributes] | None) -> None:
        """Raise a ValueError without attributes to change, or for another type."""
        if not edit:
            raise ValueError("edit= is needed, e.g. {'Eyeglasses': True}")
        check_attributes(edit, 1, "edit")

    def _invert(self, image_latents: torch.Tensor, rows: list[Attributes], timesteps: torch.Tensor) -> torch.Tensor:
        """Return `image_latents` noised up `timesteps`, each step the reverse of a step of sampling.

        It predicts without guidance, which makes an inversion inaccurate.
        """
        guidance = Guidance(self.encode_attributes(rows).to(self._execution_device))
        latents = image_latents
        self._reset_caches(guidance)
        for timestep in timesteps.flip(0):
            lower = latents
            # A fixed-point iteration: the prediction belongs at the noisier sample, which it is needed to find.
            for _ in range(REVERSE_ITERATIONS):
                output = guidance.predict(self.transformer, latents, timestep, step=0, progress=[0.0], scale=1.0)
                latents = self.scheduler.reverse_step(output, timestep, latents, lower)
        return latents

    @contextlib.contextmanager
    def _with_reversible_scheduler(self) -> Iterator[None]:
        """Replace the scheduler by DDIM on the same noise levels, whose steps can be reversed, for a while."""
        original: Any = self.scheduler
        self.scheduler = self.reversible_scheduler()
        try:
            yield
        finally:
            self.scheduler = original
