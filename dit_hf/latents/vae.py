"""The diffusers VAEs that latents are made with: `AutoencoderKL`, `AutoencoderTiny` and `AutoencoderDC`."""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, AutoModel

from ..devices import default_device
from ..storage import first_line

BUNDLED = "avatar"
# Of the images that go through a VAE at once: Stable Diffusion's takes some 3 GB for so many.
PART_PIXELS = 16 * 256 * 256
VAE: TypeAlias = AutoencoderKL | AutoencoderTiny | AutoencoderDC


def load_vae(name: str, device: str | torch.device | None = None) -> VAE:
    """Load a VAE in float32 by Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`) or folder; `avatar` is the bundled one.

    Raises:
        ValueError: if it is not there, saying what to do, or of a kind that is not supported.
    """
    path, subfolder = (str(files("dit_hf") / "assets" / "avatar_vae"), None) if name == BUNDLED else (name, None)
    if name.count("/") > 1 and not Path(name).exists() and not name.startswith(("/", ".", "~")):
        owner, repository, subfolder = name.split("/", 2)
        path = f"{owner}/{repository}"
    try:
        vae = AutoModel.from_pretrained(path, subfolder=subfolder, dtype=torch.float32)
    except Exception as error:  # a missing folder, no network, a damaged file: all raise their own
        raise ValueError(
            f"vae {name}: no VAE could be loaded from there ({first_line(error)}); give a folder, 'avatar', or a "
            "Hub id (which needs the network the first time)"
        ) from error
    if not isinstance(vae, VAE):
        raise ValueError(f"vae {name}: {type(vae).__name__} is none of AutoencoderKL, AutoencoderTiny, AutoencoderDC")
    # The config is saved with every cache and pipeline, where it must not tell how this machine names its folders.
    vae.register_to_config(_name_or_path=Path(name).name if Path(name).exists() else name)
    return vae.eval().requires_grad_(False).to(device or default_device())


def has_posterior(vae: VAE) -> bool:
    """Whether it encodes an image as a distribution, of which the standard deviation is stored too."""
    return isinstance(vae, AutoencoderKL)


def latent_shape(vae: VAE, resolution: tuple[int, int]) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of images of `resolution` (height, width).

    Raises:
        ValueError: if the resolution is not divisible by what the VAE reduces a side by.
    """
    factor = _reduction(vae)
    height, width = resolution
    if height % factor or width % factor:
        raise ValueError(f"resolution {height}x{width} is not divisible by {factor}, the VAE's reduction")
    return vae.config.latent_channels, height // factor, width // factor


def _reduction(vae: VAE) -> int:
    """By how much it makes a side smaller."""
    blocks = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return 2 ** (len(blocks) - 1)


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Latents of uint8 images [batch, height, width, 3]: mean and, where there is a posterior, standard deviation.

    They are the VAE's own values, neither shifted nor scaled, in fp16, [batch, channels, height, width].

    Raises:
        ValueError: if a latent does not fit fp16.
    """
    size = max(1, PART_PIXELS // (images.shape[1] * images.shape[2]))
    parts = [_encode_part(vae, part) for part in images.split(size)]
    mean = torch.cat([part[0] for part in parts])
    std = torch.cat([part[1] for part in parts if part[1] is not None]) if has_posterior(vae) else None
    if not torch.isfinite(mean).all():
        raise ValueError("the VAE's latents are not finite, or beyond fp16's 65,504; they cannot be stored")
    return mean, std


def _encode_part(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    pixels = images.to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # channels last in memory, as they came
    encoded = vae.encode(pixels)
    if has_posterior(vae):
        return encoded.latent_dist.mean.half(), encoded.latent_dist.std.half()
    return (encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latents).half(), None


@torch.no_grad()
def decode(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """Images, uint8 [batch, height, width, 3], of the VAE's own latents [batch, channels, height, width]."""
    size = max(1, PART_PIXELS // (latents.shape[2] * latents.shape[3] * _reduction(vae) ** 2))
    pixels = torch.cat([vae.decode(part.to(vae.device, vae.dtype)).sample for part in latents.split(size)])
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def weights_sha256(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """SHA-256 of a VAE's or another model's weights, whatever the file they came from.

    With `dtype` of what `from_pretrained(dtype=dtype)` makes of them, which keeps some parts in float32.
    """
    kept, hashes = getattr(model, "_keep_in_fp32_modules", None) or (), {}
    for name, tensor in model.state_dict().items():
        if dtype is not None and tensor.is_floating_point() and not set(name.split(".")) & set(kept):
            tensor = tensor.to(dtype)
        hashes[name] = hashlib.sha256(tensor.detach().cpu().flatten().view(torch.uint8).numpy()).hexdigest()
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
