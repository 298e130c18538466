"""The faces of a source of photographs: counted for the plan, and opened as rows of their own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ..progress import hidden_progress_bars
from .contents import condition_names
from .faces import FACE_VERSION, NO_FACE, TOO_SMALL, Face, weights_sha256
from .parallel import map_rows
from .sources import MAX_LEFT_OUT, Source
from .transforms import Geometry, find_in


@dataclass
class FaceCounts:
    """What was found in photographs.

    Attributes:
        photos: Number of photographs.
        faces: Number of faces that are taken.
        without: Number of photographs in which no face was found.
        too_small: Number of faces that are left out because they are too small.
        several: Number of photographs of which several faces are taken.
    """

    photos: int = 0
    faces: int = 0
    without: int = 0
    too_small: int = 0
    several: int = 0

    def describe(self) -> str:
        """Return one line, such as `1,204 photos: 1,530 faces, 88 without a face, 41 faces too small`."""
        return (
            f"{self.photos:,} photos: {self.faces:,} faces, {self.without:,} without a face, {self.too_small:,} "
            "faces too small"
        )

    def ambiguity(self, conditions: list[str]) -> str | None:
        """Return a note if conditions of a photograph cannot be assigned to one of its faces."""
        if not self.several or not conditions:
            return None
        return (
            f"{self.several:,} photos have several faces, whose {', '.join(conditions[:4])} is null: a list does not "
            "say whose it is (--faces largest)"
        )


def faces_identity(geometry: Geometry) -> str:
    """Return everything beside the photographs that decides which crops they become, as text.

    Raises:
        ValueError: if the detector is not installed.
    """
    detector = weights_sha256()[:12]
    return f"{geometry.faces} of at least {geometry.smallest_face:g} px, version {FACE_VERSION}, detector {detector}"


def check_faces(geometry: Geometry, missing: str) -> None:
    """Refuse options that do not fit crop `face`, before any work.

    Raises:
        ValueError: if the detector is not installed, or rows without a value of a condition are to be left out,
            although a photograph of several people has none.
    """
    if geometry.crop != "face":
        return
    weights_sha256()
    if missing == "leave_out" and geometry.faces == "all":
        raise ValueError(
            "missing=leave_out with crop=face needs faces=largest: what a list says of a photo of several people is "
            "not known to be of any of them"
        )


def open_faces(source: Source, geometry: Geometry) -> Source:
    """Find the faces of all photographs of a source and return it with one row a face; as it is with another crop.

    Ids are those of the photographs and `#0`, `#1`, the largest face first; `image` holds its `landmarks` beside
    `bytes` and `path`. A photograph's conditions are null for its faces if several are taken. The plan is completed.

    Raises:
        ValueError: if the detector is not installed, if no face is found, or if more than 1 % of the photographs
            cannot be read.
    """
    if geometry.crop != "face":
        return source
    rows, names = source.rows, condition_names(source.rows.column_names)
    identity, counts = faces_identity(geometry), FaceCounts(photos=len(source.rows))
    left_out, broken = list(source.left_out), []
    taken: list[tuple[int, str, np.ndarray]] = []  # row, id and landmarks of each face
    for row, (image_id, faces, too_small, problem) in enumerate(_find_all(rows, geometry)):
        if problem:
            broken.append((image_id, problem))
        taken += [(row, f"{image_id}#{i}", face.landmarks) for i, face in enumerate(faces)]
        left_out += [(f"{image_id}#{len(faces) + i}", TOO_SMALL) for i in range(too_small)]
        if not (faces or too_small or problem):
            left_out.append((image_id, NO_FACE))
            counts.without += 1
        counts.too_small += too_small
        counts.several += len(faces) > 1
    counts.faces = len(taken)
    if len(broken) > MAX_LEFT_OUT * len(rows):
        first = ": ".join(broken[0])
        raise ValueError(f"{len(broken)} of {len(rows)} photographs cannot be read, more than 1 %: {first}")
    if not taken:
        raise ValueError(f"{source.name}: no usable face ({counts.describe()})")

    source.plan.add_faces(counts.describe(), counts.ambiguity(names))
    digest = hashlib.sha256("\n".join([source.sha256, identity, *(name for _, name, _ in taken)]).encode())
    return dataclasses.replace(
        source,
        rows=_face_rows(rows, taken, names),
        left_out=left_out + broken,
        total=len(taken) + len(left_out) + len(broken),
        sha256=digest.hexdigest(),
    )


def _find_all(rows: Dataset, geometry: Geometry) -> Iterator[tuple[str, list[Face], int, str]]:
    """Iterate over id, large faces, number of small ones, and a broken photograph's problem, row by row."""

    def find(row: dict[str, Any]) -> tuple[str, list[Face], int, str]:
        try:
            return row["id"], *find_in(row, geometry), ""
        except ValueError as error:
            return row["id"], [], 0, str(error).removeprefix(f"{row['id']}: ")

    return map_rows(find, rows.select_columns(["id", "image"]), "finding faces", "photos")


def _face_rows(rows: Dataset, taken: list[tuple[int, str, np.ndarray]], conditions: list[str]) -> Dataset:
    """Return the rows of the faces that are taken, each given by the row of its photograph, its id and landmarks."""
    numbers = np.array([row for row, _, _ in taken])
    shared = np.bincount(numbers, minlength=len(rows))[numbers] > 1

    def add(batch: dict[str, list], positions: list[int]) -> dict[str, list]:
        images = zip(batch["image"], positions, strict=True)
        batch["image"] = [{**stored, "landmarks": taken[i][2].ravel().tolist()} for stored, i in images]
        batch["id"] = [taken[i][1] for i in positions]
        for name in conditions:
            values = zip(batch[name], positions, strict=True)
            batch[name] = [None if shared[i] else value for value, i in values]
        return batch

    image = {"bytes": Value("binary"), "path": Value("string"), "landmarks": List(Value("float64"))}
    features = Features({**rows.features, "image": image})
    with hidden_progress_bars():
        return rows.select(numbers).map(add, with_indices=True, batched=True, batch_size=32, features=features)
