"""`dit-hf sample`: a series of images by any of the pipelines, new ones or from given ones."""

from __future__ import annotations

import functools
import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..devices import memory_errors
from ..pipelines.attributes import check_attributes
from ..pipelines.guidance import GuidanceOptions, build_guidance, check_attribute_weights
from ..pipelines.interpolation import interpolate_noises
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..pipelines.pipeline_latent_dit_edit import LatentDiTEditPipeline
from ..pipelines.pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from ..pipelines.pipeline_latent_dit_inpaint import LatentDiTInpaintPipeline
from ..pipelines.preprocessing import read_images
from ..runs import load_pipeline
from ..schedulers.accuracy import check_num_inference_steps
from ..storage import disk_errors
from .generate import MAX_IMAGES, batch_options, generate_images, generators, model_sha256, to_uint8
from .inputs import Inputs, Rows, read_inputs
from .writer import GRID, Series, write_series

Mode = Literal["generate", "img2img", "inpaint", "interpolate", "edit"]
# The pipeline of each mode.
PIPELINES: dict[str, type[LatentDiTPipeline]] = {
    "generate": LatentDiTPipeline,
    "img2img": LatentDiTImg2ImgPipeline,
    "inpaint": LatentDiTInpaintPipeline,
    "interpolate": LatentDiTPipeline,
    "edit": LatentDiTEditPipeline,
}
# Options that only some modes have. In the others they are refused, because they would have no effect.
_MODES_OF = {
    "image": ("img2img", "inpaint", "interpolate", "edit"),
    "mask_image": ("inpaint",),
    "strength": ("img2img", "inpaint", "edit"),
    "edit": ("edit",),
    "edit_strength": ("edit",),
    "num_frames": ("interpolate",),
    "eta": ("generate", "img2img", "inpaint"),
    "scheduler": ("generate", "img2img", "inpaint", "interpolate"),
}
# The stock schedulers that sample every model, with the settings that they need besides the config. Heun needs
# exponential sigmas: evenly spaced by timestep, its first step spans nearly all of the noise levels.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"use_exponential_sigmas": True},
    "UniPCMultistepScheduler": {},
}
_REQUIRED = {"img2img": ("image",), "inpaint": ("image", "mask_image"), "edit": ("image", "edit")}
# Options that may be a path of this machine.
_PATHS = ("model", "image", "mask_image", "guidance_model", "attributes", "edit")


def sample(
    model: str,
    output_dir: str,
    mode: Mode = "generate",
    num_images: int | None = None,
    attributes: Rows = None,
    image: str | None = None,
    mask_image: str | None = None,
    strength: float | None = None,
    edit: Rows = None,
    edit_strength: float | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_model: str | None = None,
    eta: float | None = None,
    options: dict[str, Any] | None = None,
    scheduler: str | None = None,
    seed: int = 0,
    batch_size: int = 16,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    output_format: Literal["folder", "npz"] = "folder",
) -> Path:
    """Generate images: new ones, from given ones, between noises or images, or with edited attributes.

    Under `accelerate launch` every rank generates its share. Image i is a function of the seed and i, and the same
    call given again after a kill resumes where it was.

    Args:
        model: The folder of a run, of one of its checkpoints or of a pipeline, or a Hub id (`OWNER/NAME@REVISION`).
        output_dir: Where `00000.png` … (or `samples.npz`), `sheet.png`, `settings.json` and for films `film.gif` go.
        mode: `generate` new images, `img2img` (variations of given ones), `inpaint`, `interpolate` (a film between
            noises or images) or `edit` (other attributes).
        num_images: Number of images (with `interpolate`, of noises); by default 16, or one for each image or edit.
        attributes: The requested attributes (with `edit`, those of the images), as JSON (`'{"Smiling": true}'` or a
            list of these), a JSON file, or a latent cache, whose rows are taken in order. Image i gets row i, starting
            over after the last.
        image: An image or a folder of them, sorted by name.
        mask_image: A mask (white is inpainted, transparent parts are kept), or a folder with one for each image, of
            the same name.
        strength: How far from the given image, 0 to 1; by default the pipeline's own.
        edit: The attributes to change, spelled like `attributes`.
        edit_strength: How much to change them, 1 being as much as the pipeline's guidance.
        num_frames: Frames from one noise or image to the next, both included; 16 by default.
        num_inference_steps: Denoising steps; by default the pipeline's own.
        guidance_scale: How strongly the attributes are followed, 1 being without guidance; by default the pipeline's
            own.
        guidance_model: A weaker model of the same conditions, from which guidance steers away (autoguidance).
        eta: 0 is deterministic, 1 as noisy as DDPM.
        options: Further options of the pipeline's call, as JSON: `guidance_rescale`, `attribute_weights`,
            `negative_attributes`, `jump_n_sample`, ...
        scheduler: A diffusers scheduler by its class, e.g. `UniPCMultistepScheduler`; by default the pipeline's own.
        seed: Seed of the series.
        batch_size: Images at once.
        dtype: Precision of the computation.
        output_format: `folder` of PNG files, each with its settings in it, or one `npz` (`arr_0`, uint8
            [images, height, width, 3]).

    Raises:
        FileExistsError: if `output_dir` holds images of other settings.
        ValueError: for options that do not fit together, unknown attributes, or no such model or image.
    """
    # The order of `settings.json`.
    settings = {
        "model": model,
        "mode": mode,
        "num_images": num_images,
        "attributes": attributes,
        "image": image,
        "mask_image": mask_image,
        "strength": strength,
        "edit": edit,
        "edit_strength": edit_strength,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_model": guidance_model,
        "eta": eta,
        "options": options,
        "scheduler": scheduler,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "output_format": output_format,
    }
    return _sample(Path(output_dir), {name: value for name, value in settings.items() if value is not None})


