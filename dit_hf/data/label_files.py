"""Read files that list the classes of images: `dataset.json` of StyleGAN and EDM, ImageNet's, Tiny ImageNet's."""

from __future__ import annotations

import csv
import json
from pathlib import Path, PurePosixPath
from typing import Any

DATASET_JSON = "dataset.json"
IMAGENET_SOLUTION = "LOC_val_solution.csv"
TINY_IMAGENET = "val_annotations.txt"
LABEL_FILES = (DATASET_JSON, IMAGENET_SOLUTION, TINY_IMAGENET)


def read_label_files(folder: Path, label_files: list[str], names: list[str]) -> dict[str, Any]:
    """Return the label of each image that a label file names: a whole number, or the name of a class.

    Args:
        folder: The source.
        label_files: Relative paths of the label files.
        names: Relative paths of the images.

    Raises:
        ValueError: if a file cannot be read.
    """
    labels: dict[str, Any] = {}
    for label_file in label_files:
        path, kind = folder / label_file, PurePosixPath(label_file).name
        parent = str(PurePosixPath(label_file).parent)
        prefix = "" if parent == "." else f"{parent}/"
        if kind == DATASET_JSON:
            labels |= {f"{prefix}{name}": label for name, label in _dataset_json(path)}
        else:
            # The lists name the validation images alone, without their folders: all of ImageNet's in a folder `val`,
            # and those of Tiny ImageNet below the list's own.
            by_stem = _imagenet_solution(path) if kind == IMAGENET_SOLUTION else _tiny_imagenet(path)
            place = "val/" if kind == IMAGENET_SOLUTION else prefix
            stems = {name: PurePosixPath(name).stem for name in names if place in name}
            labels |= {name: by_stem[stem] for name, stem in stems.items() if stem in by_stem}
    return labels


def _dataset_json(path: Path) -> list[tuple[str, Any]]:
    """Return path and label of each image; [] if the file says that there are no labels."""
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"))["labels"] or []
        return [(str(PurePosixPath(name)), label) for name, label in pairs]
    except (ValueError, KeyError, TypeError) as error:
        expected = '{"labels": [[path, number], ...]}, as StyleGAN and EDM write it'
        raise ValueError(f"{path} cannot be read; expected {expected}") from error


def _imagenet_solution(path: Path) -> dict[str, str]:
    """Return the class of each validation image of ImageNet: `ILSVRC2012_val_00000001,n01751748 111 108 230 708`."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))[1:]
    return {row[0]: row[1].split()[0] for row in rows if len(row) > 1 and row[1].split()}


def _tiny_imagenet(path: Path) -> dict[str, str]:
    """Return the class of each validation image of Tiny ImageNet: `val_0.JPEG`, tab, `n03444034`, tab, a box."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return {PurePosixPath(line[0]).stem: line[1] for line in lines if len(line) > 1}
