"""A small CelebA in Kaggle's layout, of avatars, with every kind of bad image and row in it; and red squares."""

import csv
import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dit_hf.data.avatars import ATTRIBUTES, choose_face, render_face

PARTITION = {"0": "train", "1": "validation", "2": "test"}


@dataclass
class CelebA:
    """Folder that was written; attributes and splits of the good images by name; reasons of those to be left out."""

    folder: Path
    attributes: dict[str, dict[str, int]]
    splits: dict[str, str]
    left_out: dict[str, str]


def celeba_image(index: int) -> Image.Image:
    """Return an avatar on 178 x 218 pixels, the size of CelebA's aligned images."""
    image = Image.new("RGB", (178, 218), "#cfe3d6")
    image.paste(render_face(choose_face(7, index), 178), (0, 20))
    return image


def bomb() -> bytes:
    """Return a PNG of a few bytes that declares 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def make_celeba(folder: Path, count: int = 60, faults: bool = True) -> CelebA:
    """Write `count` good images (and the bad ones) with `list_attr_celeba.csv` and `list_eval_partition.csv`."""
    images = folder / "img_align_celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    attributes, splits = {}, {}
    for i in range(count):
        name = f"{i + 1:06}.jpg"
        celeba_image(i).save(images / name, quality=95)
        attributes[name] = choose_face(7, i).attributes
        splits[name] = PARTITION["0" if i % 10 < 8 else "1" if i % 10 == 8 else "2"]
    rows = [[name, *(2 * value - 1 for value in attributes[name].values())] for name in attributes]
    partition = [[name, next(k for k, v in PARTITION.items() if v == splits[name])] for name in splits]
    left_out = _plant(images, rows, partition) if faults else {}
    _write(folder / "list_attr_celeba.csv", [["image_id", *ATTRIBUTES], *rows])
    _write(folder / "list_eval_partition.csv", [["image_id", "partition"], *partition])
    return CelebA(folder, attributes, splits, left_out)


def small_image() -> Image.Image:
    """Return a red square."""
    return Image.new("RGB", (20, 20), "red")


def save_image(path: Path) -> None:
    """Write a red square, and first the folder that it belongs in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small_image().save(path)


def _plant(images: Path, rows: list, partition: list) -> dict[str, str]:
    whole = io.BytesIO()
    celeba_image(0).save(whole, "jpeg")
    small = io.BytesIO()
    Image.new("RGB", (100, 100)).save(small, "jpeg")
    broken = {
        "900001.jpg": (whole.getvalue()[:2000], "truncated"),
        "900002.jpg": (b"", "empty file"),
        "900003.jpg": (b"this is text", "not an image"),
        "900004.png": (bomb(), "decompression bomb"),
        "900005.jpg": (small.getvalue(), "smaller than the crop"),
    }
    left_out = {}
    for name, (data, reason) in broken.items():
        (images / name).write_bytes(data)
        rows.append([name, *rows[0][1:]])
        partition.append([name, "0"])
        left_out[name] = reason
    # A link to nothing, a name that is not UTF-8, an image without a row, rows without an image, rows twice or bad.
    (images / "900006.jpg").symlink_to("nowhere.jpg")
    left_out["img_align_celeba/img_align_celeba/900006.jpg"] = "No such file"
    with open(os.fsencode(images) + b"/9\xff0007.jpg", "wb") as file:
        file.write(whole.getvalue())
    left_out["img_align_celeba/img_align_celeba/9\\xff0007.jpg"] = "not UTF-8"
    (images / "900008.jpg").write_bytes(whole.getvalue())
    left_out["900008.jpg"] = "no row in list_attr_celeba.csv and list_eval_partition.csv"
    rows.append(["900009.jpg", *rows[0][1:]])
    partition.append(["900009.jpg", "0"])
    left_out["900009.jpg"] = "no such picture"
    rows.append(list(rows[1]))
    left_out[rows[1][0]] = "duplicate row"
    for name, row in {"900010.jpg": [1, 1], "900011.jpg": ["yes", *rows[0][2:]]}.items():
        (images / name).write_bytes(whole.getvalue())
        rows.append([name, *row])
        partition.append([name, "0"])
        left_out[name] = "2 values instead of 22" if name == "900010.jpg" else "'yes' is none of -1, 0, 1"
    (images / "900012.jpg").write_bytes(whole.getvalue())
    rows.append(["900012.jpg", *rows[0][1:]])
    partition.append(["900012.jpg", "3"])
    left_out["900012.jpg"] = "'3' is none of 0, 1, 2"
    return left_out


def _write(path: Path, rows: list) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
