"""The latent cache: pictures encoded once by a VAE into one Arrow data set that training reads."""

from __future__ import annotations

import csv
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, List, Value, load_from_disk
from diffusers import AutoencoderKL

from ..storage import new_folder, read_manifest, write_manifest
from .images import AVATARS, Geometry, decode_image, is_held_out, open_rows

INFO = "latents.json"
FORMAT_VERSION = 1
MAX_LEFT_OUT = 0.01
BATCH_SIZE = 64


def prepare_latents(
    output_dir: str,
    source: str = AVATARS,
    vae: str = "stabilityai/sd-vae-ft-ema",
    resolution: str = "256",
    crop: str = "center",
    split: str | None = None,
    flip: bool = False,
    num_images: int | None = None,
    seed: int = 0,
) -> Path:
    """Encode the pictures of `source` into a latent cache at `output_dir`.

    Args:
        output_dir: the cache's folder. If it holds the finished cache of the same settings, that is the result.
        source: a folder of pictures, or `avatars`, the embedded data set.
        vae: Hub id or folder of a diffusers `AutoencoderKL`, or `avatar`, the bundled one.
        resolution: `N` or `HxW` pixels, divisible by what the VAE reduces a side by.
        crop: `celeba-178`, `celeba-140`, `center` or `none`.
        split: only this part of a source that comes divided.
        flip: also encode each picture mirrored (latents themselves are never mirrored).
        num_images: only so many pictures.
        seed: which avatars.

    Returns:
        The folder, which `datasets.load_from_disk` opens: `id`, `split`, `latent_mean`, `latent_std` (fp16, channels
        first, flattened), with `flip` also `latent_mean_flip` and `latent_std_flip`, and one column a condition.

    Raises:
        FileExistsError: if `output_dir` holds something else, or a cache of other settings (the difference is said).
        ValueError: for options that do not fit, or if more than 1 % of the pictures cannot be read.
    """
    settings = {name: value for name, value in locals().items() if name != "output_dir"}
    folder = Path(output_dir)
    if _is_finished(folder, settings):
        print(f"{folder} already holds these latents")
        return folder
    rows, geometry = open_rows(source, resolution, crop, num_images, split, seed)
    encoder = _Encoder(load_vae(vae), geometry, flip)
    with new_folder(folder) as partial:
        cache = _encode(rows, encoder, settings, partial)
        _write_left_out(encoder.left_out, partial)
        encoder.vae.save_pretrained(partial / "vae")
        info = _describe(cache, encoder, settings)
        (partial / "README.md").write_text(_card(info), encoding="utf-8")
        write_manifest(partial, INFO, **info)
    counts = info["counts"]
    print(f"{folder}: {counts['train']} training, {counts['validation']} validation, {counts['left_out']} left out")
    return folder


