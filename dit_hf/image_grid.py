"""Image grids with captions and a title."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .storage import new_file, read_json

# What `dit-hf sample` writes beside the images of a series.
SETTINGS, GRID, FILM = "settings.json", "sheet.png", "film.gif"
# Grids, films and plots by the file that is always beside them: of a series, a run, an evaluation.
_WRITTEN_BESIDE = {
    SETTINGS: {GRID, FILM},
    "training_log.csv": {GRID, "denoising.png", "loss_curve.png"},
    "evaluation.json": {"evaluation.png", "neighbours.png", "settings.png"},
}
_TEXT_COLOR, _BACKGROUND = "#22272e", "#ffffff"
_GAP = 6  # between images, in pixels
_LINE_HEIGHT, _TITLE_HEIGHT = 13, 28


def grids_beside_images(folder: Path) -> set[str]:
    """Return the names of the grids, films and plots in a folder that we wrote, which are no images of it."""
    names = set()
    for marker, written in _WRITTEN_BESIDE.items():
        if (folder / marker).is_file() and (marker != SETTINGS or _is_series(folder)):
            names |= written
    if folder.name == "samples" and (folder.parent / "training_log.csv").is_file():
        names |= {path.name for path in folder.glob("step-*.png")}
    return names


def _is_series(folder: Path) -> bool:
    """Check whether the settings in a folder are those of a series; many programs name a file so."""
    try:
        return bool(read_json(folder / SETTINGS, keys=("mode", "model_sha256")))
    except (OSError, ValueError):
        return False


def make_grid(
    images: list[Image.Image],
    columns: int,
    captions: list[str] | None = None,
    title: str | None = None,
    min_side: int = 0,
) -> Image.Image:
    """Return a grid of images of one size, row by row.

    Args:
        images: The images, at least one.
        columns: Number of images in a row.
        captions: One text an image, written below it; a line break begins a new line.
        title: A line above the grid.
        min_side: Images narrower than this many pixels are enlarged by a whole factor.
    """
    # 1. Measure: all cells are as high as the caption with the most lines.
    factor = max(1, -(-min_side // images[0].width))
    width, height = images[0].width * factor, images[0].height * factor
    # Pillow's own font has no accents; matplotlib brings DejaVu Sans, which has those of most alphabets.
    letters = str(files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    font, title_font = ImageFont.truetype(letters, 10), ImageFont.truetype(letters, 14)
    lines = max((caption.count("\n") + 1 for caption in captions), default=0) if captions else 0
    cell_width, cell_height = width + _GAP, height + _GAP + _LINE_HEIGHT * lines
    top = _TITLE_HEIGHT if title else _GAP
    rows = -(-len(images) // columns)

    # 2. Write the title, and paste the images with their captions.
    grid = Image.new("RGB", (columns * cell_width + _GAP, top + rows * cell_height), _BACKGROUND)
    canvas = ImageDraw.Draw(grid)
    if title:
        canvas.text((_GAP, 5), title, _TEXT_COLOR, title_font)
    for index, image in enumerate(images):
        x, y = _GAP + index % columns * cell_width, top + index // columns * cell_height
        grid.paste(image.resize((width, height), Image.Resampling.BICUBIC), (x, y))
        if captions:
            canvas.multiline_text(
                (x + width / 2, y + height + 1),
                captions[index],
                _TEXT_COLOR,
                font,
                anchor="ma",  # the middle of the text's top is at this point
                spacing=2,
                align="center",
            )
    return grid


def save_grid(grid: Image.Image, path: Path) -> None:
    """Save a grid as PNG, with its folder, in one step, so that no viewer opens half an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        grid.save(partial, "png")


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two image grids side by side as one image."""
    both = Image.new("RGB", (left.width + 3 * _GAP + right.width, max(left.height, right.height)), _BACKGROUND)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 3 * _GAP, 0))
    return both
