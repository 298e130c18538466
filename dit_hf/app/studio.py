"""The model behind the app: its controls, and calls that generate, edit, vary, inpaint and interpolate images."""

from __future__ import annotations

import functools
import json
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps

from ..data.transforms import Geometry, decode_image
from ..pipelines.attributes import Attributes, AttributeValue
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..sampling.generate import generators
from ..sampling.sample import PIPELINES
from ..sampling.writer import PNG_TEXT
from ..schedulers.scheduling_cosine_latent import CosineLatentScheduler

OPEN = "any"
# The groups of CelebA's attributes on the page, in this order; other conditions come last.
GROUPS = {
    "Face": (
        *("Smiling", "Mouth_Slightly_Open", "Male", "Young", "Attractive", "Pale_Skin", "Rosy_Cheeks", "Narrow_Eyes"),
        *("Bags_Under_Eyes", "Arched_Eyebrows", "Bushy_Eyebrows", "Big_Lips", "Big_Nose", "Pointy_Nose", "Oval_Face"),
        *("High_Cheekbones", "Chubby", "Double_Chin"),
    ),
    "Hair": (
        *("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Wavy_Hair", "Straight_Hair", "Bangs", "Bald"),
        "Receding_Hairline",
    ),
    "Beard": ("Mustache", "Goatee", "Sideburns", "5_o_Clock_Shadow", "No_Beard"),
    "Accessories": (
        *("Eyeglasses", "Wearing_Hat", "Wearing_Earrings", "Wearing_Necklace", "Wearing_Necktie", "Wearing_Lipstick"),
        "Heavy_Makeup",
    ),
}
OTHERS = "Others"

# How often a step of inpainting is done, so that both parts fit; there are as many fewer steps.
INPAINT_REPEATS = 2
# A preview is decoded once at least this many times its own duration has passed since the last one.
PREVIEW_INTERVAL = 4


@dataclass(frozen=True)
class Control:
    """The control of one condition of the model.

    Args:
        name: The name of the condition.
        group: The heading on the page.
        values: Label and value of each choice; the first is the null condition.
    """

    name: str
    group: str
    values: list[tuple[str, AttributeValue]]

    @property
    def label(self) -> str:
        """The name with spaces."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Settings:
    """Settings of sampling; see the arguments of [`LatentDiTPipeline`] and `sampling.generate.generators`."""

    num_images: int = 8
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Args:
        mode: A key of `PIPELINES`, as in `dit-hf sample --mode`.
        settings: Settings of sampling.
        arguments: Further arguments of the pipeline's call, or of `interpolate`.
    """

    mode: str
    settings: Settings
    arguments: dict[str, Any]

    def options(self) -> dict[str, Any]:
        """Return the arguments of the pipeline's call, but for its generator."""
        settings = self.settings
        own = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
        return {name: value for name, value in {**own, **self.arguments}.items() if value is not None}

    def metadata(self, image_number: int) -> dict[str, Any]:
        """Return what the PNG of an image says of it, with the keys of `dit-hf sample`."""
        options = {name: value for name, value in self.options().items() if not isinstance(value, Image.Image)}
        return {"mode": self.mode, **options, "seed": self.settings.seed, "image_number": image_number}


@dataclass(frozen=True)
class Update:
    """How far a call is.

    Args:
        step: Number of steps done.
        num_steps: Number of steps in all.
        images: A preview, or none; at last the results.
        is_last: True for the results.
    """

    step: int
    num_steps: int
    images: list[Image.Image] = field(default_factory=list)
    is_last: bool = False


class Stopped(Exception):
    """Raised inside a call whose results nobody waits for any more."""


