"""`dit-hf sample`: new pictures, or given ones changed, in every way that the pipelines know."""

from __future__ import annotations

import inspect
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image, ImageOps

from .data.folders import EXTENSIONS
from .data.reader import LatentReader
from .pipelines.pipeline_latent_dit import GuidanceOptions, LatentDiTPipeline, interpolate_noises
from .pipelines.pipeline_latent_dit_edit import LatentDiTEditPipeline
from .pipelines.pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from .pipelines.pipeline_latent_dit_inpaint import LatentDiTInpaintPipeline
from .sampling import draw, generators, load_pipeline, to_uint8
from .schedulers.scheduling_cosine_latent import CosineLatentScheduler
from .series import Series, write_series
from .storage import disk_errors

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
    "eta": ("generate", "img2img", "inpaint", "interpolate"),
}
# What stock schedulers need beside the config: by timesteps, Heun's first step spans nearly all of the noise levels.
SCHEDULER_SETTINGS = {"HeunDiscreteScheduler": {"use_exponential_sigmas": True}}
_NEEDED = {"img2img": ("image",), "inpaint": ("image", "mask_image"), "edit": ("image", "edit")}
_PATHS = ("model", "image", "mask_image", "guidance_model")


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
    """Draw pictures: new ones, from given ones, between noises or pictures, or with attributes changed.

    Under `accelerate launch` every rank draws its part. Picture i is a function of the seed and i, and a call that was
    killed goes on where it was when it is given again.

    Args:
        model: The folder of a run or of a pipeline, or an id of the Hub.
        output_dir: Where `00000.png` … (or `samples.npz`), `sheet.png`, `settings.json` and perhaps `film.gif` go.
        mode: `generate`, `img2img`, `inpaint`, `interpolate` or `edit`.
        num_images: How many; without it 16, or one for each picture. With `interpolate`, the noises on the way.
        attributes: What to ask for (with `edit`, what the pictures have), as JSON (`'{"Smiling": true}'` or a list of
            these), a JSON file of it, or a latent cache, whose rows are taken in order. Picture i gets row i, from the
            beginning again after the last.
        image: A picture or a folder of them, in the order of their names.
        mask_image: A mask (white is painted anew), or a folder with one for each picture.
        strength: How far from the picture, 0 to 1; without it the pipeline's default.
        edit: What to change, spelled like `attributes`.
        edit_strength: How much, 1 being as much as the pipeline's guidance.
        num_frames: From one noise or picture to the next, both included; 16 without it.
        num_inference_steps: Denoising steps; without it the pipeline's default.
        guidance_scale: Without it the pipeline's own.
        guidance_model: A weaker model of the same conditions, from which guidance leads away (autoguidance).
        eta: 0 is deterministic DDIM, 1 as noisy as DDPM.
        options: Further options of the pipeline's call, as JSON: `guidance_rescale`, `attribute_weights`,
            `negative_attributes`, `jump_n_sample`, ...
        scheduler: A diffusers scheduler by its class, e.g. `DPMSolverMultistepScheduler`; without it the pipeline's.
        seed: Of the series.
        batch_size: Pictures at once.
        dtype: What is computed in.
        output_format: `folder` of PNG files, each with its settings in it, or one `npz` (`arr_0`, uint8
            [images, height, width, 3]).

    Raises:
        FileExistsError: if `output_dir` holds pictures of other settings.
        ValueError: for options that do not fit together, unknown attributes, or no such model or picture.
    """
    settings = {name: value for name, value in locals().items() if name != "output_dir" and value is not None}
    _check(settings, mode)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    pipeline = _open_pipeline(model, mode, scheduler, dtype, state.device)
    call = _options_of_call(pipeline, settings)
    if guidance_model is not None:
        weaker = _open_pipeline(guidance_model, "generate", None, dtype, state.device)
        call["guidance_transformer"] = weaker.transformer
    images, masks = _picture_files(image), _picture_files(mask_image)
    count = num_images or len(images) or 16
    rows, edits = _read_rows("attributes", attributes, count), _read_rows("edit", edit, count)
    pipeline.encode_attributes(rows)  # an unknown name is told before any work
    if mode == "generate":
        series = _new_pictures(pipeline, count, rows, seed, call)
    elif mode == "interpolate":
        series = _film(pipeline, images, num_images or 2, num_frames or 16, rows, seed, call)
    else:
        lists = {"image": images, "mask_image": masks, "attributes": rows, "edit": edits}
        series = _changed_pictures(pipeline, count, {k: v for k, v in lists.items() if v}, seed, call)
    folder = Path(output_dir)
    with disk_errors(f"output_dir {folder}"):
        write_series(folder, series, _portable(settings), batch_size, output_format == "npz", state)
    if state.is_main_process:
        print(f"{folder}: {series.num_images} pictures; {folder / 'sheet.png'} shows the first", flush=True)
    return folder


