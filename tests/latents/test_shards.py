"""Format 3 of a latent cache, and the options that it is refused for."""

import json

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Features, List, Value, load_from_disk
from diffusers import AutoencoderKL

from dit_hf.latents.cache import open_latents
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.shards import RECORD_BATCH_ROWS, ShardWriter, latent_array, open_shards, plan_sizes, spell_features
from dit_hf.latents.vae import latent_shape
from dit_hf_cli import main


def spelled(path) -> dict:
    """Return the features in the metadata of an Arrow file."""
    with pa.memory_map(str(path)) as file:
        metadata = pa.ipc.open_stream(file).schema.metadata
    return json.loads(metadata[b"huggingface"])["info"]["features"]


def test_lists_are_spelled_as_datasets_2_14_reads_them(latents):
    expected = {"feature": {"dtype": "float16", "_type": "Value"}, "length": 256, "_type": "Sequence"}
    info = json.loads((latents / "dataset_info.json").read_text())
    for features in (info["features"], spelled(next(latents.glob("data-*.arrow")))):
        assert features["latent_mean"] == features["latent_std_flip"] == expected
    cache = load_from_disk(str(latents))
    assert cache.features["latent_mean"] == List(Value("float16"), length=256)
    assert cache.features["image_sha256"] == Value("string")


def test_the_identity_is_data(latents):
    identity = json.loads((latents / "latents.json").read_text())["identity"]
    assert identity["format"] == 3
    assert identity["preprocessing"] == 2
    assert identity["resolution"] == {"height": 16, "width": 16}
    assert identity["source"]["name"] == "avatars"
    assert identity["source"]["num_images"] == 60
    assert set(identity["labels"]) == set(open_latents(latents)[1]["conditions"])


def test_record_batches_have_4096_rows_whatever_the_parts(tmp_path):
    features = Features({"id": Value("string"), "latent_mean": List(Value("float16"), length=4)})
    values = np.arange(40_000, dtype=np.float16).reshape(-1, 4)
    for size in (7, 4096, 9000):
        writer = ShardWriter(tmp_path / f"{size}.arrow", features)
        for start in range(0, len(values), size):
            part = values[start : start + size]
            ids = [str(i) for i in range(start, start + len(part))]
            writer.write({"id": pa.array(ids), "latent_mean": latent_array(part)})
        writer.close()
        column = open_shards([tmp_path / f"{size}.arrow"]).column("latent_mean")
        assert [len(chunk) for chunk in column.chunks] == [RECORD_BATCH_ROWS] * 2 + [10_000 - 2 * RECORD_BATCH_ROWS]
        np.testing.assert_array_equal(np.concatenate([c.flatten() for c in column.chunks]).reshape(-1, 4), values)
    assert (tmp_path / "7.arrow").read_bytes() == (tmp_path / "4096.arrow").read_bytes()


def test_other_features_keep_their_spelling():
    features = Features({"class": ClassLabel(names=["List", "owl"]), "age": Value("int64")})
    assert spell_features(features) == features.to_dict()
    assert Features.from_dict(spell_features(features)) == features


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        ("18", "resolution 18 gives latents 9x9, which patches of 2 do not divide; 16 or 20 would do"),
        ("2", "resolution 2 gives latents 1x1, which patches of 2 do not divide; 4 would do"),
        ("16x18", "resolution 16x18 gives latents 8x9, which patches of 2 do not divide; 16 or 16x20 would do"),
        ("15", "resolution 15x15 is not divisible by 2, the VAE's reduction; 12 or 16 would do"),
    ],
)
def test_a_resolution_that_cannot_be_trained_on_is_refused_and_leaves_nothing(
    tmp_path, vae_folder, capsys, resolution, message
):
    out = tmp_path / "out"
    options = ["--source", "avatars", "--num_images", "4", "--vae", str(vae_folder), "--output_dir", str(out)]
    assert main(["prepare-latents", *options, "--resolution", resolution]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"dit-hf prepare-latents: error: {message}"
    assert not list(tmp_path.iterdir())
    assert main(["prepare-latents", *options, "--resolution", "16"]) == 0  # the name is free


def test_resolutions_of_stable_diffusion_s_vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, **blocks)
    assert latent_shape(vae, (256, 192), 2) == (4, 32, 24)
    with pytest.raises(ValueError, match="resolution 68x68 is not divisible by 8, the VAE's reduction; 64 or 80"):
        latent_shape(vae, (68, 68), 2)
    with pytest.raises(ValueError, match="latents 17x17, which patches of 2 do not divide; 128 or 144 would do"):
        latent_shape(vae, (136, 136), 2)


@pytest.mark.parametrize("problem", ["column", "left out", "no image"])
def test_a_refused_build_leaves_nothing_behind(tmp_path, vae_folder, problem):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(10):
        tiny_image(i).save(folder / f"{i}.png")
    if problem == "column":
        (folder / "metadata.csv").write_text("file_name,latent_mean\n" + "".join(f"{i}.png,1\n" for i in range(10)))
    elif problem == "left out":
        (folder / "metadata.csv").write_text("file_name,smiling\n" + "".join(f"{i}.png,1\n" for i in range(5)))
    else:
        for path in folder.iterdir():
            path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"latent_mean|cannot be used"):
        prepare_latents(str(folder), str(tmp_path / "out"), str(vae_folder), "16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def tiny_image(seed: int):
    from PIL import Image as PILImage

    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8))


def test_sizes_depend_on_the_images_alone():
    assert plan_sizes(200_000, (256, 256)) == (16, 832)
    assert plan_sizes(200_000, (512, 512)) == (4, 784)
    assert plan_sizes(100, (64, 64)) == (64, 512)
    assert plan_sizes(10, (4096, 4096))[0] == 1
