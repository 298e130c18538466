"""`dit-hf evaluate`: a model's samples beside real images, with the floor, the errors and the whole protocol."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from PIL import Image

from ..data.image_folder import CACHE_INFO
from ..data.sources import AVATARS
from ..hub.card import write_run_card
from ..image_grid import save_grid
from ..latents.cache import open_latents
from ..latents.vae import weights_sha256
from ..pipelines.guidance import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import EVALUATION_REPORT, RunFolder, exported_summary, find_run, load_pipeline
from ..sampling.generate import describe_model, generate_images
from ..storage import disk_errors, hash_json
from .attribute_probe import AttributeHead, train_head
from .extract import IDENTITY, collect, ranks
from .features import FeatureNet, load_features
from .memorization import Neighbours, describe_pairs, find_neighbours, make_pairs_grid
from .metrics import NEIGHBOURS, Gaussian, measure
from .reference import INFO, Reference, load_reference, make_reference, statistics_identity, versions
from .reference_images import ReferenceImages, open_reference_images, reconstructed
from .report import figure_name, markdown, write_report

MIN_SAMPLES = 16


def evaluate(
    model: str,
    reference: str | None = None,
    num_samples: int = 512,
    features: str = "efficientnet-lite0",
    feature_weights: str | None = None,
    output_dir: str | None = None,
    guidance_scale: float | list[float] | None = None,
    num_inference_steps: int | list[int] = 25,
    crop: str = "center",
    split: str | None = None,
    num_images: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    save_images: bool = False,
) -> Path:
    """Measure how far a model's samples are from real images; a call that was killed goes on where it was.

    Under `accelerate launch` or `torchrun` every rank draws its part. Conditional models are asked for the attribute
    rows of the reference in order. Lists of guidance scales or steps are measured in every combination and plotted;
    the first is the one that is reported. In a run's folder the figures go into the model card too. A call with other
    options replaces the report, and features are kept for each, so that an earlier call is soon repeated.

    Args:
        model: the folder of a run, of one of its checkpoints or of a pipeline, or a Hub id.
        reference: a folder of `dit-hf reference`, or any source of images (see prepare-latents), a latent cache
            too, which is decoded; without it the images that the run learned from.
        num_samples: how many images are drawn.
        features: `inception`, `inception-clean`, `legacy64`, `dinov2`, `efficientnet-lite0`,
            `efficientnet-lite0-1280`, or the id or path of a vision model of transformers.
        feature_weights: Inception's weights: a file, a URL, or `OWNER/NAME/FILE` on the Hub.
        output_dir: where the report goes; without it `evaluation` in the run's folder.
        guidance_scale: of the samples; without it the pipeline's own.
        num_inference_steps: of the samples.
        crop: of the reference's images: `celeba-178`, `celeba-140`, `center` or `none`.
        split: only this part of a reference that comes divided.
        num_images: only so many images of the reference.
        batch_size: images at once.
        seed: of the samples; image i of a seed is always the same.
        dtype: of the pipeline's weights.
        save_images: keep the samples as PNG, in `images/`, by what they were drawn with.

    Returns:
        The folder, with `evaluation.json`, `evaluation.md`, `evaluation.png`, `neighbours.png`, and `settings.png`
        where there are several.

    Raises:
        FileExistsError: if `output_dir` holds the evaluation of another model.
        ValueError: for options that do not fit, a reference that does not match, or weights that cannot be had.
    """
    for name, value, least in (
        ("num_samples", num_samples, MIN_SAMPLES),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("evaluation needs torchmetrics, which computes the KID: pip install torchmetrics")
    device = ranks().device
    net = load_features(features, feature_weights, device)
    pipeline = load_pipeline(model, device, dtype=getattr(torch, dtype))
    folder = _folder(model, output_dir)
    resolution = _resolution(pipeline)
    pictures = _pictures(model, reference, resolution, crop, split, num_images)
    if pictures is None:
        real = load_reference(Path(str(reference)))
    elif pictures.facts["resolution"] != resolution:  # only a cache has its own
        raise ValueError(f"{reference}: images of {pictures.facts['resolution']} px, the model's are {resolution}")
    else:
        name = f"reference-{hash_json(statistics_identity(pictures, net))[:12]}"
        real = make_reference(folder / name, pictures, net, batch_size)
    real.check(net, resolution)
    if len(real.features) < 2 * MIN_SAMPLES:
        raise ValueError(f"the reference has {len(real.features)} images, and at least {2 * MIN_SAMPLES} are needed")
    evaluation = Evaluation(pipeline, net, real, pictures, folder, num_samples, batch_size, seed, dtype, save_images)
    scales = guidance_scale if isinstance(guidance_scale, list) else [guidance_scale]
    steps = num_inference_steps if isinstance(num_inference_steps, list) else [num_inference_steps]
    settings = [
        {"guidance_scale": pipeline.config.guidance_scale if scale is None else scale, "num_inference_steps": count}
        for scale in scales
        for count in steps
    ]
    if not settings:
        raise ValueError("guidance_scale and num_inference_steps must have a value")
    with disk_errors(f"output_dir {folder}"):
        evaluation.run(_name(model), settings, own_folder=output_dir is None)
        if output_dir is None and ranks().is_main_process:
            write_run_card(Path(model), pipeline, exported_summary(Path(model)))
    return folder


@dataclass(frozen=True)
class Evaluation:
    """A model, what it is compared with, and how; see `evaluate`."""

    pipeline: LatentDiTPipeline
    net: FeatureNet
    real: Reference
    pictures: ReferenceImages | None
    folder: Path
    num_samples: int
    batch_size: int
    seed: int
    dtype: str
    save_images: bool

    def run(self, name: str, settings: list[dict[str, Any]], own_folder: bool) -> None:
        """Draw, measure and report; to be called on all ranks. `own_folder` is the model's, which may have changed."""
        known = list(self.pipeline.transformer.config.conditions or {})
        asked = self.real.attributes(known, self.pipeline.config.condition_labels)
        identity = describe_model(self.pipeline)
        if not own_folder:
            self._check_model(name, identity)
        elif ranks().is_main_process:
            self._forget_other_models(identity)
        samples = [self._draw(asked, identity, setting) for setting in settings]
        held_out, rest = self._split()
        rebuilt = self._reconstruct(held_out)
        if not ranks().is_main_process:
            return
        there = self.real.attributes(known)  # what the reference itself calls it, by which the head learns
        head = self._head(there)
        rows = [self._measure(values, setting, there, head) for values, setting in zip(samples, settings, strict=True)]
        neighbours = find_neighbours(samples[0], self.real.features, self.seed)
        report = {
            "name": figure_name(self.net.label, self.num_samples),
            "model": {"name": name, **identity},
            "protocol": self._protocol(asked, settings[0]),
            "figures": {k: v for k, v in rows[0].items() if k not in (*settings[0], "accuracy", "attributes")},
            "floor": {"vae": self._floor(rebuilt, rest), "real": self._floor(self.real.features[held_out], rest)},
            "bias": _bias(self.num_samples, self.net.dim),
            "memorisation": neighbours.figures() | {"closest": describe_pairs(neighbours)},
            "attributes": rows[0]["attributes"],
            "settings": [{k: v for k, v in row.items() if k != "attributes"} for row in rows],
        }
        self._draw_neighbours(neighbours, asked, settings[0])
        write_report(self.folder, report, neighbours)
        print(f"\n{markdown(report)}\n{self.folder / EVALUATION_REPORT} has it all", flush=True)

    def _check_model(self, name: str, identity: dict[str, Any]) -> None:
        """Refuse to write over another model's report; weights in another precision can only be told by their name."""
        report = self.folder / EVALUATION_REPORT
        if not report.is_file():
            return
        before = json.loads(report.read_text(encoding="utf-8"))
        there = before["model"].pop("name")
        same = before["model"] == identity if before["protocol"]["dtype"] == self.dtype else there == name
        if not same:
            raise FileExistsError(
                f"output_dir {self.folder} holds the evaluation of another model, {there}; name a new folder"
            )

    def _forget_other_models(self, identity: dict[str, Any]) -> None:
        """Remove features of samples that another model than `identity` drew in this precision."""
        for path in (self.folder / "features").glob(f"*/*/{IDENTITY}"):
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.get("dtype") == self.dtype and facts["model"] != identity:
                shutil.rmtree(path.parent)

    def _draw(self, asked: list[Attributes] | None, identity: dict[str, Any], setting: dict[str, Any]) -> np.ndarray:
        """Features of the samples, [num_samples, dim]."""
        name = f"guidance-{setting['guidance_scale']:g}-steps-{setting['num_inference_steps']}"
        facts = {"model": identity, "setting": setting, "seed": self.seed, "dtype": self.dtype}
        facts |= {"asked": _rows_sha256(asked) if asked else None}
        images = self.folder / "images" / name / hash_json(facts)[:12]
        if self.save_images:
            facts |= {"images": True}  # others may have features without any

        def read(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            drawn = generate_images(self.pipeline, numbers, asked, self.seed, **setting)
            if self.save_images:
                images.mkdir(parents=True, exist_ok=True)
                for picture, number in zip(drawn, numbers, strict=True):
                    Image.fromarray(picture).save(images / f"{number:06d}.png")
            return drawn, np.array(numbers)

        folder = self.folder / "features" / name
        return collect(folder, self.net, read, range(self.num_samples), self.batch_size, facts, name).features

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of as many real images as there are samples (or half of them), by chance, and those of the rest."""
        order = np.random.default_rng(self.seed).permutation(len(self.real.features))
        count = min(self.num_samples, len(order) // 2)
        return np.sort(order[:count]), np.sort(order[count:])

    def _reconstruct(self, held_out: np.ndarray) -> np.ndarray | str:
        """Features of what the VAE makes of those real images, or why there are none."""
        if self.pictures is None:
            return "statistics hold no images; give --reference their source"
        if "vae_sha256" in self.pictures.facts:
            return "the reference's images are themselves decoded latents"
        vae, rows = copy.deepcopy(self.pipeline.vae).float(), self.real.rows[held_out]
        read = _with_rows(reconstructed(self.pictures, vae))
        facts = {"vae_sha256": weights_sha256(vae), "pictures": self.real.info["pictures"]}
        what = "reconstructions"
        return collect(self.folder / "features" / what, self.net, read, rows, self.batch_size, facts, what).features

    def _head(self, asked: list[Attributes] | None) -> AttributeHead | None:
        if not asked:
            return None
        return train_head(self.real.features, {name: self.real.conditions[name] for name in asked[0]}, self.seed)

    def _measure(
        self,
        values: np.ndarray,
        setting: dict[str, Any],
        asked: list[Attributes] | None,
        head: AttributeHead | None,
    ) -> dict[str, Any]:
        """One row: the setting, its figures, and whether the attributes are found."""
        figures = measure(values, self.real.features, self.real.gaussian, self.seed)
        found = None
        if head is not None and asked is not None:
            found = head.accuracy(values, [asked[i % len(asked)] for i in range(len(values))])
        return {**setting, **figures, "accuracy": found["accuracy"] if found else None, "attributes": found}

    def _floor(self, values: np.ndarray | str, rest: np.ndarray) -> dict[str, Any]:
        """Figures of real images, or their reconstructions, beside the real images that are none of them."""
        if isinstance(values, str):
            return {"reason": values}
        others = self.real.features[rest]
        return measure(values, others, Gaussian.of(others), self.seed)

    def _draw_neighbours(
        self, neighbours: Neighbours, asked: list[Attributes] | None, setting: dict[str, Any]
    ) -> None:
        """An image grid of the closest pairs; statistics alone have no images to show."""
        (self.folder / "neighbours.png").unlink(missing_ok=True)
        if self.pictures is None:
            return
        closest = neighbours.closest()
        drawn = generate_images(self.pipeline, closest, asked, self.seed, **setting)
        real = self.pictures.read(self.real.rows[neighbours.rows[closest]].tolist())
        save_grid(make_pairs_grid(drawn, real, neighbours.distances[closest]), self.folder / "neighbours.png")

    def _protocol(self, asked: list[Attributes] | None, setting: dict[str, Any]) -> dict[str, Any]:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "num_samples": self.num_samples,
            **setting,
            "seed": self.seed,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "ranks": ranks().num_processes,
            "attributes": f"of the reference's rows, in order: {', '.join(asked[0])}" if asked else "none asked for",
            "features": self.net.identity(),
            "reference": self.real.info["pictures"],
            "kid": "mean of 100 random subsets of up to 1,000 images a side, kernel (x y / dim + 1)^3",
            "precision_and_recall": f"{NEIGHBOURS} nearest neighbours",
            "standard_error": "jackknife with 20 groups of samples left out in turn, the reference fixed",
            "floor": "as many real images, or their reconstructions, against the others of the reference",
            "machine": gpu or f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "versions": versions() | {"torchmetrics": version("torchmetrics")},
        }


def _rows_sha256(rows: list[Attributes]) -> str:
    """Of the ids that are asked for."""
    digest = hashlib.sha256(json.dumps(list(rows[0])).encode())
    for name in rows[0]:
        digest.update(np.array([row[name] for row in rows], np.int64).tobytes())
    return digest.hexdigest()


def _with_rows(read: Callable[[Sequence[int]], np.ndarray]) -> Callable[[Sequence[int]], Any]:
    return lambda rows: (read(rows), np.array(rows))


def _bias(num_samples: int, dim: int) -> str:
    text = (
        f"A Fréchet distance of N = {num_samples:,} images is too high by an amount that falls as 1 / N: compare it "
        "with others of the same N only, and with the floor"
    )
    if num_samples <= dim:
        text += f"; with no more images than features ({dim:,}) most of it can be this"
    return f"{text}."


def _name(model: str) -> str:
    """What to call a model: a Hub id, or the name of the run's folder; never a path of this machine."""
    path = Path(model).resolve()
    if not path.exists():
        return model
    return path.parent.name if path.name == "pipeline" else path.name


def _folder(model: str, output_dir: str | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    if not RunFolder(Path(model)).pipeline.is_dir():
        raise ValueError(f"{model} is no run's folder; say by --output_dir where the report goes")
    return RunFolder(Path(model)).evaluation


def _resolution(pipeline: LatentDiTPipeline) -> str:
    """`HxW` of what a pipeline draws, in pixels."""
    size = pipeline.transformer.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = pipeline.image_processor.config.vae_scale_factor
    return f"{height * factor}x{width * factor}"


def _pictures(
    model: str, reference: str | None, resolution: str, crop: str, split: str | None, num_images: int | None
) -> ReferenceImages | None:
    """The reference's images; None where it is statistics, which hold none."""
    if reference is not None and (Path(reference) / INFO).is_file():
        return None
    if reference is not None:
        return open_reference_images(reference, resolution, crop, split, num_images)
    config = RunFolder(find_run(model) or Path(model)).config
    cache = Path(yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["latents"]) if config.is_file() else None
    if cache is None or not (cache / CACHE_INFO).is_file():
        raise ValueError(f"{model}: what it learned from is not here; give --reference a source or statistics")
    settings = open_latents(cache)[1]["settings"]
    if settings["source"] == AVATARS:  # which are drawn again; of other images the cache is what is left
        return open_reference_images(
            AVATARS, resolution, num_images=num_images or settings["num_images"], seed=settings["seed"]
        )
    return open_reference_images(str(cache), resolution, split=split or "train", num_images=num_images)