def _sample(folder: Path, settings: dict[str, Any]) -> Path:
    """Generate the series that `settings`, the arguments of `sample` that are not None, describe."""
    # 1. Check the options before anything is loaded.
    mode, batch_size = settings["mode"], settings["batch_size"]
    _check(settings, mode)

    # 2. Load the models. The timeout is that of the slowest rank's whole share, for which the others wait at the end.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    precision = settings["dtype"]
    pipeline = _open_pipeline(settings["model"], mode, settings.get("scheduler"), precision, state.device)
    call = _call_options(pipeline, settings)
    # Now and not later: a film between images replaces the scheduler, which is part of the hash.
    hashes = {"model_sha256": model_sha256(pipeline)}
    if "guidance_model" in settings:
        weaker = _open_pipeline(settings["guidance_model"], "generate", None, precision, state.device)
        own, others = (each.transformer.config.conditions or {} for each in (pipeline, weaker))
        if own != others:
            raise ValueError(
                f"--guidance_model has other conditions ({others or 'none'}) than the model ({own or 'none'})"
            )
        call["guidance_transformer"] = weaker.transformer
        hashes["guidance_model_sha256"] = model_sha256(weaker)

    # 3. Read the inputs and describe the series.
    inputs = read_inputs(settings, pipeline)
    _check_options(pipeline, inputs, settings, call)
    series = _describe_series(pipeline, inputs, settings, call)
    hashes |= inputs.hashes()

    # 4. Generate what is missing.
    as_npz = settings["output_format"] == "npz"
    advice = f"a --batch_size below {batch_size} needs less"
    with memory_errors(advice), disk_errors(f"output_dir {folder}"):
        write_series(folder, series, _portable(settings) | hashes, batch_size, as_npz, state)
    if state.is_main_process:
        print(f"{folder}: {series.num_images} images; {folder / GRID} shows the first", flush=True)
    return folder


def _check(settings: dict[str, Any], mode: str) -> None:
    """Refuse options that do not fit the mode or are out of their range.

    Raises:
        ValueError: naming the option and what is expected.
    """
    # 1. Options of other modes, and missing ones.
    for name, modes in _MODES_OF.items():
        if name in settings and mode not in modes:
            raise ValueError(f"--{name} is for --mode {' or '.join(modes)}, not {mode}")
    missing = [f"--{name}" for name in _REQUIRED.get(mode, ()) if name not in settings]
    if missing:
        raise ValueError(f"--mode {mode} needs {' and '.join(missing)}")

    # 2. A film between images has one noise for each of them, and is generated by the DDIM that found the noises.
    if mode == "interpolate" and "image" in settings:
        for name in ("num_images", "scheduler"):
            if name in settings:
                raise ValueError(f"--{name} is for films between noises; between images each is a stop, by DDIM")

    # 3. Ranges.
    for name, least in (("num_images", 1), ("batch_size", 1), ("num_inference_steps", 1), ("seed", 0)):
        if settings.get(name, least) < least:
            raise ValueError(f"--{name} {settings[name]} must be at least {least}")
    for name in ("num_images", "num_frames"):
        if settings.get(name, 0) > MAX_IMAGES:
            raise ValueError(f"--{name} {settings[name]} must be at most {MAX_IMAGES:,}")
    for name in ("strength", "eta"):
        if not 0 <= settings.get(name, 0) <= 1:
            raise ValueError(f"--{name} {settings[name]} must be between 0 and 1")


