"""A series of images as files: generated batch by batch on many ranks, resumed after a kill, with an image grid."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image, PngImagePlugin

from ..image_grid import FILM, GRID, SETTINGS, make_grid, save_grid
from ..progress import ProgressBar
from ..storage import first_line, folder_taken, is_missing_or_empty, new_file, read_arrays, read_json, write_text
from .generate import batches

NPZ = "samples.npz"
PNG_TEXT = "dit_hf"  # the text chunk of a PNG that holds its settings, as JSON
CONTENTS = "contents_sha256"  # the setting that holds the hash of the given images, from version 0.2.0 on
NUM_GRID_IMAGES = 64


@dataclass
class Series:
    """A series of images to generate.

    Attributes:
        num_images: Their number.
        generate: Generates the images of some numbers, uint8 [len, height, width, 3].
        metadata: Returns the metadata that only the file of the image of a number has.
        is_film: True if they are the frames of a film, which is also saved as a GIF.
        given: Reads the image from which the image of a number was made, at the model's size, if there is one.
    """

    num_images: int
    generate: Callable[[range], np.ndarray]
    metadata: Callable[[int], dict[str, Any]]
    is_film: bool = False
    given: Callable[[int], Image.Image] | None = None


def write_series(
    folder: Path, series: Series, settings: dict[str, Any], batch_size: int, as_npz: bool, state: PartialState
) -> None:
    """Generate the missing images of a series on all ranks, then write the image grid and the film.

    Args:
        folder: Where the files go.
        series: The images.
        settings: All that decides the images. It is stored in the folder and in every PNG, and must be the same in a
            call that resumes the series.
        batch_size: Images generated at once.
        as_npz: True writes one `samples.npz` (`arr_0`) instead of PNG files.
        state: The ranks.

    Raises:
        FileExistsError: if the folder holds images of other settings, or something else.
    """
    # 1. The folder, before any rank writes into it.
    if state.is_main_process:
        _open_folder(folder, settings)
    state.wait_for_everyone()

    # 2. The batches of this rank. A finished npz needs none: its batches have been deleted.
    if not (folder / NPZ).is_file():
        own = batches(series.num_images, batch_size, state.process_index, state.num_processes)
        write_batch = _write_array if as_npz else _write_images
        with ProgressBar(sum(map(len, own)), "generating", "images", shown=state.is_main_process) as progress:
            for images in own:
                write_batch(folder, series, images, settings)
                progress.update(len(images))

    # 3. What takes the images of all ranks.
    state.wait_for_everyone()
    if state.is_main_process:
        first = _join_batches(folder, series, batch_size) if as_npz else _read_images(folder, NUM_GRID_IMAGES)
        save_grid(_grid(first, series), folder / GRID)
        if series.is_film and not as_npz:
            save_gif(_read_images(folder, series.num_images), folder / FILM)

    # 4. No rank leaves, and perhaps ends the process group, before the files are complete.
    state.wait_for_everyone()


def _grid(images: list[Image.Image], series: Series) -> Image.Image:
    """Return the grid of the first images of a series, each after the one that it was made from, if there is one.

    Images from the same one follow it together.
    """
    if series.given is None:
        return make_grid(images, columns=min(8, len(images)), min_side=96)
    cells: list[tuple[str, Image.Image]] = []
    shown = None
    for number, image in enumerate(images):
        if (before := series.given(number)) != shown:
            cells.append(("before", before))
            shown = before
        cells.append(("after", image))
    captions, cell_images = zip(*cells, strict=True)
    return make_grid([*cell_images], min(8, len(cells)), [*captions], min_side=96)


def save_gif(frames: list[Image.Image], path: Path, duration: int = 80) -> None:
    """Save frames as an endless GIF that plays them forth and back, `duration` milliseconds each."""
    first, *others = [*frames, *frames[-2:0:-1]]
    _save(path, lambda file: first.save(file, "gif", save_all=True, append_images=others, duration=duration, loop=0))


def _open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Begin a series, or check that the one in the folder has the same settings.

    Settings without an image do not count: the call that wrote them failed before its first batch.
    """
    path, place = folder / SETTINGS, f"output_dir {folder}"
    (folder / f".{SETTINGS}.partial").unlink(missing_ok=True)  # of a call that was killed
    text = json.dumps(settings, indent=2) + "\n"
    if path.is_file() and any(_is_output(file.name) for file in folder.iterdir()):
        # Both through JSON, which turns tuples into lists.
        before, now = read_json(path, "name a new folder"), json.loads(text)
        if CONTENTS in now and CONTENTS not in before:
            print(f"{place} was begun by version 0.1.0: its images are compared by name and size alone", flush=True)
            del now[CONTENTS]
        names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        different = "; ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
        if different:
            raise FileExistsError(folder_taken(place, f"holds images of other settings ({different})"))
    elif not (path.is_file() or is_missing_or_empty(folder)):
        raise FileExistsError(folder_taken(place, missing=SETTINGS))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _is_output(name: str) -> bool:
    """Check whether a file of this name holds images of a series."""
    return name == NPZ or (name[0].isdigit() and name.endswith(".png")) or name.startswith(".images-")


