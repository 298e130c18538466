"""Images of any format and mode are read as the RGB that a viewer shows, or refused with the reason."""

import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from struct import pack

import numpy as np
import pytest
from image_files import SRGB, chunk, cmyk_profile, encode, gray, packed_tiff, png, profile, tiff, with_chunk
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from dit_hf.pipelines import image_inputs
from dit_hf.pipelines.image_inputs import IMAGE_FORMATS, IMAGE_SUFFIXES, open_image, to_rgb

GREEN = (40, 200, 40)


def read(data, name=""):
    """Return the pixels of the first row of a file."""
    return [tuple(pixel) for pixel in np.asarray(to_rgb(open_image(data, name)))[0].tolist()]


def grays(data):
    return [pixel[0] for pixel in read(data)]


@pytest.mark.parametrize("format", [name for name in IMAGE_FORMATS if name != "HEIF"])
def test_every_format_is_read_and_no_truncated_file_is(format):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    image.paste(GREEN, (0, 0, 32, 32))
    data = encode(image, format)
    assert np.abs(np.subtract(read(data, "x.tga")[8], GREEN)).max() <= 12
    for share in (0.3, 0.9):
        with pytest.raises((OSError, ValueError, SyntaxError), match=r"[Tt]runcated|broken|decoder"):
            read(data[: int(len(data) * share)], "x.tga")


def test_heif_is_read_or_the_missing_package_is_named():
    if "HEIF" in IMAGE_FORMATS:
        assert np.abs(np.subtract(read(encode(Image.new("RGB", (64, 64), GREEN), "HEIF"))[8], GREEN)).max() <= 4
        assert ".heic" in IMAGE_SUFFIXES
    else:
        with pytest.raises(ValueError, match="pip install pillow-heif"):
            read(b"\0\0\0\x18ftypheic" + bytes(40))
        assert ".heic" not in IMAGE_SUFFIXES


def test_other_formats_are_not_tried():
    for data in (*(encode(Image.new("RGB", (16, 16)), format) for format in ("EPS", "ICO", "PCX")), b"<svg/>"):
        with pytest.raises(UnidentifiedImageError):
            read(data)


def test_tga_is_read_by_its_name_or_footer_alone():
    data = encode(Image.new("RGB", (4, 4), GREEN), "TGA")
    old = data.removesuffix(b"TRUEVISION-XFILE.\0")  # TGA 1 has no footer
    assert read(data)[0] == read(old, "a/b.TGA")[0] == GREEN
    with pytest.raises(UnidentifiedImageError):
        read(old, "b.png")


# Depths.


def test_16_bit_gray_is_its_upper_8_bits_whatever_its_values():
    dark = pack(">2H", 200, 255)
    assert grays(png(2, 16, 0, dark)) == [0, 0]
    assert grays(png(2, 16, 0, pack(">2H", 0x1234, 0xFFFF))) == [0x12, 0xFF]
    assert grays(b"P5 2 1 65535\n" + dark) == [0, 0]
    assert grays(tiff((200, 0x8000), "H", 16)) == [0, 128]
    assert grays(tiff((200, 0x7000), "h", 16, sample_format=2)) == [0, 0x70]
    assert grays(tiff((0, 0x8000), "H", 16, photometric=0)) == [255, 127]  # white is zero
    assert grays(packed_tiff(b"\x80\x01\x00", 2, 12)) == [0x80, 0x10]  # 12 bits: 0x800, 0x100


def test_32_bit_integers_are_read_as_they_are_or_refused():
    assert grays(tiff((200, 255), "i", 32, sample_format=2)) == [200, 255]
    assert grays(tiff((0, 7), "I", 32)) == [0, 7]
    for values, code, sample_format in [((0, 256), "i", 2), ((-1, 9), "i", 2), ((0, 2**32 - 1), "I", 1)]:
        with pytest.raises(ValueError, match="32-bit pixels"):
            read(tiff(values, code, 32, sample_format))
    with pytest.raises(ValueError, match="floating-point pixels"):
        read(tiff((0.5,), "f", 32, sample_format=3))
    with pytest.raises(ValueError, match="negative pixels"):
        read(tiff((-5, 9), "h", 16, sample_format=2))
    assert to_rgb(Image.fromarray(np.array([[0, 255]], np.int32))).getpixel((1, 0)) == (255, 255, 255)


