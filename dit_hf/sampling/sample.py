"""`dit-hf sample`: new images, or given ones changed, in every way that the pipelines know."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from ..data.image_folder import EXTENSIONS
from ..data.transforms import Geometry, decode_image
from ..latents.reader import LatentReader
from ..pipelines.guidance import GuidanceOptions
from ..pipelines.interpolation import interpolate_noises
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..pipelines.pipeline_latent_dit_edit import LatentDiTEditPipeline
from ..pipelines.pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from ..pipelines.pipeline_latent_dit_inpaint import LatentDiTInpaintPipeline
from ..runs import load_pipeline
from ..storage import disk_errors
from .generate import generate_images, generators, model_sha256, to_uint8
from .writer import FILM, SETTINGS, SHEET, Series, write_series

Mode = Literal["generate", "img2img", "inpaint", "interpolate", "edit"]
Rows = dict[str, Any] | list[dict[str, Any]] | str | None
_PIPELINES: dict[str, type[LatentDiTPipeline]] = {
    "generate": LatentDiTPipeline,
    "img2img": LatentDiTImg2ImgPipeline,
    "inpaint": LatentDiTInpaintPipeline,
    "interpolate": LatentDiTPipeline,
    "edit": LatentDiTEditPipeline,
}
# Options that only some modes have: elsewhere they would do nothing, in silence.
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
# The stock schedulers that sample every model, with what they need beside the config: by timesteps, Heun's first step
# spans nearly all of the noise levels.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {},
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {"use_exponential_sigmas": True},
    "UniPCMultistepScheduler": {},
}
_NEEDED = {"img2img": ("image",), "inpaint": ("image", "mask_image"), "edit": ("image", "edit")}
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
    """Draw images: new ones, from given ones, between noises or images, or with attributes changed.

    Under `accelerate launch` every rank draws its part. Image i is a function of the seed and i, and a call that was
    killed goes on where it was when it is given again.

    Args:
        model: The folder of a run, of one of its checkpoints or of a pipeline, or an id of the Hub.
        output_dir: Where `00000.png` … (or `samples.npz`), `sheet.png`, `settings.json` and perhaps `film.gif` go.
        mode: `generate`, `img2img`, `inpaint`, `interpolate` or `edit`.
        num_images: How many; without it 16, or one for each image or edit. With `interpolate`, the noises to pass.
        attributes: What to ask for (with `edit`, what the images have), as JSON (`'{"Smiling": true}'` or a list of
            these), a JSON file of it, or a latent cache, whose rows are taken in order. Image i gets row i, from the
            beginning again after the last.
        image: An image or a folder of them, in the order of their names.
        mask_image: A mask (white is painted anew, what is transparent is kept), or a folder with one for each image,
            in the order of their names.
        strength: How far from the image, 0 to 1; without it the pipeline's default.
        edit: What to change, spelled like `attributes`.
        edit_strength: How much, 1 being as much as the pipeline's guidance.
        num_frames: From one noise or image to the next, both included; 16 without it.
        num_inference_steps: Denoising steps; without it the pipeline's default.
        guidance_scale: Without it the pipeline's own.
        guidance_model: A weaker model of the same conditions, from which guidance leads away (autoguidance).
        eta: 0 is deterministic, 1 as noisy as DDPM.
        options: Further options of the pipeline's call, as JSON: `guidance_rescale`, `attribute_weights`,
            `negative_attributes`, `jump_n_sample`, ...
        scheduler: A diffusers scheduler by its class, e.g. `UniPCMultistepScheduler`; without it the pipeline's.
        seed: Of the series.
        batch_size: Images at once.
        dtype: What is computed in.
        output_format: `folder` of PNG files, each with its settings in it, or one `npz` (`arr_0`, uint8
            [images, height, width, 3]).

    Raises:
        FileExistsError: if `output_dir` holds images of other settings.
        ValueError: for options that do not fit together, unknown attributes, or no such model or image.
    """
    settings = {name: value for name, value in locals().items() if name != "output_dir" and value is not None}
    _check(settings, mode)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    pipeline = _open_pipeline(model, mode, scheduler, dtype, state.device)
    call = _options_of_call(pipeline, settings)
    hashes = {"model_sha256": model_sha256(pipeline)}
    if guidance_model is not None:
        weaker = _open_pipeline(guidance_model, "generate", None, dtype, state.device)
        call["guidance_transformer"], hashes["guidance_model_sha256"] = weaker.transformer, model_sha256(weaker)
    images, masks = _image_files(image), _image_files(mask_image)
    if len(masks) > 1 and len(masks) != len(images):
        raise ValueError(f"{mask_image} holds {len(masks)} masks for {len(images)} images; want one, or one for each")
    edits = _read_rows("edit", edit, pipeline, num_images)
    count = num_images or max(len(images), len(edits or [])) or 16
    rows = _read_rows("attributes", attributes, pipeline, count)
    for asked in (rows, edits):
        pipeline.encode_attributes(asked)  # an unknown name is told before any work
    if mode == "generate":
        series = _new_images(pipeline, count, rows, seed, call)
    elif mode == "interpolate":
        series = _film(pipeline, images, num_images or 2, num_frames or 16, rows, seed, call, batch_size)
    else:
        lists = {"image": images, "mask_image": masks, "attributes": rows, "edit": edits}
        series = _changed_images(pipeline, count, {k: v for k, v in lists.items() if v}, seed, call)
    hashes["inputs_sha256"] = _inputs_sha256(rows, edits, [*images, *masks])
    folder = Path(output_dir)
    try:
        with disk_errors(f"output_dir {folder}"):
            write_series(folder, series, _portable(settings) | hashes, batch_size, output_format == "npz", state)
    except torch.OutOfMemoryError as error:
        raise OSError(f"the GPU's memory is too small for --batch_size {batch_size}; give a smaller one") from error
    if state.is_main_process:
        print(f"{folder}: {series.num_images} images; {folder / SHEET} shows the first", flush=True)
    return folder


def _check(settings: dict[str, Any], mode: str) -> None:
    """Refuse options that do not fit the mode, before any work."""
    for name, modes in _MODES_OF.items():
        if name in settings and mode not in modes:
            raise ValueError(f"--{name} is for --mode {' or '.join(modes)}, not {mode}")
    missing = [f"--{name}" for name in _NEEDED.get(mode, ()) if name not in settings]
    if missing:
        raise ValueError(f"--mode {mode} needs {' and '.join(missing)}")
    if mode == "interpolate" and "image" in settings:
        for name in ("num_images", "scheduler"):
            if name in settings:
                raise ValueError(f"--{name} is for films between noises; between images each is a stop, by DDIM")
    for name, least in (("num_images", 1), ("batch_size", 1), ("num_inference_steps", 1), ("seed", 0)):
        if settings.get(name, least) < least:
            raise ValueError(f"--{name} {settings[name]} must be at least {least}")
    for name in ("strength", "eta"):
        if not 0 <= settings.get(name, 0) <= 1:
            raise ValueError(f"--{name} {settings[name]} must be between 0 and 1")


def _open_pipeline(
    model: str, mode: str, scheduler: str | None, dtype: str, device: torch.device
) -> LatentDiTPipeline:
    loaded = load_pipeline(model, device, dtype=getattr(torch, dtype))
    if scheduler is not None:
        if scheduler not in SCHEDULERS:
            raise ValueError(f"--scheduler {scheduler} is unknown; known are {', '.join(SCHEDULERS)}")
        settings = SCHEDULERS[scheduler]
        loaded.scheduler = getattr(diffusers, scheduler).from_config(loaded.scheduler.config, **settings)
    pipeline = _PIPELINES[mode](**loaded.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _options_of_call(pipeline: LatentDiTPipeline, settings: dict[str, Any]) -> dict[str, Any]:
    """The options that go to the pipeline's call as they are."""
    names = ("strength", "edit_strength", "num_inference_steps", "guidance_scale", "eta")
    options = settings.get("options", {})
    managed = {"self", "image", "mask_image", "attributes", "edit", "generator", "latents", "batch_size", *names}
    managed |= {"num_images_per_prompt", "output_type", "return_dict", "guidance_options", "guidance_transformer"}
    managed |= {"callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    own, guidance = (inspect.signature(f).parameters for f in (type(pipeline).__call__, pipeline._prepare_guidance))
    known = (own.keys() | GuidanceOptions.__annotations__) - managed
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"--options {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    for name, value in options.items():
        if isinstance({**guidance, **own}[name].default, float) and not isinstance(value, int | float):
            raise ValueError(f"--options {name}: {value!r} is no number")
    return {name: settings[name] for name in names if name in settings} | options


def _new_images(
    pipeline: LatentDiTPipeline, count: int, rows: list[dict] | None, seed: int, call: dict[str, Any]
) -> Series:
    return Series(
        count,
        lambda images: generate_images(pipeline, images, rows, seed, **call),
        lambda image: {"attributes": rows[image % len(rows)]} if rows else {},
    )


def _changed_images(
    pipeline: LatentDiTPipeline, count: int, lists: dict[str, list], seed: int, call: dict[str, Any]
) -> Series:
    """Image i is made of the image, mask, row and edit i, each list beginning again after its last."""

    def draw_images(images: range) -> np.ndarray:
        chosen: dict[str, list] = {name: [values[i % len(values)] for i in images] for name, values in lists.items()}
        if masks := chosen.get("mask_image"):
            chosen["mask_image"] = [_open_image(path, "black").convert("L") for path in masks]
        chosen["image"] = [_open_image(path) for path in chosen["image"]]
        if not isinstance(pipeline, LatentDiTEditPipeline):  # which draws no noise
            chosen["generator"] = generators(seed, images)
        changed: Any = pipeline  # each of diffusers' pipelines has a call of its own
        return to_uint8(changed(**chosen, **call, output_type="pt", return_dict=False)[0])

    def facts(image: int) -> dict[str, Any]:
        own = {name: values[image % len(values)] for name, values in lists.items()}
        return {name: value.name if isinstance(value, Path) else value for name, value in own.items()}

    return Series(count, draw_images, facts)


def _film(
    pipeline: LatentDiTPipeline,
    pictures: list[Path],
    num_noises: int,
    num_frames: int,
    rows: list[dict] | None,
    seed: int,
    call: dict[str, Any],
    batch_size: int,
) -> Series:
    """Frames from noise to noise, or from image to image over the noises that give them."""
    if rows is not None and len(rows) > 1:
        raise ValueError("--mode interpolate takes one row of attributes, for all frames")
    stops, attributes = len(pictures) or num_noises, rows[0] if rows else None
    if stops < 2 or num_frames < 2:
        raise ValueError(
            f"--mode interpolate needs two noises or images and two frames; these are {stops} and {num_frames}"
        )
    if pictures:
        call = {"num_inference_steps": 50, "guidance_scale": 1.0, **call}
        inverting = LatentDiTEditPipeline(**pipeline.components)
        # The noises give the images back by the steps that they are found by.
        pipeline.scheduler = inverting.reversible_scheduler()

    @functools.cache
    def frames() -> torch.Tensor:
        """All noises; of images they are sought when the first frame is drawn."""
        parts = [range(start, min(start + batch_size, stops)) for start in range(0, stops, batch_size)]
        if not pictures:
            noises = [pipeline.sample_noise(len(part), generators(seed, part)) for part in parts]
        else:
            given = [[_open_image(pictures[i]) for i in part] for part in parts]
            noises = [inverting.invert(part, attributes, call["num_inference_steps"]) for part in given]
        return interpolate_noises(torch.cat(noises), num_frames)

    def draw_frames(images: range) -> np.ndarray:
        noises = frames()[images.start : images.stop]
        (pixels,) = pipeline(attributes, len(images), latents=noises, output_type="pt", return_dict=False, **call)
        return to_uint8(pixels)

    return Series((stops - 1) * (num_frames - 1) + 1, draw_frames, lambda image: {}, is_film=True)


def _read_rows(
    option: str, given: Rows, pipeline: LatentDiTPipeline, count: int | None
) -> list[dict[str, Any]] | None:
    """Rows of attributes from JSON, a JSON file, or the first `count` of a latent cache (None is its first)."""
    if isinstance(given, str):
        if Path(given).is_dir():
            known = list(pipeline.transformer.config.conditions or {})
            return LatentReader(given, conditions=known).attributes(count or 1, pipeline.config.condition_labels)
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--{option} {given}: neither JSON, nor a file of it, nor a latent cache") from error
    rows = [given] if isinstance(given, dict) else given
    if rows is not None and not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'--{option} {given!r}: expected a dict like {{"Smiling": true}}, or a list of them')
    return rows


