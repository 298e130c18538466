"""Images from a latent Diffusion Transformer, with or without attributes."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .guidance import Attributes, AttributeValue, Guidance, GuidanceOptions
from .interpolation import interpolate_noises
from .standalone import standalone_source

# The pixels that go through the VAE at a time, which needs far more memory for an image than the transformer.
VAE_PIXELS = 16 * 256 * 256


class LatentDiTPipeline(DiffusionPipeline):
    r"""
    Generates images with a [`LatentDiTTransformer2DModel`].

    Args:
        transformer: The denoiser.
        scheduler: A [`CosineLatentScheduler`], or one of diffusers' made with `from_config` of its config (see there).
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
    _current_timestep: torch.Tensor | None = None
    _interrupt = False
    scheduler: SchedulerMixin

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
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=2 ** (len(blocks) - 1), resample="bicubic", do_convert_rgb=True
        )

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
        **guidance_options: Unpack[GuidanceOptions],
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
            eta: 0 is deterministic, 1 as noisy as DDPM; only schedulers that know it use it.
            generator: For the first noise and that of `eta`; a list has one for each image.
            latents: The first noise itself, [images, channels, height, width], unit variance; sets the size too.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"` (the model's normalised latents).
            return_dict: False for the tuple `(images,)`.
            callback_on_step_end: Called as `f(pipeline, step, timestep, tensors)` after each step; may return changed
                tensors.
            callback_on_step_end_tensor_inputs: Which tensors it gets.
            guidance_options: See `GuidanceOptions`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for unknown attributes, values or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_inputs(attributes, batch_size, output_type, callback_on_step_end_tensor_inputs)
        rows = self._rows(attributes, batch_size, num_images_per_prompt)
        options = (attributes is not None, guidance_scale, num_images_per_prompt)
        guidance = self._prepare_guidance(rows, *options, **guidance_options)

        # 2. Noise, and the timesteps.
        device = self._execution_device
        latents = self._prepare_latents(len(rows), generator, latents, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma

        # 3. Denoise.
        on_step_end = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(latents, self.scheduler.timesteps, guidance, eta, generator, *on_step_end)

        # 4. Decode.
        return self._output(latents, output_type, return_dict)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the step under way, which some of diffusers' caches ask for."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the steps is left out: a callback sets `pipeline._interrupt`, as diffusers documents."""
        return self._interrupt

    def encode_attributes(
        self, attributes: Attributes | Sequence[Attributes] | None, batch_size: int = 1
    ) -> torch.Tensor:
        """Condition ids, int64 [rows, conditions] in the order of the transformer's config; see `__call__`.

        Raises:
            ValueError: for a name or value that the model does not know, listing those it knows.
        """
        rows = self._rows(attributes, batch_size)
        conditions = self.transformer.config.conditions or {}
        ids = torch.tensor([list(conditions.values())] * len(rows), dtype=torch.int64)  # all null
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
        """Images of the model's normalised latents [batch, channels, height, width], as `output_type` says.

        Raises:
            ValueError: if they are beyond what the VAE's precision holds.
        """
        mean, std = self._statistics(latents.device)
        latents = (latents.float() * std + mean).to(self.vae.dtype)
        parts = self._vae_parts(latents, self.image_processor.config.vae_scale_factor)
        pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        if not torch.isfinite(pixels).all():
            dtype = str(self.vae.dtype).removeprefix("torch.")
            raise ValueError(f"decoded images are not finite: does the VAE need more than {dtype}? pipe.vae.float()")
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _vae_parts(self, images: torch.Tensor, factor: int = 1) -> tuple[torch.Tensor, ...]:
        """Images [batch, channels, height, width], or latents of a side `factor` times smaller, a few at a time."""
        return images.split(max(1, VAE_PIXELS // (images[0, 0].numel() * factor**2)))

    @torch.no_grad()
    def interpolate(
        self,
        num_frames: int = 16,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        attributes: Attributes | None = None,
        **options: Any,
    ) -> list[Any]:
        r"""
        Frames between noises: each the image of a point on the arc from one noise to the next.

        Args:
            num_frames: Frames from one noise to the next, both ends included.
            latents: The noises, [two or more, channels, height, width]; None draws two.
            generator: For those.
            attributes: What to ask for in every frame.
            options: Of a call.

        Returns:
            The images, `num_frames` of them and `num_frames - 1` more for each noise beyond the second.

        Raises:
            ValueError: for less than two frames or noises.
        """
        if latents is None:
            latents = self.draw_noise(2, generator)
        frames = interpolate_noises(latents, num_frames)
        options |= {"latents": frames, "return_dict": False}
        return LatentDiTPipeline.__call__(self, attributes, len(frames), **options)[0]

    def draw_noise(
        self, batch_size: int = 1, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Noise of the size that the model was trained on, [batch_size, channels, height, width]; see `latents`."""
        size, channels = self.transformer.config.sample_size, self.transformer.config.in_channels
        return self._noise((batch_size, channels, *((size, size) if isinstance(size, int) else size)), generator)

    @property
    def components(self) -> dict[str, Any]:
        """All that `__init__` takes: another of the pipelines made with it works on the same latents."""
        return {**super().components, **super().parameters}

    @property
    def parameters(self) -> dict[str, Any]:
        """Nothing: what diffusers keeps here is among the `components`."""
        return {}

    def to_json_string(self) -> str:
        """The index as JSON, so that `DiffusionPipeline.from_pretrained` finds every class after `import dit_hf`.

        It is that of a [`LatentDiTPipeline`] for those that are made of its parts too, so that it loads everywhere.
        """
        index = json.loads(super().to_json_string())
        index["_class_name"] = LatentDiTPipeline.__name__
        index.pop("_name_or_path", None)
        for name, value in index.items():
            if (
                isinstance(value, list)
                and len(value) == 2
                and str(value[0]).startswith(("dit_hf.", "diffusers_modules."))
            ):
                index[name] = ["diffusers", value[1]]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the index, and beside it `pipeline.py`, with which it loads where dit_hf is not installed.

        The components, saved before it, are not to tell either where they were loaded from.
        """
        for path in Path(save_directory).glob("*/*config.json"):
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        parts = (LatentDiTTransformer2DModel, CosineLatentScheduler, Guidance, interpolate_noises, standalone_source)
        code = standalone_source(*parts, LatentDiTPipeline)
        (Path(save_directory) / "pipeline.py").write_text(code, encoding="utf-8")
        super().save_config(save_directory, push_to_hub, **kwargs)

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's latents by channel, [1, channels, 1, 1]."""
        mean, std = (
            torch.tensor(values, device=device, dtype=torch.float32).view(1, -1, 1, 1)
            for values in (self.config.latents_mean, self.config.latents_std)
        )
        return mean, std

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
        try:
            number = int(value)
        except (TypeError, ValueError):  # of lists and the like
            number = -1
        if number != value or not 0 <= number < count:
            raise ValueError(f"{name}={value} is none of the numbers between 0 and {count - 1}")
        return number

    def _prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        if latents is None:
            return self.draw_noise(batch, generator)
        channels = self.transformer.config.in_channels
        if latents.ndim != 4 or latents.shape[:2] != (batch, channels):
            expected = f"[{batch}, {channels}, height, width]"
            raise ValueError(f"latents has shape {list(latents.shape)}; expected {expected}")
        return latents.to(device=device, dtype=torch.float32)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """float32, on the device; a list of generators has one for each image."""
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images")
        return randn_tensor(tuple(shape), generator, device=self._execution_device, dtype=torch.float32)

    @staticmethod
    def _rows(
        attributes: Attributes | Sequence[Attributes] | None, batch_size: int, each: int = 1
    ) -> list[Attributes]:
        """One row of attributes an image, `each` of them in succession for one of `attributes`."""
        if each < 1:
            raise ValueError(f"num_images_per_prompt={each} must be at least 1")
        rows = [attributes] * batch_size if attributes is None or isinstance(attributes, Mapping) else attributes
        return [row or {} for row in rows for _ in range(each)]

    def _prepare_guidance(
        self,
        rows: Sequence[Attributes],
        conditional: bool,
        guidance_scale: float | None = None,
        each: int = 1,
        negative_attributes: Attributes | Sequence[Attributes] | None = None,
        attribute_weights: Mapping[str, float] | None = None,
        guidance_rescale: float = 0.0,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        guidance_transformer: LatentDiTTransformer2DModel | None = None,
    ) -> Guidance:
        """What is predicted at every step, and with which shares.

        Args:
            rows: One an image, `each` of them in succession for one of the call's.
            conditional: Whether anything is asked for.
            guidance_scale: None is the config's.
            each: Images for each row of the call.
            negative_attributes: This and the following are `GuidanceOptions`.

        Raises:
            ValueError: for unknown attributes, or options out of their range.
        """
        for name, value in (("rescale", guidance_rescale), ("start", guidance_start), ("end", guidance_end)):
            if not 0 <= value <= 1:
                raise ValueError(f"guidance_{name}={value} must be between 0 and 1")
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        asked, device = self.encode_attributes(rows), self._execution_device
        guidance = Guidance(asked.to(device), rescale=guidance_rescale, start=guidance_start, end=guidance_end)
        negative, weak = negative_attributes, guidance_transformer
        # 1. Away from the negative, or from what another model predicts.
        if scale != 1 and (weak is not None or (asked.shape[1] > 0 and (conditional or negative is not None))):
            repeated = self._rows(negative, len(rows) // each, each)
            negative_rows = rows if negative is None and weak is not None else repeated
            if len(negative_rows) != len(rows):
                raise ValueError(f"{len(negative_rows)} rows of negative_attributes for {len(rows)} images")
            guidance.share, guidance.transformer = scale, weak
            guidance.others.append((self.encode_attributes(negative_rows).to(device), 1 - scale))
        # 2. Further towards what some of the attributes make of it.
        for name, weight in (attribute_weights or {}).items():
            without = [{key: value for key, value in row.items() if key != name} for row in rows]
            if without == list(rows):
                raise ValueError(f"attribute_weights has {name!r}, which no image is asked for")
            extra = scale * (weight - 1)
            guidance.share += extra
            guidance.others.append((self.encode_attributes(without).to(device), -extra))
        return guidance

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: Guidance,
        eta: float,
        generator: torch.Generator | list[torch.Generator] | None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """From noisy latents at the first of `timesteps` to those after the last; `after_step` may change them."""
        step_options = self._step_options(eta, generator)
        self._num_timesteps, self._interrupt = len(timesteps), False
        self._reset_caches(guidance)
        progress = (1 - (timesteps.float() + 1) / self.scheduler.config.num_train_timesteps).tolist()
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                model_input = self.scheduler.scale_model_input(latents, t)
                model_output = self._predict(model_input, t, guidance, progress[i])
                latents = self.scheduler.step(model_output, t, latents, **step_options, return_dict=False)[0]
                if after_step is not None:
                    latents = after_step(i, latents)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()
        self._current_timestep = None
        return latents

    def _predict(
        self, model_input: torch.Tensor, timestep: torch.Tensor, guidance: Guidance, progress: float
    ) -> torch.Tensor:
        """The model's output after guidance, all of a model's predictions in one batch; a learned sigma is dropped."""
        asked_ids, others = guidance.at(progress)
        own = others if guidance.transformer is None else others[1:]
        outputs = self._run(self.transformer, model_input, timestep, [*(ids for ids, _ in own), asked_ids])
        if not others:
            return outputs[0]
        asked = outputs.pop()
        if len(own) < len(others):
            outputs = self._run(guidance.transformer, model_input, timestep, [others[0][0]]) + outputs
        return guidance.combine(outputs, asked)

    def _run(
        self, transformer: Any, model_input: torch.Tensor, timestep: torch.Tensor, condition_ids: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """A prediction for each entry of `condition_ids`.

        The model may be half precision; latents, guidance and steps stay in float32, which costs nothing beside it.
        """
        count, device = len(condition_ids), model_input.device
        inputs = torch.cat([model_input] * count)
        ids, timesteps = torch.cat(condition_ids), timestep.to(device).expand(len(inputs))
        # Caches keep what they know by the number of predictions, which differs outside of guidance's interval.
        with transformer.cache_context(f"{count} predictions"):
            output = transformer(inputs.to(transformer.dtype), timesteps, ids, return_dict=False)[0]
        return list(output[:, : transformer.config.in_channels].to(model_input.dtype).chunk(count))

    def _reset_caches(self, guidance: Guidance) -> None:
        """diffusers' caches forget the last series of steps."""
        for transformer in (self.transformer, guidance.transformer):
            if transformer is not None:
                transformer._reset_stateful_cache()

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _step_options(self, eta: float, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Those of `eta` and `generator` that the scheduler in use takes."""
        known = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in known}
