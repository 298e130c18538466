"""A series of images as files: generated batch by batch on many ranks, resumed after a kill, with an image grid."""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from ..image_grid import make_grid, save_grid
from ..storage import is_missing_or_empty, new_file, write_text
from .generate import batches

SETTINGS = "settings.json"
SHEET, FILM = "sheet.png", "film.gif"
NPZ = "samples.npz"
GRID_SIZE = 64


@dataclass
class Series:
    """Images to draw.

    Attributes:
        num_images: How many.
        draw: Numbers of images to uint8 [len, height, width, 3].
        facts: Number of an image to what its file says of it alone.
        is_film: Whether they are the frames of one, which is saved as a GIF too.
    """

    num_images: int
    draw: Callable[[range], np.ndarray]
    facts: Callable[[int], dict[str, Any]]
    is_film: bool = False


def write_series(
    folder: Path, series: Series, settings: dict[str, Any], batch_size: int, as_npz: bool, state: PartialState
) -> None:
    """Draw what is missing of a series, on all ranks, and then what is made of the whole.

    Args:
        folder: Where the files go.
        series: The images.
        settings: What decides about all of them: kept in the folder and in every PNG, and the same for a call that
            goes on.
        batch_size: Images drawn at once.
        as_npz: One `samples.npz` (`arr_0`) instead of PNG files.
        state: Of the ranks.

    Raises:
        FileExistsError: if the folder holds images of other settings, or something else.
    """
    if state.is_main_process:
        _open_folder(folder, settings)
    state.wait_for_everyone()
    if not (folder / NPZ).is_file():
        mine = batches(series.num_images, batch_size, state.process_index, state.num_processes)
        with tqdm(total=sum(map(len, mine)), desc="drawing", unit="images", disable=not state.is_main_process) as bar:
            for images in mine:
                (_draw_batch if as_npz else _draw_images)(folder, series, images, settings)
                bar.update(len(images))
    state.wait_for_everyone()
    if state.is_main_process:
        first = _join_batches(folder, series, batch_size) if as_npz else _read_images(folder, GRID_SIZE)
        save_grid(make_grid(first, columns=min(8, len(first)), min_side=96), folder / SHEET)
        if series.is_film and not as_npz:
            save_gif(_read_images(folder, series.num_images), folder / FILM)
    state.wait_for_everyone()


def save_gif(frames: list[Image.Image], path: Path, duration: int = 80) -> None:
    """An endless GIF that goes there and back; `duration` is a frame's, in milliseconds."""
    first, *others = [*frames, *frames[-2:0:-1]]
    _save(path, lambda file: first.save(file, "gif", save_all=True, append_images=others, duration=duration, loop=0))


def _open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Begin a series, or check that one of which something is drawn is the same."""
    path, text = folder / SETTINGS, json.dumps(settings, indent=2) + "\n"
    if path.is_file() and any(_is_drawn(drawn.name) for drawn in folder.iterdir()):
        before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        different = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
        if different:
            raise FileExistsError(f"output_dir {folder} holds images of other settings ({different})")
    elif not (path.is_file() or is_missing_or_empty(folder)):
        raise FileExistsError(f"output_dir {folder} holds something else (no {SETTINGS}); name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _is_drawn(name: str) -> bool:
    return name == NPZ or (name[0].isdigit() and name.endswith(".png")) or name.startswith(".images-")


def _draw_images(folder: Path, series: Series, images: range, settings: dict[str, Any]) -> None:
    """A batch as PNG files, each with its settings in it, unless they are there."""
    paths = [folder / f"{image:05}.png" for image in images]
    if all(path.is_file() for path in paths):
        return
    for image, path, pixels in zip(images, paths, series.draw(images), strict=True):
        info = PngImagePlugin.PngInfo()
        info.add_text("dit_hf", json.dumps({**settings, "image_number": image, **series.facts(image)}))
        _save(path, functools.partial(Image.fromarray(pixels).save, format="png", pnginfo=info))


def _draw_batch(folder: Path, series: Series, images: range, settings: dict[str, Any]) -> None:
    """A batch as one array, which the npz is made of, unless it is there."""
    path = _batch_path(folder, images)
    if not path.is_file():
        pixels = series.draw(images)
        _save(path, lambda file: np.save(file, pixels))


def _join_batches(folder: Path, series: Series, batch_size: int) -> list[Image.Image]:
    """Make the npz, batch after batch so that only one is in memory; returns its first images."""
    paths = [_batch_path(folder, images) for images in batches(series.num_images, batch_size)]
    if not (folder / NPZ).is_file():
        _save(folder / NPZ, lambda file: _write_npz(file, paths, series.num_images))
    for path in paths:
        path.unlink(missing_ok=True)
    with zipfile.ZipFile(folder / NPZ) as archive, archive.open("arr_0.npy") as array:
        np.lib.format.read_magic(array)
        shape, _, dtype = np.lib.format.read_array_header_1_0(array)
        count = min(GRID_SIZE, shape[0])
        pixels = np.frombuffer(array.read(count * int(np.prod(shape[1:]))), dtype).reshape(count, *shape[1:])
    return [Image.fromarray(picture) for picture in pixels]


def _write_npz(file: Any, paths: list[Path], num_images: int) -> None:
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
        shape = (num_images, *np.load(paths[0], mmap_mode="r").shape[1:])
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for path in paths:
            array.write(np.load(path).tobytes())


def _read_images(folder: Path, count: int) -> list[Image.Image]:
    paths = [path for image in range(count) if (path := folder / f"{image:05}.png").is_file()]
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))  # and the file is closed
    return images


def _batch_path(folder: Path, images: range) -> Path:
    return folder / f".images-{images.start:07}.npy"


def _save(path: Path, write: Callable[[Any], Any]) -> None:
    """Have `write` write the file at `path`, in one step."""
    with new_file(path) as partial, open(partial, "wb") as file:
        write(file)