def _check(settings: dict[str, Any], mode: str) -> None:
    """Refuse options that do not fit the mode, before any work."""
    for name, modes in _MODES_OF.items():
        if name in settings and mode not in modes:
            raise ValueError(f"--{name} is for --mode {' or '.join(modes)}, not {mode}")
    missing = [f"--{name}" for name in _NEEDED.get(mode, ()) if name not in settings]
    if missing:
        raise ValueError(f"--mode {mode} needs {' and '.join(missing)}")
    for name in ("num_images", "batch_size", "num_inference_steps"):
        if settings.get(name, 1) < 1:
            raise ValueError(f"--{name} {settings[name]} must be at least 1")


def _open_pipeline(
    model: str, mode: str, scheduler: str | None, dtype: str, device: torch.device
) -> LatentDiTPipeline:
    loaded = load_pipeline(model, device, dtype=getattr(torch, dtype))
    if scheduler is not None:
        known = sorted(one.__name__ for one in loaded.scheduler.compatibles)
        if scheduler not in known:
            raise ValueError(f"--scheduler {scheduler} is unknown; known are {', '.join(known)}")
        settings = SCHEDULER_SETTINGS.get(scheduler, {})
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
    known = (inspect.signature(type(pipeline).__call__).parameters.keys() | GuidanceOptions.__annotations__) - managed
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"--options {', '.join(unknown)}: known are {', '.join(sorted(known))}")
    return {name: settings[name] for name in names if name in settings} | options


def _new_pictures(
    pipeline: LatentDiTPipeline, count: int, rows: list[dict] | None, seed: int, call: dict[str, Any]
) -> Series:
    return Series(
        count,
        lambda images: draw(pipeline, images, rows, seed, **call),
        lambda image: {"attributes": rows[image % len(rows)]} if rows else {},
    )


def _changed_pictures(
    pipeline: LatentDiTPipeline, count: int, lists: dict[str, list], seed: int, call: dict[str, Any]
) -> Series:
    """Picture i is made of the picture, mask, row and edit i, each list beginning again after its last."""

    def draw_images(images: range) -> np.ndarray:
        chosen: dict[str, list] = {name: [values[i % len(values)] for i in images] for name, values in lists.items()}
        for name in ("image", "mask_image"):
            if name in chosen:
                chosen[name] = [_open_picture(path) for path in chosen[name]]
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
) -> Series:
    """Frames from noise to noise, or from picture to picture over the noises that give them."""
    if rows is not None and len(rows) > 1:
        raise ValueError("--mode interpolate takes one row of attributes, for all frames")
    attributes = rows[0] if rows else None
    if pictures:
        inverting = LatentDiTEditPipeline(**pipeline.components)
        call = {"num_inference_steps": 50, "guidance_scale": 1.0, **call}
        # The noises give the pictures back by the steps that they were found by.
        pipeline.scheduler = CosineLatentScheduler.from_config(pipeline.scheduler.config, multistep=False)
        noises = inverting.invert([_open_picture(p) for p in pictures], attributes, call["num_inference_steps"])
    else:
        noises = torch.cat([pipeline.draw_noise(1, one) for one in generators(seed, range(num_noises))])
    frames = interpolate_noises(noises, num_frames)

    def draw_frames(images: range) -> np.ndarray:
        noises = frames[images.start : images.stop]
        (pixels,) = pipeline(attributes, len(images), latents=noises, output_type="pt", return_dict=False, **call)
        return to_uint8(pixels)

    return Series(len(frames), draw_frames, lambda image: {}, is_film=True)


def _read_rows(option: str, given: Rows, count: int) -> list[dict[str, Any]] | None:
    """Rows of attributes from JSON, a JSON file, or the first `count` of a latent cache."""
    if isinstance(given, str):
        if Path(given).is_dir():
            return LatentReader(given).attributes(count)
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--{option} {given}: neither JSON, nor a file of it, nor a latent cache") from error
    rows = [given] if isinstance(given, dict) else given
    if rows is not None and not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'--{option} {given!r}: expected a dict like {{"Smiling": true}}, or a list of them')
    return rows


def _picture_files(given: str | None) -> list[Path]:
    """A picture, or those of a folder in the order of their names."""
    if given is None:
        return []
    path = Path(given)
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise ValueError(f"{path}: no picture there ({', '.join(EXTENSIONS)})")
    return found


def _open_picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except OSError as error:
        raise ValueError(f"{path}: no picture that can be read ({error})") from error


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with what lies on this machine by its own name alone."""
    on_disk = {name: Path(settings[name]) for name in _PATHS if name in settings}
    return settings | {name: path.resolve().name for name, path in on_disk.items() if path.exists()}
