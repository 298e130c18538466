"""VAEs by name: folders, files, pipelines, the Hub with and without a network."""

import re
import shutil
import time

import pytest
import torch
from conftest import tiny_pipeline, tiny_vae
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import constants
from safetensors.torch import save_file

from dit_hf import LatentDiTPipeline, open_images
from dit_hf.latents.cache import open_latents
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.vae import encode, load_vae
from dit_hf.training.trainer import train
from dit_hf_cli import main


def other_vaes():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "mid_block_add_attention": False}
    plain = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    tiny = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    tiny |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    deep = {f"{part}_block_out_channels": (8, 16) for part in ("encoder", "decoder")}
    deep |= {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
    deep |= {f"{part}_qkv_multiscales": ((), ()) for part in ("encoder", "decoder")}
    return {
        "kl-16": AutoencoderKL(latent_channels=16, **blocks, **sizes, **plain),
        "tiny": AutoencoderTiny(**tiny),
        "dc": AutoencoderDC(latent_channels=8, attention_head_dim=4, scaling_factor=0.4, **deep),
    }


@pytest.mark.parametrize("kind", ["kl-16", "tiny", "dc"])
def test_other_vaes_and_training_on_their_latents(tmp_path, config, kind):
    vae = other_vaes()[kind].eval()
    vae.save_pretrained(tmp_path / "vae")
    prepare_latents("avatars", str(tmp_path / "latents"), str(tmp_path / "vae"), "16", num_images=40)
    cache, info = open_latents(tmp_path / "latents")
    pixels = VaeImageProcessor(do_resize=False).preprocess(
        open_images("avatars", resolution=16, num_images=40)[3]["image"]
    )
    with torch.no_grad():
        encoded = vae.encode(pixels)
    expected = {
        "kl-16": lambda: encoded.latent_dist.mean,
        "tiny": lambda: encoded.latents,
        "dc": lambda: encoded.latent,
    }
    latent = expected[kind]()
    assert info["latent_shape"] == list(latent.shape[1:])
    torch.testing.assert_close(torch.tensor(cache[3]["latent_mean"]), latent.flatten(), atol=2e-3, rtol=2e-3)
    assert ("latent_std" in cache.column_names) == (kind == "kl-16")
    assert info["shift_factor"] == (0.1159 if kind == "kl-16" else 0.0)
    config.data.latents, config.train.max_train_steps = str(tmp_path / "latents"), 2
    pipeline = LatentDiTPipeline.from_pretrained(train(config) / "pipeline")
    images = pipeline(batch_size=1, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_the_error_names_the_class_of_another_model(tmp_path):
    VQModel(norm_num_groups=8).save_pretrained(tmp_path / "vq")
    with pytest.raises(ValueError, match=r"vq: expected AutoencoderKL, AutoencoderTiny or AutoencoderDC, got VQModel"):
        load_vae(str(tmp_path / "vq"))


def test_latents_beyond_half_precision_are_not_stored():
    vae = tiny_vae().requires_grad_(False)
    vae.quant_conv.bias[0] = 70_000
    with pytest.raises(ValueError, match="beyond fp16's 65,504"):
        encode(vae, torch.zeros(2, 16, 16, 3, dtype=torch.uint8))


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
        ("empty", "a folder without config.json, which a VAE has; give a folder, 'avatar', or a Hub id"),
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
    with pytest.raises(ValueError, match="vae you/nothing: no such model on the Hub, or a private one"):
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
    expected = r"vae stabilityai/sd-vae-ft-ema: not on this machine, and the Hub cannot be reached \(.*"
    assert re.search(f"error: {expected}({reason})", lines[-1])
    assert "Retrying" not in "".join(lines)


def test_a_vae_that_was_downloaded_needs_no_network(tmp_path, hub, monkeypatch):
    tiny_vae().save_pretrained(tmp_path / "vae")
    hub.repositories["you/kept"] = {path.name: path.read_bytes() for path in (tmp_path / "vae").iterdir()}
    load_vae("you/kept", "cpu")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same_weights(load_vae("you/kept", "cpu"), tiny_vae())


def test_a_vae_may_be_a_revision_and_a_gated_one_is_named(tmp_path, hub):
    vae = tiny_vae()
    for key, shift in (("you/vae", 0), ("you/vae@v2", 1)):
        with torch.no_grad():
            vae.quant_conv.bias.add_(shift)
        vae.save_pretrained(tmp_path / key)
        files = {f"sub/{path.name}": path.read_bytes() for path in (tmp_path / key).iterdir()}
        hub.repositories[key] = files | {name.removeprefix("sub/"): content for name, content in files.items()}
    for name in ("you/vae@v2", "you/vae/sub@v2"):
        loaded = load_vae(name, "cpu")
        assert same_weights(loaded, vae)
        assert loaded.config._name_or_path == name
    assert not same_weights(load_vae("you/vae", "cpu"), vae)
    hub.denied["you/real"] = (403, "GatedRepo")
    with pytest.raises(ValueError, match=r"vae you/real: gated on the Hub: ask for access at .*/you/real,"):
        load_vae("you/real")


def _original_names(vae):
    """Return the weights of a VAE by the names that Stable Diffusion's own files have."""
    last = len(vae.config.block_out_channels) - 1
    renamed = {}
    for name, weight in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d)\.(downsamplers\.0|resnets\.)", r"down.\1.\2", name)
        name = re.sub(r"up_blocks\.(\d)\.", lambda match: f"up.{last - int(match[1])}.", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        for ours, theirs in (
            *(("downsamplers.0", "downsample"), ("upsamplers.0", "upsample"), ("resnets.", "block.")),
            *(("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out")),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = weight
    return renamed


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])  # the VAE alone, and inside a whole model
def test_one_file_in_the_layout_of_stable_diffusion(tmp_path, prefix):
    vae = tiny_vae()
    vae.save_config(tmp_path)
    save_file(
        {f"{prefix}{name}": weight for name, weight in _original_names(vae).items()}, tmp_path / "sd.safetensors"
    )
    loaded = load_vae(str(tmp_path / "sd.safetensors"), "cpu")
    assert same_weights(loaded, vae)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"its config is on the Hub, which cannot be reached: .*config\.json beside it"
    ):
        load_vae(str(tmp_path / "sd.safetensors"), "cpu")
