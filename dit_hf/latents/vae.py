"""Load and run the diffusers VAEs that make latents: `AutoencoderKL`, `AutoencoderTiny` and `AutoencoderDC`."""

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
# Pixels of the images that a VAE encodes or decodes at once; Stable Diffusion's needs about 3 GB for this many.
CHUNK_PIXELS = 16 * 256 * 256
VAE: TypeAlias = AutoencoderKL | AutoencoderTiny | AutoencoderDC


def load_vae(name: str, device: str | torch.device | None = None) -> VAE:
    """Load a VAE in float32 by Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`) or folder; `avatar` is the bundled one.

    Raises:
        ValueError: if it cannot be loaded (the message says what to do), or is of another class.
    """
    path, subfolder = name, None
    if name == BUNDLED:
        path = str(files("dit_hf") / "assets" / "avatar_vae")
    # A third part of a Hub id is a subfolder of the repository.
    if name.count("/") > 1 and not Path(name).exists() and not name.startswith(("/", ".", "~")):
        owner, repository, subfolder = name.split("/", 2)
        path = f"{owner}/{repository}"

    try:
        vae = AutoModel.from_pretrained(path, subfolder=subfolder, dtype=torch.float32)
    except Exception as error:  # a missing folder, no network and a damaged file each raise a class of their own
        raise ValueError(
            f"vae {name}: no VAE could be loaded from there ({first_line(error)}); give a folder, 'avatar', or a "
            "Hub id (which needs the network the first time)"
        ) from error
    if not isinstance(vae, VAE):
        raise ValueError(
            f"vae {name}: expected AutoencoderKL, AutoencoderTiny or AutoencoderDC, got {type(vae).__name__}"
        )
    # The config is saved with every cache and pipeline and must not hold a path of this machine. `_name_or_path` is
    # where diffusers keeps the name (private, read in 0.42.1).
    vae.register_to_config(_name_or_path=Path(name).name if Path(name).exists() else name)
    return vae.eval().requires_grad_(False).to(device or default_device())


def has_posterior(vae: VAE) -> bool:
    """Check whether a VAE encodes an image as a distribution, whose standard deviation is stored too."""
    return isinstance(vae, AutoencoderKL)


def latent_shape(vae: VAE, resolution: tuple[int, int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of the latents of images of `resolution` (height, width).

    Raises:
        ValueError: if the resolution is not divisible by the VAE's reduction of a side.
    """
    factor = _reduction(vae)
    height, width = resolution
    if height % factor or width % factor:
        raise ValueError(f"resolution {height}x{width} is not divisible by {factor}, the VAE's reduction")
    return vae.config.latent_channels, height // factor, width // factor


def _reduction(vae: VAE) -> int:
    """Return the factor by which a VAE reduces each side of an image."""
    blocks = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return 2 ** (len(blocks) - 1)


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode uint8 images [batch, height, width, 3].

    Returns:
        Mean and, if the VAE has a posterior, standard deviation of the latents: fp16 [batch, channels, height, width],
        neither shifted nor scaled.

    Raises:
        ValueError: if a latent does not fit fp16.
    """
    size = max(1, CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
    encoded = [_encode_chunk(vae, chunk) for chunk in images.split(size)]
    mean = torch.cat([chunk_mean for chunk_mean, _ in encoded])  # [batch, channels, height, width]
    std = torch.cat([chunk_std for _, chunk_std in encoded if chunk_std is not None]) if has_posterior(vae) else None
    if not torch.isfinite(mean).all():
        raise ValueError("the VAE's latents are not finite, or beyond fp16's 65,504; they cannot be stored")
    return mean, std


def _encode_chunk(vae: VAE, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode images that fit into memory at once."""
    # `permute` leaves the images channels last in memory, the layout in which convolutions are fastest.
    pixels = images.to(vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [batch, 3, height, width] in [-1, 1]
    encoded = vae.encode(pixels)
    if has_posterior(vae):
        return encoded.latent_dist.mean.half(), encoded.latent_dist.std.half()
    return (encoded.latent if isinstance(vae, AutoencoderDC) else encoded.latents).half(), None


@torch.no_grad()
def decode(vae: VAE, latents: torch.Tensor) -> torch.Tensor:
    """Decode the VAE's own latents [batch, channels, height, width] to images, uint8 [batch, height, width, 3]."""
    size = max(1, CHUNK_PIXELS // (latents.shape[2] * latents.shape[3] * _reduction(vae) ** 2))
    pixels = torch.cat([vae.decode(chunk.to(vae.device, vae.dtype)).sample for chunk in latents.split(size)])
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def weights_sha256(model: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 of a VAE's or another model's weights, which does not depend on the file they came from.

    With `dtype`, the weights are hashed as `from_pretrained(dtype=dtype)` would load them, some of them in float32.
    """
    # A class attribute that diffusers' `from_pretrained` reads (private, read in 0.42.1).
    fp32_modules = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    hashes = {}
    for name, tensor in model.state_dict().items():
        if dtype is not None and tensor.is_floating_point() and not set(name.split(".")) & fp32_modules:
            tensor = tensor.to(dtype)
        hashes[name] = hashlib.sha256(tensor.detach().cpu().flatten().view(torch.uint8).numpy()).hexdigest()
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
