"""The model behind the app: it generates, varies, edits and inpaints images, and describes its controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageChops, ImageOps

from ..data.transforms import Geometry, decode_image
from ..pipelines.attributes import Attributes, AttributeValue
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..pipelines.pipeline_latent_dit_edit import LatentDiTEditPipeline
from ..pipelines.pipeline_latent_dit_img2img import LatentDiTImg2ImgPipeline
from ..pipelines.pipeline_latent_dit_inpaint import LatentDiTInpaintPipeline
from ..sampling.generate import generators

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

OnStep = Callable[[int, int], None]


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

    num_images: int = 4
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None


class Studio:
    """The four pipelines of one model. Image i of a call is a function of the seed and i.

    Args:
        pipeline: The model; the other pipelines share its components.

    Raises:
        ValueError: if the pipeline has no VAE.
    """

    def __init__(self, pipeline: LatentDiTPipeline):
        if pipeline.vae is None:
            raise ValueError("this pipeline has no vae, without which there are no images")

        # 1. One pipeline a mode; the page shows their progress itself.
        parts = pipeline.components
        self.text2img = LatentDiTPipeline(**parts)
        self.img2img = LatentDiTImg2ImgPipeline(**parts)
        self.inpainting = LatentDiTInpaintPipeline(**parts)
        self.editing = LatentDiTEditPipeline(**parts)
        for one in (self.text2img, self.img2img, self.inpainting, self.editing):
            one.set_progress_bar_config(disable=True)

        # 2. Defaults and bounds of the page's sliders.
        self.guidance_scale = float(pipeline.config.guidance_scale)
        self.num_levels = int(pipeline.scheduler.config.num_train_timesteps)
        self.resolution = pipeline.resolution

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

    def generate(self, attributes: Attributes, settings: Settings, on_step: OnStep) -> list[Image.Image]:
        """Generate new images."""
        return self.text2img(attributes or None, settings.num_images, **_options(settings, on_step))[0]

    def vary(
        self, image: Image.Image, attributes: Attributes, strength: float, settings: Settings, on_step: OnStep
    ) -> list[Image.Image]:
        """Generate variations of an image, from a share of `strength` noise."""
        options = _options(settings, on_step)
        count = settings.num_images
        return self.img2img(attributes or None, image, strength, num_images_per_prompt=count, **options)[0]

    def edit(
        self, image: Image.Image, change: Attributes, strength: float, settings: Settings, on_step: OnStep
    ) -> list[Image.Image]:
        """Edit attributes of an image, by `strength`.

        Raises:
            ValueError: if there is nothing to change.
        """
        if not change:
            raise ValueError("choose at least one attribute to edit")
        options = _options(settings, on_step)
        del options["generator"]  # an edit samples no noise
        return self.editing(None, image, change, strength, **options)[0]

    def inpaint(
        self, image: Image.Image, mask: Image.Image, attributes: Attributes, settings: Settings, on_step: OnStep
    ) -> list[Image.Image]:
        """Inpaint an image where the mask is white, in several ways.

        Raises:
            ValueError: if the mask is black.
        """
        if mask.getbbox() is None:
            raise ValueError("paint over the part of the image that is to be inpainted")
        options = _options(settings, on_step)
        count = settings.num_images
        return self.inpainting(attributes or None, image, mask, num_images_per_prompt=count, **options)[0]


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


def _options(settings: Settings, on_step: OnStep) -> dict[str, Any]:
    """Return the keywords that all of the pipelines' calls have; `on_step` gets the step and the number of steps."""

    def callback(pipeline: LatentDiTPipeline, step: int, _timestep: Any, tensors: dict) -> dict:
        on_step(step + 1, pipeline.num_timesteps)
        return tensors

    return {
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "generator": generators(settings.seed, range(settings.num_images)),
        "callback_on_step_end": callback,
        "return_dict": False,
    }
