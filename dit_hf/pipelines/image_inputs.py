"""Read an image of any kind as 8-bit RGB: formats, orientation, color profiles, transparency, palettes and depths."""

from __future__ import annotations

import functools
import io
import zlib
from importlib import import_module

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

# The formats that are read, and no others: for EPS, say, Pillow would start Ghostscript. JPEG includes MPO.
IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA")
IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".avif", ".tga"),
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")

# HEIF needs the extra `heif`. It comes after AVIF: some files of both begin alike, and it takes AVIF's for its own.
try:
    import_module("pillow_heif").register_heif_opener()
except ImportError:
    pass
else:
    IMAGE_FORMATS, IMAGE_SUFFIXES = (*IMAGE_FORMATS, "HEIF"), (*IMAGE_SUFFIXES, *HEIF_SUFFIXES)

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF and a value
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}


def open_image(data: bytes, name: str = "") -> Image.Image:
    """Open the bytes of an image file in one of `IMAGE_FORMATS`; `to_rgb` decodes it.

    Args:
        data: The whole file.
        name: Its name. TGA has no signature and almost any bytes may pass for it, so that it is read only from names
            that end in .tga and from files with its footer.

    Raises:
        PIL.UnidentifiedImageError: if it is in none of these formats.
        ValueError: if it begins like one of them but cannot be read, or is HEIF without pillow-heif.
    """
    formats = IMAGE_FORMATS
    if not name.lower().endswith(".tga") and not data.endswith(_TGA_FOOTER):
        formats = tuple(format for format in formats if format != "TGA")
    is_png = data.startswith(_PNG_SIGNATURE)
    try:
        image = Image.open(io.BytesIO(_without_bad_chunks(data) if is_png else data), formats=formats)
    except Exception as error:
        if isinstance(error, UnidentifiedImageError):
            _explain_unread(data, formats)
        raise
    if is_png and "transparency" in image.info:
        _fit_transparent_color(image, depth=data[24])
    return image


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Return an image of any mode as 8-bit RGB in sRGB, turned by its EXIF orientation.

    Args:
        image: Any image of PIL; of an animation the current frame. Of 16 bits per channel the upper 8 are kept;
            integers of 32 bits are read as they are if all of them are 0 to 255.
        background: Color behind transparent pixels.

    Raises:
        ValueError: for floating-point pixels, and integers of 32 bits beyond 0 to 255.
    """
    image.load()  # first, because some properties are known only now, and so that truncated files fail here
    profile = image.info.get("icc_profile")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        image = _upper_8_bits(image)
    image = upright(image)
    if profile:
        image = _to_srgb(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")
    return image.convert("RGB")


def center_box(width: int, height: int, target_height: int, target_width: int) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of the largest centered box of the target's aspect ratio in an image."""
    scale = min(width / target_width, height / target_height)
    box_width, box_height = max(1, round(target_width * scale)), max(1, round(target_height * scale))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _explain_unread(data: bytes, formats: tuple[str, ...]) -> None:
    """Raise a ValueError that says what a file is that could not be opened, if its first bytes say so."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and "HEIF" not in formats:
        raise ValueError("HEIF, which needs one more package: pip install pillow-heif")
    for name in formats:
        begins_like = Image.OPEN[name][1]
        if begins_like is not None and begins_like(data[:16]) is True:
            raise ValueError(f"a broken {name} file, or a kind of {name} that Pillow does not read")


def _upper_8_bits(image: Image.Image) -> Image.Image:
    """Return a gray image of integers as 8 bits, by the depth of its file and never by its values."""
    values = np.asarray(image)
    depth = 32 if image.mode == "I" and image.format not in ("PNG", "PPM") else 16  # PIL opens some of 16 bits as 32
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    depth = tags.get(_BITS_PER_SAMPLE, (depth,))[0]
    if depth == 32:
        if values.min() < 0 or values.max() > 255:
            raise ValueError("32-bit pixels")
        depth = 8
    if values.min() < 0:
        raise ValueError("negative pixels")
    upper = (values >> (depth - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # which PIL heeds only for 8 bits
        upper = 255 - upper
    gray = Image.fromarray(upper)
    gray.info = dict(image.info)
    if "transparency" in gray.info:
        opaque = values != gray.info.pop("transparency")
        gray.putalpha(Image.fromarray(opaque.astype(np.uint8) * 255))
    return gray


def upright(image: Image.Image) -> Image.Image:
    """Turn an image by its EXIF orientation, unless its EXIF data cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata makes PIL raise anything, and does not cost the image
        turn = None
    if turn is None:
        return image
    turned = image.transpose(turn)
    # Without its metadata, so that it is never turned again.
    turned.info = {key: image.info[key] for key in ("transparency", "icc_profile") if key in image.info}
    return turned


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert the colors from `profile` to sRGB; they stay as they are if it is not a profile of such an image."""
    mode, transform = _srgb_transform(profile)
    expected = "L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB"
    if transform is None or mode != expected or image.mode == "LAB":
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    # Of a palette the RGBA copy, since PIL warns if it is converted to RGB with its transparency.
    colors = image.convert("RGBA").convert("RGB") if image.mode in ("P", "PA") else image.convert(mode)
    converted = transform.apply(colors)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=16)
def _srgb_transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Return the mode of a profile's colors and their transform to sRGB: None for sRGB itself or a broken profile."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _PROFILE_MODES[source.profile.xcolor_space]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        description = source.profile.profile_description or ""
    except (OSError, KeyError, ValueError, TypeError, ImageCms.PyCMSError):
        return "", None
    if mode == "CMYK":
        return mode, transform

    # sRGB is known by what it does to colors. One named sRGB may differ a little, but linear sRGB is named so as well.
    grid = Image.fromarray(np.indices((6, 6, 6)).reshape(3, 36, 6).transpose(1, 2, 0).astype(np.uint8) * 51)
    before = grid.convert(mode)
    after = transform.apply(before)
    change = np.abs(np.asarray(before.convert("RGB"), int) - np.asarray(after, int)).max()
    return mode, None if change <= (32 if "sRGB" in description else 1) else transform


def _without_bad_chunks(png: bytes) -> bytes:
    """Return a PNG without the ancillary chunks that Pillow would refuse it for: large texts, bad profiles and CRCs.

    Pillow's limits are settings of the whole process, which other threads rely on.
    """
    kept, start, position = [], 0, len(_PNG_SIGNATURE)
    room = PngImagePlugin.MAX_TEXT_MEMORY
    while position + 12 <= len(png):
        kind, end = png[position + 4 : position + 8], position + 12 + int.from_bytes(png[position : position + 4])
        if kind[:1].islower():  # ancillary
            body, crc = png[position + 8 : end - 4], png[end - 4 : end]
            size = _text_size(kind, body)
            if size is None or size > room or zlib.crc32(kind + body) != int.from_bytes(crc):
                kept.append(png[start:position])
                start = end
            else:
                room -= size
        position = end
    return b"".join([*kept, png[start:]]) if kept else png


def _text_size(kind: bytes, body: bytes) -> int | None:
    """Return how much text a PNG's chunk holds, in bytes: None if it, or a profile, is more than Pillow reads."""
    if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
        return 0
    rest = body.partition(b"\0")[2]  # after keyword or name
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] != b"\x01"):
        return len(body)
    method, packed = rest[:1], rest[1:]
    if kind == b"iTXt":  # flag, method, language, translated keyword, text
        method, packed = rest[1:2], rest[2:].split(b"\0", 2)[-1]
    if method != b"\0":
        return None
    inflate = zlib.decompressobj()
    try:
        text = inflate.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK)
    except zlib.error:  # which Pillow forgives
        return 0
    return None if inflate.unconsumed_tail else len(text)


def _fit_transparent_color(image: Image.Image, depth: int) -> None:
    """Scale the transparent color of a PNG like PIL scales its pixels; PIL leaves it in the depth of the file."""
    color = image.info["transparency"]
    if image.mode == "L" and depth < 8:
        image.info["transparency"] = color * (255 // (2**depth - 1))
    elif image.mode == "RGB" and depth == 16:
        image.info["transparency"] = tuple(channel >> 8 for channel in color)
