# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline that inpaints parts of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers.accuracy import check_num_inference_steps
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .attributes import Attributes
from .exclusive import exclusive
from .guidance import GuidanceOptions
from .pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from .preprocessing import ImageInput, InputRange, read_images, read_masks

# The default of `jump_n_sample` for a scheduler that can go back.
JUMP_N_SAMPLE = 4


class LatentDiTInpaintPipeline(LatentDiTImg2ImgPipeline):
    r"""
    Inpaints the white part of a mask and keeps the rest: after every step the image, noised to the level of that
    step, replaces the latents outside the mask (RePaint, https://arxiv.org/abs/2201.09865).

    It has the components of a [`LatentDiTPipeline`]: make it by `LatentDiTInpaintPipeline(**pipe.components)`,
    `LatentDiTInpaintPipeline.from_pipe(pipe)` or `from_pretrained`.
    """

    @exclusive
    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each of diffusers' pipelines has a call of its own
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        strength: float = 1.0,
        jump_length: int = 1,
        jump_n_sample: int | None = None,
        paste_back: bool = True,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' spelling)
        input_range: InputRange | None = None,
        **guidance_options: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Inpaint images.

        Args:
            attributes: The requested attributes, one dict for all images or a list with one for each; see
                [`LatentDiTPipeline`] for this and all arguments that are not listed here.
            image: One image or several; see [`LatentDiTImg2ImgPipeline`].
            mask_image: One mask for all, or one for each image, in the forms of images and of their aspect ratio,
                cropped and resized like them: white (1 in floats, integers and bools) is inpainted, black is kept,
                grey blends. See [`read_masks`].
            strength: The share of noise in the white part at the beginning; below 1 some of the image shows through.
            jump_length: Number of consecutive steps that are repeated together if `jump_n_sample` is above 1.
            jump_n_sample: How often each step is done, with noise added again before a repetition. It multiplies the
                time; done once, the inpainted part fits the rest badly. None is 4 with a [`CosineLatentScheduler`],
                and 1 with others, which cannot go back.
            paste_back: Return the original pixels where the mask is black (and blend them where it is grey); without
                it they have gone through the VAE.
            num_images_per_prompt: Outputs for each image.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: without image or mask, for unknown attributes, or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_image_inputs(image, strength)
        if jump_n_sample is None:
            jump_n_sample = JUMP_N_SAMPLE if isinstance(self.scheduler, CosineLatentScheduler) else 1
        self._check_jumps(mask_image, jump_length, jump_n_sample)
        self._check_inputs(attributes, 1, output_type, callback_on_step_end_tensor_inputs)
        check_num_inference_steps(self.scheduler, num_inference_steps)

        # 2. Encode the images, and bring masks and attributes to one for each output.
        pixels, sizes = read_images(image, *self.resolution, input_range)
        mask = read_masks(mask_image, *self.resolution, sizes).to(self._execution_device)  # [1 or images, 1, H, W]
        image_latents = self._encode_pixels(pixels)
        rows, image_latents = self._match(attributes, image_latents, num_images_per_prompt)
        mask = mask.repeat_interleave(len(image_latents) // len(mask), dim=0)  # [outputs, 1, height, width]
        # The maximum: a latent is inpainted if any of its pixels is, because it decodes to all of them.
        latent_mask = torch.nn.functional.adaptive_max_pool2d(mask, image_latents.shape[2:]).to(image_latents.dtype)
        guidance = self._prepare_guidance(
            rows,
            conditional=attributes is not None,
            guidance_scale=guidance_scale,
            num_images_per_row=num_images_per_prompt,
            **guidance_options,
        )

        # 3. Noise the images to the level of `strength`, and order the steps from there, repetitions included.
        schedule = self._set_timesteps(num_inference_steps, strength)
        noise = self._noise(image_latents.shape, generator)
        latents = self._add_noise(image_latents, noise, schedule, strength)
        order = _step_order(len(schedule), jump_length, jump_n_sample)

        # 4. Denoise. After each step put the image back outside the mask, at the level where the step ended; before a
        #    repetition noise everything again, so that both parts can adapt to each other.
        def blend(step: int, latents: torch.Tensor) -> torch.Tensor:
            level = order[step] + 1
            original = self._noise_to(level, image_latents, noise, schedule)
            latents = latent_mask * latents + (1 - latent_mask) * original
            if step + 1 < len(order) and order[step + 1] < level:
                return self._noise_again(latents, schedule, level, order[step + 1], generator)
            return latents

        latents = self._denoise(
            latents,
            schedule[order],
            guidance,
            eta=eta,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            after_step=blend,
        )

        # 5. Decode, and paste the original pixels back.
        if output_type == "latent" or not paste_back:
            return self._output(latents, output_type, return_dict)
        pasted = self._paste_back(latents, pixels, mask, num_images_per_prompt)
        # They are between 0 and 1 already, which is all that denormalising would change.
        images = self.image_processor.postprocess(pasted, output_type, do_denormalize=[False] * len(pasted))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_jumps(self, mask_image: ImageInput | None, jump_length: int, jump_n_sample: int) -> None:
        """Check the arguments of a call that only inpainting has.

        Raises:
            ValueError: without a mask, for numbers below 1, or repetitions with a scheduler that cannot go back.
        """
        if mask_image is None:
            raise ValueError("a mask is needed: `mask_image=` is white where the image is to be inpainted")
        if not all(isinstance(number, int) and number >= 1 for number in (jump_length, jump_n_sample)):
            raise ValueError(
                f"jump_length={jump_length} and jump_n_sample={jump_n_sample} must be whole numbers above 0"
            )
        if jump_n_sample > 1 and not isinstance(self.scheduler, CosineLatentScheduler):
            name = type(self.scheduler).__name__
            raise ValueError(f"jump_n_sample={jump_n_sample} needs a CosineLatentScheduler; {name} cannot go back")

    def _noise_to(
        self, level: int, image_latents: torch.Tensor, noise: torch.Tensor, schedule: torch.Tensor
    ) -> torch.Tensor:
        """Return latents of images noised to a level of the schedule; its length is the clean latent."""
        if level == len(schedule):
            return image_latents
        return self.scheduler.add_noise(image_latents, noise, schedule[level : level + 1].repeat(len(image_latents)))

    def _paste_back(
        self, latents: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor, num_images_per_prompt: int
    ) -> torch.Tensor:
        """Decode latents, and return the original pixels where the mask is black; [outputs, 3, height, width], 0 to 1.

        Args:
            latents: [outputs, channels, height, width].
            pixels: The images between -1 and 1, [images, 3, height, width].
            mask: [outputs, 1, height, width] in pixels.
            num_images_per_prompt: Outputs for each image.
        """
        inpainted = self.decode_latents(latents, "pt").float()  # [outputs, 3, height, width], 0 to 1
        # One image for several rows of attributes is expanded first, as its latents were in `_match`.
        pixels = (pixels.to(latents.device) / 2 + 0.5).expand(len(latents) // num_images_per_prompt, -1, -1, -1)
        return mask * inpainted + (1 - mask) * pixels.repeat_interleave(num_images_per_prompt, dim=0)

    def _noise_again(
        self,
        latents: torch.Tensor,
        schedule: torch.Tensor,
        level: int,
        target: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """Return latents noised from one level of the schedule to a noisier one.

        Args:
            latents: At `level`, [batch, channels, height, width].
            schedule: Timesteps, the noisiest first.
            level: An index of `schedule`; its length is the clean latent.
            target: The lower index of the level to noise to.
            generator: Samples the noise.
        """
        # 1. alpha and sigma of both levels; the scheduler's -1 is the clean latent.
        current = schedule[level] if level < len(schedule) else -torch.ones_like(schedule[0])
        (alpha, alpha_target), (sigma, sigma_target) = self.scheduler.levels(torch.stack([current, schedule[target]]))

        # 2. Scale the signal to its new share, and add the variance that the scaled noise is short of.
        ratio = alpha_target / alpha
        fresh = randn_tensor(latents.shape, generator, device=latents.device, dtype=latents.dtype)
        return ratio * latents + (sigma_target.square() - (ratio * sigma).square()).sqrt() * fresh


def _step_order(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """Return the indices of steps in order: each `jump_length` of them are done `jump_n_sample` times."""
    return [
        index
        for begin in range(0, num_steps, jump_length)
        for _ in range(jump_n_sample)
        for index in range(begin, min(begin + jump_length, num_steps))
    ]