class Studio:
    """One model. Image i of a call is a function of the seed and i.

    Args:
        pipeline: The model; the pipelines of all modes share its components.

    Raises:
        ValueError: if the pipeline has no VAE.
    """

    def __init__(self, pipeline: LatentDiTPipeline):
        if pipeline.vae is None:
            raise ValueError("this pipeline has no vae, without which there are no images")

        # 1. One pipeline a mode; the page shows their progress itself. One thread, because they share a scheduler.
        self.pipelines = {mode: kind(**pipeline.components) for mode, kind in PIPELINES.items()}
        for one in self.pipelines.values():
            one.set_progress_bar_config(disable=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._closed = threading.Event()

        # 2. Defaults and bounds of the page's sliders.
        self.guidance_scale = float(pipeline.config.guidance_scale)
        self.num_levels = int(pipeline.scheduler.config.num_train_timesteps)
        self.num_inference_steps = min(25, self.num_levels)
        self.resolution = pipeline.resolution
        self.num_parameters = sum(p.numel() for p in pipeline.transformer.parameters())

        # 3. The controls, in the order of `GROUPS`; conditions that are not in there keep the model's order.
        labels = pipeline.config.condition_labels
        conditions = pipeline.transformer.config.conditions or {}
        self.controls = [_control(name, count, labels.get(name)) for name, count in conditions.items()]
        groups = [*GROUPS, OTHERS]
        celeba_names = [name for names in GROUPS.values() for name in names]
        self.controls.sort(
            key=lambda control: (
                groups.index(control.group),
                celeba_names.index(control.name) if control.name in celeba_names else len(celeba_names),
            )
        )

    def fit(self, image: Image.Image) -> Image.Image:
        """Return an image as the model gets it: its centre, at the model's size."""
        return Geometry(self.resolution, "center").fit(image)

    def generate(self, attributes: Attributes, settings: Settings) -> Call:
        """Return the call that generates new images."""
        return Call("generate", settings, {"attributes": attributes or None, "batch_size": settings.num_images})

    def vary(self, image: Image.Image, attributes: Attributes, strength: float, settings: Settings) -> Call:
        """Return the call that generates variations of an image, from a share of `strength` noise."""
        arguments = {"attributes": attributes or None, "image": image, "strength": strength}
        return Call("img2img", settings, {**arguments, "num_images_per_prompt": settings.num_images})

    def edit(self, image: Image.Image, change: Attributes, edit_strength: float, settings: Settings) -> Call:
        """Return the call that edits attributes of an image, by `edit_strength`.

        Raises:
            ValueError: if there is nothing to change.
        """
        if not change:
            raise ValueError("choose at least one attribute to edit")
        return Call("edit", settings, {"image": image, "edit": change, "edit_strength": edit_strength})

    def inpaint(self, image: Image.Image, mask: Image.Image, attributes: Attributes, settings: Settings) -> Call:
        """Return the call that inpaints an image where the mask is white, in several ways.

        Raises:
            ValueError: if the mask is black.
        """
        if mask.getbbox() is None:
            raise ValueError("paint over the part of the image that is to be inpainted")
        repeats = INPAINT_REPEATS if isinstance(self.pipelines["inpaint"].scheduler, CosineLatentScheduler) else 1
        repeats = min(repeats, settings.num_inference_steps)
        arguments = {
            "attributes": attributes or None,
            "image": image,
            "mask_image": _feather(mask, *self.resolution),
            "num_inference_steps": settings.num_inference_steps // repeats,
            "jump_n_sample": repeats,
            "num_images_per_prompt": settings.num_images,
        }
        return Call("inpaint", settings, arguments)

    def interpolate(self, attributes: Attributes, num_frames: int, settings: Settings) -> Call:
        """Return the call that generates a film from the first to the second image of a seed."""
        return Call("interpolate", settings, {"attributes": attributes or None, "num_frames": num_frames})

    def examples(self) -> list[Image.Image]:
        """Return the images that the page shows at first, which are generated once."""
        return self._examples.result()

    @functools.cached_property
    def _examples(self) -> Future[list[Image.Image]]:
        settings = Settings(num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale)
        return self._submit(self.generate({}, settings), lambda update: None, self._closed)

    def run(self, call: Call) -> Generator[Update]:
        """Run a call and yield how far it is; closing the iterator stops it."""
        updates: queue.SimpleQueue[Update | None] = queue.SimpleQueue()
        stopped = threading.Event()
        images = self._submit(call, updates.put, stopped)
        images.add_done_callback(lambda _: updates.put(None))
        last = Update(0, 0)
        try:
            yield last
            for last in iter(updates.get, None):
                yield last
            yield Update(last.num_steps, last.num_steps, images.result(), is_last=True)
        finally:
            stopped.set()
            images.cancel()

    def close(self) -> None:
        """Stop what is under way."""
        self._closed.set()
        self._thread.shutdown(cancel_futures=True)

    def _submit(
        self, call: Call, report: Callable[[Update], None], stopped: threading.Event
    ) -> Future[list[Image.Image]]:
        """Run a call in the model's thread, after those before it."""

        def perform() -> list[Image.Image]:
            images = self._perform(call, _callback(report, lambda: stopped.is_set() or self._closed.is_set()))
            for number, image in enumerate(images):
                image.info[PNG_TEXT] = json.dumps(call.metadata(number))
            return images

        return self._thread.submit(perform)

    def _perform(self, call: Call, callback: Callable) -> list[Image.Image]:
        """Call the pipeline of a mode."""
        pipeline: Any = self.pipelines[call.mode]
        options = {**call.options(), "callback_on_step_end": callback}
        seed = call.settings.seed
        if call.mode == "interpolate":
            return pipeline.interpolate(latents=pipeline.sample_noise(2, generators(seed, range(2))), **options)
        if call.mode != "edit":  # an edit samples no noise
            options["generator"] = generators(seed, range(call.settings.num_images))
        return pipeline(**options).images


def read_image(path: str) -> Image.Image:
    """Read an uploaded image of any kind, upright by its EXIF, in RGB.

    Raises:
        ValueError: if it is not an image, or a broken one.
    """
    return decode_image({"id": "this file", "image": {"path": path}}, Geometry(None, "none"))


def union(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """Return a mask of `size` that is white where any of `layers` was painted on, and black elsewhere."""
    mask = Image.new("L", size)
    for layer in layers:
        # Browsers that blur fingerprints add 1 to the alpha of pixels at random.
        painted = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 16))
        mask = ImageChops.lighter(mask, ImageOps.fit(painted, size, Image.Resampling.NEAREST))
    return mask


