"""An image or mask means the same in whatever form it is passed, or is refused with the ways out."""

import logging

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image

from dit_hf import LatentDiTEditPipeline, LatentDiTInpaintPipeline
from dit_hf.data.avatars import choose_face, render_face
from dit_hf.pipelines.preprocessing import read_images, read_masks

FACE = render_face(choose_face(0, 0), 16).convert("RGB")
PIXELS = np.asarray(FACE)
HALF = np.zeros((16, 16), np.uint8)
HALF[:, :8] = 255


def levels(image, size=(16, 16), **options):
    """Return the pixels of images as levels of 255, [images, height, width, 3]."""
    pixels, _ = read_images(image, *size, **options)
    return ((pixels / 2 + 0.5) * 255).permute(0, 2, 3, 1).numpy()


def painted(mask, size=(16, 16)):
    """Return masks as levels of 255, [masks, height, width]."""
    return (read_masks(mask, *size, [(16, 16)]) * 255)[:, 0].numpy()


def chw(array):
    return torch.from_numpy(np.array(array)).permute(2, 0, 1)


SAME = {
    "array": PIXELS,
    "batch": PIXELS[None],
    "negative strides": PIXELS[:, ::-1][:, ::-1],
    "CHW array": PIXELS.transpose(2, 0, 1),
    "tensor": chw(PIXELS),
    "batch of tensors": chw(PIXELS)[None],
    "list of tensors": [chw(PIXELS)],
    "HWC tensor": torch.from_numpy(PIXELS.copy()),
    "int64": PIXELS.astype(np.int64),
    "uint16": PIXELS.astype(np.uint16) * 257,
    "floats": PIXELS / 255,
    "float32 tensor": chw(PIXELS) / 255,
    "a tensor that requires gradients": (chw(PIXELS) / 255).requires_grad_(),
    "RGBA array": np.dstack([PIXELS, np.full((16, 16), 255, np.uint8)]),
    "RGBA floats": np.dstack([PIXELS / 255, np.ones((16, 16))]),
}


@pytest.mark.parametrize("image", SAME.values(), ids=SAME)
def test_arrays_and_tensors_are_the_same_image_as_from_pil(image):
    np.testing.assert_allclose(levels(image), PIXELS[None], atol=1e-3)


def test_ranges_can_be_declared():
    for image, input_range in [
        (chw(PIXELS) / 127.5 - 1, (-1, 1)),
        (PIXELS.astype(np.float32), (0, 255)),
        (PIXELS, (0, 255)),
        (PIXELS.astype(np.int32) - 128, (-128, 127)),
    ]:
        np.testing.assert_allclose(levels(image, input_range=input_range), PIXELS[None], atol=1e-2)


def test_half_precision_and_rounding_errors_are_accepted():
    np.testing.assert_allclose(levels((chw(PIXELS) / 255).bfloat16()), PIXELS[None], atol=1)
    np.testing.assert_allclose(levels(np.full((16, 16, 3), 1.003)), 255)


def test_files_are_read(tmp_path):
    FACE.save(tmp_path / "face.png")
    for path in (tmp_path / "face.png", str(tmp_path / "face.png")):
        np.testing.assert_allclose(levels([path, FACE]), np.stack([PIXELS, PIXELS]), atol=1e-3)
    turned = FACE.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    for given in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        np.testing.assert_allclose(levels(given), PIXELS[None], atol=1e-3)


def test_modes_show_what_a_viewer_shows():
    hidden = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    hidden.paste(FACE, (4, 4))
    white = Image.new("RGB", (16, 16), "white")
    white.paste(FACE, (4, 4))
    gray = np.asarray(FACE.convert("L"))
    for image, expected in [
        (hidden, white),
        (np.asarray(hidden), white),
        (np.asarray(hidden) / 255, white),
        (Image.merge("LA", [hidden.convert("L"), hidden.getchannel("A")]), white.convert("L")),
        (Image.fromarray(gray.astype(np.uint16) * 257), FACE.convert("L")),
        (Image.fromarray((gray / 255).astype(np.float32)), FACE.convert("L")),
        (gray, FACE.convert("L")),
        (torch.from_numpy(gray.copy())[None], FACE.convert("L")),
        (FACE.convert("P"), FACE.convert("P").convert("RGB")),
        (HALF > 0, Image.fromarray(HALF)),
    ]:
        np.testing.assert_allclose(levels(image), np.asarray(expected.convert("RGB"))[None], atol=0.6)


