"""The pipelines as blocks of Modular Diffusers: what a call is given decides what is done, and guiders can be set.

Each block makes a pipeline of the parts and calls one step of it, so that pipelines and blocks give the same pixels.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..models.transformer_latent_dit import LatentDiTTransformer2DModel
from ..schedulers.accuracy import check_num_inference_steps
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .exclusive import exclusive
from .guidance import GuidanceOptions, build_guidance
from .pipeline_latent_dit import LatentDiTPipeline
from .pipeline_latent_dit_edit import LatentDiTEditPipeline
from .pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from .pipeline_latent_dit_inpaint import LatentDiTInpaintPipeline

try:
    from diffusers.guiders import BaseGuidance
    from diffusers.modular_pipelines.modular_pipeline import (
        AutoPipelineBlocks,
        ModularPipelineBlocks,
        SequentialPipelineBlocks,
    )
    from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
except ImportError:  # an older diffusers, in which the pipelines work, but no blocks
    AutoPipelineBlocks = ModularPipelineBlocks = SequentialPipelineBlocks = object

Kind = TypeVar("Kind", bound=LatentDiTPipeline)

# Arguments of a call that every task has.
CALL = ("attributes", "num_inference_steps", "guidance_scale")
SAMPLED = ("num_images_per_prompt", "eta", "generator")  # what inverts an image samples nothing


class LatentDiTEncodeStep(ModularPipelineBlocks):
    """Encodes images to latents."""

    description = "Encode images of any size and form to the model's normalised latents."
    expected_components = property(lambda self: _components("transformer", "vae"))
    expected_configs = property(lambda self: _configs())
    inputs = property(lambda self: [_required(*_inputs(LatentDiTImg2ImgPipeline, "image")), *self._options()])
    intermediate_outputs = property(lambda self: [_output("image_latents", "Latents, [images, channels, h, w].")])

    def _options(self) -> list[Any]:
        return _inputs(LatentDiTImg2ImgPipeline, "input_range")

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        pipeline = _pipeline(LatentDiTImg2ImgPipeline, components)
        pipeline._check_image(block_state.image)
        block_state.image_latents = pipeline.encode_images(block_state.image, block_state.input_range)
        self.set_block_state(state, block_state)
        return components, state


class LatentDiTInpaintEncodeStep(LatentDiTEncodeStep):
    """Encodes images to latents, and reads masks."""

    description = "Encode images to latents, and read the masks that are white where to inpaint."
    intermediate_outputs = property(
        lambda self: [
            _output("image_latents", "Latents, [images, channels, h, w]."),
            _output("pixels", "The images between -1 and 1, [images, 3, height, width]."),
            _output("mask", "White (1) where to inpaint, [1 or images, 1, height, width]."),
        ]
    )

    def _options(self) -> list[Any]:
        return [_required(*_inputs(LatentDiTInpaintPipeline, "mask_image")), *super()._options()]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        pipeline = _pipeline(LatentDiTInpaintPipeline, components)
        pipeline._check_image(block_state.image)
        pipeline._check_mask(block_state.mask_image)
        block_state.pixels, block_state.mask = pipeline._read_masked(
            block_state.image, block_state.mask_image, block_state.input_range
        )
        block_state.image_latents = pipeline._encode_pixels(block_state.pixels)
        self.set_block_state(state, block_state)
        return components, state


class LatentDiTAutoEncodeStep(AutoPipelineBlocks):
    """Encodes images if there are any."""

    description = "Encode the images, if there are any."
    block_classes = [LatentDiTInpaintEncodeStep, LatentDiTEncodeStep]
    block_names = ["inpainting", "image"]
    block_trigger_inputs = ["mask_image", "image"]


class LatentDiTGenerateStep(ModularPipelineBlocks):
    """Denoises noise."""

    description = "Denoise noise, with attributes or without."
    expected_components = property(lambda self: _components("transformer", "scheduler", "guider"))
    expected_configs = property(lambda self: _configs())
    inputs = property(
        lambda self: _inputs(LatentDiTPipeline, *CALL, "batch_size", *SAMPLED, "latents") + _guidance_inputs()
    )
    intermediate_outputs = property(lambda self: [_output("latents", "Denoised latents, [images, channels, h, w].")])
    # The one of pipelines, which a modular pipeline passes on to its blocks.
    set_progress_bar_config = DiffusionPipeline.set_progress_bar_config
    # The pipeline, and its step that the block calls.
    _kind: type[LatentDiTPipeline] = LatentDiTPipeline
    _step: Callable[..., torch.Tensor] = LatentDiTPipeline._generate

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        pipeline = _pipeline(self._kind, components)
        pipeline._guider = components.guider
        pipeline.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        self._check(pipeline, block_state)
        block_state.latents = _denoise(type(self)._step, pipeline, block_state)
        self.set_block_state(state, block_state)
        return components, state

    def _check(self, pipeline: Any, block_state: Any) -> None:
        """Check the inputs, as the call of the pipeline does."""
        pipeline._check_inputs(block_state.attributes, getattr(block_state, "batch_size", 1), "latent", [])
        check_num_inference_steps(pipeline.scheduler, block_state.num_inference_steps)


class LatentDiTImg2ImgStep(LatentDiTGenerateStep):
    """Noises images to some level and denoises them."""

    description = "Noise images to the level of `strength`, and denoise them."
    inputs = property(
        lambda self: [
            _image_latents(),
            *_inputs(LatentDiTImg2ImgPipeline, *CALL, "strength", *SAMPLED),
            *_guidance_inputs(),
        ]
    )
    _kind, _step = LatentDiTImg2ImgPipeline, LatentDiTImg2ImgPipeline._vary

    def _check(self, pipeline: Any, block_state: Any) -> None:
        pipeline._check_strength(block_state.strength)
        super()._check(pipeline, block_state)


class LatentDiTInpaintStep(LatentDiTGenerateStep):
    """Denoises images where a mask is white, and keeps the rest."""

    description = "Denoise where the mask is white, and keep the rest."
    inputs = property(
        lambda self: [
            _image_latents(),
            InputParam("mask", torch.Tensor, required=True, description="White (1) where to inpaint, as encoded."),
            *_inputs(LatentDiTInpaintPipeline, *CALL, "strength", "jump_length", "jump_n_sample", *SAMPLED),
            *_guidance_inputs(),
        ]
    )
    _kind, _step = LatentDiTInpaintPipeline, LatentDiTInpaintPipeline._inpaint

    def _check(self, pipeline: Any, block_state: Any) -> None:
        pipeline._check_strength(block_state.strength)
        pipeline._check_jumps(block_state.jump_length, block_state.jump_n_sample)
        super()._check(pipeline, block_state)


class LatentDiTEditStep(LatentDiTGenerateStep):
    """Inverts images to noise and denoises that for other attributes."""

    description = "Invert images to the noise that generates them, and denoise that for other attributes."
    inputs = property(
        lambda self: [
            _image_latents(),
            _required(*_inputs(LatentDiTEditPipeline, "edit")),
            *_inputs(LatentDiTEditPipeline, *CALL, "edit_strength", "strength"),
            *_guidance_inputs(),
        ]
    )
    _kind, _step = LatentDiTEditPipeline, LatentDiTEditPipeline._edit

    def _check(self, pipeline: Any, block_state: Any) -> None:
        pipeline._check_strength(block_state.strength)
        pipeline._check_inputs(block_state.attributes, 1, "latent", [])
        check_num_inference_steps(pipeline.reversible_scheduler(), block_state.num_inference_steps)
        pipeline._check_edit(block_state.edit)


class LatentDiTAutoDenoiseStep(AutoPipelineBlocks):
    """Edits, inpaints, varies or generates, by the inputs that there are."""

    description = "Edit if there is an `edit`, inpaint if there is a mask, vary images if there are any, or generate."
    # The first that describes an input describes it for all.
    block_classes = [LatentDiTGenerateStep, LatentDiTInpaintStep, LatentDiTEditStep, LatentDiTImg2ImgStep]
    block_names = ["generation", "inpainting", "edit", "img2img"]
    block_trigger_inputs = [None, "mask", "edit", "image_latents"]

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set the options of the progress bar, those of tqdm."""
        for block in self.sub_blocks.values():
            block.set_progress_bar_config(**options)

    def select_block(self, **inputs: Any) -> str | None:
        """Return the name of the block to run; None is the default.

        Raises:
            ValueError: for an edit with a mask, which no block does.
        """
        if inputs.get("edit") is not None and inputs.get("mask") is not None:
            raise ValueError("edit= changes attributes, and mask_image= inpaints: pass one of the two")
        return super().select_block(**inputs)


