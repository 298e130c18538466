import functools
import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_vae
from datasets import load_dataset, load_from_disk
from huggingface_hub import snapshot_download

from dit_hf import storage
from dit_hf.card_blocks import sign_blocks
from dit_hf.data.avatars import choose_face, render_face
from dit_hf.data.transforms import Geometry
from dit_hf.evaluation.reference_images import open_reference_images
from dit_hf.latents.cache import (
    format_identity,
    load_cache_vae,
    open_latents,
    parse_identity,
    push_latents,
    read_cache_info,
)
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.shards import load_rows, open_shards


def test_an_unfinished_or_damaged_cache_is_not_read(latents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    data = next(copy.glob("*.arrow"))
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged"):
        open_latents(copy)
    with pytest.raises(ValueError, match="not a latent cache"):
        open_latents(tmp_path)


def flip(path):
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("key", ["identity", "condition_labels", "settings", "statistics"])
def test_entries_of_other_types_are_named(latents, tmp_path, key):
    """As in a cache of somebody else, who wrote no hash."""
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    info = json.loads((copy / "latents.json").read_text()) | {key: 5}
    del info["json_sha256"]
    (copy / "latents.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"latents\.json is damaged \({key} is not an object\); delete .*copy and"):
        read_cache_info(copy)


@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "vae/diffusion_pytorch_model.safetensors"])
def test_a_flipped_bit_is_found_by_the_same_call_and_where_weights_are_used(
    latents, vae_folder, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(storage, "SMALL_FILE", 0)  # as if the files were large
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    flip(copy / name)
    again = functools.partial(prepare_latents, "avatars", str(copy), str(vae_folder), "16", flip=True, num_images=60)
    message = f"damaged: {name} has changed in content since it was written; delete .*copy and make it again"
    with pytest.raises(ValueError, match=message):
        again()
    again(verify=False)
    read_cache_info(copy)
    with pytest.raises(ValueError, match=message):
        push_latents(copy, "you/x")
    with pytest.raises(ValueError, match=message):
        load_cache_vae(copy) if name.startswith("vae") else open_reference_images(str(copy), Geometry((16, 16)))


def test_an_arrow_file_that_cannot_be_read_is_named(latents, tmp_path):
    for name in ("data-00000-of-00001.arrow", "dataset_info.json"):
        copy = tmp_path / name / "copy"
        shutil.copytree(latents, copy)
        (copy / name).write_bytes(b"[]")
        with pytest.raises(ValueError, match=r"copy is damaged .*; make the cache again"):
            load_rows(copy)
    with pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow is damaged .*; make the cache again"):
        open_shards([tmp_path / "data-00000-of-00001.arrow" / "copy" / "data-00000-of-00001.arrow"])


def test_what_the_owner_edits_in_a_cache_does_not_bar_it(latents, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(latents, copy)
    (copy / "README.md").write_text("mine")
    (copy / "left_out.csv").write_text("saved by a spreadsheet")
    (copy / "reconstructions.png").unlink()
    assert len(open_latents(copy, hashes=True)[0]) == 60


def test_a_folder_that_datasets_cannot_open_is_refused_before_any_work(tmp_path, vae_folder):
    with pytest.raises(ValueError, match="a::b: datasets cannot open a folder with :: in its path; name another one"):
        prepare_latents("avatars", str(tmp_path / "a::b"), str(vae_folder), "16", num_images=4)
    assert not list(tmp_path.iterdir())


def test_the_error_names_a_partly_copied_cache(tmp_path, latents, vae_folder):
    shutil.copytree(latents, tmp_path / "half")
    next((tmp_path / "half").glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match="damaged: data-"):
        prepare_latents("avatars", str(tmp_path / "half"), str(vae_folder), "16", flip=True, num_images=60)
    (tmp_path / "half" / "latents.json").unlink()
    with pytest.raises(FileExistsError, match=r"holds something else \(no latents\.json\); name a new folder"):
        prepare_latents("avatars", str(tmp_path / "half"), str(vae_folder), "16", flip=True, num_images=60)


def test_a_changed_source_or_vae_is_refused_with_the_difference(tmp_path, vae_folder):
    source = tmp_path / "faces"
    source.mkdir()
    for i in range(6):
        render_face(choose_face(0, i), 32).save(source / f"{i}.png")
    prepare_latents(str(source), str(tmp_path / "latents"), str(vae_folder), "16")
    render_face(choose_face(1, 0), 32).save(source / "5.png")
    with pytest.raises(FileExistsError, match=r"other images: 1 of 6 images have changed, first 5\.png; name"):
        prepare_latents(str(source), str(tmp_path / "latents"), str(vae_folder), "16")
    render_face(choose_face(0, 5), 32).save(source / "5.png")
    other = tiny_vae().requires_grad_(False)
    other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "vae")
    with pytest.raises(FileExistsError, match=r"vae was vae \(\w+\) and is vae \(\w+\)"):
        prepare_latents(str(source), str(tmp_path / "latents"), str(tmp_path / "vae"), "16")
    with pytest.raises(FileExistsError, match="crop was center and is none"):
        prepare_latents(str(source), str(tmp_path / "latents"), str(vae_folder), "16", crop="none")
    source.rename(tmp_path / "faces2")  # the same images elsewhere are the same
    prepare_latents(str(tmp_path / "faces2"), str(tmp_path / "latents"), str(vae_folder), "16")


def test_identity_keeps_the_spelling_of_format_2():
    written = {
        "format": 2,
        "source": "faces, 3 pictures (x), 60 pictures (64b3bbef2596)",
        "vae": "vae (1) (1e475c2136fa)",
        "crop": "center",
        "resolution": "16x24",
        "flip": False,
    }
    identity = parse_identity(written)
    assert identity["source"] == {"name": "faces, 3 pictures (x)", "num_images": 60, "sha256": "64b3bbef2596"}
    assert identity["vae"] == {"name": "vae (1)", "sha256": "1e475c2136fa"}
    assert identity["resolution"] == {"height": 16, "width": 24}
    assert json.dumps(format_identity(identity)) == json.dumps(written)
    with pytest.raises(ValueError, match="unreadable vae: 'vae'"):
        parse_identity({**written, "vae": "vae"})


def downloaded(hub, folder):
    """Write the files of the data set you/big to a folder."""
    for name, content in hub.repositories["datasets/you/big"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def num_rows(folder):
    """The rows that `load_dataset` finds by the card; of a folder it refuses what `load_from_disk` would open."""
    (Path(folder) / "state.json").unlink()
    return len(load_dataset(folder, split="train", cache_dir=f"{folder}-cache"))


@pytest.mark.parametrize("has_list", [True, False], ids=["pushed", "pushed by 0.1.0"])
def test_a_cache_of_fewer_shards_replaces_one_of_more(latents, hub, tmp_path, has_list):
    push_latents(latents, "you/big")
    files = hub.repositories["datasets/you/big"]
    shard = files["data-00000-of-00001.arrow"]
    larger = {f"data-0000{i}-of-00002.arrow": shard for i in range(2)}
    files |= larger
    listed = json.loads(files.pop("pushed_files.json"))
    if has_list:
        listed["files"] += [*larger]
        files["pushed_files.json"] = json.dumps(listed).encode()
    # The card names the shards, whatever else is there.
    assert num_rows(downloaded(hub, tmp_path / "with")) == 60
    push_latents(latents, "you/big")
    assert not larger.keys() & hub.repositories["datasets/you/big"].keys()
    folder = downloaded(hub, tmp_path / "now")
    assert load_from_disk(folder)["id"][:] == load_rows(latents)["id"][:]
    assert num_rows(folder) == 60


@pytest.mark.parametrize("files", [{"README.md": b"MINE", "data/train-0.parquet": b"x"}, {"a.csv": b""}])
def test_a_data_set_that_is_no_cache_is_left_alone(latents, hub, files):
    hub.repositories["datasets/you/mine"] = dict(files)
    message = f"push_to_hub you/mine holds something else already .*{[*files][-1]}.*; name another repository"
    with pytest.raises(FileExistsError, match=message):
        push_latents(latents, "you/mine")
    assert hub.repositories["datasets/you/mine"] == files


def test_the_edited_card_of_a_cache_keeps_its_owners_words(latents, hub, tmp_path):
    push_latents(latents, "you/big")
    files = hub.repositories["datasets/you/big"]
    edited = "---\nlicense: mit\n" + files["README.md"].decode().removeprefix("---\n") + "\nOf my aunt.\n"
    files["README.md"] = edited.replace("60 train", "61 train").encode()
    push_latents(latents, "you/big")
    card = hub.repositories["datasets/you/big"]["README.md"].decode()
    assert "license: mit\n" in card
    assert card.endswith("\nOf my aunt.\n")
    # Nobody has edited the next one, but its figures are of another cache.
    files["README.md"] = sign_blocks(edited.replace("PSNR", "about PSNR")).encode()
    push_latents(latents, "you/big")
    card = hub.repositories["datasets/you/big"]["README.md"].decode()
    assert "about PSNR" not in card
    assert card.endswith("\nOf my aunt.\n")


def test_a_cache_is_pushed_with_its_card(latents, hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    push_latents(latents, "you/faces", private=True)
    rows, _ = open_latents(snapshot_download("you/faces", repo_type="dataset", cache_dir=tmp_path / "hub"))
    assert rows["id"][:] == open_latents(latents)[0]["id"][:]
    loaded = load_dataset("you/faces", split="train", cache_dir=str(tmp_path / "datasets"))
    assert loaded["latent_mean"][5] == rows["latent_mean"][5]
    with pytest.raises(ValueError, match="push_to_hub not a name"):
        push_latents(latents, "not a name")
    assert hub.private["you/faces"] is True
    files = hub.repositories["datasets/you/faces"]
    assert files["README.md"] == (latents / "README.md").read_bytes()
    assert "reconstructions.png" in files
