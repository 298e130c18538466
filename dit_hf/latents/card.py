"""Write the card of a latent cache, and an image grid of images beside their reconstructions."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from ..card_blocks import sign_blocks
from ..data.transforms import decode_crops, photo_of
from ..image_grid import make_grid, save_grid
from .shards import Job, load_rows
from .vae import VAE, decode

GRID_IMAGES = 16
LEFT_OUT_NOTE = "`left_out.csv`, which is not uploaded, names each"
# PSNR in dB from which on reconstructions are called so.
QUALITY = {30: "very good", 25: "good", 20: "fair"}


def quality(psnr: float) -> str:
    """Return how good reconstructions of this PSNR in dB are, with what follows from poor ones."""
    word = next((word for least, word in QUALITY.items() if psnr >= least), "poor")
    return word if word != "poor" else "poor: a model trained on these latents cannot generate better images than this"


def describe_copies(info: dict[str, Any]) -> list[str]:
    """Return a sentence for each held-out split that holds training images; caches of earlier versions have none."""
    return [
        f"{found['count']:,} of {info['counts'][split]:,} {split} images are training images too, by content (first "
        f"{found['first'][0]} is {found['first'][1]}): what is measured on them is too good"
        for split, found in info.get("copies", {}).items()
    ]


def save_reconstruction_grid(cache: Dataset, rows: Dataset, ids: list[str], vae: VAE, job: Job, path: Path) -> float:
    """Save a grid of images, evenly spread over the cache, beside the reconstructions from their stored latents.

    Args:
        cache: The rows of the cache; those of images that the source does not have any more are not shown.
        rows: The rows of the source, images not decoded.
        ids: Their ids in the cache.
        vae: The VAE of the cache; its memory format is changed to contiguous.
        job: The job that encoded the cache.
        path: The PNG to write.

    Returns:
        Mean PSNR of the reconstructions in dB, rounded to one decimal.
    """
    sources = {image_id: row for row, image_id in enumerate(ids)}
    shown = [row for row, name in enumerate(cache["id"][:]) if photo_of(name, job.geometry.crop) in sources]
    chosen = np.unique(np.linspace(0, len(shown) - 1, GRID_IMAGES).round().astype(int))
    stored = cache.select([shown[i] for i in chosen]).select_columns(["id", "latent_mean"])[:]
    images: list[Image.Image] = []
    ratios, captions = [], []

    # The encoder may have changed the memory format, which changes how sums are rounded: the grid must not depend on
    # whether this process encoded any shard.
    vae = vae.to(memory_format=torch.contiguous_format)
    for image_id, latent in zip(stored["id"], stored["latent_mean"], strict=True):
        photo = photo_of(image_id, job.geometry.crop)
        row = {**rows[sources[photo]], "id": photo}
        original = next(crop.pixels for crop in decode_crops(row, job.geometry).crops if crop.id == image_id)
        latents = torch.tensor(latent).view(1, *job.latent_shape)  # [1, channels, height, width]
        pixels = decode(vae, latents)[0].cpu().numpy()  # [height, width, 3]
        error = np.square(original.astype(np.float64) - pixels).mean()
        ratios.append(10 * math.log10(255**2 / max(error, 1e-9)))
        captions += [Path(image_id).name[-20:], f"{ratios[-1]:.1f} dB"]
        images += [Image.fromarray(original), Image.fromarray(pixels)]

    mean = round(float(np.mean(ratios)), 1)
    title = f"images, and their reconstructions from the latents: PSNR {mean:.1f} dB"
    save_grid(make_grid(images, 8, captions, title, min_side=96), path)
    return mean


def write_cache_card(folder: Path, info: dict[str, Any], left_out: list[tuple[str, str]], plan: list[str]) -> None:
    """Write the cache's README.md, which is also its card on the Hub.

    Args:
        folder: The cache.
        info: The content of `latents.json`, which need not be written yet.
        left_out: Id and reason of each image that was left out.
        plan: How the source was read, as it was printed.
    """
    settings, counts = info["settings"], info["counts"]
    channels, height, width = info["latent_shape"]
    columns = [name for name in load_rows(folder).column_names if name.startswith("latent_")]
    size = sum(path.stat().st_size for path in folder.glob("data-*.arrow"))
    reasons = Counter(reason for _, reason in left_out).most_common(10)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    # The size that was raced on such latents.
    recipe = "celeba" if height * width >= 32 * 32 else "avatars"
    word, source = quality(info["psnr"]), "\n".join(plan)
    copies = "".join(f"\n| copies | {sentence} |" for sentence in describe_copies(info))
    # With the number of shards, so that shards of another cache that were pushed before are never read too.
    shards = f"data-*-of-{next(folder.glob('data-*.arrow')).stem.rpartition('-')[2]}.arrow"
    text = f"""---
tags:
- dit_hf
- latents
configs:
- config_name: default
  data_files: {shards}
---

# Latents of {settings["source"]}

<!-- A push writes the sections between these comments anew, except those that were edited; the rest is yours. -->

<!-- dit_hf: begin contents -->

![images and their reconstructions](reconstructions.png)

| | |
|---|---|
| images | {counts["train"]:,} train, {counts["validation"]:,} validation, {counts["test"]:,} test |
| left out | {counts["left_out"]:,}{f": {listed}" if listed else ""} ({LEFT_OUT_NOTE}) |{copies}
| geometry | crop `{settings["crop"]}`, {settings["resolution"]} px, RGB, antialiased bicubic resize of PIL |
| VAE | `{settings["vae"]}` (a copy is in `vae/`); PSNR {info["psnr"]:.1f} dB over the images of the grid, {word} |
| latents | {channels} x {height} x {width}, fp16, neither shifted nor scaled: {", ".join(f"`{c}`" for c in columns)} |
| conditions | {", ".join(f"{name} ({count})" for name, count in info["conditions"].items()) or "none"} |
| size | {size / 1e6:,.1f} MB |

Each row is an image: its `id`, its `split`, the SHA-256 of its file, the latents (flattened, channels first; mean and
standard deviation of the VAE's posterior where it has one, `_flip` those of the mirrored image) and the conditions
(null where unknown). `latents.json` has the statistics of each channel, the settings, and size and SHA-256 of every
file.

How the source was read:

```
{source}
```

<!-- dit_hf: end contents -->

<!-- dit_hf: begin use -->

```python
from datasets import load_from_disk

latents = load_from_disk("latents")  # this folder
```

```sh
hf download OWNER/NAME --repo-type dataset --local-dir latents  # from the Hub
dit-hf train {recipe} --data.latents latents --train.output_dir runs/mine
```

<!-- dit_hf: end use -->

Made by `dit-hf prepare-latents`. The terms of use of the images are those of their source.
"""
    (folder / "README.md").write_text(sign_blocks(text), encoding="utf-8")