class LatentDiTDecodeStep(ModularPipelineBlocks):
    """Decodes latents to images."""

    description = "Decode latents to images."
    expected_components = property(lambda self: _components("vae"))
    expected_configs = property(lambda self: _configs())
    inputs = property(lambda self: [_latents(), *_inputs(LatentDiTPipeline, "output_type")])
    intermediate_outputs = property(
        lambda self: [
            _output("images", "The images, see `output_type`.", "list[PIL.Image.Image] | np.ndarray | torch.Tensor")
        ]
    )

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        pipeline = _pipeline(LatentDiTPipeline, components)
        block_state.images = pipeline._output(block_state.latents, block_state.output_type, return_dict=False)[0]
        self.set_block_state(state, block_state)
        return components, state


class LatentDiTInpaintDecodeStep(LatentDiTDecodeStep):
    """Decodes latents to images, and pastes the original pixels back."""

    description = "Decode latents to images, with the original pixels where the mask is black."
    inputs = property(
        lambda self: [
            _latents(),
            InputParam("pixels", torch.Tensor, required=True, description="The images, as encoded."),
            InputParam("mask", torch.Tensor, required=True, description="White (1) where inpainted, as encoded."),
            *_inputs(LatentDiTInpaintPipeline, "output_type", "paste_back"),
        ]
    )

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        if block_state.output_type == "latent" or not block_state.paste_back:
            return super().__call__(components, state)
        pipeline = _pipeline(LatentDiTInpaintPipeline, components)
        block_state.images = pipeline._paste_back(
            block_state.latents, block_state.pixels, block_state.mask, block_state.output_type
        )
        self.set_block_state(state, block_state)
        return components, state


