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
    for name, box in (("a", (0, 0, 8, 16)), ("b", (8, 0, 16, 16))):
        mask = Image.new("L", (16, 16))
        mask.paste(255, box)
        mask.save(masks / f"{name}.png")
    options = {"mode": "inpaint", "num_inference_steps": 2, "mask_image": str(masks)}
    inpainted = pixels(sample(model, str(tmp_path / "out"), image=str(faces), **options))
    own = [np.asarray(Image.open(faces / f"face-{i}.png")) for i in range(2)]
    assert np.array_equal(inpainted[0][:, 8:], own[0][:, 8:])
    assert np.array_equal(inpainted[1][:, :8], own[1][:, :8])
    # The same mask as a layer of strokes on a transparent background.
    for name in ("a", "b"):
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
