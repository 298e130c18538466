"""Avatars, the embedded dataset: cartoon faces with 22 of CelebA's attributes, rendered when they are needed.

The artwork is Avataaars by Pablo Stanley (https://avataaars.com, free for personal and commercial use) as packaged by
DiceBear and rendered by resvg. Face i of a seed is a pure function of (seed, i): no download, no network, and the same
images on every machine.
"""

from __future__ import annotations

import functools
import io
import json
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import resvg_py
from datasets import Dataset, Features, Image, Value, config
from datasets.exceptions import DatasetGenerationError
from dicebear import Avatar, Style
from PIL import Image as PILImage
from PIL import ImageOps

from ..processes import start_worker
from ..storage import first_line

_MAX_AVATARS = 10_000_000

# The parts of the artwork by the attribute that they show. Parts that no attribute of CelebA describes (hijab and
# turban, an eye patch, crossed-out eyes) are left out. Order and repetitions decide which face a seed gives.
_HATS = ["hat", "winterHat02", "winterHat03", "winterHat04", "winterHat1"]
_BANGS = ["bob", "longButNotTooLong", "miaWallace", "shaggy", "shaggyMullet", "straightAndStrand"]
_WAVY = ["bigHair", "curly", "curvy", "dreads", "dreads01", "dreads02", "fro", "froBand", "shortCurly", "shortWaved"]
_STRAIGHT = ["bob", "longButNotTooLong", "miaWallace", "straight01", "straight02", "straightAndStrand", "shortFlat"]
_STRAIGHT += ["shortRound", "theCaesar", "theCaesarAndSidePart"]
_SHORT = ["dreads01", "frizzle", "shaggy", "shaggyMullet", "shortCurly", "shortFlat", "shortRound", "shortWaved"]
_SHORT += ["theCaesar", "theCaesarAndSidePart"]
_LONG = ["bigHair", "bob", "bun", "curly", "curvy", "dreads", "dreads02", "fro", "froBand", "longButNotTooLong"]
_LONG += ["miaWallace", "shavedSides", "straight01", "straight02", "straightAndStrand"]
_GLASSES = ["kurt", "prescription01", "prescription02", "round", "sunglasses", "wayfarers"]
_SMILES = {"default", "smile", "twinkle"}
_OPEN_MOUTHS = {"concerned", "default", "disbelief", "screamOpen", "smile"}
_MOUTHS = ["default", "smile", "twinkle", "default", "smile", "twinkle", "concerned", "disbelief", "sad", "screamOpen"]
_MOUTHS += ["serious"]
_NARROW_EYES = ["closed", "happy", "squint"]
_WIDE_EYES = ["default", "default", "side", "surprised"]
_ARCHED_BROWS = {"raisedExcited", "raisedExcitedNatural"}
_BUSHY_BROWS = {"defaultNatural", "flatNatural", "frownNatural"}
_BROWS = ["default", "default", "sadConcerned", "upDown", *sorted(_ARCHED_BROWS), *sorted(_BUSHY_BROWS)]
_HAIR = {
    "Black_Hair": ["#2c1b18"],
    "Brown_Hair": ["#a55728", "#724133", "#4a312c"],
    "Blond_Hair": ["#b58143", "#d6b370"],
    "Gray_Hair": ["#e8e1e1"],
    "": ["#c93305"],  # CelebA has no attribute for red hair
}
_HAIR_WEIGHTS = [30, 25, 25, 12, 8]
_PALE_SKIN = "#ffdbb4"
_SKINS = ["#614335", "#ae5d29", "#d08b5b", "#edb98a", _PALE_SKIN]
_CLOTH_COLORS = ["#262e33", "#65c9ff", "#5199e4", "#25557c", "#929598", "#a7ffc4", "#ff488e", "#ff5c5c", "#ffffff"]
_HAT_COLORS = ["#262e33", "#65c9ff", "#5199e4", "#25557c", "#929598", "#ff488e", "#ff5c5c"]
_FRAME_COLORS = ["#262e33", "#25557c", "#3c4f5c", "#ff488e", "#ff5c5c"]
_BACKGROUNDS = ["#f4f1ea", "#dbe7f0", "#cfe3d6", "#f3dfc1", "#e3d7ee", "#f6d5d5", "#c9d6df", "#b8c4bb"]
_CLOTHES = ["blazerAndShirt", "blazerAndSweater", "collarAndSweater", "hoodie", "overall", "shirtCrewNeck"]
_CLOTHES += ["shirtScoopNeck", "shirtVNeck"]

