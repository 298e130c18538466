"""Load and run the diffusers VAEs that make latents: `AutoencoderKL`, `AutoencoderTiny` and `AutoencoderDC`."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, AutoModel
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file

from ..devices import default_device
from ..hub_ids import hub_problem, reading_problem, split_revision
from ..storage import first_line

BUNDLED = {"avatar": "avatar_vae", "avatar-robust": "avatar_robust_vae"}  # name: folder in assets
# Pixels of the images that a VAE encodes or decodes at once; Stable Diffusion's needs about 3 GB for this many.
CHUNK_PIXELS = 16 * 256 * 256
VAE: TypeAlias = AutoencoderKL | AutoencoderTiny | AutoencoderDC


def load_vae(name: str, device: str | torch.device | None = None) -> VAE:
    """Load a VAE in float32; `avatar` and `avatar-robust` are bundled.

    Args:
        name: Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`, either with `@REVISION`), folder, or `.safetensors` file.
            Of a whole pipeline its VAE is loaded; weights that exist in half precision alone are loaded too.
        device: Where to load it; by default the accelerator, if there is one.

    Raises:
        ValueError: if it cannot be loaded (the message says what to do), or is of another class.
    """
    if name in BUNDLED:
        vae = _load_folder(str(files("dit_hf") / "assets" / BUNDLED[name]))
    elif Path(name).is_file():
        vae = _load_file(Path(name))
    else:
        vae = _load_named(name)
    if not isinstance(vae, VAE):
        raise ValueError(
            f"vae {name}: expected AutoencoderKL, AutoencoderTiny or AutoencoderDC, got {type(vae).__name__}"
        )
    # The config is saved with every cache and pipeline and must not hold a path of this machine. `_name_or_path` is
    # where diffusers keeps the name (private, read in 0.42.1).
    vae.register_to_config(_name_or_path=Path(name).name if Path(name).exists() else name)
    return vae.eval().requires_grad_(False).to(device or default_device())


def _load_named(name: str) -> Any:
    """Load a VAE from a folder or the Hub."""
    is_path = Path(name).exists() or name.startswith(("/", ".", "~"))
    (path, revision), subfolder = split_revision(name), None
    # A third part of a Hub id is a subfolder of the repository.
    if path.count("/") > 1 and not is_path:
        owner, repository, subfolder = path.split("/", 2)
        path = f"{owner}/{repository}"
    advice = "give a folder, 'avatar', or a Hub id (which needs the network the first time)"

    if not is_path and "/" not in name:
        raise ValueError(f"vae {name}: no such folder; {advice}")
    problem = None if is_path else reading_problem(path, revision)
    try:
        return _load_folder(path, subfolder, revision, local_files_only=is_path or problem is not None)
    except Exception as error:  # a missing folder, no network and a damaged file each raise a class of their own
        if is_path and not Path(name).exists():
            raise ValueError(f"vae {name}: no VAE could be loaded from there (no such folder); {advice}") from error
        if is_path and not any((Path(name) / file).is_file() for file in ("config.json", "model_index.json")):
            raise ValueError(f"vae {name}: a folder without config.json, which a VAE has; {advice}") from error
        if problem is not None:
            raise ValueError(f"vae {name}: {problem}; a folder or 'avatar' needs no network") from error
        raise ValueError(f"vae {name}: no VAE could be loaded from there ({first_line(error)}); {advice}") from error


def _load_folder(
    path: str, subfolder: str | None = None, revision: str | None = None, local_files_only: bool = True
) -> Any:
    """Load a model from a folder or repository, or the VAE of the pipeline in it, in whole or in half precision."""
    subfolders = [subfolder] if subfolder is not None else [None, "vae"]
    if subfolder is None and (Path(path) / "model_index.json").is_file():
        subfolders = ["vae"]
    errors = []
    for folder, variant in itertools.product(subfolders, (None, "fp16")):
        options = {"subfolder": folder, "variant": variant, "revision": revision, "local_files_only": local_files_only}
        try:
            with _quiet_hub():
                return check_weights(AutoModel.from_pretrained(path, dtype=torch.float32, **options))
        except Exception as error:
            errors.append(error)
            # There is nothing else to find in a repository that does not exist or may not be read.
            if isinstance(_cause(error), RepositoryNotFoundError):
                break
    raise errors[0]


def _cause(error: BaseException) -> BaseException:
    """Return the error that led to `error`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _load_file(path: Path) -> Any:
    """Load a VAE from one file: with the `config.json` beside it, or, in Stable Diffusion's own layout, without.

    Raises:
        ValueError: if it cannot be loaded, with what is missing.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"vae {path}: expected a .safetensors file, a folder or a Hub id, got a {path.suffix} file")
    has_config = (path.parent / "config.json").is_file()
    problem = None if has_config else hub_problem()  # the config of Stable Diffusion's own files is on the Hub
    try:
        if has_config:
            vae = AutoModel.from_config(json.loads((path.parent / "config.json").read_text(encoding="utf-8")))
            weights = load_file(path)
            if weights.keys() == vae.state_dict().keys():
                vae.load_state_dict(weights)
                return vae.float()
        options = {"config": str(path.parent)} if has_config else {}
        with _quiet_hub():
            offline = has_config or problem is not None
            vae = AutoencoderKL.from_single_file(str(path), dtype=torch.float32, local_files_only=offline, **options)
        return check_weights(vae)
    except Exception as error:  # as in `_load_named`
        reason = f"its config is on the Hub, which cannot be reached: {problem}" if problem else first_line(error)
        raise ValueError(
            f"vae {path}: weights in one file, which could not be loaded ({reason}); put the VAE's config.json beside "
            "it, or give a folder of diffusers"
        ) from error


def check_weights(model: Any) -> Any:
    """Return a loaded model. diffusers leaves weights that its file lacks without values, on the meta device.

    Raises:
        ValueError: naming the first such weight.
    """
    missing = [name for name, weight in model.named_parameters() if weight.is_meta]
    if missing:
        raise ValueError(f"its weights lack {missing[0]}; config.json and weights do not belong together")
    return model


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Hide a warning: diffusers 0.42.1 passes huggingface_hub an option that it warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")
        yield


def has_posterior(vae: VAE) -> bool:
    """Check whether a VAE encodes an image as a distribution, whose standard deviation is stored too."""
    return isinstance(vae, AutoencoderKL)


def latent_shape(vae: VAE, resolution: tuple[int, int], patch_size: int = 1) -> tuple[int, int, int]:
    """Return (channels, height, width) of the latents of images of `resolution` (height, width).

    Raises:
        ValueError: if the resolution is not divisible by the VAE's reduction of a side, or the latents are not by
            `patch_size`; with the nearest resolutions that are.
    """
    factor = _reduction(vae)
    height, width = resolution
    problem = None
    if height % factor or width % factor:
        problem = f"resolution {height}x{width} is not divisible by {factor}, the VAE's reduction"
    elif height // factor % patch_size or width // factor % patch_size:
        shape = f"{height // factor}x{width // factor}"
        problem = f"resolution {_spell(resolution)} gives latents {shape}, which patches of {patch_size} do not divide"
    if problem is None:
        return vae.config.latent_channels, height // factor, width // factor
    unit = factor * patch_size
    smaller = [side // unit * unit for side in resolution]
    larger = [-(-side // unit) * unit for side in resolution]
    choices = " or ".join(_spell(sides) for sides in (smaller, larger) if min(sides))
    raise ValueError(f"{problem}; {choices} would do")


def _spell(sides: Sequence[int]) -> str:
    """Return (height, width) as an option spells it: "64", or "64x48" if they differ."""
    return f"{sides[0]}x{sides[1]}" if sides[0] != sides[1] else str(sides[0])


def _reduction(vae: VAE) -> int:
    """Return the factor by which a VAE reduces each side of an image."""
    blocks = vae.config.get("encoder_block_out_channels") or vae.config["block_out_channels"]
    return 2 ** (len(blocks) - 1)


@torch.no_grad()
def encode(vae: VAE, images: torch.Tensor, batch_size: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode uint8 images [batch, height, width, 3], `batch_size` at once (by default what takes about 3 GB).

    Returns:
        Mean and, if the VAE has a posterior, standard deviation of the latents: fp16 [batch, channels, height, width],
        neither shifted nor scaled.

    Raises:
        ValueError: if a latent does not fit fp16.
    """
    size = batch_size or max(1, CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
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
