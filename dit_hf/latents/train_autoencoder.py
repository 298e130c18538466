"""Train a small diffusers `AutoencoderKL` on any image source, for images that no published VAE suits."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL.Image import Image
from torch.utils.data import DataLoader

from ..data.contents import SplitFrom
from ..data.images import open_images
from ..data.sources import MAX_LEFT_OUT
from ..data.splits import is_held_out
from ..data.transforms import Faces, photo_of
from ..devices import available_cpus, default_device
from ..progress import ProgressBar
from ..storage import folder_taken, is_missing_or_empty, new_folder, write_text
from .vae import encode, latent_shape, load_vae

MSE_WEIGHT = 0.5
EMA_DECAY = 0.999
LOGGING_STEPS = 100


def train_autoencoder(
    source: str,
    output_dir: str,
    resolution: int = 64,
    crop: str = "center",
    faces: Faces = "all",
    min_face_size: int | None = None,
    num_images: int | None = None,
    split: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    exclude: str | None = None,
    split_from: SplitFrom | None = None,
    max_train_steps: int = 10_000,
    train_batch_size: int = 16,
    learning_rate: float = 2e-3,
    mixed_precision: str = "no",
    seed: int = 0,
    init_from: str | None = None,
    decoder_only: bool = False,
    kl_weight: float = 1e-4,
    latent_noise: float = 0.0,
) -> AutoencoderKL:
    """Train a VAE with 4 latent channels and a 4-fold reduction of each side, or an earlier one, and save it.

    The loss is L1 + 0.5 MSE on pixels in [-1, 1], plus `kl_weight` times the KL divergence to the unit normal,
    averaged over the latent's elements (Kingma & Welling, https://arxiv.org/abs/1312.6114, eq. 10). The learning rate
    falls to zero in the second half; the saved weights are the EMA in half precision. The `scaling_factor` is one over
    the standard deviation of the latents (Rombach et al., https://arxiv.org/abs/2112.10752, appendix G).

    A decoder that has only seen latents of images turns small errors of generated latents into blotches. With
    `latent_noise` it learns to correct them (noise-augmented decoding: Zheng et al.,
    https://arxiv.org/abs/2510.11690, section 4.3), for a little detail. With `decoder_only` the latents stay what they
    are, so that models which were trained on them can use the new decoder (`pipe.vae = ...`).

    Args:
        source: any source of images (see prepare-latents); 2 % of them, chosen by the hash of the id, are held out.
        output_dir: a new or empty folder for the weights and `training.json` (settings and held-out PSNR).
        resolution: side of the square training images in pixels, divisible by the VAE's reduction, 4 for a new one;
            the trained VAE takes any size.
        crop: `center` (the largest centered box), `face` (each face of a photograph, aligned by eyes and mouth),
            `celeba-178` or `celeba-140` (squares of CelebA's aligned images), or `none` (stretch the whole image).
        faces: with crop `face`, `all` faces of a photograph or the `largest`.
        min_face_size: with crop `face`, the smallest side of a face's crop in pixels of the photograph, about
            twice the width of the face; by default half the resolution, which is enlarged twice.
        num_images: take so many images of the training split (or of `split`), spread over classes and folders.
        split: only this split of the source.
        dataset_config_name: configuration of a dataset on the Hub.
        image_column: the column of images, where a dataset has several.
        exclude: patterns of files and folders that are not read, separated by commas, such as `masks,*_depth.png`;
            `none` reads images that look like masks too.
        split_from: where splits come from: `folders`, `files`, `column` or `none`.
        max_train_steps: optimizer steps.
        train_batch_size: images per step.
        learning_rate: AdamW's learning rate before the decay.
        mixed_precision: `no` or `bf16`.
        seed: seed of the images (avatars), the initial weights and the order of the images.
        init_from: start from this `AutoencoderKL` (a Hub id, a folder or `avatar`, as --vae of prepare-latents); by
            default from a new one with random weights.
        decoder_only: train the decoder alone; the encoder of `init_from` and its latents stay.
        kl_weight: weight of the KL divergence. The larger it is, the less fine detail the latents hold, which a model
            would have to learn.
        latent_noise: add noise to the latents before they are decoded, of a standard deviation between 0 and this many
            times theirs, chosen for each image.

    Returns:
        The trained VAE, with its weights rounded to half precision.

    Raises:
        ValueError: for options that do not fit, before any work.
        FileExistsError: if `output_dir` is not empty.
    """
    # Options.
    folder = Path(output_dir)
    _check_options(folder, max_train_steps, train_batch_size, learning_rate, mixed_precision, kl_weight, latent_noise)
    torch.manual_seed(seed)
    vae = _open_autoencoder(init_from, decoder_only, resolution)
    settings = {
        "source": source,
        "resolution": resolution,
        "crop": crop,
        "num_images": num_images,
        "max_train_steps": max_train_steps,
        "train_batch_size": train_batch_size,
        "learning_rate": learning_rate,
        "mixed_precision": mixed_precision,
        "seed": seed,
        "init_from": vae.config.get("_name_or_path"),  # `load_vae` sets it; without paths of this machine
        "decoder_only": decoder_only,
        "kl_weight": kl_weight,
        "latent_noise": latent_noise,
    }

    # Images.
    opened = open_images(
        source,
        resolution,
        crop,
        num_images=num_images,
        split=split,
        seed=seed,
        dataset_config_name=dataset_config_name,
        image_column=image_column,
        conditions="none",  # an autoencoder has none
        exclude=exclude,
        split_from=split_from,
        faces=faces,
        min_face_size=min_face_size,
        verbose=True,
    )
    train, validation = _hold_out(_readable(opened), crop)
    if not len(validation) or len(train) < train_batch_size:
        few = f"{len(train) + len(validation)} images are too few for batches of {train_batch_size}"
        raise ValueError(f"source {source}: {few}; give more images, or a smaller --train_batch_size")

    # Training.
    batches = _batches(train, train_batch_size, seed)
    started = time.monotonic()
    loss_of = functools.partial(_loss, bf16=mixed_precision == "bf16", kl_weight=kl_weight, latent_noise=latent_noise)
    ema = _fit(vae, batches, max_train_steps, learning_rate, loss_of)
    ema.copy_to(vae.parameters())
    seconds = round(time.monotonic() - started)
    if not decoder_only:  # whose latents are what they were
        vae.register_to_config(scaling_factor=scaling_factor(vae, validation))
    _save(vae, folder, validation, {"settings": settings, "seconds": seconds})
    return vae


def new_autoencoder(sample_size: int) -> AutoencoderKL:
    """Return an untrained `AutoencoderKL` of 0.65 M parameters, from [B, 3, H, W] in [-1, 1] to [B, 4, H/4, W/4]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=sample_size,
    )


def _open_autoencoder(init_from: str | None, decoder_only: bool, resolution: int) -> AutoencoderKL:
    """Return the VAE to train, a new one or `init_from`, on the device; its encoder is frozen with `decoder_only`.

    Raises:
        ValueError: if it cannot be loaded, is no `AutoencoderKL`, or does not fit the resolution.
    """
    if init_from is None:
        if decoder_only:
            raise ValueError("decoder_only keeps an encoder that is trained already; name its VAE by init_from")
        vae = new_autoencoder(resolution).to(default_device())
    else:
        loaded = load_vae(init_from)
        if not isinstance(loaded, AutoencoderKL):
            raise ValueError(f"init_from {init_from}: expected an AutoencoderKL, got {type(loaded).__name__}")
        vae = loaded.train().requires_grad_(True)
    latent_shape(vae, (resolution, resolution))  # refuses a resolution that does not fit
    if decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            if part is not None:  # some VAEs have no quant_conv
                part.requires_grad_(False)
    return vae


def scaling_factor(vae: AutoencoderKL, images: Dataset, count: int = 1000) -> float:
    """Return one over the standard deviation, over all channels, of the latents of the first `count` images."""
    mean, std = encode(vae, torch.from_numpy(np.stack([np.array(image) for image in images[:count]["image"]])))
    # Law of total variance: of the posteriors' means, plus the mean variance within a posterior.
    within = 0.0 if std is None else std.float().square().mean()
    return round((mean.float().var() + within).rsqrt().item(), 5)


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: Dataset, batch_size: int = 64) -> float:
    """Return the mean over images of the PSNR in dB of reconstructions from the posterior's mode.

    Reconstructions are rounded to 8 bits first, as they would be when saved.
    """
    values = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]["image"]
        pixels = torch.stack([_to_pixels(image) for image in batch]).to(vae.device)  # [B, 3, H, W]
        rebuilt = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        error = ((rebuilt.clamp(-1, 1) + 1) * 127.5).round() - (pixels + 1) * 127.5
        values.append(-10 * torch.log10((error / 255).square().mean(dim=(1, 2, 3))))
    return torch.cat(values).mean().item()