class LatentDiTAutoDecodeStep(AutoPipelineBlocks):
    """Decodes latents, of inpainting with the original pixels."""

    description = "Decode latents to images, of inpainting with the original pixels outside the mask."
    block_classes = [LatentDiTInpaintDecodeStep, LatentDiTDecodeStep]
    block_names = ["inpainting", "image"]
    block_trigger_inputs = ["mask", None]


class LatentDiTAutoBlocks(SequentialPipelineBlocks):
    """Generates, varies, inpaints and edits images: `LatentDiTAutoBlocks().init_pipeline(repository)`.

    A repository loads as these blocks without dit_hf, too:
    `ModularPipeline.from_pretrained(repository, trust_remote_code=True)`.
    """

    description = "Generate images; with `image` vary it, with `mask_image` inpaint it, with `edit` edit it."
    block_classes = [LatentDiTAutoEncodeStep, LatentDiTAutoDenoiseStep, LatentDiTAutoDecodeStep]
    block_names = ["encode", "denoise", "decode"]
    _workflow_map = {
        "generation": {},
        "img2img": {"image": True},
        "inpainting": {"image": True, "mask_image": True},
        "edit": {"image": True, "edit": True},
    }


def _pipeline(kind: type[Kind], components: Any) -> Kind:
    """Return a pipeline of the parts that a modular one has loaded, and of its config."""
    parts: Any = {name: getattr(components, name, None) for name in ("transformer", "scheduler", "vae")}
    config: Any = {spec.name: components.config[spec.name] for spec in _configs()}
    return kind(**parts, **config)


def _denoise(step: Callable[..., torch.Tensor], pipeline: LatentDiTPipeline, block_state: Any) -> torch.Tensor:
    """Call the `step` of a pipeline with the inputs of its block, while no other call uses the scheduler."""
    values, given = block_state.as_dict(), {}
    for spec in _guidance_inputs():
        value = values.pop(spec.name)
        # As in the call of a pipeline: only what differs from the defaults, which a guider has itself.
        if value != spec.default:
            given[spec.name] = value
    return exclusive(step)(pipeline, guidance_options=given, **values)


def _components(*names: str) -> list[Any]:
    """Return the specs of some of the parts."""
    specs = [
        ComponentSpec("transformer", LatentDiTTransformer2DModel, "The denoiser."),
        ComponentSpec("scheduler", CosineLatentScheduler, "This or another by `from_config` of its config."),
        ComponentSpec("vae", AutoencoderKL, "Encodes images and decodes latents."),
        ComponentSpec("guider", BaseGuidance, "Guides in place of `guidance_scale` and its options, if one is set."),
    ]
    return [spec for spec in specs if spec.name in names]


def _configs() -> list[Any]:
    """Return the specs of a pipeline's config, with its defaults."""
    parameters = inspect.signature(LatentDiTPipeline.__init__).parameters
    names = ("latents_mean", "latents_std", "guidance_scale", "condition_labels")
    described = _descriptions(LatentDiTPipeline.__doc__)
    return [ConfigSpec(name, parameters[name].default, described.get(name)) for name in names]


def _inputs(kind: type[LatentDiTPipeline], *names: str) -> list[Any]:
    """Return arguments of a pipeline's call, with its defaults and descriptions, as inputs of a block."""
    parameters = inspect.signature(kind.__call__).parameters
    described: dict[str, str] = {}
    for each in reversed(kind.__mro__[: kind.__mro__.index(LatentDiTPipeline) + 1]):
        described |= _descriptions(each.__call__.__doc__)
    return [
        InputParam(name, parameters[name].annotation, parameters[name].default, description=described.get(name, ""))
        for name in names
    ]


def _guidance_inputs() -> list[Any]:
    """Return `GuidanceOptions` as inputs of a block."""
    parameters, described = inspect.signature(build_guidance).parameters, _descriptions(GuidanceOptions.__doc__)
    return [
        InputParam(name, parameters[name].annotation, parameters[name].default, description=described.get(name, ""))
        for name in GuidanceOptions.__annotations__
    ]


def _descriptions(doc: str | None) -> dict[str, str]:
    """Return the descriptions of the arguments in a docstring, which is None if Python has removed it."""
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.cleandoc(doc or ""), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _required(spec: Any) -> Any:
    spec.required = True
    return spec


def _image_latents() -> Any:
    return InputParam("image_latents", torch.Tensor, required=True, description="Latents of images, as encoded.")


def _latents() -> Any:
    return InputParam("latents", torch.Tensor, required=True, description="Denoised latents.")


def _output(name: str, description: str, type_hint: Any = torch.Tensor) -> Any:
    return OutputParam(name, type_hint, description)
