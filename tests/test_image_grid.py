import numpy as np
from PIL import Image

from dit_hf.image_grid import grids_beside_images, make_grid, save_grid, side_by_side

COLORS = ["red", "lime", "blue", "yellow", "magenta"]


def test_images_are_placed_row_by_row_with_captions_below(tmp_path):
    images = [Image.new("RGB", (10, 8), color) for color in COLORS]
    grid = make_grid(images, columns=3, captions=list("abcde"), title="five", min_side=30)
    pixels = np.asarray(grid)
    corners = [
        tuple(int(v) for v in np.argwhere((pixels == image.getpixel((0, 0))).all(-1)).min(0)) for image in images
    ]
    assert corners == sorted(corners)
    tops, lefts = zip(*corners, strict=True)
    assert tops[0] == tops[1] == tops[2] < tops[3] == tops[4]
    assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2]
    assert sum((pixels == images[0].getpixel((0, 0))).all(-1).ravel()) == 30 * 24
    below = pixels[tops[0] + 24 : tops[3], lefts[0] : lefts[0] + 30]
    assert (below < 128).any()
    save_grid(side_by_side(grid, grid), tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").width > 2 * grid.width
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_captions_have_accents():
    """A letter that the font lacks would be the same box as any other that it lacks."""
    image = Image.new("RGB", (80, 8), "white")
    letters = [np.asarray(make_grid([image], 1, captions=[letter])) for letter in "éèñłőčЖΩ"]
    assert len({letter.tobytes() for letter in letters}) == len(letters)


def test_grids_beside_images_are_known_by_what_wrote_them(tmp_path):
    series, run, other = tmp_path / "series", tmp_path / "run", tmp_path / "other"
    (run / "samples").mkdir(parents=True)
    for folder in (series, other):
        folder.mkdir()
    (series / "settings.json").write_text('{"mode": "generate", "model_sha256": "0"}')
    (other / "settings.json").write_text("// of an editor\n{}")
    (run / "training_log.csv").write_text("step\n")
    (run / "samples" / "step-10.png").write_bytes(b"")
    assert grids_beside_images(series) == {"sheet.png", "film.gif"}
    assert grids_beside_images(other) == set()
    assert grids_beside_images(run) == {"sheet.png", "denoising.png", "loss_curve.png"}
    assert grids_beside_images(run / "samples") == {"step-10.png"}
