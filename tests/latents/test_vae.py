import pytest
import torch
from conftest import tiny_vae
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.image_processor import VaeImageProcessor

from dit_hf import LatentDiTPipeline, open_images
from dit_hf.latents.cache import open_latents
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.vae import encode, load_vae
from dit_hf.training.trainer import train


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