def _feather(mask: Image.Image, height: int, width: int) -> Image.Image:
    """Return a mask at the model's size, with a soft edge outside of what is white."""
    radius = min(height, width) // 64
    mask = ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST)
    if radius == 0:  # for which Pillow (12) divides by 0 and ends the process
        return mask
    return mask.filter(ImageFilter.MaxFilter(2 * radius + 1)).filter(ImageFilter.GaussianBlur(radius))


def _control(name: str, count: int, labels: list[str] | None) -> Control:
    """Return the control of a condition with `count` values; labels or numbers, and yes or no for an attribute."""
    group = next((group for group, names in GROUPS.items() if name in names), OTHERS)
    if labels:
        values: list[tuple[str, AttributeValue]] = [(label, number) for number, label in enumerate(labels)]
    elif count == 2:
        values = [("yes", True), ("no", False)]
    else:
        values = [(str(number), number) for number in range(count)]
    return Control(name, group, [(OPEN, None), *values])


def _callback(report: Callable[[Update], None], is_stopped: Callable[[], bool]) -> Callable:
    """Return a `callback_on_step_end` that reports every step, some of them with a preview, until it is stopped."""
    next_preview = 0.0

    def callback(pipeline: LatentDiTPipeline, step: int, _timestep: torch.Tensor, tensors: dict) -> dict:
        nonlocal next_preview
        if is_stopped():
            raise Stopped
        start, images = time.monotonic(), []
        if start >= next_preview and step + 1 < pipeline.num_timesteps:
            images = pipeline.decode_latents(tensors["latents"])
            end = time.monotonic()
            next_preview = end + PREVIEW_INTERVAL * (end - start)
        report(Update(step + 1, pipeline.num_timesteps, images))
        return tensors

    return callback
