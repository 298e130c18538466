"""Image grids of images: grids with captions, as people look at them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .storage import new_file

_INK, _PAPER, _GAP = "#22272e", "#ffffff", 6


def make_grid(
    images: list[Image.Image],
    columns: int,
    captions: list[str] | None = None,
    title: str | None = None,
    min_side: int = 0,
) -> Image.Image:
    """A grid of images of one size, row by row.

    Args:
        images: The images.
        columns: How many stand side by side.
        captions: One text an image, drawn below it; a line break begins a new line.
        title: A line above the grid.
        min_side: Images narrower than this many pixels are enlarged by a whole factor.
    """
    factor = max(1, -(-min_side // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    font, title_font = ImageFont.load_default(11), ImageFont.load_default(16)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0) if captions else 0
    cell_width, cell_height = width + _GAP, height + _GAP + 13 * lines
    top = 28 if title else _GAP
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_width + _GAP, top + rows * cell_height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((_GAP, 5), title, _INK, title_font)
    for index, image in enumerate(images):
        x, y = _GAP + index % columns * cell_width, top + index // columns * cell_height
        sheet.paste(image.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if captions:
            pen.multiline_text((x + width / 2, y + height + 1), captions[index], _INK, font, "ma", 2, "center")
    return sheet


def save_grid(sheet: Image.Image, path: Path) -> None:
    """Save as PNG in one step, so that nobody opens half an image; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        sheet.save(partial, "png")


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two image grids side by side."""
    sheet = Image.new("RGB", (left.width + 3 * _GAP + right.width, max(left.height, right.height)), _PAPER)
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + 3 * _GAP, 0))
    return sheet
