# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""The pipeline that generates images from given ones: it noises them to some level and denoises them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ..schedulers.accuracy import check_num_inference_steps
from .attributes import Attributes, attribute_rows
from .exclusive import exclusive
from .guidance import GuidanceOptions
from .pipeline_latent_dit import LatentDiTPipeline
from .preprocessing import ImageInput, InputRange, read_images


class LatentDiTImg2ImgPipeline(LatentDiTPipeline):
    r"""
    Generates variations of images (SDEdit, https://arxiv.org/abs/2108.01073).

    It has the components of a [`LatentDiTPipeline`]: make it by `LatentDiTImg2ImgPipeline(**pipe.components)`,
    `LatentDiTImg2ImgPipeline.from_pipe(pipe)` or `from_pretrained`.
    """

    @exclusive
    @torch.no_grad()
    def __call__(  # type: ignore[override]  # each of diffusers' pipelines has a call of its own
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        image: ImageInput | None = None,
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
        input_range: InputRange | None = None,
        **guidance_options: Unpack[GuidanceOptions],
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images from images.

        Args:
            attributes: The requested attributes, one dict for all images or a list with one for each; see
                [`LatentDiTPipeline`] for this and all arguments that are not listed here.
            image: One image or several, of any size and form: PIL images, arrays, tensors, paths; see
                [`read_images`]. They are cropped at the centre to the model's aspect ratio, resized to its size, and
                encoded as the posterior's mean.
            strength: The share of noise at the beginning: 0 runs no step and returns the VAE's reconstruction, 1
                begins with noise alone.
            input_range: The values of black and white in arrays and tensors, if they are not 0 and 255 in bytes or 0
                and 1 in floats, e.g. `(-1, 1)`.
            num_images_per_prompt: Outputs for each image.
            num_inference_steps: Steps of a whole schedule, of which those below `strength` of the timesteps are
                run, at least one.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: without an image, for unknown attributes, or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_image(image)
        self._check_strength(strength)
        self._check_inputs(attributes, 1, output_type, callback_on_step_end_tensor_inputs)
        check_num_inference_steps(self.scheduler, num_inference_steps)

        # 2. Encode the images, noise them to the level of `strength`, and denoise.
        latents = self._vary(
            self.encode_images(image, input_range),
            attributes,
            strength,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            guidance_options,
            generator,
            eta=eta,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Decode.
        return self._output(latents, output_type, return_dict)

    def _vary(
        self,
        image_latents: torch.Tensor,
        attributes: Attributes | Sequence[Attributes] | None,
        strength: float,
        num_images_per_prompt: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        guidance_options: GuidanceOptions,
        generator: torch.Generator | list[torch.Generator] | None,
        **step_options: Any,
    ) -> torch.Tensor:
        """Return variations of latents of images; see `__call__`, and `_denoise` for the rest."""
        rows, image_latents = self._match(attributes, image_latents, num_images_per_prompt)
        guidance = self._prepare_guidance(
            rows, attributes is not None, guidance_scale, num_images_per_prompt, **guidance_options
        )
        timesteps = self._set_timesteps(num_inference_steps, strength)
        noise = self._noise(image_latents.shape, generator)
        latents = self._add_noise(image_latents, noise, timesteps, strength)
        return self._denoise(latents, timesteps, guidance, generator=generator, **step_options)

    @torch.no_grad()
    def encode_images(self, image: ImageInput, input_range: InputRange | None = None) -> torch.Tensor:
        """Encode images of any size to the model's normalised latents, float32 [images, channels, height, width].

        They are cropped at the centre to the model's aspect ratio and resized to its size; see [`read_images`]. If the
        VAE has a posterior, its mean is taken.
        """
        return self._encode_pixels(read_images(image, *self.resolution, input_range)[0])

    def _encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode images between -1 and 1, [images, 3, height, width], as `encode_images`."""
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = torch.cat([self._encode(part) for part in self._split_for_vae(pixels)])
        mean, std = self._statistics(latents.device)
        return (latents.float() - mean) / std

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the VAE's own latents; if it has a posterior, its mean."""
        encoded = self.vae.encode(pixels)
        # The three kinds of VAE in diffusers name their output differently.
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean
        return encoded.latents if hasattr(encoded, "latents") else encoded.latent

    def _check_image(self, image: ImageInput | None) -> None:
        """Check that there is an image, and a VAE to encode it.

        Raises:
            ValueError: if there is not.
        """
        if image is None or (isinstance(image, list) and not image):
            raise ValueError("an image is needed: `image=` takes one or a list")
        if self.vae is None:
            raise ValueError("this pipeline has no vae, which would encode the image")

    def _check_strength(self, strength: float) -> None:
        """Raise a ValueError for a `strength` outside [0, 1]."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength} must be between 0 and 1")

    def _match(
        self,
        attributes: Attributes | Sequence[Attributes] | None,
        image_latents: torch.Tensor,
        num_images_per_row: int,
    ) -> tuple[list[Attributes], torch.Tensor]:
        """Return one row of attributes and one latent for every output; a single row or image serves for all.

        Raises:
            ValueError: if there are several of both, but not equally many.
        """
        rows = attribute_rows(attributes, 1)
        count = max(len(rows), len(image_latents))
        if len(rows) not in (1, count) or len(image_latents) not in (1, count):
            raise ValueError(f"{len(rows)} rows of attributes for {len(image_latents)} images")
        rows = attribute_rows(rows * count if len(rows) == 1 else rows, 1, num_images_per_row)
        return rows, image_latents.expand(count, -1, -1, -1).repeat_interleave(num_images_per_row, dim=0)

    def _add_noise(
        self, image_latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, strength: float
    ) -> torch.Tensor:
        """Return the latents from which denoising begins, [images, channels, height, width]."""
        if not len(timesteps):
            return image_latents
        # Noise alone, exactly: the noisiest level would keep a trace of the image.
        if strength == 1:
            return noise * self.scheduler.init_noise_sigma
        return self.scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(len(image_latents)))
