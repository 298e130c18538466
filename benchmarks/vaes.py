"""VAEs with random weights, which are as fast as trained ones."""

import torch
from diffusers import AutoencoderKL


def sd_shaped_vae() -> AutoencoderKL:
    """Build the architecture of Stable Diffusion's VAE."""
    return _build((128, 256, 512, 512), layers_per_block=2)


def tiny_vae() -> AutoencoderKL:
    """Build a VAE that halves each side and costs next to nothing, so that everything beside it shows."""
    return _build((8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False)


def _build(channels: tuple[int, ...], **options: int) -> AutoencoderKL:
    torch.manual_seed(0)
    down, up = (("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels))
    return AutoencoderKL(block_out_channels=channels, down_block_types=down, up_block_types=up, **options).eval()