@pytest.mark.parametrize("size", [(64, 48), (48, 64)])
def test_large_images_are_made_smaller_alike(size):
    large = render_face(choose_face(0, 1), 512).convert("RGB").crop((0, 0, 512, 400))
    expected = levels(large, size)
    array = np.asarray(large)
    palette = large.convert("P")
    assert np.array_equal(levels(array, size), expected)
    assert np.array_equal(levels(palette, size), levels(palette.convert("RGB"), size))
    for image in (array / 255, chw(array) / 255):
        assert np.abs(levels(image, size) - expected).mean() < 0.6
    # The centre of the aspect ratio, antialiased: what PIL makes of it.
    height = round(512 * size[0] / size[1]) if size[0] < size[1] else 400
    width = 512 if size[0] < size[1] else round(400 * size[1] / size[0])
    left, top = (512 - width) // 2, (400 - height) // 2
    centre = large.crop((left, top, left + width, top + height)).resize(size[::-1], Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(centre) - expected[0]).mean() < 0.6


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (PIXELS.astype(np.float32), r"floats are 0 to 1, .*input_range"),
        (chw(PIXELS) / 127.5 - 1, r"floats are 0 to 1, .*input_range=\(-1, 1\)"),
        (np.full((16, 16, 3), np.nan), "not finite"),
        (np.ones((16, 16, 3), np.int64), "read in two ways.*input_range"),
        (PIXELS.astype(np.uint16), "read in two ways"),
        (PIXELS.astype(np.int16) - 128, "values from .*input_range"),
        (PIXELS.astype(complex), "complex128"),
        (np.zeros((3, 16, 3)), "first or last"),
        (np.zeros((8, 16, 16)), r"got the shape \[8, 16, 16\]"),
        (np.zeros((0, 16, 3)), r"got the shape \[0, 16, 3\]"),
        (np.zeros(16), "got the shape"),
        ([FACE, []], r"image\[1\] is an empty list"),
        ([FACE, None], r"image\[1\]: expected a PIL image, .*got NoneType"),
        ("nothing.png", "nothing.png is not a file"),
        (Image.fromarray(np.full((4, 4), 1000, np.int32)), "image: 32-bit pixels"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(image, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_images(image, 16, 16)


def test_a_declared_range_must_hold():
    with pytest.raises(ValueError, match=r"input_range=\(0, 1\) is declared, but values are"):
        read_images(PIXELS.astype(np.float32), 16, 16, (0, 1))
    with pytest.raises(ValueError, match="values of black and white"):
        read_images(PIXELS, 16, 16, (1, 0))
    with pytest.raises(ValueError, match="a PIL image needs none"):
        read_images(FACE, 16, 16, (-1, 1))


# Masks.

MASKS = {
    "L": Image.fromarray(HALF),
    "0 and 1": Image.fromarray(HALF // 255),
    "1": Image.fromarray(HALF).convert("1"),
    "F": Image.fromarray((HALF / 255).astype(np.float32)),
    "I;16": Image.fromarray(HALF.astype(np.uint16) * 257),
    "I of 0 and 1": Image.fromarray((HALF // 255).astype(np.int32)),
    "I;16 of 0 and 1": Image.fromarray((HALF // 255).astype(np.uint16)),
    "P": Image.fromarray(HALF).convert("P"),
    "P of 0 and 1": Image.fromarray(HALF // 255).convert("P"),
    "RGB": Image.fromarray(HALF).convert("RGB"),
    "strokes": Image.merge("LA", [Image.new("L", (16, 16), 255), Image.fromarray(HALF)]),
    "bytes": HALF,
    "bytes of 0 and 1": HALF // 255,
    "bool": HALF > 0,
    "bool tensor": torch.from_numpy(HALF > 0),
    "int64": (HALF > 0).astype(np.int64),
    "floats": HALF / 255,
    "RGB floats": np.repeat(HALF[..., None] / 255, 3, axis=2),
    "CHW floats": np.repeat(HALF[None] / 255, 3, axis=0),
    "HW1": HALF[..., None],
    "batch": (HALF > 0)[None],
    "N1HW": torch.from_numpy(HALF / 255)[None, None],
    "RGBA floats": np.dstack([np.ones((16, 16, 3)), HALF / 255]),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_any_form_are_the_same(mask):
    assert np.array_equal(painted(mask), HALF[None])


def test_gray_blends_alike():
    gray = HALF // 2
    for mask in (gray, Image.fromarray(gray), gray / 255, gray.astype(np.int32), torch.from_numpy(gray)):
        np.testing.assert_allclose(painted(mask), gray[None], atol=1e-3)


def test_batches_of_masks():
    """Different planes are different masks, also where there are as many as an image has channels."""
    masks = np.stack([HALF, HALF.T, 255 - HALF])
    sizes = [(16, 16)] * 3
    for given in (masks, list(masks), torch.from_numpy(masks > 0), masks[..., None], masks[:, None]):
        assert np.array_equal((read_masks(given, 16, 16, sizes) * 255)[:, 0], masks)
    with pytest.raises(ValueError, match="3 masks for 2 images"):
        read_masks(masks, 16, 16, sizes[:2])


def test_a_mask_is_cropped_like_its_image():
    image = Image.new("RGB", (48, 32))
    image.paste("white", (20, 0, 48, 32))
    mask = image.convert("L")
    expected = read_images(image, 16, 16)[0][:, :1] / 2 + 0.5
    for given in (mask, np.asarray(mask), np.asarray(mask) > 0, mask.resize((24, 16), Image.Resampling.NEAREST)):
        found = read_masks(given, 16, 16, [image.size])
        assert (found - expected).abs().max() < 0.13
        assert (found[..., 7:] == 1).all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((16, 24), np.uint8), "mask of 24x16 px has another aspect ratio than its image of 16x16"),
        (Image.new("L", (16, 20)), "another aspect ratio"),
        (Image.new("RGB", (16, 16), "red"), "mask_image has colors"),
        (np.dstack([HALF / 255, 0 * HALF, 0 * HALF]), "mask_image has colors"),
        (HALF.astype(np.float32), "floats are 0 to 1, but values are 0 to 255; pass uint8"),
        (-HALF.astype(np.int64), "values from -255 to 0"),
        (np.stack([HALF] * 2), "2 masks for 1 images"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        read_masks(mask, 16, 16, [(16, 16)])


def test_a_black_mask_and_a_map_of_labels_are_reported(caplog):
    for mask, highest in ((HALF * 0, "0"), (HALF // 100, "0.00784")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            painted(mask)
        assert f"mask_image is black (its highest value is {highest} of 1): nothing is inpainted" in caplog.text


# In the pipelines.


def test_kept_pixels_are_untouched_whatever_the_form_of_the_image():
    inpaint = LatentDiTInpaintPipeline(**tiny_pipeline().components)
    inpaint.set_progress_bar_config(disable=True)
    options = {"mask_image": HALF > 0, "num_inference_steps": 1, "jump_n_sample": 1}
    outputs = [
        np.asarray(inpaint(image=image, generator=torch.Generator().manual_seed(0), **options, **further).images[0])
        for image, further in ((FACE, {}), (PIXELS, {}), (chw(PIXELS) / 127.5 - 1, {"input_range": (-1, 1)}))
    ]
    for output in outputs:
        assert np.array_equal(output[:, 8:], PIXELS[:, 8:])
        assert np.abs(output.astype(int) - outputs[0]).max() <= 1
    assert not np.array_equal(outputs[0][:, :8], PIXELS[:, :8])


def test_an_edit_reads_arrays_as_images():
    edit = LatentDiTEditPipeline(**tiny_pipeline().components)
    edit.set_progress_bar_config(disable=True)
    options = {"edit": {"Smiling": True}, "num_inference_steps": 1, "output_type": "latent"}
    expected = edit(image=FACE, **options).images
    torch.testing.assert_close(edit(image=PIXELS, **options).images, expected)
    declared = edit(image=chw(PIXELS) / 127.5 - 1, input_range=(-1, 1), **options).images
    torch.testing.assert_close(declared, expected, atol=1e-4, rtol=1e-4)
