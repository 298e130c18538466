"""Read files that list the classes of images: `dataset.json` of StyleGAN and EDM, ImageNet's, Tiny ImageNet's."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from ..storage import parse_json

DATASET_JSON = "dataset.json"
IMAGENET_SOLUTION = "LOC_val_solution.csv"
TINY_IMAGENET = "val_annotations.txt"
LABEL_FILES = (DATASET_JSON, IMAGENET_SOLUTION, TINY_IMAGENET)
# What may list images without being read: the first files of these suffixes are looked into.
LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".xls")
_MAX_LISTS, _LIST_HEAD, _LIST_LINES = 50, 16384, 20
_BETWEEN_WORDS = re.compile(r"[\s,;|\"']+")


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
        pairs = parse_json(path.read_text(encoding="utf-8"))["labels"] or []
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


def unread_lists(folder: Path, texts: list[str], images: Collection[str]) -> dict[str, str]:
    """Return those of the files that are not read which name images of the source, and what would make them read.

    Args:
        folder: The source.
        texts: Relative paths of files with one of `LIST_SUFFIXES`.
        images: Relative paths of the images.
    """
    if not texts:
        return {}
    beside = {name.rpartition(".")[0] for name in images}
    names = {name.rpartition("/")[2] for name in images}
    stems = {name.rpartition(".")[0] for name in names}
    found: dict[str, str] = {}
    # Files named like an image describe it alone: captions, boxes.
    lists = (text for text in texts if text.rpartition(".")[0] not in beside)
    for text in itertools.islice(lists, _MAX_LISTS):
        if text.endswith((".xlsx", ".xls")):
            found[text] = "a spreadsheet, but only metadata.csv (file_name, ...) is read"
        elif _names_images(folder / text, names, stems):
            found[text] = "lists images, but only metadata.csv (file_name, ...) is read"
    return found


def _names_images(path: Path, names: set[str], stems: set[str]) -> bool:
    """Check whether two of the first lines of a file hold names of images, or begin with one without its suffix."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [_BETWEEN_WORDS.split(line.strip()) for line in file.read(_LIST_HEAD).splitlines()[:_LIST_LINES]]
    except OSError:
        return False
    if path.suffix == ".json":  # often one line
        words = {word for line in lines for word in line}
        return len({word.rpartition("/")[2] for word in words} & names) > 1
    hits = sum(line[0] in stems or any(word.rpartition("/")[2] in names for word in line) for line in lines)
    return hits > 1
