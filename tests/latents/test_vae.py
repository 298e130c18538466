"""VAEs by name: folders, files, pipelines, the Hub with and without a network."""

import re
import shutil
import time

import pytest
import torch
from conftest import tiny_pipeline, tiny_vae
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import save_file

from dit_hf.cli import main
from dit_hf.latents.vae import load_vae


def same_weights(first: AutoencoderKL, second: AutoencoderKL, tolerance: float = 0.0) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, atol=tolerance, rtol=0) and a.dtype == torch.float32 for a, b in pairs)


def test_weights_in_half_precision_alone(tmp_path):
    tiny_vae().half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert same_weights(load_vae(str(tmp_path / "vae"), "cpu"), tiny_vae(), 1e-3)


def test_the_vae_of_a_whole_pipeline(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path / "pipeline")
    assert same_weights(load_vae(str(tmp_path / "pipeline"), "cpu"), pipeline.vae)


def test_one_file_with_its_config(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "my-vae.safetensors"
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").rename(file)
    assert same_weights(load_vae(str(file), "cpu"), tiny_vae())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my-vae.safetensors",
            r"weights in one file, .* \(.*\); put the VAE's config.json beside it",
        ),
        ("vae.ckpt", r"expected a \.safetensors file, a folder or a Hub id, got a \.ckpt file"),
        ("nowhere/vae/", "no such folder"),
        ("transformer", "expected AutoencoderKL, AutoencoderTiny or AutoencoderDC, got LatentDiTTransformer2DModel"),
        ("empty", "no VAE could be loaded from there"),
    ],
)
def test_what_is_no_vae_is_named(tmp_path, name, message):
    save_file({"x": torch.zeros(3)}, tmp_path / "my-vae.safetensors")
    (tmp_path / "vae.ckpt").write_bytes(b"\x80")
    (tmp_path / "empty").mkdir()
    if name == "transformer":
        tiny_pipeline().transformer.save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load_vae(str(tmp_path / name), "cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["you/vae", "you/pipeline", "you/pipeline/vae", "you/half"])
def test_the_hub(tmp_path, hub, name):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    shutil.copytree(tmp_path / "pipeline" / "vae", tmp_path / "vae")
    tiny_vae().half().save_pretrained(tmp_path / "half", variant="fp16")
    folder = tmp_path / name.split("/")[1]
    hub.repositories["/".join(name.split("/")[:2])] = {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    assert same_weights(load_vae(name, "cpu"), tiny_vae(), 1e-3)


def test_no_such_vae_on_the_hub(hub):
    started = time.monotonic()
    with pytest.raises(ValueError, match="vae you/nothing: no VAE could be loaded from there"):
        load_vae("you/nothing", "cpu")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("endpoint", "reason"),
    [("http://127.0.0.1:9", "refused"), ("http://no-such-host.invalid", "not known|resolution")],
)
def test_without_a_network_one_line_says_so_within_seconds(tmp_path, monkeypatch, capsys, endpoint, reason):
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    options = ["--source", "avatars", "--num_images", "2", "--resolution", "16", "--vae", "stabilityai/sd-vae-ft-ema"]
    started = time.monotonic()
    assert main(["prepare-latents", *options, "--output_dir", str(tmp_path / "out")]) == 1
    assert time.monotonic() - started < 5
    lines = capsys.readouterr().err.splitlines()
    expected = r"vae stabilityai/sd-vae-ft-ema: it is not on this machine, and the Hub cannot be reached: .*"
    assert re.search(f"error: {expected}({reason})", lines[-1])
    assert "Retrying" not in "".join(lines)


def test_a_vae_that_was_downloaded_needs_no_network(tmp_path, hub, monkeypatch):
    tiny_vae().save_pretrained(tmp_path / "vae")
    hub.repositories["you/kept"] = {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    load_vae("you/kept", "cpu")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same_weights(load_vae("you/kept", "cpu"), tiny_vae())
