"""Image files that Pillow cannot write: color profiles from numbers, PNGs chunk by chunk, TIFFs of any depth."""

import io
import struct
import zlib

from PIL import Image

ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))  # XYZ, D50
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
D50 = (0.96420, 1.0, 0.82491)


def profile(primaries=ADOBE_RGB, gamma=2.2, description="wide"):
    """Return an ICC profile: RGB of these primaries, or gray for None."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    if primaries is None:
        return _icc(b"mntr", b"GRAY", b"XYZ ", description, {b"kTRC": curve})
    tags = {bytes([letter]) + b"XYZ": _xyz(color) for letter, color in zip(b"rgb", primaries, strict=True)}
    tags |= {bytes([letter]) + b"TRC": curve for letter in b"rgb"}
    return _icc(b"mntr", b"RGB ", b"XYZ ", description, tags)


def cmyk_profile():
    """Return an ICC profile in which full black is black, and other full inks in any number the gray of L* 50."""
    straight = bytes(range(256))
    white, gray, black = (bytes((lightness, 128, 128)) for lightness in (255, 128, 0))  # L*, a*, b*
    colors = white + black + (gray + black) * 7  # at the corners of CMYK
    matrix = struct.pack(">9i", *(65536 * (number % 4 == 0) for number in range(9)))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + matrix + straight * 4 + colors + straight * 3
    return _icc(b"prtr", b"CMYK", b"Lab ", "inks", {b"A2B0": table})


def _icc(device, space, connection, description, tags):
    text = description.encode() + b"\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": _xyz(D50),
        **tags,
    }
    start = 132 + 12 * len(tags)
    body, table = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, device, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + table + body


def _xyz(values):
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def encode(image, format="PNG", **options):
    """Return the bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def chunk(kind, body):
    """Return a chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png, data, at_end=False):
    """Return a PNG with `data` after its header, or before its end."""
    position = len(png) - 12 if at_end else 33
    return png[:position] + data + png[position:]


def png(width, depth, color, row, *chunks):
    """Return a PNG of one row: `color` is 0 for gray, 2 for RGB, 4 and 6 with alpha."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, 1, depth, color, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def tiff(values, code, bits, sample_format=1, photometric=1):
    """Return a gray TIFF of one row: `code` is that of `struct`, `sample_format` 1 unsigned, 2 signed, 3 float."""
    return packed_tiff(struct.pack(f"<{len(values)}{code}", *values), len(values), bits, sample_format, photometric)


def packed_tiff(row, width, bits, sample_format=1, photometric=1):
    """Return a gray TIFF of one row of packed samples."""
    row += bytes(len(row) % 2)
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(row)}
    tags[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(row)) + row + struct.pack("<H", len(tags)) + entries + bytes(4)


def gray(*values):
    """Return an image of one row of gray pixels."""
    image = Image.new("L", (len(values), 1))
    image.putdata(values)
    return image
