"""Avatars, the embedded data set: drawn faces with 22 of CelebA's attributes, rendered on the spot.

The artwork is Avataaars by Pablo Stanley (https://avataaars.com, free for personal and commercial use) as packaged by
DiceBear; resvg draws it. Face number i of a seed is a pure function of (seed, i): no download, no network, and the
same pictures on every machine.
"""

from __future__ import annotations

import functools
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import resvg_py
from datasets import Dataset, Features, Image, Value
from dicebear import Avatar, Style
from PIL import Image as PILImage
from PIL import ImageOps

# The parts of the artwork, sorted by the attribute they show. Parts that no attribute of CelebA describes honestly
# (hijab and turban, an eye patch, crossed-out eyes) are left out.
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
    "": ["#c93305"],  # red has no name in CelebA
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
"""The names of the 22 attributes, spelled as in CelebA, in the order of the data set's columns."""


@dataclass(frozen=True)
class Face:
    """What one avatar looks like: DiceBear's options, the crop (x, y, side of a 280 x 280 canvas), mirrored or not."""

    options: dict[str, Any]
    crop: tuple[float, float, float]
    mirrored: bool
    attributes: dict[str, int]


def choose_face(seed: int, index: int) -> Face:
    """Choose face number `index` of `seed`: sex first, which steers hair and beard, then everything else."""
    rng = random.Random(f"{seed}-{index}")
    male = rng.random() < 0.5
    # `top` is what is on the head; None is a bald head and "sides" a receding hairline.
    tops: list[tuple[list, int]] = (
        [([None], 9), (["sides"], 9), (_HATS, 20), (_SHORT, 62)] if male else [(_HATS, 20), (_LONG, 72), (_SHORT, 8)]
    )
    top = rng.choice(rng.choices([names for names, _ in tops], [weight for _, weight in tops])[0])
    beards = [(None, 50), ("beardLight", 14), ("beardMedium", 8), ("beardMajestic", 6)]
    beards += [("moustacheFancy", 11), ("moustacheMagnum", 11)]
    beard = rng.choices([name for name, _ in beards], [weight for _, weight in beards])[0] if male else None
    hair_name = rng.choices(list(_HAIR), _HAIR_WEIGHTS)[0]
    hair_color = rng.choice(_HAIR[hair_name])
    skin = rng.choice(_SKINS)
    glasses = rng.choice(_GLASSES) if rng.random() < 0.3 else None
    mouth = rng.choice(_MOUTHS)
    eyes = rng.choice(_NARROW_EYES if rng.random() < 0.25 else _WIDE_EYES)
    brows = rng.choice(_BROWS)
    options = {
        **_variant("top", top),
        **_variant("facialHair", beard),
        **_variant("accessories", glasses),
        **_variant("mouth", mouth),
        **_variant("eyes", eyes),
        **_variant("eyebrows", brows),
        **_variant("clothes", rng.choice(_CLOTHES)),
        "seed": f"{seed}-{index}",
        "hairColor": [hair_color],
        "facialHairColor": [hair_color],
        "skinColor": [skin],
        "clothesColor": [rng.choice(_CLOTH_COLORS)],
        "hatColor": [rng.choice(_HAT_COLORS)],
        "accessoriesColor": [rng.choice(_FRAME_COLORS)],
        "backgroundColor": [rng.choice(_BACKGROUNDS)],
    }
    side = 190 * rng.uniform(0.95, 1.05)
    crop = (140 - side / 2 + rng.uniform(-6, 6), 113 - side / 2 + rng.uniform(-6, 6), side)
    hair_visible = top is not None and top not in _HATS
    gray_visible = hair_name == "Gray_Hair" and (hair_visible or beard is not None)
    shown = {
        "Male": male,
        "Eyeglasses": glasses is not None,
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
        "Pale_Skin": skin == _PALE_SKIN,
        **{name: hair_visible and hair_name == name for name in _HAIR if name},
        "Young": not (gray_visible or top in (None, "sides")),
    }
    return Face(options, crop, rng.random() < 0.5, {name: int(shown[name]) for name in ATTRIBUTES})


def render_face(face: Face, size: int) -> PILImage.Image:
    """Draw `face` as an RGB picture of `size` x `size` pixels."""
    svg = Avatar(_style(), face.options).to_string()
    x, y, side = face.crop
    svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{x:.3f} {y:.3f} {side:.3f} {side:.3f}"', svg, count=1)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    image = PILImage.open(io.BytesIO(png)).convert("RGB")
    return ImageOps.mirror(image) if face.mirrored else image


def open_avatars(num_images: int, resolution: int, seed: int, num_proc: int | None = None) -> Dataset:
    """Avatars 0 … `num_images` - 1 of `seed` as a data set: `id`, `image` (`resolution` px square), 22 attributes.

    Rendered once in `num_proc` processes and kept in datasets' own cache, like anything `load_dataset` makes.
    """
    features = Features({"id": Value("string"), "image": Image()} | {name: Value("int8") for name in ATTRIBUTES})
    return Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"indices": list(range(num_images)), "resolution": resolution, "seed": seed},
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        fingerprint=f"avatars-1-{seed}-{resolution}-{num_images}",
    )


def _rows(indices: list[int], resolution: int, seed: int) -> Iterator[dict[str, Any]]:
    for index in indices:
        face = choose_face(seed, index)
        yield {"id": f"avatar-{seed}-{index}", "image": render_face(face, resolution), **face.attributes}


def _variant(part: str, name: str | None) -> dict[str, Any]:
    return {f"{part}Probability": 0} if name is None else {f"{part}Variant": [name], f"{part}Probability": 100}


@functools.cache
def _style() -> Style:
    definition = json.loads(files("dicebear_styles").joinpath("avataaars.json").read_text("utf-8"))
    return Style(definition)
