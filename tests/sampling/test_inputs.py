"""Images, masks and rows of attributes that a series starts from."""

import json

import numpy as np
import pytest
from conftest import tiny_pipeline, tiny_transformer, tiny_vae
from PIL import Image
from series import pixels, save_faces

from dit_hf import CosineLatentScheduler, LatentDiTImg2ImgPipeline, LatentDiTPipeline
from dit_hf.data.avatars import choose_face, render_face
from dit_hf.latents.reader import LatentReader
from dit_hf.sampling.sample import sample


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return save_faces(tmp_path_factory.mktemp("images"))


def test_images_are_read_as_for_a_latent_cache(model, tmp_path):
    """Transparency is on white, EXIF is applied; hidden files and folders are left out."""
    folder = tmp_path / "images"
    (folder / "folder.png").mkdir(parents=True)
    (folder / "._a.png").write_text("of another system")
    face = render_face(choose_face(0, 0), 16)
    face.putalpha(Image.linear_gradient("L").resize((16, 16)))
    face.save(folder / "a.png")
    white = Image.new("RGBA", (16, 16), "white")
    turned = Image.alpha_composite(white, face).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    turned.transpose(Image.Transpose.ROTATE_90).save(folder / "b.png", exif=exif)
    out = sample(model, str(tmp_path / "out"), mode="img2img", image=str(folder), strength=0.0)
    first, second = pixels(out)
    assert np.abs(first - second).max() <= 1
    plain = LatentDiTImg2ImgPipeline(**tiny_pipeline().components)
    expected = np.asarray(plain(image=turned, strength=0.0).images[0])
    assert np.abs(first - expected).max() <= 1


def test_a_mask_for_each_image_and_several_edits_of_one(model, faces, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, box in (("face-0", (0, 0, 8, 16)), ("face-1", (8, 0, 16, 16))):
        mask = Image.new("L", (16, 16))
        mask.paste(255, box)
        mask.save(masks / f"{name}.png")
    options = {"mode": "inpaint", "num_inference_steps": 2, "mask_image": str(masks)}
    inpainted = pixels(sample(model, str(tmp_path / "out"), image=str(faces), **options))
    own = [np.asarray(Image.open(faces / f"face-{i}.png")) for i in range(2)]
    assert np.array_equal(inpainted[0][:, 8:], own[0][:, 8:])
    assert np.array_equal(inpainted[1][:, :8], own[1][:, :8])
    # The same mask as a layer of strokes on a transparent background.
    for name in ("face-0", "face-1"):
        strokes = Image.open(masks / f"{name}.png")
        layer = Image.new("RGBA", strokes.size, (255, 255, 255, 0))
        layer.putalpha(strokes)
        layer.save(masks / f"{name}.png")
    layered = pixels(sample(model, str(tmp_path / "layered"), image=str(faces), **options))
    assert np.array_equal(layered, inpainted)
    with pytest.raises(ValueError, match="2 masks for 1 images"):
        sample(model, str(tmp_path / "one"), image=str(faces / "face-0.png"), **options)
    edits = [{"class": name} for name in ("cat", "dog", "owl")]
    options = {"mode": "edit", "image": str(faces / "face-0.png"), "edit": edits, "num_inference_steps": 2}
    assert len(pixels(sample(model, str(tmp_path / "edits"), **options))) == 3


def test_masks_belong_to_images_by_name(model, faces, tmp_path):
    """In the order of names 10 comes before 2, and 010 after 002."""
    options = {"mode": "inpaint", "num_inference_steps": 1, "options": {"jump_n_sample": 1}}

    def folders(images, masks):
        folder = tmp_path / f"{images}-{masks}"
        for kind, names in (("images", images), ("masks", masks)):
            (folder / kind).mkdir(parents=True)
            for i, name in enumerate(names):
                white = Image.new("L", (16, 16))
                white.paste(255, (0, 0, 1 + i, 16))
                (white if kind == "masks" else Image.open(faces / "face-0.png")).save(folder / kind / name)
        return {
            "image": str(folder / "images"),
            "mask_image": str(folder / "masks"),
            "output_dir": str(folder / "out"),
        }

    given = folders(["1.png", "2.png", "10.png"], ["10.bmp", "2.png", "1.png"])
    out = sample(model, **given, **options)
    pairs = [json.loads(Image.open(path).text["dit_hf"]) for path in sorted(out.glob("0*.png"))]
    assert [(pair["image"], pair["mask_image"]) for pair in pairs] == [
        ("1.png", "1.png"),
        ("10.png", "10.bmp"),
        ("2.png", "2.png"),
    ]
    for images, masks, message in [
        (["1.png", "10.png"], ["01.png", "10.png"], "no mask is named like 1.png"),
        (["a.png", "b.png", "c.png"], ["b.png", "c.png", "d.png"], "no mask is named like a.png"),
        (["a.png", "b.png"], ["a.png", "b.png", "c.png"], "no image is named like c.png"),
        (["a.png", "b.png"], ["a.png", "a.bmp"], "two masks named a"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(model, **folders(images, masks), **options)


def test_another_image_of_the_same_name_and_size_is_another_input(model, tmp_path):
    image, mask = tmp_path / "in.bmp", tmp_path / "mask.bmp"
    white = Image.new("L", (16, 16), 255)
    render_face(choose_face(0, 0), 16).convert("RGB").save(image)
    white.save(mask)
    options = {"mode": "inpaint", "image": str(image), "mask_image": str(mask), "num_inference_steps": 1}
    out = sample(model, str(tmp_path / "out"), **options)
    before = pixels(out)
    assert np.array_equal(pixels(sample(model, str(out), **options)), before)
    for path, other in ((image, render_face(choose_face(0, 9), 16).convert("RGB")), (mask, Image.new("L", (16, 16)))):
        kept = path.read_bytes()
        other.save(path)
        assert path.stat().st_size == len(kept)
        with pytest.raises(FileExistsError, match=r"other settings .*contents_sha256"):
            sample(model, str(out), **options)
        path.write_bytes(kept)
    # What version 0.1.0 began has no such hash.
    settings = json.loads((out / "settings.json").read_text())
    del settings["contents_sha256"]
    (out / "settings.json").write_text(json.dumps(settings))
    assert np.array_equal(pixels(sample(model, str(out), **options)), before)


def test_rows_of_a_latent_cache_and_of_a_file(model, latents, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text('[{"class": "dog"}]')
    options = {"num_images": 1, "num_inference_steps": 1, "batch_size": 1}
    by_file = sample(model, str(tmp_path / "file"), attributes=str(rows), **options)
    by_value = sample(model, str(tmp_path / "value"), attributes={"class": "dog"}, **options)
    assert np.array_equal(pixels(by_file), pixels(by_value))
    with pytest.raises(ValueError, match="has no condition class"):
        sample(model, str(tmp_path / "cache"), attributes=str(latents), **options)
    smiles = LatentDiTPipeline(tiny_transformer(conditions={"Smiling": 2}), CosineLatentScheduler(), tiny_vae())
    smiles.save_pretrained(tmp_path / "smiles")
    options |= {"num_images": 3}
    by_cache = sample(str(tmp_path / "smiles"), str(tmp_path / "cache"), attributes=str(latents), **options)
    reader = LatentReader(latents, conditions=["Smiling"])
    requested = [json.loads(Image.open(by_cache / f"0000{i}.png").text["dit_hf"])["attributes"] for i in range(3)]
    assert requested == reader.attributes(3)
    assert str(latents) not in (by_cache / "settings.json").read_text()
