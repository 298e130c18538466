"""What a cache of photographs tells of their faces: the counts in its plan, and an image grid of the crops."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.contents import condition_names
from ..data.faces import NO_FACE, TOO_SMALL
from ..data.photographs import FaceCounts
from ..data.plan import Plan
from ..data.transforms import decode_crops, photo_of
from ..devices import available_cpus
from ..image_grid import make_grid, save_grid
from .cache import CacheSpec
from .shards import Job, ShardNotes

FACES_GRID = "faces.png"
GRID_FACES, EDGE_FACES, GRID_SEED = 100, 10, 0
CAPTION_LENGTH = 15  # letters that fit below a face


def describe_faces(plan: Plan, photos: int, columns: list[str], notes: list[ShardNotes]) -> None:
    """Complete the plan of a cache of photographs by what was found in them.

    Args:
        plan: The plan.
        photos: Number of photographs.
        columns: Columns of the source's rows.
        notes: The notes of all shards.
    """
    reasons = Counter(reason for note in notes for _, reason in note.left_out)
    in_photo = Counter(photo_of(name, "face") for note in notes for name, _, _ in note.faces)
    counts = FaceCounts(
        photos=photos,
        faces=in_photo.total(),
        without=reasons[NO_FACE],
        too_small=reasons[TOO_SMALL],
        several=sum(count > 1 for count in in_photo.values()),
    )
    plan.add_faces(counts.describe(), counts.ambiguity(condition_names(columns)))


def save_faces_grid(job: Job, spec: CacheSpec, notes: list[ShardNotes], path: Path) -> None:
    """Save a grid of crops with their ids: 100 at random, and if there are more, those closest to being left out.

    Args:
        job: The job that encoded the cache.
        spec: The cache.
        notes: The notes of all shards.
        path: The PNG to write.
    """
    faces = [face for note in notes for face in note.faces]  # id, side and score
    random = np.random.default_rng(GRID_SEED).permutation(len(faces))[:GRID_FACES]
    edge = EDGE_FACES if len(faces) > GRID_FACES else 0  # few are all shown already
    smallest = sorted(faces, key=lambda face: face[1])[:edge]
    least_certain = sorted(faces, key=lambda face: face[2])[:edge]
    chosen = [*(faces[i] for i in sorted(random)), *smallest, *least_certain]
    labels = [""] * len(random) + ["\nsmallest"] * len(smallest) + ["\nleast certain"] * len(least_certain)

    numbers = {image_id: row for row, image_id in enumerate(spec.source.rows["id"][:])}
    photos = sorted({photo_of(name, "face") for name, _, _ in chosen})
    rows = [spec.source.rows[numbers[photo]] for photo in photos]
    images: dict[str, Image.Image] = {}
    with ThreadPoolExecutor(available_cpus()) as pool:
        for found in pool.map(lambda row: decode_crops(row, job.geometry), rows):
            shown = {crop.id: Image.fromarray(crop.pixels) for crop in found.crops}
            images |= {name: image.resize((96, 96), Image.Resampling.BICUBIC) for name, image in shown.items()}
    captions = [
        f"{_short(name)}\n{side:.0f} px, {score:.2f}{label}"
        for (name, side, score), label in zip(chosen, labels, strict=True)
    ]
    title = f"{len(random)} of {len(faces):,} faces" + (
        " at random, the smallest and the least certain" if edge else ""
    )
    save_grid(make_grid([images[name] for name, _, _ in chosen], 10, captions, title), path)


def _short(name: str) -> str:
    """Return the end of an id without its folder, short enough for a caption."""
    name = name.rpartition("/")[2]
    return name if len(name) <= CAPTION_LENGTH else "…" + name[1 - CAPTION_LENGTH :]
