"""The pipeline that generates images with a latent Diffusion Transformer, with or without attributes."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..schedulers.accuracy import check_num_inference_steps, schedule_of
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .attributes import Attributes, attribute_rows, check_attributes, check_condition_labels, condition_ids
from .exclusive import exclusive
from .guidance import Guidance, GuidanceOptions, build_guidance, check_options_with_guider
from .interpolation import interpolate_noises
from .saving import LatentDiTSavingMixin
from .signature import with_types

logger = logging.getLogger(__name__)

# Pixels that go through the VAE at a time. It needs far more memory for an image than the transformer does.
VAE_PIXELS = 16 * 256 * 256


class LatentDiTPipeline(LatentDiTSavingMixin, DiffusionPipeline):
    r"""
    Generates images with a [`LatentDiTTransformer2DModel`].

    Args:
        transformer: The denoiser.
        scheduler: A [`CosineLatentScheduler`], or one of diffusers' made with `from_config` of its config (see there).
        vae: An `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, which decodes the latents; with None only
            `output_type="latent"` is possible.
        latents_mean: Mean of the VAE's latents by channel: the model works on `(latents - mean) / std`. None is the
            VAE's `shift_factor`, or 0.
        latents_std: Their standard deviation by channel; None is `1 / scaling_factor` of the VAE.
        guidance_scale: The default of a call.
        condition_labels: Names of the values of a condition, e.g. `{"class": ["cat", "dog"]}`; conditions without an
            entry take booleans and numbers.
    """

    # DiffusionPipeline of diffusers 0.42.1 reads the first three names; callbacks set the last two.
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]
    _current_timestep: torch.Tensor | None = None
    _num_timesteps = 0
    _interrupt = False
    _guidance_scale: float
    # One of diffusers' guiders, which the blocks of a modular pipeline set.
    _guider: Any = None
    scheduler: CosineLatentScheduler | SchedulerMixin

    @with_types
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
        # 1. The components, and the statistics by which latents are normalised.
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # A part may be set after loading: then the statistics have been saved with the pipeline.
        channels = len(latents_mean or []) if transformer is None else transformer.config.in_channels
        if latents_mean is None:
            latents_mean = [getattr(getattr(vae, "config", None), "shift_factor", None) or 0.0] * channels
        if latents_std is None:
            latents_std = [1 / getattr(getattr(vae, "config", None), "scaling_factor", 1.0)] * channels
        if not len(latents_mean) == len(latents_std) == channels:
            raise ValueError(f"latents_mean and latents_std must have {channels} numbers, one a channel")
        if not all(map(math.isfinite, latents_mean)) or not all(0 < std < math.inf for std in latents_std):
            raise ValueError("latents_mean must be finite numbers, and latents_std finite numbers above 0")
        check_condition_labels(condition_labels or {}, getattr(transformer, "config", {}).get("conditions") or {})

        # 2. The config, which is saved in model_index.json.
        self.register_to_config(
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            guidance_scale=guidance_scale,
            condition_labels=condition_labels or {},
        )
        self._guidance_scale = guidance_scale
        # What the model was trained on, with which a scheduler that is set later is compared.
        self._trained_schedule = schedule_of(scheduler)

        # 3. The image processor: every block of the VAE but the last halves the side.
        config = getattr(vae, "config", {})
        blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or [0]
        self.image_processor = VaeImageProcessor(
            vae_scale_factor=2 ** (len(blocks) - 1), resample="bicubic", do_convert_rgb=True
        )

    @exclusive
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
            attributes: The requested attributes, a dict (`{"Smiling": True, "Eyeglasses": False}`, `{"class": "cat"}`)
                or a list of dicts, one an image. Names left out are the null condition; None is unconditional.
            batch_size: Number of images if `attributes` is None or one dict.
            num_images_per_prompt: Images for each row of attributes.
            num_inference_steps: Denoising steps.
            guidance_scale: Scale of classifier-free guidance (https://arxiv.org/abs/2207.12598), 1 or less is none;
                None is the value in the pipeline's config. It has no effect on unconditional images. A callback may
                change it for the steps that follow: `pipeline._guidance_scale = 0.0` turns guidance off.
            eta: 0 is deterministic, 1 as noisy as DDPM; schedulers without it ignore it.
            generator: Samples the initial noise and that of `eta`; a list has one for each image.
            latents: The initial noise itself, [images, channels, height, width], unit variance; sets the size too.
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"` (the model's normalised latents).
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: Called as `f(pipeline, step, timestep, tensors)` after each step; may return changed
                tensors.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.
            guidance_options: See `GuidanceOptions`.

        Returns:
            `ImagePipelineOutput` with `images`.

        Raises:
            ValueError: for unknown attributes, values or options that do not fit together.
        """
        # 1. Check inputs.
        self._check_inputs(attributes, batch_size, output_type, callback_on_step_end_tensor_inputs)
        check_num_inference_steps(self.scheduler, num_inference_steps)

        # 2. Denoise noise.
        latents = self._generate(
            attributes,
            batch_size,
            num_images_per_prompt,
            num_inference_steps,
            guidance_scale,
            guidance_options,
            generator,
            latents,
            eta=eta,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

        # 3. Decode.
        return self._output(latents, output_type, return_dict)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current step, or of the last one; a callback sets `pipeline._guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if guidance is on, at the scale of the current step."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current call, or of the last one; 0 before."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the current step, which some of diffusers' caches read; None outside a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """True skips the remaining steps: a callback sets `pipeline._interrupt`, as diffusers documents."""
        return self._interrupt

    def encode_attributes(
        self, attributes: Attributes | Sequence[Attributes] | None, batch_size: int = 1
    ) -> torch.Tensor:
        """Return condition ids, int64 [rows, conditions] in the order of the transformer's config; see `__call__`.

        Raises:
            ValueError: for a name or value that the model does not have; the message lists the valid ones.
        """
        rows = attribute_rows(attributes, batch_size)
        return condition_ids(rows, self.transformer.config.conditions or {}, self.config.condition_labels)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Decode the model's normalised latents, [batch, channels, height, width], to images of an `output_type`.

        Raises:
            ValueError: if latents are not finite, or an image, which means an overflow in the VAE's precision.
        """
        if not torch.isfinite(latents).all():
            raise ValueError("latents are not finite: the transformer's weights are damaged, or need more precision")
        mean, std = self._statistics(latents.device)
        latents = (latents.float() * std + mean).to(self.vae.dtype)
        parts = self._split_for_vae(latents, self.image_processor.config.vae_scale_factor)
        pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        # Half precision overflows in some VAEs, and PIL would turn NaN into a black image.
        if not torch.isfinite(pixels).all():
            dtype = str(self.vae.dtype).removeprefix("torch.")
            raise ValueError(f"decoded images are not finite: does the VAE need more than {dtype}? pipe.vae.float()")
        return self.image_processor.postprocess(pixels, output_type=output_type)

    def _split_for_vae(self, images: torch.Tensor, factor: int = 1) -> tuple[torch.Tensor, ...]:
        """Split images, or latents whose side is `factor` times smaller, into batches of about `VAE_PIXELS`."""
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
        Generate the frames of a film between noises: each is the image of a point on the arc from one to the next.

        Args:
            num_frames: Frames from one noise to the next, both ends included.
            latents: The noises, [two or more, channels, height, width]; None samples two.
            generator: Samples those.
            attributes: The requested attributes, the same for every frame.
            options: Further arguments of `__call__`.

        Returns:
            The images, `num_frames` of them and `num_frames - 1` more for each noise beyond the second.

        Raises:
            ValueError: for less than two frames or noises.
        """
        if latents is None:
            latents = self.sample_noise(2, generator)
        frames = interpolate_noises(latents, num_frames)
        options |= {"latents": frames, "return_dict": False}
        # By the class, because the calls of the subclasses take an image.
        return LatentDiTPipeline.__call__(self, attributes, len(frames), **options)[0]

    def sample_noise(
        self, batch_size: int = 1, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Sample noise, [batch_size, channels, height, width] of the trained size, to pass as `latents`."""
        return self._noise((batch_size, self.transformer.config.in_channels, *self.transformer.latent_size), generator)

    @property
    def resolution(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that the model was trained on."""
        height, width = self.transformer.latent_size
        factor = self.image_processor.config.vae_scale_factor
        return height * factor, width * factor

    def _statistics(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the VAE's latents by channel, each [1, channels, 1, 1]."""
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
        """Check the arguments of a call that need no model.

        Raises:
            ValueError: naming the argument and what is expected.
        """
        if self.transformer is None:
            raise ValueError("this pipeline has no transformer: set pipe.transformer")
        if self._trained_schedule is not None and schedule_of(self.scheduler) != self._trained_schedule:
            raise ValueError(
                f"this {type(self.scheduler).__name__} has other noise levels, or another prediction_type, than the "
                "scheduler of the pipeline: create it by from_config(pipe.scheduler.config)"
            )
        check_attributes(attributes, batch_size)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"expected output_type pil, np, pt or latent, got {output_type!r}")
        if output_type != "latent" and self.vae is None:
            raise ValueError("this pipeline has no vae; only output_type='latent' is possible")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs {sorted(unknown)} not in {self._callback_tensor_inputs}"
            )

    def _generate(
        self,
        attributes: Attributes | Sequence[Attributes] | None,
        batch_size: int,
        num_images_per_prompt: int,
        num_inference_steps: int,
        guidance_scale: float | None,
        guidance_options: GuidanceOptions,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        **step_options: Any,
    ) -> torch.Tensor:
        """Return generated latents, [images, channels, height, width]; see `__call__`, and `_denoise` for the rest."""
        rows = attribute_rows(attributes, batch_size, num_images_per_prompt)
        guidance = self._prepare_guidance(
            rows, attributes is not None, guidance_scale, num_images_per_prompt, **guidance_options
        )
        # Euler's `init_noise_sigma` is known only after `set_timesteps`.
        latents = self._prepare_latents(len(rows), generator, latents, self._execution_device)
        timesteps = self._set_timesteps(num_inference_steps)
        latents = latents * self.scheduler.init_noise_sigma
        return self._denoise(latents, timesteps, guidance, generator=generator, **step_options)

    def _prepare_latents(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        device: torch.device,
    ) -> torch.Tensor:
        """Return the initial noise, float32 [batch, channels, height, width]: that of the caller, or a sample."""
        if latents is None:
            return self.sample_noise(batch, generator)
        channels = self.transformer.config.in_channels
        if latents.ndim != 4 or latents.shape[:2] != (batch, channels):
            expected = f"[{batch}, {channels}, height, width]"
            raise ValueError(f"latents has shape {list(latents.shape)}; expected {expected}")
        return latents.to(device=device, dtype=torch.float32)

    def _noise(self, shape: Sequence[int], generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
        """Sample noise, float32 on the device; a list of generators has one for each image."""
        for each in generator if isinstance(generator, list) else [generator]:
            if not (each is None or isinstance(each, torch.Generator)):
                raise TypeError(f"expected generator=torch.Generator().manual_seed(0) or a list of them, got {each!r}")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} images")
        return randn_tensor(tuple(shape), generator, device=self._execution_device, dtype=torch.float32)

    def _set_timesteps(self, num_inference_steps: int, strength: float = 1.0) -> torch.Tensor:
        """Return the timesteps up to `strength` of the noise levels, and have the scheduler begin there.

        They are chosen by level and not by number, because not every scheduler spaces its steps evenly. Above a
        strength of 0 the last step is run in any case, and reported if it begins at more noise than that.
        """
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        order = self.scheduler.order  # timesteps a step: Heun has 2
        begins = self.scheduler.timesteps[::order] + 1  # the levels at which steps begin
        total = self.scheduler.config.num_train_timesteps
        # Skip the steps that begin above that level; half a timestep is left for rounding.
        first = int((begins > strength * total + 0.5).sum())
        if first == len(begins) and strength > 0:
            first -= 1
            logger.warning(
                f"strength={strength} is less than a step of num_inference_steps={num_inference_steps}: the last one "
                f"is run, from a strength of {begins[-1].item() / total:.2g}; more steps come nearer"
            )
        # Stock schedulers count their steps and must be told where to begin; ours looks each one up.
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(order * first)
        return self.scheduler.timesteps[order * first :]

    def _prepare_guidance(
        self,
        rows: Sequence[Attributes],
        conditional: bool,
        guidance_scale: float | None = None,
        num_images_per_row: int = 1,
        **options: Unpack[GuidanceOptions],
    ) -> Guidance:
        """Set the guidance scale (None is the config's), and return what the steps predict; see [`build_guidance`].

        Raises:
            TypeError: for an option that there is not.
            ValueError: for a scale that is not a number of at least 0, options that a guider has itself, and as
                `build_guidance`.
        """
        valid = sorted(GuidanceOptions.__annotations__)
        for name in options.keys() - {*valid}:
            raise TypeError(
                f"{type(self).__name__} has no argument {name!r}; those of guidance are {', '.join(valid)}"
            )
        if self._guider is not None:
            check_options_with_guider(self._guider, {"guidance_scale": guidance_scale, **options})
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if not isinstance(scale, int | float) or not 0 <= scale < float("inf"):
            raise ValueError(f"guidance_scale={scale!r} must be a number of at least 0; 1 or less is no guidance")
        self._guidance_scale = float(scale)

        def encode(rows: Sequence[Attributes]) -> torch.Tensor:
            return self.encode_attributes(rows).to(self._execution_device)

        guidance = build_guidance(encode, rows, conditional, num_images_per_row, **options)
        guidance.guider = self._guider
        return guidance

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        guidance: Guidance,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Denoise latents from the noise level of the first of `timesteps` to the end of the step at the last.

        Args:
            latents: Noisy latents, float32 [batch, channels, height, width].
            timesteps: The timesteps at which the steps begin.
            guidance: The predictions of a step.
            eta: See `__call__`, as for the arguments that are not listed here.
            after_step: Replaces the latents after step i: `latents = after_step(i, latents)`.
        """
        # 1. Reset what the previous call left behind, which may have ended by an error.
        step_options = self._step_options(eta, generator)
        self._num_timesteps = len(timesteps)
        self._interrupt = False
        self._reset_caches(guidance)

        # 2. Where each step is between noise (0) and image (1). One copy from the device here, none in the loop.
        progress = (1 - (timesteps.float() + 1) / self.scheduler.config.num_train_timesteps).tolist()

        # 3. The loop.
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = t
                model_input = self.scheduler.scale_model_input(latents, t)
                scale = self._guidance_scale  # of this step: the last callback may have changed it
                model_output = guidance.predict(self.transformer, model_input, t, i, progress, scale)
                latents = self.scheduler.step(model_output, t, latents, **step_options, return_dict=False)[0]
                # Before the callback, which is documented to see the latents that the next step starts from.
                if after_step is not None:
                    latents = after_step(i, latents)
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", latents)
                progress_bar.update()
        self._current_timestep = None
        return latents

    def _reset_caches(self, guidance: Guidance) -> None:
        """Clear diffusers' feature caches, which hold on to the previous series of steps."""
        for transformer in (self.transformer, guidance.transformer):
            if transformer is not None:
                transformer._reset_stateful_cache()  # CacheMixin of diffusers 0.42.1, which has no public way

    def _output(self, latents: torch.Tensor, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple:
        """Return the output of a call; see `output_type` and `return_dict` there."""
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _step_options(self, eta: float, generator: torch.Generator | list[torch.Generator] | None) -> dict[str, Any]:
        """Return those of `eta` and `generator` that the `step` of the scheduler accepts."""
        accepted = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