def _open_pipeline(
    model: str, mode: str, scheduler: str | None, dtype: str, device: torch.device
) -> LatentDiTPipeline:
    """Load the pipeline of a mode, with one of `SCHEDULERS` or its own."""
    loaded = load_pipeline(model, device, dtype=getattr(torch, dtype))
    if scheduler is not None:
        if scheduler not in SCHEDULERS:
            raise ValueError(f"--scheduler {scheduler} is unknown; valid names are {', '.join(SCHEDULERS)}")
        settings = SCHEDULERS[scheduler]
        loaded.scheduler = getattr(diffusers, scheduler).from_config(loaded.scheduler.config, **settings)
    pipeline = PIPELINES[mode](**loaded.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _call_options(pipeline: LatentDiTPipeline, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of the pipeline's call that are the same for all batches.

    Raises:
        ValueError: for a name in `--options` that the call does not have, or a value that is not a number.
    """
    # 1. `--options` takes all arguments of the call, except those that have an option or are decided here.
    names = ("strength", "edit_strength", "num_inference_steps", "guidance_scale", "eta")
    managed = {"self", "image", "mask_image", "attributes", "edit", "generator", "latents", "batch_size", *names}
    managed |= {"num_images_per_prompt", "output_type", "return_dict", "guidance_options", "guidance_transformer"}
    managed |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs", "input_range"}
    arguments = inspect.signature(type(pipeline).__call__).parameters
    valid = (arguments.keys() | GuidanceOptions.__annotations__) - managed
    options = settings.get("options", {})
    unknown = sorted(options.keys() - valid)
    if unknown:
        raise ValueError(f"--options {', '.join(unknown)}: valid names are {', '.join(sorted(valid))}")

    # 2. Numbers and switches, by their defaults; those of `GuidanceOptions` are in the function that takes them.
    defaults = {**inspect.signature(build_guidance).parameters, **arguments}
    for name, value in options.items():
        default = defaults[name].default
        if isinstance(default, bool) and not isinstance(value, bool):
            raise ValueError(f"--options {name}: expected true or false, got {value!r}")
        if isinstance(default, float) and not isinstance(value, int | float):
            raise ValueError(f"--options {name}: expected a number, got {value!r}")
    return {name: settings[name] for name in names if name in settings} | options


def _check_options(
    pipeline: LatentDiTPipeline, inputs: Inputs, settings: dict[str, Any], call: dict[str, Any]
) -> None:
    """Refuse, before an image is generated, options of the call that would fail at some image.

    Raises:
        ValueError: for a number of steps that the scheduler does not have, or weights of attributes that no image
            requests.
    """
    mode, caller = settings["mode"], type(pipeline).__call__
    scheduler: Any = pipeline.scheduler
    if isinstance(pipeline, LatentDiTEditPipeline) or (mode == "interpolate" and inputs.images):
        scheduler = LatentDiTEditPipeline(**pipeline.components).reversible_scheduler()
    default_steps = inspect.signature(caller).parameters["num_inference_steps"].default
    check_num_inference_steps(scheduler, call.get("num_inference_steps", default_steps))

    check_attribute_weights(call.get("attribute_weights"))
    requested = {name for row in [*(inputs.rows or []), *(inputs.edits or [])] for name in row}
    unknown = sorted((call.get("attribute_weights") or {}).keys() - requested)
    if unknown:
        raise ValueError(f"--options attribute_weights: {', '.join(unknown)} is requested for no image")
    negative = call.get("negative_attributes")
    check_attributes(negative, 1, "negative_attributes")
    pipeline.encode_attributes(negative)
    if isinstance(negative, list) and mode == "interpolate":
        raise ValueError("--options negative_attributes: a film takes one row, for all frames")


def _describe_series(
    pipeline: LatentDiTPipeline, inputs: Inputs, settings: dict[str, Any], call: dict[str, Any]
) -> Series:
    """Return the series of a mode."""
    mode, seed = settings["mode"], settings["seed"]
    if mode == "generate":
        return _new_images(pipeline, inputs, seed, call)
    if mode == "interpolate":
        num_noises, num_frames = settings.get("num_images") or 2, settings.get("num_frames") or 16
        return _film(pipeline, inputs, num_noises, num_frames, seed, call, settings["batch_size"])
    return _edited_images(pipeline, inputs, seed, call)


def _new_images(pipeline: LatentDiTPipeline, inputs: Inputs, seed: int, call: dict[str, Any]) -> Series:
    """Return a series of new images; image i has row i of the attributes, starting over after the last."""
    rows = inputs.rows

    def generate(images: range) -> np.ndarray:
        return generate_images(pipeline, images, rows, seed, **call)

    def metadata(image: int) -> dict[str, Any]:
        return {"attributes": rows[image % len(rows)]} if rows else {}

    return Series(inputs.num_images, generate, metadata)


def _edited_images(pipeline: LatentDiTPipeline, inputs: Inputs, seed: int, call: dict[str, Any]) -> Series:
    """Return a series of image i with mask, row and edit i, each list starting over after its last."""
    given: dict[str, list[Any] | None] = {
        "image": inputs.images,
        "mask_image": inputs.masks,
        "attributes": inputs.rows,
        "edit": inputs.edits,
    }
    lists = {name: values for name, values in given.items() if values}
    caller: Any = pipeline  # the call of each pipeline has other arguments

    def generate(images: range) -> np.ndarray:
        chosen: dict[str, list] = {name: [values[i % len(values)] for i in images] for name, values in lists.items()}
        # An edit samples no noise, and its call takes no generator.
        if not isinstance(pipeline, LatentDiTEditPipeline):
            chosen["generator"] = generators(seed, images)
        requested = chosen.get("attributes", []) + chosen.get("edit", [])
        options = batch_options(call, requested, images)
        return to_uint8(caller(**chosen, **options, output_type="pt", return_dict=False)[0])

    def metadata(image: int) -> dict[str, Any]:
        own = {name: values[image % len(values)] for name, values in lists.items()}
        return {name: value.name if isinstance(value, Path) else value for name, value in own.items()}

    def read_given(image: int) -> Image.Image:
        pixels, _ = read_images(inputs.images[image % len(inputs.images)], *pipeline.resolution)
        return Image.fromarray(to_uint8(pixels / 2 + 0.5)[0])

    return Series(inputs.num_images, generate, metadata, given=read_given)


def _film(
    pipeline: LatentDiTPipeline,
    inputs: Inputs,
    num_noises: int,
    num_frames: int,
    seed: int,
    call: dict[str, Any],
    batch_size: int,
) -> Series:
    """Return the frames from noise to noise, or from image to image by way of the noises that generate them.

    Raises:
        ValueError: for several rows of attributes, or less than two noises, images or frames.
    """
    # 1. Check the inputs.
    rows, paths = inputs.rows, inputs.images
    if rows is not None and len(rows) > 1:
        raise ValueError("--mode interpolate takes one row of attributes, for all frames")
    attributes = rows[0] if rows else None
    num_stops = len(paths) or num_noises
    if num_stops < 2 or num_frames < 2:
        raise ValueError(
            f"--mode interpolate needs two noises or images and two frames, got {num_stops} and {num_frames}"
        )
    num_images = (num_stops - 1) * (num_frames - 1) + 1
    if num_images > MAX_IMAGES:
        raise ValueError(f"--num_images and --num_frames make {num_images:,} frames, more than {MAX_IMAGES:,}")

    # 2. Noises that were found by inversion return the images only by the steps that were inverted.
    if paths:
        call = {"num_inference_steps": 50, "guidance_scale": 1.0, **call}
        inverting = LatentDiTEditPipeline(**pipeline.components)
        pipeline.scheduler = inverting.reversible_scheduler()

    def stops(part: range) -> torch.Tensor:
        if not paths:
            return pipeline.sample_noise(len(part), generators(seed, part))
        return inverting.invert([paths[i] for i in part], attributes, call["num_inference_steps"])

    # 3. The noises of all frames, once a process, and only when the first frame is generated: an inversion takes time
    #    that a finished series does not need.
    @functools.cache
    def noises() -> torch.Tensor:
        parts = [range(start, min(start + batch_size, num_stops)) for start in range(0, num_stops, batch_size)]
        return interpolate_noises(torch.cat([stops(part) for part in parts]), num_frames)

    def generate(images: range) -> np.ndarray:
        latents = noises()[images.start : images.stop]
        (pixels,) = pipeline(attributes, len(images), latents=latents, output_type="pt", return_dict=False, **call)
        return to_uint8(pixels)

    return Series(num_images, generate, lambda image: {}, is_film=True)


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which a path of this machine is only the name of its file or folder."""
    texts = {name: settings[name] for name in _PATHS if isinstance(settings.get(name), str)}
    return settings | {name: Path(text).resolve().name for name, text in texts.items() if Path(text).exists()}
