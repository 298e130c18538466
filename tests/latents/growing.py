"""Sources of small images and caches of them, for the tests of caches that grow and of parts."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from dit_hf.latents.prepare import prepare_latents
from dit_hf.storage import sha256


def save_images(folder: Path, numbers: range, seed: int = 0) -> Path:
    """Save images of 16 px, `003.png` and so on; their content depends on the seed and the number alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        pixels = np.random.default_rng([seed, i]).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


def build(source: Path, vae_folder: Path, name: str = "latents", **options) -> Path:
    """Build a cache beside the source."""
    return prepare_latents(str(source), str(source.parent / name), str(vae_folder), "16", **options)


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of each file of a cache by its name."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def copy_source(source: Path, target: Path) -> Path:
    """Copy a folder of images to other inodes and times, as a download does."""
    return Path(shutil.copytree(source, target, copy_function=shutil.copyfile))