def test_16_bit_color_is_its_upper_8_bits():
    assert read(png(1, 16, 2, pack(">3H", 0x1234, 0xFF00, 0xFF))) == [(0x12, 0xFF, 0)]
    assert read(png(1, 16, 6, pack(">4H", 0x1234, 0xFF00, 0xFF, 0xFFFF))) == [(0x12, 0xFF, 0)]


# Transparency.


@pytest.mark.parametrize(
    ("depth", "color", "row", "transparent", "expected"),
    [
        (1, 0, b"\x40", (0,), [(255,) * 3, (255,) * 3]),
        (2, 0, b"\x10", (1,), [(0,) * 3, (255,) * 3]),
        (4, 0, b"\x12", (1,), [(255,) * 3, (34,) * 3]),
        (8, 0, b"\x12\x34", (0x12,), [(255,) * 3, (0x34,) * 3]),
        (16, 0, b"\x12\x34\x12\x35", (0x1234,), [(255,) * 3, (0x12,) * 3]),
        (8, 2, b"\1\2\3\4\5\6", (1, 2, 3), [(255,) * 3, (4, 5, 6)]),
        (16, 2, b"\1\0\2\0\3\0\4\0\5\0\6\0", (0x100, 0x200, 0x300), [(255,) * 3, (4, 5, 6)]),
    ],
)
def test_the_transparent_color_of_a_png_shows_the_background(depth, color, row, transparent, expected):
    key = chunk(b"tRNS", pack(f">{len(transparent)}H", *transparent))
    assert read(png(2, depth, color, row, key)) == expected


