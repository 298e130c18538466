"""Images that a dataset stores as the path of a file: only files of the dataset itself are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, config
from huggingface_hub import constants

from .stored_images import PARQUET, TAR, parse_address


def own_folders(source: str) -> list[Path]:
    """Return the folders whose files belong to a source: its own, or where the Hub's client stores its files."""
    path = Path(source)
    if path.exists():
        return [path if path.is_dir() else path.parent]
    return [
        Path(constants.HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}",
        Path(config.EXTRACTED_DATASETS_PATH),
    ]


def drop_foreign_paths(images: Dataset, folders: list[Path], addressed: bool = False) -> tuple[Dataset, int]:
    """Drop the paths of images that are no regular files in `folders`; relative paths are below the first of them.

    A path in a row says nothing about whose file it is: it could name any file of this machine.

    Args:
        images: A dataset with the column `image` alone, undecoded.
        folders: See [`own_folders`].
        addressed: Whether it was read shard by shard, so that addresses in it lead into those shards.

    Returns:
        The dataset, in which such images have neither bytes nor a path, and their number.
    """
    before = _count_paths(images, addressed)
    if not before:
        return images, 0
    roots = [folder.resolve() for folder in folders]

    def own_path(path: str) -> str | None:
        file = (roots[0] / path).resolve()
        return str(file) if any(file.is_relative_to(root) for root in roots) and file.is_file() else None

    def rewrite(row: dict[str, Any]) -> dict[str, Any]:
        image = row["image"]
        if image is None or image["bytes"] is not None or image["path"] is None:
            return row
        if not (addressed and parse_address(image["path"])):
            image = {"bytes": None, "path": own_path(image["path"])}
        return {"image": image}

    checked = images.map(rewrite, features=images.features, keep_in_memory=True, load_from_cache_file=False)
    return checked, before - _count_paths(checked, addressed)


def _count_paths(images: Dataset, addressed: bool) -> int:
    """Count the images of which only a path is stored, without those inside the shards that were read."""
    count = 0
    for batch in images.with_format("arrow").iter(1000):
        data, path = (pc.struct_field(batch["image"], name) for name in ("bytes", "path"))
        foreign = pc.and_(pc.is_null(data), pc.is_valid(path))
        if addressed:
            inside = pc.or_(pc.starts_with(path, PARQUET), pc.starts_with(path, TAR))
            foreign = pc.and_not(foreign, pc.fill_null(inside, False))
        count += pc.sum(foreign).as_py() or 0
    return count