def open_latents(folder: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """Open a latent cache: the data set, and what its `latents.json` says.

    Raises:
        ValueError: if the folder is no latent cache, or not whole.
    """
    folder = Path(folder)
    if not (folder / INFO).is_file():
        raise ValueError(f"{folder} is no latent cache (no {INFO}); make one with dit-hf prepare-latents")
    return load_from_disk(str(folder)), read_manifest(folder, INFO)


def load_vae(name: str, device: str | torch.device | None = None) -> AutoencoderKL:
    """Load a VAE in float32 by Hub id or folder; `avatar` is the bundled one.

    Raises:
        ValueError: if it is not there, saying what to do.
    """
    path = str(files("dit_hf") / "assets" / "avatar_vae") if name == "avatar" else name
    try:
        vae = AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"vae {name}: no AutoencoderKL there; give a Hub id (needs the network once), a folder, or 'avatar'"
        ) from error
    # The config is saved with every cache and pipeline, where it must not tell how this machine names its folders.
    vae.register_to_config(_name_or_path=Path(name).name if Path(name).exists() else name)
    return vae.eval().requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class _Encoder:
    """Encodes batches of rows for `datasets.map`, sums up the statistics and notes what it leaves out."""

    def __init__(self, vae: AutoencoderKL, geometry: Geometry, flip: bool):
        self.vae, self.geometry, self.flip = vae, geometry, flip
        if geometry.resolution is None:
            raise ValueError("resolution is needed: all latents of a cache have one shape")
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        height, width = geometry.resolution
        if height % factor or width % factor:
            raise ValueError(f"resolution {height}x{width} is not divisible by {factor}, the VAE's reduction")
        self.latent_shape = (vae.config.latent_channels, height // factor, width // factor)
        self.left_out: list[tuple[str, str]] = []
        self.sums = torch.zeros(3, self.latent_shape[0], dtype=torch.float64)
        self.count = 0

    def __call__(self, batch: dict[str, list]) -> dict[str, Any]:
        images, kept = [], []
        for index, (image_id, image) in enumerate(zip(batch["id"], batch["image"], strict=True)):
            try:
                images.append(np.asarray(decode_image({"id": image_id, "image": image}, self.geometry)))
                kept.append(index)
            except ValueError as error:
                self.left_out.append((image_id, str(error).removeprefix(f"{image_id}: ")))
        columns: dict[str, Any] = {
            name: [values[i] for i in kept] for name, values in batch.items() if name != "image"
        }
        columns.setdefault("split", ["validation" if is_held_out(i) else "train" for i in columns["id"]])
        pixels = np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)
        columns |= self._encode(pixels)
        if self.flip:
            columns |= {f"{name}_flip": values for name, values in self._encode(pixels[:, :, ::-1]).items()}
        return columns

    @torch.no_grad()
    def _encode(self, images: np.ndarray) -> dict[str, Any]:
        if not len(images):
            return {"latent_mean": [], "latent_std": []}
        pixels = torch.from_numpy(images.copy()).to(self.vae.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.vae.encode(pixels).latent_dist
        mean, std = posterior.mean.half(), posterior.std.half()
        exact_mean, exact_std = mean.double(), std.double()
        self.sums += torch.stack(
            [exact_mean.sum((0, 2, 3)), exact_mean.square().sum((0, 2, 3)), exact_std.square().sum((0, 2, 3))]
        ).cpu()
        self.count += mean[:, 0].numel()
        return {"latent_mean": mean.flatten(1).cpu().numpy(), "latent_std": std.flatten(1).cpu().numpy()}

    def statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation by channel of samples of the posteriors (law of total variance)."""
        mean, mean_square, variance = self.sums / self.count
        return {"mean": mean.tolist(), "std": (mean_square - mean.square() + variance).sqrt().tolist()}


def _is_finished(folder: Path, settings: dict[str, Any]) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / INFO).is_file():
        raise FileExistsError(f"output_dir {folder} holds something else; name a new folder")
    before = read_manifest(folder, INFO)["settings"]
    different = [f"{k}={before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]
    if different:
        raise FileExistsError(f"output_dir {folder} holds a cache with {'; '.join(different)}; name a new folder")
    return True


def _encode(rows: Dataset, encoder: _Encoder, settings: dict[str, Any], partial: Path) -> Dataset:
    size = int(np.prod(encoder.latent_shape))
    names = ["latent_mean", "latent_std"]
    names += [f"{name}_flip" for name in names] if encoder.flip else []
    features = Features({"id": Value("string"), "split": Value("string")})
    features |= {name: List(Value("float16"), length=size) for name in names}
    features |= {name: feature for name, feature in rows.features.items() if name not in ("id", "image", "split")}
    built = partial / "building"
    built.mkdir()
    cache = rows.map(
        encoder,
        batched=True,
        batch_size=BATCH_SIZE,
        remove_columns=rows.column_names,
        features=Features(features),
        cache_file_name=str(built / "latents.arrow"),
        # A map function that holds a VAE hashes differently in every process, so the fingerprint is ours.
        new_fingerprint=hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16],
        desc="encoding",
    )
    if len(encoder.left_out) > MAX_LEFT_OUT * len(rows):
        first = "; ".join(f"{image_id}: {reason}" for image_id, reason in encoder.left_out[:3])
        raise ValueError(f"{len(encoder.left_out)} of {len(rows)} pictures cannot be read, more than 1 %: {first}")
    cache.save_to_disk(str(partial))
    del cache
    for path in built.iterdir():
        path.unlink()
    built.rmdir()
    return load_from_disk(str(partial))


def _describe(cache: Dataset, encoder: _Encoder, settings: dict[str, Any]) -> dict[str, Any]:
    splits = cache["split"]
    conditions, labels = {}, {}
    for name, feature in cache.features.items():
        if isinstance(feature, ClassLabel):
            conditions[name], labels[name] = feature.num_classes, feature.names
        elif isinstance(feature, Value) and feature.dtype == "int8":
            conditions[name] = max(2, 1 + max(cache[name]))
    config = encoder.vae.config
    weights = json.dumps({k: hashlib.sha256(v.cpu().numpy()).hexdigest() for k, v in encoder.vae.state_dict().items()})
    return {
        "version": FORMAT_VERSION,
        "settings": settings,
        "latent_shape": list(encoder.latent_shape),
        "conditions": conditions,
        "condition_labels": labels,
        "statistics": encoder.statistics(),
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor or 0.0,
        "vae_sha256": hashlib.sha256(weights.encode()).hexdigest(),
        "counts": {
            **{name: sum(split == name for split in splits) for name in ("train", "validation", "test")},
            "left_out": len(encoder.left_out),
        },
    }


def _write_left_out(left_out: list[tuple[str, str]], folder: Path) -> None:
    with open(folder / "left_out.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "reason"), *left_out])


def _card(info: dict[str, Any]) -> str:
    settings, counts = info["settings"], info["counts"]
    channels, height, width = info["latent_shape"]
    return f"""# Latents of {settings["source"]}

| | |
|---|---|
| pictures | {counts["train"]} train, {counts["validation"]} validation, {counts["test"]} test |
| left out | {counts["left_out"]} (`left_out.csv` names each and says why) |
| geometry | crop `{settings["crop"]}`, {settings["resolution"]} px{", mirrored too" if settings["flip"] else ""} |
| VAE | `{settings["vae"]}` (a copy is in `vae/`) |
| latents | {channels} x {height} x {width}, fp16, mean and standard deviation of the posterior |
| conditions | {", ".join(info["conditions"]) or "none"} |

Made by `dit-hf prepare-latents`; `datasets.load_from_disk` opens it. `{INFO}` has settings, statistics and hashes.
"""
