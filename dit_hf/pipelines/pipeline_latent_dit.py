# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Images from a latent Diffusion Transformer, with or without attributes."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel

AttributeValue = bool | int | str | None
Attributes = Mapping[str, AttributeValue]


class LatentDiTPipeline(DiffusionPipeline):
    r"""
    Generates images with a [`LatentDiTTransformer2DModel`].

    Args:
        transformer: The denoiser.
        scheduler: A [`CosineLatentScheduler`] or any diffusers scheduler made with `from_config` of its config.
        vae: An `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, which decodes the latents; None leaves
            `output_type="latent"`.
        latents_mean: Mean of the VAE's latents by channel: the model works on `(latents - mean) / std`. None is the
            VAE's `shift_factor`, or 0.
        latents_std: Their standard deviation by channel; None is `1 / scaling_factor` of the VAE.
        guidance_scale: What a call without `guidance_scale` uses.
        condition_labels: Names of the values of a condition, e.g. `{"class": ["cat", "dog"]}`; conditions without an
            entry take booleans and numbers.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: LatentDiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        guidance_scale: float = 1.0,
        condition_labels: dict[str, list[str]] | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        channels = transformer.config.in_channels
        if latents_mean is None:
            latents_mean = [getattr(getattr(vae, "config", None), "shift_factor", None) or 0.0] * channels
        if latents_std is None:
            latents_std = [1 / getattr(getattr(vae, "config", None), "scaling_factor", 1.0)] * channels
        if not len(latents_mean) == len(latents_std) == channels:
            raise ValueError(f"latents_mean and latents_std must have {channels} numbers, one a channel")
        self.register_to_config(
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            guidance_scale=guidance_scale,
            condition_labels=condition_labels or {},
        )
        config = getattr(vae, "config", {})
        blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or [0]
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(blocks) - 1))

    @torch.no_grad()
    def __call__(
        self,
        attributes: Attributes | Sequence[Attributes] | None = None,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' spelling)
    ) -> ImagePipelineOutput | tuple:
        r"""
        Generate images.

        Args:
            attributes: What to ask for, a dict (`{"Smiling": True, "Eyeglasses": False}`, `{"class": "cat"}`) or a
                list of dicts, one an image. Names left out are not asked for; None asks for nothing.
            batch_size: Number of images when `attributes` is None or one dict.
            num_images_per_prompt: Images for each row of attributes.
            num_inference_steps: Denoising steps.
            guidance_scale: Classifier-free guidance (https://arxiv.org/abs/2207.12598), 1 is none; None is the value
                in the pipeline's config. It has no effect where nothing is asked for.
            eta: 0 for deterministic DDIM, up to 1; only schedulers that know it use it.
            generator: For the first noise and that of `eta`; a list has one for each image.
            latents: The first noise itself, [images, channels, height, width], unit variance; sets the size too.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"` (the model's normalised latents).
            return_dict: False for the tuple `(images,)`.
            callback_on_step_end: Called as `f(pipeline, step, timestep, tensors)` after each step; may return changed
                tensors.
            callback_on_step_end_tensor_inputs: Which tensors it gets.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for unknown attributes, values or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_inputs(attributes, batch_size, output_type, callback_on_step_end_tensor_inputs)
        device = self._execution_device
        condition_ids = self.encode_attributes(attributes, batch_size)
        condition_ids = condition_ids.repeat_interleave(num_images_per_prompt, dim=0).to(device)
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale
        null_ids = self.transformer.null_condition_ids.to(device).expand_as(condition_ids)
        guided = guidance_scale != 1 and attributes is not None and condition_ids.shape[1] > 0

        # 2. Noise, and the timesteps.
        latents = self._prepare_latents(len(condition_ids), generator, latents, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        latents = latents * self.scheduler.init_noise_sigma
        step_options = self._step_options(eta, generator)
        self._num_timesteps = len(timesteps)

        # 3. Denoise.
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                model_input = self.scheduler.scale_model_input(latents, t)
                model_output = self._predict(model_input, t, condition_ids, null_ids, guidance_scale, guided)
                latents = self.scheduler.step(model_output, t, latents, **step_options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()

        # 4. Decode.
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    def encode_attributes(
        self, attributes: Attributes | Sequence[Attributes] | None, batch_size: int = 1
    ) -> torch.Tensor:
        """Condition ids, int64 [rows, conditions] in the order of the transformer's config; see `__call__`.

        Raises:
            ValueError: for a name or value that the model does not know, listing those it knows.
        """
        rows = [attributes or {}] * batch_size if attributes is None or isinstance(attributes, Mapping) else attributes
        conditions = self.transformer.config.conditions or {}
        ids = self.transformer.null_condition_ids.cpu().repeat(len(rows), 1)
        names = list(conditions)
        for row, wanted in enumerate(rows):
            for name, value in (wanted or {}).items():
                if name not in conditions:
                    known = ", ".join(names) or "none, this model is unconditional"
                    raise ValueError(f"attribute {name!r} is unknown; known are {known}")
                ids[row, names.index(name)] = self._value_id(name, value, conditions[name])
        return ids

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Images of the model's normalised latents [batch, channels, height, width], as `output_type` says."""
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        latents = (latents.float() * std + mean).to(self.vae.dtype)
        return self.image_processor.postprocess(self.vae.decode(latents).sample, output_type=output_type)

    def to_json_string(self) -> str:
        """The index as JSON, so that `DiffusionPipeline.from_pretrained` finds every class after `import dit_hf`."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = type(self).__name__
        index.pop("_name_or_path", None)
        for name, value in index.items():
            if isinstance(value, list) and len(value) == 2 and str(value[0]).startswith("dit_hf."):
                index[name] = ["diffusers", value[1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the index; the components, saved before it, are not to tell either where they were loaded from."""
        for path in Path(save_directory).glob("*/config.json"):
            config = json.loads(path.read_text())
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n")
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _check_inputs(
        self,
        attributes: Attributes | Sequence[Attributes] | None,
        batch_size: int,
        output_type: str,
        tensor_inputs: list[str],
    ) -> None:
        rows = [attributes] if attributes is None or isinstance(attributes, Mapping) else attributes
        if not isinstance(rows, list | tuple) or not all(row is None or isinstance(row, Mapping) for row in rows):
            raise ValueError(f"attributes={attributes!r} must be a dict like {{'Smiling': True}}, or a list of dicts")
        if isinstance(attributes, Sequence) and batch_size not in (1, len(attributes)):
            raise ValueError(f"batch_size={batch_size}, but attributes has {len(attributes)} rows; leave one out")
        if batch_size < 1 or (attributes is not None and len(rows) == 0):
            raise ValueError("at least one image must be asked for")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r} is unknown; known are pil, np, pt, latent")
        if output_type != "latent" and self.vae is None:
            raise ValueError("this pipeline has no vae; ask for output_type='latent'")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)} not in {self._callback_tensor_inputs}"
            )

    def _value_id(self, name: str, value: AttributeValue, count: int) -> int:
        if value is None:
            return count  # the null value
        labels = self.config.condition_labels.get(name)
        if isinstance(value, str):
            if labels is None or value not in labels:
                known = ", ".join(labels) if labels else f"0 to {count - 1}"
                raise ValueError(f"{name}={value!r} is unknown; known are {known}")
            return labels.index(value)
        if not 0 <= int(value) < count:
            raise ValueError(f"{name}={value} is not between 0 and {count - 1}")
        return int(value)

    def _prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        config, dtype = self.transformer.config, self.transformer.dtype
        if latents is not None:
            if latents.ndim != 4 or latents.shape[:2] != (batch, config.in_channels):
                expected = f"[{batch}, {config.in_channels}, height, width]"
                raise ValueError(f"latents has shape {list(latents.shape)}; expected {expected}")
            return latents.to(device=device, dtype=dtype)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images")
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return randn_tensor((batch, config.in_channels, height, width), generator, device=device, dtype=dtype)

    def _predict(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        condition_ids: torch.Tensor,
        null_ids: torch.Tensor,
        guidance_scale: float,
        guided: bool,
    ) -> torch.Tensor:
        """The model's output, both halves of guidance in one batch; a learned sigma is dropped."""
        if guided:
            model_input = torch.cat([model_input, model_input])
            condition_ids = torch.cat([null_ids, condition_ids])
        timestep = timestep.to(model_input.device).expand(len(model_input))
        with self.transformer.cache_context("cond_uncond"):
            output = self.transformer(model_input, timestep, condition_ids, return_dict=False)[0]
        output = output[:, : self.transformer.config.in_channels]
        if guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        return output

    def _step_options(self, eta: float, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Those of `eta` and `generator` that the scheduler in use takes."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}
