"""The inputs of `dit-hf sample`: rows of attributes, images and masks."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.contents import shortened
from ..image_grid import grids_beside_images
from ..latents.reader import LatentReader
from ..pipelines.image_inputs import IMAGE_SUFFIXES
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..storage import parse_json, sha256
from .writer import CONTENTS

Rows = dict[str, Any] | list[dict[str, Any]] | str | None
DEFAULT_NUM_IMAGES = 16


@dataclass(frozen=True)
class Inputs:
    """The inputs of a series.

    Attributes:
        images: Paths of the given images.
        masks: Paths of their masks.
        rows: Requested attributes (in mode `edit` those that the images have); None is unconditional.
        edits: Attributes to change.
        num_images: Number of images to generate in the modes other than `interpolate`.
    """

    images: list[Path]
    masks: list[Path]
    rows: list[dict[str, Any]] | None
    edits: list[dict[str, Any]] | None
    num_images: int

    def hashes(self) -> dict[str, str]:
        """Return the hashes by which a resumed series is compared: of attributes and names, and of files' contents."""
        files = [*self.images, *self.masks]
        names = [(path.name, path.stat().st_size) for path in files]
        hashes = {"inputs_sha256": hashlib.sha256(json.dumps([self.rows, self.edits, names]).encode()).hexdigest()}
        if files:
            contents = "".join(sha256(path) for path in files)
            hashes[CONTENTS] = hashlib.sha256(contents.encode()).hexdigest()
        return hashes


def read_inputs(settings: dict[str, Any], pipeline: LatentDiTPipeline) -> Inputs:
    """Read the inputs that the settings name.

    Args:
        settings: The arguments of `sample` by name, without those that are None.
        pipeline: The one that is to generate the images, which decides what attributes are valid.

    Raises:
        ValueError: for images that do not exist, numbers that do not fit, or attributes that the model does not have.
    """
    # 1. Images and masks.
    images, masks = _image_files(settings.get("image")), _image_files(settings.get("mask_image"))
    if len(masks) > 1:
        masks = _pair_by_name(images, masks, settings["mask_image"])

    # 2. Edits before attributes, because their number decides how many rows a latent cache is read for.
    num_images = settings.get("num_images")
    edits = _read_rows("edit", settings.get("edit"), pipeline, num_images)
    count = num_images or max(len(images), len(edits or [])) or DEFAULT_NUM_IMAGES
    rows = _read_rows("attributes", settings.get("attributes"), pipeline, count)

    # 3. Names and values are checked here, before any work.
    for requested in (rows, edits):
        pipeline.encode_attributes(requested)
    return Inputs(images, masks, rows, edits, count)


def _pair_by_name(images: list[Path], masks: list[Path], place: str) -> list[Path]:
    """Return the mask of each image, which has its name, whatever the suffix.

    Raises:
        ValueError: naming an image or a mask that has no partner, or has two.
    """
    by_name = {mask.stem: mask for mask in masks}
    if len(by_name) < len(masks):
        twice = next(mask for mask in masks if by_name[mask.stem] != mask)
        raise ValueError(f"{place} holds two masks named {twice.stem}")
    names = {image.stem for image in images}
    missing = [image.name for image in images if image.stem not in by_name]
    surplus = [mask.name for mask in masks if mask.stem not in names]
    if missing or surplus:
        problem = f"no mask is named like {missing[0]}" if missing else f"no image is named like {surplus[0]}"
        counts = f"{len(masks)} masks for {len(images)} images"
        raise ValueError(f"{place} holds {counts}, but {problem}; expected one mask, or one of each image's name")
    return [by_name[image.stem] for image in images]


def _read_rows(
    option: str, given: Rows, pipeline: LatentDiTPipeline, count: int | None
) -> list[dict[str, Any]] | None:
    """Return rows of attributes from JSON, a JSON file, or the first `count` of a latent cache (None is its first)."""
    if isinstance(given, str):
        # A folder is a latent cache; JSON itself has been parsed by the command line, so that the rest is a file.
        if os.path.isdir(given):
            conditions = list(pipeline.transformer.config.conditions or {})
            return LatentReader(given, conditions=conditions).attributes(count or 1, pipeline.config.condition_labels)
        try:
            given = parse_json(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            shown = str(given)[:200]
            raise ValueError(
                f"--{option} {shown}: expected JSON such as '{{\"Smiling\": true}}', a JSON file or a latent cache"
            ) from error
    rows = [given] if isinstance(given, dict) else given
    if rows is not None and not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'--{option} {given!r}: expected a dict like {{"Smiling": true}}, or a list of them')
    return rows


def _image_files(given: str | None) -> list[Path]:
    """Return the path of an image, or those of a folder sorted by name.

    Of a folder that `sample` wrote they are the generated images, without the image grid and the film.
    """
    if given is None:
        return []
    path = Path(given)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    left_out = grids_beside_images(path)
    files = [p for p in files if not p.name.startswith(".") and p.name not in left_out]
    images = [p for p in files if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"{path}: no image there ({shortened([*IMAGE_SUFFIXES], 6)})")
    return images
