"""What the app does with a model: images drawn, varied, changed and painted anew, and the controls it offers."""

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
# Where CelebA's attributes stand on the page; what is not among them comes last.
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
    "Worn": (
        *("Eyeglasses", "Wearing_Hat", "Wearing_Earrings", "Wearing_Necklace", "Wearing_Necktie", "Wearing_Lipstick"),
        "Heavy_Makeup",
    ),
}
OTHERS = "Others"

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Control:
    """One condition of the model as the page offers it.

    Args:
        name: The condition.
        group: The heading it stands under.
        values: What can be chosen, each with the word that stands for it; the first leaves it open.
    """

    name: str
    group: str
    values: list[tuple[str, AttributeValue]]

    @property
    def label(self) -> str:
        """The name as people write it."""
        return self.name.replace("_", " ")


@dataclass(frozen=True)
class Settings:
    """How images are sampled: see the arguments of [`LatentDiTPipeline`] and `sampling.generators`."""

    num_images: int = 4
    seed: int = 0
    num_inference_steps: int = 25
    guidance_scale: float | None = None


class Studio:
    """The four pipelines of one model. Image i of a call is a function of the seed and i.

    Args:
        pipeline: The model; the others are made of its parts.

    Raises:
        ValueError: if the pipeline has no VAE.
    """

    def __init__(self, pipeline: LatentDiTPipeline):
        if pipeline.vae is None:
            raise ValueError("this pipeline has no vae, without which there are no images")
        parts = pipeline.components
        self.text2img = LatentDiTPipeline(**parts)
        self.img2img = LatentDiTImg2ImgPipeline(**parts)
        self.inpainting = LatentDiTInpaintPipeline(**parts)
        self.editing = LatentDiTEditPipeline(**parts)
        for one in (self.text2img, self.img2img, self.inpainting, self.editing):
            one.set_progress_bar_config(disable=True)
        self.guidance_scale = float(pipeline.config.guidance_scale)
        self.num_levels = int(pipeline.scheduler.config.num_train_timesteps)
        size, factor = pipeline.transformer.config.sample_size, pipeline.image_processor.config.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        self.resolution = (height * factor, width * factor)
        labels = pipeline.config.condition_labels
        conditions = pipeline.transformer.config.conditions or {}
        self.controls = [_control(name, count, labels.get(name)) for name, count in conditions.items()]
        order = [*GROUPS, OTHERS]
        known = [name for names in GROUPS.values() for name in names]
        self.controls.sort(
            key=lambda control: (
                order.index(control.group),
                known.index(control.name) if control.name in known else len(known),
            )
        )

    def fit(self, image: Image.Image) -> Image.Image:
        """What the model sees of an image: its centre, at the model's size."""
        return Geometry(self.resolution, "center").fit(image)

    def generate(self, asked: Attributes, settings: Settings, on_step: OnStep) -> list[Image.Image]:
        """New images."""
        return self.text2img(asked or None, settings.num_images, **_options(settings, on_step))[0]

    def vary(
        self, image: Image.Image, asked: Attributes, strength: float, settings: Settings, on_step: OnStep
    ) -> list[Image.Image]:
        """An image drawn anew from `strength` noise, in several ways."""
        options = _options(settings, on_step)
        return self.img2img(asked or None, image, strength, num_images_per_prompt=settings.num_images, **options)[0]

    def edit(
        self, image: Image.Image, change: Attributes, strength: float, settings: Settings, on_step: OnStep
    ) -> list[Image.Image]:
        """An image with attributes changed, by `strength`.

        Raises:
            ValueError: if there is nothing to change.
        """
        if not change:
            raise ValueError("choose at least one attribute to change")
        options = _options(settings, on_step)
        del options["generator"]  # nothing is drawn by chance
        return self.editing(None, image, change, strength, **options)[0]

    def inpaint(
        self, image: Image.Image, mask: Image.Image, asked: Attributes, settings: Settings, on_step: OnStep
    ) -> list[Image.Image]:
        """An image painted anew where the mask is white, in several ways.

        Raises:
            ValueError: if the mask is black.
        """
        if mask.getbbox() is None:
            raise ValueError("paint over the part that is to be drawn anew")
        options = _options(settings, on_step)
        return self.inpainting(asked or None, image, mask, num_images_per_prompt=settings.num_images, **options)[0]


def read_image(path: str) -> Image.Image:
    """An uploaded image of any kind, the way up that its EXIF says, in RGB.

    Raises:
        ValueError: if it is no image, or a broken one.
    """
    return decode_image({"id": "this file", "image": {"path": path}}, Geometry(None, "none"))


def union(layers: Sequence[Image.Image], size: tuple[int, int]) -> Image.Image:
    """White where any of `layers` was painted on, black elsewhere."""
    mask = Image.new("L", size)
    for layer in layers:
        painted = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))
        mask = ImageChops.lighter(mask, ImageOps.fit(painted, size, Image.Resampling.NEAREST))
    return mask


def _control(name: str, count: int, labels: list[str] | None) -> Control:
    group = next((group for group, names in GROUPS.items() if name in names), OTHERS)
    if labels:
        values: list[tuple[str, AttributeValue]] = [(label, number) for number, label in enumerate(labels)]
    elif count == 2:
        values = [("yes", True), ("no", False)]
    else:
        values = [(str(number), number) for number in range(count)]
    return Control(name, group, [(OPEN, None), *values])


def _options(settings: Settings, on_step: OnStep) -> dict[str, Any]:
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
