"""Quality of generation, inpainting, inversion and editing on avatars that a model was not trained on.

python benchmarks/manipulation.py MODEL [--json FILE] [--sheets DIR]       (about fifteen minutes on 2 cores)

MODEL was trained on avatars at 64 px. Attributes are recognized by a classifier that is trained on avatars of yet
another seed; its accuracy on real avatars is reported beside.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avatar_classifier import TRAINING_SEED, accuracies, avatars, balanced_accuracy, classify, train_classifier
from machine import machine
from PIL import Image
from torch import nn

from dit_hf import (
    CosineLatentScheduler,
    LatentDiTEditPipeline,
    LatentDiTImg2ImgPipeline,
    LatentDiTInpaintPipeline,
    LatentDiTPipeline,
)
from dit_hf.data.avatars import ATTRIBUTES
from dit_hf.image_grid import make_grid, save_grid
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import batches, generate_images, model_sha256, to_uint8

UNSEEN = 5  # the seed of the avatars whose attributes are requested, and which are edited
SHOWN = ("Eyeglasses", "Smiling", "Wearing_Hat", "Blond_Hair", "Black_Hair")
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--num_rows", type=int, default=500)
    parser.add_argument("--num_edits", type=int, default=200)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/manipulation.json"))
    parser.add_argument("--sheets", type=Path, default=Path("runs/manipulation"))
    options = parser.parse_args()
    pipeline, classifier = load_pipeline(options.model), train_classifier()
    images, labels = avatars(UNSEEN, max(options.num_rows, 8 * options.num_edits))
    result: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "model": Path(options.model).name,
        "model_sha256": model_sha256(pipeline),
        "guidance_scale": pipeline.config.guidance_scale,
        "scheduler": f"{type(pipeline.scheduler).__name__}, multistep {pipeline.scheduler.config.get('multistep')}",
        "seeds": {"avatars": UNSEEN, "classifier's avatars": TRAINING_SEED, "noise": 0},
        "reconstruction": reconstruction(pipeline, images[:64], labels[:64]),
        "generation": generation(pipeline, classifier, images[: options.num_rows], labels[: options.num_rows]),
        "inpainting": inpainting(pipeline, images[:2], labels[:2], options.sheets),
    }
    write(result, options.json)
    for name in ("Eyeglasses", "Smiling"):
        rows = np.flatnonzero(labels[:, ATTRIBUTES.index(name)] == 0)[: options.num_edits]
        result[f"editing {name}"] = editing(pipeline, classifier, images[rows], labels[rows], name, options.sheets)
        write(result, options.json)
    print(json.dumps(result, indent=2))


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def rows_of(labels: np.ndarray) -> list[dict[str, int]]:
    return [dict(zip(ATTRIBUTES, row.tolist(), strict=True)) for row in labels]


def to_pil(images: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(image) for image in images]


def other(cls: Any, pipeline: LatentDiTPipeline) -> Any:
    made = cls(**pipeline.components)
    made.set_progress_bar_config(disable=True)
    return made


def psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean PSNR over the images in dB; pixels are between 0 and 1."""
    return round(float((-10 * (first - second).square().mean(dim=(1, 2, 3)).log10()).mean()), 2)