def _check_options(
    folder: Path,
    max_train_steps: int,
    train_batch_size: int,
    learning_rate: float,
    mixed_precision: str,
    kl_weight: float,
    latent_noise: float,
) -> None:
    """Refuse a folder that is not empty, and options that do not fit."""
    if not is_missing_or_empty(folder):
        raise FileExistsError(folder_taken(f"output_dir {folder}", "is not empty"))
    for name, number in (("max_train_steps", max_train_steps), ("train_batch_size", train_batch_size)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if not learning_rate > 0:  # NaN too
        raise ValueError(f"learning_rate={learning_rate:g} must be above 0")
    for name, weight in (("kl_weight", kl_weight), ("latent_noise", latent_noise)):
        if not weight >= 0:
            raise ValueError(f"{name}={weight:g} must be at least 0")
    if mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed_precision={mixed_precision!r}: expected no or bf16")


def _readable(images: Dataset) -> Dataset:
    """Return the images that can be decoded, and print the reasons for the others.

    Raises:
        ValueError: if more than 1 % of the images cannot be decoded.
    """
    readable, broken = [], []
    for row in range(len(images)):
        try:
            images[row]
            readable.append(row)
        except ValueError as error:
            broken.append(str(error))
    if len(broken) > MAX_LEFT_OUT * len(images):
        raise ValueError(f"{len(broken)} of {len(images)} images cannot be read, more than 1 %: {broken[0]}")
    for reason in broken:
        print(f"left out: {reason}")
    return images.select(readable) if broken else images


def _hold_out(images: Dataset, crop: str) -> tuple[Dataset, Dataset]:
    """Split images into those to train on and those that are held out, faces by their photograph."""
    held_out = [is_held_out(photo_of(image_id, crop)) for image_id in images["id"]]
    train = images.select([row for row, held in enumerate(held_out) if not held])
    return train, images.select([row for row, held in enumerate(held_out) if held])


def _batches(images: Dataset, batch_size: int, seed: int) -> DataLoader:
    """Return a loader of batches, float32 [batch_size, 3, H, W] in [-1, 1], in an order that depends on `seed`."""
    return DataLoader(
        images.select_columns(["image"]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        num_workers=min(2, available_cpus()),
        persistent_workers=True,
        collate_fn=_collate,
    )


def _fit(
    vae: AutoencoderKL,
    batches: DataLoader,
    steps: int,
    learning_rate: float,
    loss_of: Callable[[AutoencoderKL, torch.Tensor], torch.Tensor],
) -> EMAModel:
    """Train `vae` for `steps` optimizer steps and return the EMA of its weights."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    ema = EMAModel(vae.parameters(), decay=EMA_DECAY, foreach=True)
    with ProgressBar(steps, "training", "steps") as progress:
        for pixels in _repeated(batches, steps):
            # Loss and gradients.
            loss = loss_of(vae, pixels.to(vae.device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)

            # Weights, learning rate and EMA.
            optimizer.step()
            decay.step()
            optimizer.zero_grad(set_to_none=True)
            ema.step(vae.parameters())

            # `.item()` waits for the device, so the loss is shown every so many steps only.
            progress.update()
            if progress.done % LOGGING_STEPS == 0:
                progress.report(f"loss {loss.item():.4f}")
    return ema


def _repeated(batches: DataLoader, count: int) -> Iterator[torch.Tensor]:
    """Yield `count` batches, in a new order each time that the images have been gone through."""
    endless = itertools.chain.from_iterable(itertools.repeat(batches))
    return itertools.islice(endless, count)


def _loss(vae: AutoencoderKL, pixels: torch.Tensor, bf16: bool, kl_weight: float, latent_noise: float) -> torch.Tensor:
    """Return the loss on `pixels`, [B, 3, H, W] in [-1, 1]; see [`train_autoencoder`]."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.sample()  # [B, C, h, w]
        if latent_noise:
            # Relative to the latents, or the encoder could escape the noise by making them larger.
            levels = latent_noise * latents.detach().std() * torch.rand(len(latents), 1, 1, 1, device=latents.device)
            latents = latents + levels * torch.randn_like(latents)
        rebuilt = vae.decode(latents).sample  # [B, 3, H, W]
    # Float32 from here on: exponentials and means lose too much in bfloat16.
    rebuilt, mean, logvar = rebuilt.float(), posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(rebuilt, pixels) + MSE_WEIGHT * F.mse_loss(rebuilt, pixels) + kl_weight * kl


def _save(vae: AutoencoderKL, folder: Path, validation: Dataset, record: dict[str, Any]) -> None:
    """Round the weights to half precision, measure them, and save them with `record` and the figures."""
    value = psnr(vae.half().float(), validation)
    with new_folder(folder) as partial:
        vae.half().save_pretrained(partial)
        figures = {"psnr_db": value, "held_out": len(validation)}
        write_text(partial / "training.json", json.dumps(record | figures, indent=2) + "\n")
    print(f"{folder}: {value:.2f} dB PSNR on {len(validation)} held-out images")


def _to_pixels(image: Image) -> torch.Tensor:
    """Return an RGB image as float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _collate(rows: list[dict]) -> torch.Tensor:
    """Stack the images of a batch, [B, 3, H, W]."""
    return torch.stack([_to_pixels(row["image"]) for row in rows])