ATTRIBUTES = (
    *("Male", "Eyeglasses", "Smiling", "Mouth_Slightly_Open", "Wearing_Hat", "Bald", "Receding_Hairline", "Bangs"),
    *("Wavy_Hair", "Straight_Hair", "Mustache", "No_Beard", "5_o_Clock_Shadow", "Narrow_Eyes", "Arched_Eyebrows"),
    *("Bushy_Eyebrows", "Pale_Skin", "Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Young"),
)
"""Names of the 22 attributes, spelled as in CelebA, in the order of the dataset's columns."""


@dataclass(frozen=True)
class Face:
    """Description of one avatar.

    Attributes:
        options: DiceBear's options.
        crop: (x, y, side) of the visible square on a canvas of 280 x 280 units.
        mirrored: Whether the image is mirrored.
        attributes: 1 or 0 for each of `ATTRIBUTES`.
    """

    options: dict[str, Any]
    crop: tuple[float, float, float]
    mirrored: bool
    attributes: dict[str, int]


@dataclass(frozen=True)
class _Parts:
    """Parts of one face; None is no such part, and as `top` a bald head."""

    male: bool
    top: str | None
    beard: str | None
    hair_name: str
    hair_color: str
    skin: str
    glasses: str | None
    mouth: str
    eyes: str
    brows: str


def _choose_parts(rng: random.Random) -> _Parts:
    """Choose the sex, which decides about hair and beard, and the other parts of a face.

    The order of the calls of `rng` must not change: it decides which face a seed gives.
    """
    # Head; "sides" is a receding hairline.
    male = rng.random() < 0.5
    tops: list[tuple[list, int]] = (
        [([None], 9), (["sides"], 9), (_HATS, 20), (_SHORT, 62)] if male else [(_HATS, 20), (_LONG, 72), (_SHORT, 8)]
    )
    top = rng.choice(rng.choices([names for names, _ in tops], [weight for _, weight in tops])[0])

    # Beard and hair.
    beards = [(None, 50), ("beardLight", 14), ("beardMedium", 8), ("beardMajestic", 6)]
    beards += [("moustacheFancy", 11), ("moustacheMagnum", 11)]
    beard = rng.choices([name for name, _ in beards], [weight for _, weight in beards])[0] if male else None
    hair_name = rng.choices(list(_HAIR), _HAIR_WEIGHTS)[0]
    hair_color = rng.choice(_HAIR[hair_name])

    # Face.
    skin = rng.choice(_SKINS)
    glasses = rng.choice(_GLASSES) if rng.random() < 0.3 else None
    mouth = rng.choice(_MOUTHS)
    eyes = rng.choice(_NARROW_EYES if rng.random() < 0.25 else _WIDE_EYES)
    brows = rng.choice(_BROWS)
    return _Parts(male, top, beard, hair_name, hair_color, skin, glasses, mouth, eyes, brows)


def choose_face(seed: int, index: int) -> Face:
    """Choose face number `index` of `seed`.

    As in `_choose_parts`, the order of the calls of `rng` must not change.
    """
    rng = random.Random(f"{seed}-{index}")
    parts = _choose_parts(rng)
    options = {
        **_variant("top", parts.top),
        **_variant("facialHair", parts.beard),
        **_variant("accessories", parts.glasses),
        **_variant("mouth", parts.mouth),
        **_variant("eyes", parts.eyes),
        **_variant("eyebrows", parts.brows),
        **_variant("clothes", rng.choice(_CLOTHES)),
        "seed": f"{seed}-{index}",
        "hairColor": [parts.hair_color],
        "facialHairColor": [parts.hair_color],
        "skinColor": [parts.skin],
        "clothesColor": [rng.choice(_CLOTH_COLORS)],
        "hatColor": [rng.choice(_HAT_COLORS)],
        "accessoriesColor": [rng.choice(_FRAME_COLORS)],
        "backgroundColor": [rng.choice(_BACKGROUNDS)],
    }

    # The crop shows the head alone; position and size vary by some percent.
    side = 190 * rng.uniform(0.95, 1.05)
    crop = (140 - side / 2 + rng.uniform(-6, 6), 113 - side / 2 + rng.uniform(-6, 6), side)
    mirrored = rng.random() < 0.5
    return Face(options, crop, mirrored, _attributes(parts))


