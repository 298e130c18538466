"""Files as people have them become the pixels of a viewer, or an error with the image's id and the cause."""

import shutil
import zlib

import numpy as np
import pytest
from image_files import chunk, encode, profile, tiff, with_chunk
from PIL import Image

from dit_hf import open_images
from dit_hf.data.transforms import Geometry, decode_image

GREEN = (40, 200, 40)
WHOLE = Geometry(None, "none")


def decode(name, data, geometry=WHOLE):
    return decode_image({"id": name, "image": {"bytes": data, "path": None}}, geometry)


def reason(name, data, geometry=WHOLE):
    with pytest.raises(ValueError, match=f"^{name}: ") as caught:
        decode(name, data, geometry)
    text = str(caught.value)
    assert "\n" not in text
    assert "object at" not in text
    return text.removeprefix(f"{name}: ")


def test_files_of_a_folder_are_decoded_by_their_content(tmp_path):
    image = Image.new("RGB", (8, 8), GREEN)
    (tmp_path / "a.jpg").write_bytes(encode(image, "PNG"))
    (tmp_path / "b.png").write_bytes(encode(image, "WEBP", lossless=True))
    (tmp_path / "c.bmp").write_bytes(encode(image, icc_profile=profile()))
    pixels = [row["image"].getpixel((0, 0)) for row in open_images(str(tmp_path))]
    assert pixels == [GREEN, GREEN, (0, 201, 0)]


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.ppm", "PPM"), ("a.pgm", "PPM"), ("a.tga", "TGA"), ("a.jpe", "JPEG"), ("a", "PNG"), ("a.jp2", "JPEG2000")],
)
def test_formats_that_other_loaders_list(tmp_path, name, format):
    mode, color = ("L", 90) if name == "a.pgm" else ("RGB", GREEN)
    (tmp_path / name).write_bytes(encode(Image.new(mode, (16, 16), color), format))
    row = {"id": name, "image": {"bytes": None, "path": str(tmp_path / name)}}
    pixel = decode_image(row, WHOLE).getpixel((3, 3))
    assert np.abs(np.subtract(pixel, color)).max() <= 3


def test_tga_in_a_shard_is_known_by_the_name_beside_its_bytes():
    data = encode(Image.new("RGB", (4, 4), GREEN), "TGA").removesuffix(b"TRUEVISION-XFILE.\0")
    for row in ({"id": "7", "image": {"bytes": data, "path": "x.TGA"}}, {"id": "7.tga", "image": {"bytes": data}}):
        assert decode_image(row, WHOLE).getpixel((0, 0)) == GREEN


def test_a_png_is_not_lost_for_its_large_text():
    png = encode(Image.new("RGB", (4, 4), GREEN))
    for kind in (b"zTXt", b"iCCP"):
        large = chunk(kind, b"name\0\0" + zlib.compress(bytes(1_500_000)))
        assert decode("a.png", with_chunk(png, large)).getpixel((0, 0)) == GREEN


def test_a_profile_is_applied_before_the_crop_and_the_transparency(tmp_path):
    image = Image.new("RGBA", (20, 10), (*GREEN, 0))
    image.paste((*GREEN, 255), (5, 0, 15, 10))
    data = encode(image, icc_profile=profile())
    assert np.array_equal(decode("a.png", data, Geometry((10, 10))), np.full((10, 10, 3), (0, 201, 0)))
    assert decode("a.png", data).getpixel((0, 0)) == (255, 255, 255)


def test_32_bit_gray_is_never_stretched():
    assert decode("a.tif", tiff((200, 3), "i", 32, sample_format=2)).getpixel((0, 0)) == (200, 200, 200)
    assert reason("a.tif", tiff((200, 300), "i", 32, sample_format=2)) == "32-bit pixels"
    assert reason("a.tif", tiff((0.5,), "f", 32, sample_format=3)) == "floating-point pixels"


def test_reasons_name_the_cause():
    jpeg = encode(Image.new("RGB", (64, 64), GREEN), "JPEG")
    assert reason("a.jpg", b"text") == reason("a.svg", b"<svg/>") == "not an image"
    assert reason("a.jpg", bytes(4000)) == "not an image"
    assert reason("a.jpg", b"") == "an empty file"
    assert "truncated" in reason("a.jpg", jpeg[:-20])
    avif = encode(Image.new("RGB", (64, 64), GREEN), "AVIF")
    assert reason("a.avif", avif[:200]) == "a broken AVIF file, or a kind of AVIF that Pillow does not read"
    assert "smaller than the crop" in reason("a.jpg", jpeg, Geometry(None, "celeba-178"))
    with pytest.raises(ValueError, match="gone: No such file"):
        decode_image({"id": "gone", "image": {"bytes": None, "path": "/nowhere/gone.png"}}, WHOLE)


def test_a_bomb_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    assert "exceeds limit" in reason("a.png", encode(Image.new("1", (100, 100))))


def test_no_other_program_is_started(tmp_path, monkeypatch):
    started = tmp_path / "started"
    for program in ("gs", "gswin64c"):
        (tmp_path / program).write_text(f"#!/bin/sh\ntouch {started}\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert shutil.which("gs") == str(tmp_path / "gs")
    eps = encode(Image.new("RGB", (8, 8)), "EPS")
    assert reason("a.jpg", eps) == reason("a.eps", eps) == "not an image"
    assert not started.exists()
