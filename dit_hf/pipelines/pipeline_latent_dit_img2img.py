# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Images from images: noised to some level, and denoised again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image

from .guidance import Attributes, GuidanceOptions
from .pipeline_latent_dit import LatentDiTPipeline


class LatentDiTImg2ImgPipeline(LatentDiTPipeline):
    r"""
    Generates images that begin with given ones (SDEdit, https://arxiv.org/abs/2108.01073).

    Made of the parts of a [`LatentDiTPipeline`]: `LatentDiTImg2ImgPipeline(**pipe.components)`, or by
    `LatentDiTImg2ImgPipeline.from_pipe(pipe)` and `from_pretrained`.
    """

    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each of diffusers' pipelines has a call of its own
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.6,
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
        Generate images from images.

        Args:
            attributes: What to ask for, one dict for all images or a list with one for each; see
                [`LatentDiTPipeline`], as for all arguments that are not explained here.
            image: One image or several, as PIL images, arrays or tensors; PIL images are cropped at the centre to
                the model's shape, all are resized to its size. They are encoded by the posterior's mean.
            strength: How much is noise to begin with: 0 runs no step and gives the VAE's reconstruction, 1 begins
                with noise alone.
            num_images_per_prompt: Images for each image.
            num_inference_steps: Steps of a whole schedule, of which those below `strength` of the timesteps are run.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: without an image, for unknown attributes, or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_image_inputs(image, strength)
        self._check_inputs(attributes, 1, output_type, callback_on_step_end_tensor_inputs)
        known = self.encode_images(image)
        rows, known = self._match(attributes, known, num_images_per_prompt)
        options = (attributes is not None, guidance_scale, num_images_per_prompt)
        guidance = self._prepare_guidance(rows, *options, **guidance_options)

        # 2. Noise, and the timesteps that are left.
        timesteps = self._last_timesteps(num_inference_steps, strength)
        noise = self._noise(known.shape, generator)
        latents = self._add_noise(known, noise, timesteps, strength)

        # 3. Denoise.
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, timesteps, guidance, eta, generator, *on_step_end)

        # 4. Decode.
        return self._output(latents, output_type, return_dict)

    @torch.no_grad()
    def encode_images(self, image: PipelineImageInput) -> torch.Tensor:
        """The model's normalised latents, float32 [images, channels, height, width], of images of any size.

        PIL images are cropped at the centre to the model's shape, all are resized to its size. Where the VAE has a
        posterior its mean is taken.
        """
        pixels = self._preprocess(self.image_processor, image)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = torch.cat([self._encode(part) for part in self._vae_parts(pixels)])
        mean, std = self._statistics(latents.device)
        return (latents.float() - mean) / std

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """The VAE's own latents; where it has a posterior, its mean."""
        encoded = self.vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent

    def _preprocess(self, processor: Any, image: PipelineImageInput) -> torch.Tensor:
        """Images of the model's size as `processor` makes them, [images, channels, height, width]."""
        size = self.transformer.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = processor.config.vae_scale_factor
        first = image[0] if isinstance(image, list) else image
        options = {"resize_mode": "crop"} if isinstance(first, Image.Image) else {}
        return processor.preprocess(image, height * factor, width * factor, **options)

    def _check_image_inputs(self, image: PipelineImageInput | None, strength: float) -> None:
        if image is None or (isinstance(image, list) and not image):
            raise ValueError("an image is needed: `image=` takes one or a list")
        if self.vae is None:
            raise ValueError("this pipeline has no vae, which would encode the image")
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength} must be between 0 and 1")

    def _match(
        self, attributes: Attributes | Sequence[Attributes] | None, known: torch.Tensor, each: int
    ) -> tuple[list[Attributes], torch.Tensor]:
        """A row of attributes and a latent for every image: one of either serves for all."""
        rows = self._rows(attributes, 1)
        count = max(len(rows), len(known))
        if len(rows) not in (1, count) or len(known) not in (1, count):
            raise ValueError(f"{len(rows)} rows of attributes for {len(known)} images")
        rows = self._rows(rows * count if len(rows) == 1 else rows, 1, each)
        return rows, known.expand(count, -1, -1, -1).repeat_interleave(each, dim=0)

    def _last_timesteps(self, num_inference_steps: int, strength: float) -> torch.Tensor:
        """The timesteps up to `strength` of the way to noise, however many these are; the scheduler begins there."""
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        order, highest = self.scheduler.order, strength * self.scheduler.config.num_train_timesteps
        # Where steps begin, with half a timestep for rounding.
        first = order * int((self.scheduler.timesteps[::order] + 1 > highest + 0.5).sum())
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return self.scheduler.timesteps[first:]

    def _add_noise(
        self, known: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Where denoising begins: `known` itself if there is no step, noise alone if there are all."""
        if not len(timesteps):
            return known
        if strength == 1:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(known, noise, timesteps[:1].repeat(len(known)))