def _image_files(given: str | None) -> list[Path]:
    """An image, or those of a folder in the order of their names; of what `sample` wrote the numbered ones."""
    if given is None:
        return []
    path = Path(given)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    left_out = {SHEET, FILM} if (path / SETTINGS).is_file() else set()
    files = [p for p in files if not p.name.startswith(".") and p.name not in left_out]
    found = [p for p in files if p.is_file() and p.suffix.lower() in EXTENSIONS]
    if not found:
        raise ValueError(f"{path}: no image there ({', '.join(EXTENSIONS)})")
    return found


def _open_image(path: Path, background: str = "white") -> Image.Image:
    """As images are read for a latent cache, which are on white; a mask of strokes on nothing is on black."""
    return decode_image({"id": str(path), "image": {"path": str(path)}}, Geometry(None, "none", background))


def _inputs_sha256(rows: list[dict] | None, edits: list[dict] | None, pictures: list[Path]) -> str:
    """Of what a series is drawn from besides the model: attributes, and names and sizes of images."""
    files = [(path.name, path.stat().st_size) for path in pictures]
    return hashlib.sha256(json.dumps([rows, edits, files]).encode()).hexdigest()


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with what lies on this machine by its own name alone."""
    texts = {name: settings[name] for name in _PATHS if isinstance(settings.get(name), str)}
    return settings | {name: Path(text).resolve().name for name, text in texts.items() if Path(text).exists()}
