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
        self._check_image(image)
        self._check_strength(strength)
        self._check_mask(mask_image)
        self._check_jumps(jump_length, jump_n_sample)
        self._check_inputs(attributes, 1, output_type, callback_on_step_end_tensor_inputs)
        check_num_inference_steps(self.scheduler, num_inference_steps)

        # 2. Encode the images, and denoise the white part.
        pixels, mask = self._read_masked(image, mask_image, input_range)
        latents = self._inpaint(
            self._encode_pixels(pixels),
            mask,
            attributes,
            strength,
            jump_length,
            jump_n_sample,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            guidance_options,
            generator,
            eta=eta,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Decode, and paste the original pixels back.
        if output_type == "latent" or not paste_back:
            return self._output(latents, output_type, return_dict)
        images = self._paste_back(latents, pixels, mask, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _read_masked(
        self, image: ImageInput, mask_image: ImageInput, input_range: InputRange | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images between -1 and 1, [images, 3, height, width], and masks, [1 or images, 1, height, width]."""
        pixels, sizes = read_images(image, *self.resolution, input_range)
        return pixels, read_masks(mask_image, *self.resolution, sizes).to(self._execution_device)

    def _inpaint(
        self,
        image_latents: torch.Tensor,
        mask: torch.Tensor,
        attributes: Attributes | Sequence[Attributes] | None,
        strength: float,
        jump_length: int,
        jump_n_sample: int | None,
        num_images_per_prompt: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        guidance_options: GuidanceOptions,
        generator: torch.Generator | list[torch.Generator] | None,
        **step_options: Any,
    ) -> torch.Tensor:
        """Return latents inpainted where the mask is white; see `__call__`, and `_denoise` for the rest."""
        # 1. Bring masks and attributes to one for each output.
        rows, image_latents = self._match(attributes, image_latents, num_images_per_prompt)
        # The maximum: a latent is inpainted if any of its pixels is, because it decodes to all of them.
        latent_mask = torch.nn.functional.adaptive_max_pool2d(mask, image_latents.shape[2:]).to(image_latents.dtype)
        latent_mask = latent_mask.repeat_interleave(len(image_latents) // len(mask), dim=0)
        guidance = self._prepare_guidance(
            rows, attributes is not None, guidance_scale, num_images_per_prompt, **guidance_options
        )

        # 2. Noise the images to the level of `strength`, and order the steps from there, repetitions included.
        schedule = self._set_timesteps(num_inference_steps, strength)
        noise = self._noise(image_latents.shape, generator)
        latents = self._add_noise(image_latents, noise, schedule, strength)
        if jump_n_sample is None:
            jump_n_sample = JUMP_N_SAMPLE if isinstance(self.scheduler, CosineLatentScheduler) else 1
        order = _step_order(len(schedule), jump_length, jump_n_sample)

        # 3. Denoise. After each step put the image back outside the mask, at the level where the step ended; before a
        #    repetition noise everything again, so that both parts can adapt to each other.
        def blend(step: int, latents: torch.Tensor) -> torch.Tensor:
            level = order[step] + 1
            original = self._noise_to(level, image_latents, noise, schedule)
            latents = latent_mask * latents + (1 - latent_mask) * original
            if step + 1 < len(order) and order[step + 1] < level:
                return self._noise_again(latents, schedule, level, order[step + 1], generator)
            return latents

        return self._denoise(latents, schedule[order], guidance, generator=generator, after_step=blend, **step_options)

    def _check_mask(self, mask_image: ImageInput | None) -> None:
        """Raise a ValueError without a mask."""
        if mask_image is None:
            raise ValueError("a mask is needed: `mask_image=` is white where the image is to be inpainted")

    def _check_jumps(self, jump_length: int, jump_n_sample: int | None) -> None:
        """Check how often steps are repeated.

        Raises:
            ValueError: for numbers below 1, or repetitions with a scheduler that cannot go back.
        """
        times = 1 if jump_n_sample is None else jump_n_sample
        if not all(isinstance(number, int) and number >= 1 for number in (jump_length, times)):
            raise ValueError(
                f"jump_length={jump_length} and jump_n_sample={jump_n_sample} must be whole numbers above 0"
            )
        if times > 1 and not isinstance(self.scheduler, CosineLatentScheduler):
            name = type(self.scheduler).__name__
            raise ValueError(f"jump_n_sample={jump_n_sample} needs a CosineLatentScheduler; {name} cannot go back")

    def _noise_to(
        self, level: int, image_latents: torch.Tensor, noise: torch.Tensor, schedule: torch.Tensor
    ) -> torch.Tensor:
        """Return latents of images noised to a level of the schedule; its length is the clean latent."""
        if level == len(schedule):
            return image_latents
        return self.scheduler.add_noise(image_latents, noise, schedule[level : level + 1].repeat(len(image_latents)))

    def _paste_back(self, latents: torch.Tensor, pixels: torch.Tensor, mask: torch.Tensor, output_type: str) -> Any:
        """Decode latents to images of an `output_type`, with the original pixels where the mask is black.

        Args:
            latents: [outputs, channels, height, width]; the outputs of an image follow each other.
            pixels: The images between -1 and 1, [images, 3, height, width].
            mask: [1 or images, 1, height, width].
            output_type: See [`LatentDiTPipeline`].
        """
        inpainted = self.decode_latents(latents, "pt").float()  # [outputs, 3, height, width], 0 to 1
        pixels = pixels.to(latents.device) / 2 + 0.5
        pixels, mask = (each.repeat_interleave(len(latents) // len(each), dim=0) for each in (pixels, mask))
        pasted = mask * inpainted + (1 - mask) * pixels
        # They are between 0 and 1 already, which is all that denormalising would change.
        return self.image_processor.postprocess(pasted, output_type, do_denormalize=[False] * len(pasted))

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