def _attributes(parts: _Parts) -> dict[str, int]:
    """Return 1 or 0 for each of `ATTRIBUTES`, by what can be seen: hair under a hat has no color."""
    top, beard, mouth, eyes, brows = parts.top, parts.beard, parts.mouth, parts.eyes, parts.brows
    hair_visible = top is not None and top not in _HATS
    gray_visible = parts.hair_name == "Gray_Hair" and (hair_visible or beard is not None)
    shown = {
        "Male": parts.male,
        "Eyeglasses": parts.glasses is not None,
        "Smiling": mouth in _SMILES,
        "Mouth_Slightly_Open": mouth in _OPEN_MOUTHS,
        "Wearing_Hat": top in _HATS,
        "Bald": top is None,
        "Receding_Hairline": top == "sides",
        "Bangs": top in _BANGS,
        "Wavy_Hair": top in _WAVY,
        "Straight_Hair": top in _STRAIGHT,
        "Mustache": beard in ("moustacheFancy", "moustacheMagnum"),
        "No_Beard": beard is None or beard.startswith("moustache"),
        "5_o_Clock_Shadow": beard == "beardLight",
        "Narrow_Eyes": eyes in _NARROW_EYES,
        "Arched_Eyebrows": brows in _ARCHED_BROWS,
        "Bushy_Eyebrows": brows in _BUSHY_BROWS,
        "Pale_Skin": parts.skin == _PALE_SKIN,
        **{name: hair_visible and parts.hair_name == name for name in _HAIR if name},
        "Young": not (gray_visible or top in (None, "sides")),
    }
    return {name: int(shown[name]) for name in ATTRIBUTES}


def render_face(face: Face, size: int) -> PILImage.Image:
    """Render `face` as an RGB image of `size` x `size` pixels."""
    svg = Avatar(_style(), face.options).to_string()
    # DiceBear cannot crop, but the root's viewBox can. System fonts would make the image depend on the machine.
    x, y, side = face.crop
    svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{x:.3f} {y:.3f} {side:.3f} {side:.3f}"', svg, count=1)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = PILImage.open(io.BytesIO(png)).convert("RGB")
    return ImageOps.mirror(image) if face.mirrored else image


def open_avatars(num_images: int, resolution: int, seed: int, num_proc: int = 1) -> Dataset:
    """Open avatars 0 … `num_images` - 1 of `seed` as a dataset: `id`, `image` (`resolution` px square), 22 attributes.

    They are rendered once, in `num_proc` processes, and then stay in the cache of `datasets`.

    Raises:
        ValueError: for more than ten million avatars, or if they cannot be rendered.
        OSError: if that cache is damaged and cannot be removed, or cannot be written.
    """
    if num_images > _MAX_AVATARS:
        raise ValueError(f"num_images={num_images}: expected at most {_MAX_AVATARS:,} avatars")
    features = Features({"id": Value("string"), "image": Image()} | {name: Value("int8") for name in ATTRIBUTES})
    fingerprint = f"avatars-1-{seed}-{resolution}-{num_images}"

    def rendered() -> Dataset:
        return Dataset.from_generator(
            _rows,
            features=features,
            gen_kwargs={"num_images": num_images, "resolution": resolution, "seed": seed, "num_proc": num_proc},
            fingerprint=fingerprint,
        )

    # An Arrow file that cannot be opened was damaged since it was written, and is rendered again.
    cached = Path(config.HF_DATASETS_CACHE) / "generator" / f"default-fingerprint={fingerprint}"
    was_there = cached.is_dir()
    try:
        try:
            return rendered()
        except (ValueError, OSError):  # Arrow's among them
            if not was_there:
                raise
            shutil.rmtree(cached)
            return rendered()
    except PermissionError as error:
        raise OSError(f"{config.HF_DATASETS_CACHE} cannot be written; set HF_HOME to a folder that can") from error
    except DatasetGenerationError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"avatars of {resolution} px cannot be rendered: {first_line(cause)}") from error


def _rows(num_images: int, resolution: int, seed: int, num_proc: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the dataset, which `num_proc` processes render."""
    row = functools.partial(_row, resolution=resolution, seed=seed)
    if num_proc == 1:
        yield from map(row, range(num_images))
        return
    with ProcessPoolExecutor(num_proc, initializer=start_worker) as pool:
        try:
            yield from pool.map(row, range(num_images), chunksize=50)
        finally:
            pool.shutdown(cancel_futures=True)


def _row(index: int, resolution: int, seed: int) -> dict[str, Any]:
    face = choose_face(seed, index)
    # Encoded here, and not by the one process that writes the rows.
    image = Image().encode_example(render_face(face, resolution))
    return {"id": f"avatar-{seed}-{index}", "image": image, **face.attributes}


def _variant(part: str, name: str | None) -> dict[str, Any]:
    """Return DiceBear's options for one part: always this variant, or never any."""
    return {f"{part}Probability": 0} if name is None else {f"{part}Variant": [name], f"{part}Probability": 100}


@functools.cache
def _style() -> Style:
    """Load the artwork."""
    definition = json.loads(files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8"))
    return Style(definition)