def _write_images(folder: Path, series: Series, images: range, settings: dict[str, Any]) -> None:
    """Generate a batch as PNG files, each with its settings as metadata, unless all of them are there."""
    paths = [folder / f"{image:05}.png" for image in images]
    if all(_is_intact(path) for path in paths):
        return
    for image, path, pixels in zip(images, paths, series.generate(images), strict=True):
        info = PngImagePlugin.PngInfo()
        info.add_text(PNG_TEXT, json.dumps({**settings, "image_number": image, **series.metadata(image)}))
        _save(path, functools.partial(Image.fromarray(pixels).save, format="png", pnginfo=info))


def _is_intact(path: Path) -> bool:
    """Check that an image is there and the checksums in it are right."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError, struct.error):  # Pillow's, and those that it lets pass
        return False
    return True


def _write_array(folder: Path, series: Series, images: range, settings: dict[str, Any]) -> None:
    """Generate a batch as one array, from which the npz is made, unless it is there."""
    path = _batch_path(folder, images)
    with contextlib.suppress(OSError, ValueError):  # missing or damaged
        read_arrays(path)
        return
    pixels = series.generate(images)
    _save(path, lambda file: np.savez(file, pixels))


def _join_batches(folder: Path, series: Series, batch_size: int) -> list[Image.Image]:
    """Write the npz, batch by batch so that only one is in memory, and return the first images for the grid."""
    paths = [_batch_path(folder, images) for images in batches(series.num_images, batch_size)]
    if (folder / NPZ).is_file():
        _check_npz(folder / NPZ)
    else:
        _save(folder / NPZ, lambda file: _write_npz(file, paths, series.num_images))
    # Only after the npz is in its place: a kill in between loses nothing, and the next call deletes them.
    for path in folder.glob(".images-*"):
        path.unlink()
    # The first images alone, from the beginning of the array in the archive.
    with zipfile.ZipFile(folder / NPZ) as archive, archive.open("arr_0.npy") as array:
        np.lib.format.read_magic(array)
        shape, _, dtype = np.lib.format.read_array_header_1_0(array)
        count = min(NUM_GRID_IMAGES, shape[0])
        pixels = np.frombuffer(array.read(count * int(np.prod(shape[1:]))), dtype).reshape(count, *shape[1:])
    return [Image.fromarray(image) for image in pixels]


def _write_npz(file: Any, paths: list[Path], num_images: int) -> None:
    """Write an npz as `numpy.savez` would, without holding the whole array in memory."""
    with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as array:
        shape = (num_images, *read_arrays(paths[0])["arr_0"].shape[1:])
        np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for path in paths:
            array.write(read_arrays(path)["arr_0"].tobytes())


def _check_npz(path: Path) -> None:
    """Compare the checksum of a finished npz, without holding it in memory.

    Raises:
        ValueError: naming it, if it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile and zlib have an exception for each kind of damage
        damaged = first_line(error)
    if damaged:
        raise ValueError(f"{path} is damaged ({damaged}); delete it to generate its images again")


def _read_images(folder: Path, count: int) -> list[Image.Image]:
    """Return the first `count` images of a folder, those that are there."""
    paths = [path for image in range(count) if (path := folder / f"{image:05}.png").is_file()]
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))  # reads it, so that the file can be closed
    return images


def _batch_path(folder: Path, images: range) -> Path:
    """Return where a batch of an npz waits for the others; hidden, because it is not for users."""
    return folder / f".images-{images.start:07}.npz"


def _save(path: Path, write: Callable[[Any], Any]) -> None:
    """Save a file by `write(file)`, in one step: under another name first, then renamed."""
    with new_file(path) as partial, open(partial, "wb") as file:
        write(file)