def test_modes_with_alpha_show_the_background():
    half = Image.new("RGBA", (1, 1), (255, 0, 0, 128))
    for image in (half, half.convert("RGBa"), open_image(encode(half)), open_image(encode(half, "TIFF"))):
        assert np.abs(np.subtract(to_rgb(image).getpixel((0, 0)), (255, 127, 127))).max() <= 1
    assert to_rgb(half, "black").getpixel((0, 0)) == (128, 0, 0)
    assert to_rgb(Image.new("LA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("PA", (1, 1), (0, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_palettes():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    red, green, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    assert read(encode(image)) == [red, green, blue]
    assert read(encode(image, transparency=1)) == [red, white, blue]
    assert read(encode(image, transparency=b"\0\xff\0")) == [white, green, white]
    assert read(encode(image, "GIF", transparency=2)) == [red, green, white]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("CMYK", (0, 255, 0, 0), (255, 0, 255)),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (85, 255, 255), (0, 255, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
    ],
)
def test_color_models(mode, color, expected):
    pixel = to_rgb(Image.new(mode, (1, 1), color)).getpixel((0, 0))
    assert np.abs(np.subtract(pixel, expected)).max() <= 2


def test_the_first_frame_of_an_animation_is_read():
    frames = [Image.new("RGB", (4, 4), color) for color in (GREEN, (200, 0, 0))]
    for format in ("GIF", "PNG", "TIFF"):
        assert read(encode(frames[0], format, save_all=True, append_images=frames[1:]))[0] == GREEN


# Orientation.


def oriented(value, format="PNG"):
    """Return a red and a blue pixel above each other as a file of this EXIF orientation."""
    image = Image.new("RGB", (8, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = value
    return encode(image, format, exif=exif)


@pytest.mark.parametrize(("value", "corner"), [(1, (0, 0)), (3, (7, 15)), (6, (15, 0)), (8, (0, 7))])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_exif_orientation_is_applied_once(format, value, corner):
    image = to_rgb(open_image(oriented(value, format)))
    assert image.getpixel(corner)[0] > 200
    assert np.array_equal(image, to_rgb(image))


def test_broken_exif_does_not_cost_the_image():
    assert read(encode(Image.new("RGB", (8, 8), GREEN), "PNG", exif=b"Exif\0\0no TIFF header"))[0] == GREEN


# Color profiles.


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_colors_of_a_wide_gamut_become_srgb(format):
    options = {"quality": 100, "subsampling": "4:4:4"} if format in ("JPEG", "AVIF") else {}
    options |= {"lossless": True} if format == "WEBP" else {}
    data = encode(Image.new("RGB", (16, 16), GREEN), format, icc_profile=profile(), **options)
    assert np.abs(np.subtract(read(data)[0], (0, 201, 0))).max() <= (1 if options else 0)
    again = to_rgb(to_rgb(open_image(data)))
    assert np.array_equal(again, to_rgb(open_image(data)))


def test_srgb_and_profiles_that_do_not_fit_leave_the_pixels_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    near = profile(SRGB, 2.2, "sRGB IEC61966-2.1")  # named sRGB, with a curve of its own
    for icc in (own, near, profile(None), b"no profile", profile()[:200]):
        assert np.array_equal(to_rgb(open_image(encode(Image.fromarray(pixels), icc_profile=icc))), pixels)
    assert grays(encode(gray(9, 99), icc_profile=profile())) == [9, 99]  # an RGB profile of a gray image


def test_linear_srgb_is_converted_although_it_is_named_srgb():
    data = encode(Image.new("RGB", (1, 1), (55, 55, 55)), icc_profile=profile(SRGB, 1.0, "sRGB linear"))
    assert np.abs(np.subtract(read(data), 128)).max() <= 1


def test_gray_profiles_are_converted_at_8_and_16_bits_and_under_transparency():
    icc = profile(None, 1.0)  # linear: 55 of 255 is sRGB's 128
    assert np.abs(np.subtract(grays(encode(gray(0, 55, 255), icc_profile=icc)), (0, 128, 255))).max() <= 1
    deep = with_chunk(png(1, 16, 0, pack(">H", 55 << 8)), chunk(b"iCCP", b"x\0\0" + zlib.compress(icc)))
    assert abs(grays(deep)[0] - 128) <= 1
    half = encode(Image.new("LA", (1, 1), (55, 128)), icc_profile=icc)
    assert abs(grays(half)[0] - 191) <= 1


def test_cmyk_is_converted_by_its_profile():
    magenta = Image.new("CMYK", (16, 16), (0, 255, 0, 0))
    for format in ("JPEG", "TIFF"):
        assert np.abs(np.subtract(read(encode(magenta, format))[0], (255, 0, 255))).max() <= 2
        assert np.abs(np.subtract(read(encode(magenta, format, icc_profile=cmyk_profile()))[0], 119)).max() <= 2
    paper = Image.new("CMYK", (16, 16))
    assert read(encode(paper, "TIFF", icc_profile=cmyk_profile()))[0] == (255, 255, 255)


def test_transparency_and_palettes_survive_a_profile():
    clear = Image.new("RGBA", (2, 1), (*GREEN, 255))
    clear.putpixel((1, 0), (*GREEN, 0))
    assert read(encode(clear, icc_profile=profile())) == [(0, 201, 0), (255, 255, 255)]
    palette = Image.new("P", (2, 1))
    palette.putpalette([*GREEN, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    assert read(encode(palette, icc_profile=profile())) == [(0, 201, 0), (0, 0, 0)]
    assert read(encode(palette, icc_profile=profile(), transparency=b"\xff\0")) == [(0, 201, 0), (255, 255, 255)]


def test_threads_share_a_transform():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    files = [encode(Image.fromarray(each), icc_profile=profile()) for each in pixels] * 4
    alone = [read(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, files)) == alone


# Chunks of PNGs.


def large_text(kind=b"zTXt"):
    packed = zlib.compress(b"x" * 1_500_000)
    return chunk(kind, b"key\0" + (b"\1\0\0\0" if kind == b"iTXt" else b"\0") + packed)


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_large_text_and_profiles_of_a_png_are_skipped(kind, at_end):
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    data = with_chunk(encode(Image.new("RGB", (4, 4), GREEN)), large_text(kind), at_end)
    assert read(data)[0] == GREEN
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)


def test_many_texts_that_are_too_much_together_are_skipped(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 10_000)
    data = encode(Image.new("RGB", (4, 4), GREEN))
    for number in range(8):
        data = with_chunk(data, chunk(b"tEXt", b"key%d\0" % number + b"x" * 2_000))
    assert read(data)[0] == GREEN


def test_small_chunks_stay_and_broken_ones_are_skipped():
    turned = oriented(6)
    assert to_rgb(open_image(with_chunk(turned, large_text()))).size == (16, 8)
    bad_crc = chunk(b"tEXt", b"key\0text")[:-1] + b"\0"
    bad_method = chunk(b"zTXt", b"key\0\7text")
    for bad in (bad_crc, bad_method, chunk(b"iCCP", b"name")):
        assert read(with_chunk(encode(Image.new("RGB", (4, 4), GREEN)), bad))[0] == GREEN


def test_a_decompression_bomb_is_refused():
    header = chunk(b"IHDR", pack(">2I5B", 20_000, 20_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(Image.DecompressionBombError, match="400000000 pixels"):
        open_image(bomb)


def test_the_file_stands_alone():
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); assert not {'torch', 'dit_hf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, image_inputs.__file__], check=True)
