# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Parts of images painted anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .guidance import Attributes, GuidanceOptions
from .pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline

JUMP_N_SAMPLE = 4


class LatentDiTInpaintPipeline(LatentDiTImg2ImgPipeline):
    r"""
    Paints the white part of a mask anew and keeps the rest: after every step the known part, noised to that step's
    level, is blended in (RePaint, https://arxiv.org/abs/2201.09865).

    Made of the parts of a [`LatentDiTPipeline`]: `LatentDiTInpaintPipeline(**pipe.components)`, or by
    `LatentDiTInpaintPipeline.from_pipe(pipe)` and `from_pretrained`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each of diffusers' pipelines has a call of its own
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
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
        **guidance_options: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Paint parts of images anew.

        Args:
            attributes: What to ask for, one dict for all images or a list with one for each; see
                [`LatentDiTPipeline`], as for all arguments that are not explained here.
            image: One image or several; see [`LatentDiTImg2ImgPipeline`].
            mask_image: One mask for all, or one for each image, cropped and resized like them: white is painted
                anew, black is kept, grey blends.
            strength: How much of the white part is noise to begin with; below 1 something of it shows through.
            jump_length: Steps that are done again at a time when `jump_n_sample` is above 1.
            jump_n_sample: How often each of them is done, noised again before, for as many times the time: done
                once, what is painted fits the rest badly. None is 4 with a [`CosineLatentScheduler`], and 1 with
                others, which cannot go back.
            paste_back: Put the picture's own pixels back where the mask is black (and blend them where it is grey);
                without it they have gone through the VAE.
            num_images_per_prompt: Images for each image.

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
        known = self.encode_images(image)
        mask = self._masks(mask_image, known)
        rows, known = self._match(attributes, known, num_images_per_prompt)
        each = len(known) // len(mask)
        mask = mask.repeat_interleave(each, dim=0)
        # A latent is painted anew if any of its pixels is.
        latent_mask = torch.nn.functional.adaptive_max_pool2d(mask, known.shape[2:]).to(known.dtype)
        options = (attributes is not None, guidance_scale, num_images_per_prompt)
        guidance = self._prepare_guidance(rows, *options, **guidance_options)

        # 2. Noise, the timesteps that are left, and their order.
        schedule = self._last_timesteps(num_inference_steps, strength)
        noise = self._noise(known.shape, generator)
        latents = self._add_noise(known, noise, schedule, strength)
        order = [
            index
            for begin in range(0, len(schedule), jump_length)
            for _ in range(jump_n_sample)
            for index in range(begin, min(begin + jump_length, len(schedule)))
        ]

        # 3. Denoise; after each step the known part is that of the image, at the same level.
        def blend(step: int, latents: torch.Tensor) -> torch.Tensor:
            following = order[step] + 1
            if following < len(schedule):
                kept = self.scheduler.add_noise(known, noise, schedule[following : following + 1].repeat(len(known)))
            else:
                kept = known
            latents = latent_mask * latents + (1 - latent_mask) * kept
            if step + 1 < len(order) and order[step + 1] < following:
                return self._noise_again(latents, schedule, following, order[step + 1], generator)
            return latents

        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, schedule[order], guidance, eta, generator, *on_step_end, after_step=blend)

        # 4. Decode, and put the known pixels back.
        if output_type == "latent" or not paste_back:
            return self._output(latents, output_type, return_dict)
        pixels = self._preprocess(self.image_processor, image).to(latents.device, torch.float32)
        pixels = (pixels / 2 + 0.5).expand(len(known) // num_images_per_prompt, -1, -1, -1)
        painted = self.decode_latents(latents, "pt").float()
        images = mask * painted + (1 - mask) * pixels.repeat_interleave(num_images_per_prompt, dim=0)
        images = self.image_processor.postprocess(images, output_type, do_denormalize=[False] * len(images))
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_jumps(self, mask_image: PipelineImageInput | None, jump_length: int, jump_n_sample: int) -> None:
        if mask_image is None:
            raise ValueError("a mask is needed: `mask_image=` is white where the image is to be painted anew")
        if jump_length < 1 or jump_n_sample < 1:
            raise ValueError(f"jump_length={jump_length} and jump_n_sample={jump_n_sample} must be at least 1")
        if jump_n_sample > 1 and not isinstance(self.scheduler, CosineLatentScheduler):
            name = type(self.scheduler).__name__
            raise ValueError(f"jump_n_sample={jump_n_sample} needs a CosineLatentScheduler; {name} cannot go back")

    def _masks(self, mask_image: PipelineImageInput, known: torch.Tensor) -> torch.Tensor:
        """Masks, float32 [1 or images, 1, height, width] in pixels, between 0 and 1."""
        factor = self.image_processor.config.vae_scale_factor
        processor = VaeImageProcessor(
            vae_scale_factor=factor, resample="bilinear", do_normalize=False, do_convert_grayscale=True
        )
        mask = self._preprocess(processor, mask_image).to(known.device, torch.float32).clamp(0, 1)
        if len(mask) not in (1, len(known)):
            raise ValueError(f"{len(mask)} masks for {len(known)} images")
        return mask

    def _noise_again(
        self,
        latents: torch.Tensor,
        schedule: torch.Tensor,
        level: int,
        target: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """From entry `level` of the schedule (its length is the clean latent) up to the noisier entry `target`."""
        ends = torch.stack(
            [schedule[level] if level < len(schedule) else -torch.ones_like(schedule[0]), schedule[target]]
        )
        (alpha, alpha_target), (sigma, sigma_target) = self.scheduler.levels(ends)
        ratio = alpha_target / alpha
        fresh = randn_tensor(latents.shape, generator, device=latents.device, dtype=latents.dtype)
        return ratio * latents + (sigma_target.square() - (ratio * sigma).square()).sqrt() * fresh