def reconstruction(pipeline: LatentDiTPipeline, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Compare strength 0, and inversion and denoising in 50 steps with guidance 1, with the VAE alone."""
    changing, editing_ = other(LatentDiTImg2ImgPipeline, pipeline), other(LatentDiTEditPipeline, pipeline)
    given, rows = to_pil(images), rows_of(labels)
    vae = editing_.decode_latents(editing_.encode_images(given), "pt")
    untouched = changing(rows, image=given, strength=0.0, output_type="pt").images
    options = {"num_inference_steps": 50, "guidance_scale": 1.0, "output_type": "pt"}
    noise = editing_.invert(given, rows, 50)
    # Denoise with DDIM, whose inverse the inversion is.
    default_scheduler = pipeline.scheduler
    pipeline.scheduler = CosineLatentScheduler.from_config(default_scheduler.config, multistep=False)
    returned = pipeline(rows, latents=noise, **options).images
    without_attributes = pipeline(None, len(given), latents=editing_.invert(given, None, 50), **options).images
    pipeline.scheduler = default_scheduler
    real = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return {
        "pictures": len(given),
        "largest_difference_of_strength_0": float((untouched - vae).abs().max()),
        "psnr_of_vae_to_picture": psnr(vae, real),
        "psnr_of_return_to_vae": psnr(returned, vae),
        "psnr_of_return_to_vae_without_attributes": psnr(without_attributes, vae),
        "deviation_of_inverted_noise": round(float(noise.std()), 4),
    }


def generation(
    pipeline: LatentDiTPipeline, classifier: nn.Module, images: np.ndarray, labels: np.ndarray
) -> dict[str, Any]:
    """Measure how many requested attributes generated faces show, and the classifier's accuracy on real faces."""
    rows = rows_of(labels)
    generated = np.concatenate([generate_images(pipeline, part, rows, 0) for part in batches(len(rows), BATCH)])
    predicted, real = classify(classifier, generated), classify(classifier, images)
    return {
        "rows": len(rows),
        "num_inference_steps": 25,
        "shown": {name: accuracies(predicted, labels)[name] for name in SHOWN},
        "accuracies": accuracies(predicted, labels),
        "balanced_accuracy": balanced_accuracy(predicted, labels),
        "accuracies_on_real": accuracies(real, labels),
        "balanced_accuracy_on_real": balanced_accuracy(real, labels),
    }


def inpainting(pipeline: LatentDiTPipeline, images: np.ndarray, labels: np.ndarray, sheets: Path) -> dict[str, Any]:
    """Inpaint ten completions each of a face without its upper and without its lower half, given `Male` only."""
    inpaint = other(LatentDiTInpaintPipeline, pipeline)
    shown, largest = [], 0
    for top, original, row in zip((0, 34), images, rows_of(labels), strict=True):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, top, 64, top + 30))
        generator = torch.Generator().manual_seed(0)
        (given,) = to_pil(original[None])
        options = {"image": given, "mask_image": mask, "num_images_per_prompt": 10, "generator": generator}
        completed = inpaint({"Male": row["Male"]}, **options).images
        unmasked = np.asarray(mask) == 0
        changes = [np.abs(np.asarray(image).astype(int) - original)[unmasked].max() for image in completed]
        largest = max(largest, *map(int, changes))
        covered = Image.composite(Image.new("RGB", given.size, "#b8b8b8"), given, mask)
        shown += [given, covered, *completed]
    save_grid(make_grid(shown, 12, title="given, covered, ten completions", min_side=96), sheets / "inpainting.png")
    return {"completions": 20, "largest_change_outside_the_mask": largest}


def editing(
    pipeline: LatentDiTPipeline,
    classifier: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    name: str,
    sheets: Path,
) -> dict[str, Any]:
    """Add one attribute to faces without it, and compare the classifier's other predictions before and after."""
    changing = other(LatentDiTEditPipeline, pipeline)
    place, rows = ATTRIBUTES.index(name), rows_of(labels)
    edited, vae = [], []
    for part in batches(len(rows), BATCH):
        given = to_pil(images[part.start : part.stop])
        own = rows[part.start : part.stop]
        edited.append(to_uint8(changing(own, image=given, edit={name: True}, output_type="pt").images))
        vae.append(to_uint8(changing.decode_latents(changing.encode_images(given), "pt")))
    after = classify(classifier, np.concatenate(edited))
    same = {
        compared: np.delete(after == classify(classifier, before), place, axis=1).mean()
        for compared, before in (("pictures", images), ("reconstructions", np.concatenate(vae)))
    }
    given, shown = to_pil(images[:24]), to_pil(np.concatenate(edited)[:24])
    pairs = [image for row in range(3) for image in given[8 * row : 8 * row + 8] + shown[8 * row : 8 * row + 8]]
    save_grid(make_grid(pairs, 8, title=f"given, and below with {name}", min_side=96), sheets / f"edit-{name}.png")
    return {
        "faces": len(rows),
        "num_inference_steps": 50,
        "edit_strength": 1.0,
        "shows_the_attribute": round(float(after[:, place].mean()), 4),
        "showed_it_before": round(float(classify(classifier, images)[:, place].mean()), 4),
        "other_answers_unchanged": {compared: round(float(share), 4) for compared, share in same.items()},
    }


if __name__ == "__main__":
    main()
