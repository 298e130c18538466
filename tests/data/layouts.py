"""Folders and datasets of small images, and how they are read."""

from pathlib import Path

from celeba import save_image, small_image
from datasets import ClassLabel, Dataset, Features, Image, Value

from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import Source, open_source


def write(folder: Path, *patterns: str) -> None:
    """Write images: `train/cat*3` is train/cat/0.png to train/cat/2.png, `a.png` is one image."""
    for pattern in patterns:
        place, star, count = pattern.partition("*")
        for name in [f"{place}/{i}.png" for i in range(int(count))] if star else [pattern]:
            save_image(folder / name)


def read(source: object, **options) -> Source:
    return open_source(str(source), SourceOptions(**options))


def classes(source: Source, name: str = "class") -> dict[str, str | None]:
    """Return the name of the class of each image by its id; None is missing."""
    names = source.rows.features[name].names
    pairs = zip(source.rows["id"][:], source.rows[name][:], strict=True)
    return {image_id: None if value is None else names[value] for image_id, value in pairs}


def data_set(count: int) -> Dataset:
    """Return rows with a column of images called face, an attribute and a class."""
    smiling = [i % 2 == 0 for i in range(count)]
    rows = {"face": [small_image()] * count, "Smiling": smiling, "kind": [0, 1] * (count // 2)}
    kinds = ClassLabel(names=["round", "square"])
    return Dataset.from_dict(rows, Features({"face": Image(), "Smiling": Value("bool"), "kind": kinds}))
