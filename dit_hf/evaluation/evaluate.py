"""`dit-hf evaluate`: compare a model's samples with real images, and report floors, errors and the whole protocol."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..data.contents import SourceOptions, SplitFrom, parse_conditions, parse_exclude
from ..hub.card import read_report, write_run_card
from ..image_grid import save_grid
from ..latents.vae import weights_sha256
from ..pipelines.attributes import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import EVALUATION_REPORT, RunFolder, exported_summary, load_pipeline
from ..sampling.generate import MAX_IMAGES, describe_model, generate_images
from ..storage import disk_errors, folder_taken, hash_json, read_json
from .attribute_probe import AttributeHead, train_head
from .extract import IDENTITY, collect, ranks
from .features import FeatureNet, load_features
from .memorization import Neighbours, describe_pairs, find_neighbours, make_pairs_grid
from .metrics import NEIGHBOURS, Gaussian, measure
from .reference import CONTENT, INFO, Reference, load_reference, make_reference, statistics_identity, versions
from .reference_images import ReferenceImages, open_reference_images, open_training_images, reconstruction_reader
from .report import bias_note, figure_name, markdown, write_report

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
    image_column: str | None = None,
    conditions: str | None = None,
    exclude: str | None = None,
    split_from: SplitFrom | None = None,
    batch_size: int = 32,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    save_images: bool = False,
) -> Path:
    """Measure how far a model's samples are from real images; a call that was killed is resumed by calling it again.

    Under `accelerate launch` or `torchrun` every rank generates its part of the samples. The attributes requested from
    a conditional model are those of the reference's rows, in order. Lists of guidance scales or steps are measured in
    every combination and plotted; the first combination is the reported one. In a run's folder the figures go into the
    model card too. A call with other options replaces the report; features are kept for each set of options, so
    repeating an earlier call is quick.

    Args:
        model: the folder of a run, of one of its checkpoints or of a pipeline, or a Hub id.
        reference: a folder of `dit-hf reference`, or any source of images (see prepare-latents), including a latent
            cache, which is decoded; by default the images that the run was trained on.
        num_samples: how many images are generated.
        features: `inception`, `inception-clean`, `legacy64`, `dinov2`, `efficientnet-lite0`,
            `efficientnet-lite0-1280`, or the id or path of a vision model of transformers.
        feature_weights: Inception's weights: a file, a URL, or `OWNER/NAME/FILE` on the Hub.
        output_dir: the report's folder; by default `evaluation` in the run's folder.
        guidance_scale: of the samples; by default the pipeline's own.
        num_inference_steps: of the samples.
        crop: of the reference's images: `celeba-178`, `celeba-140`, `center` or `none`.
        split: only this split of the reference, if it has several.
        num_images: only the first so many images of the reference.
        image_column: of the reference: the column of images, where a dataset has several.
        conditions: of the reference: the columns that are conditions, separated by commas (`class` is the folder's
            name), or `none`; by default all columns of yes and no, and of classes.
        exclude: of the reference: patterns of files and folders that are not read, separated by commas, such as
            `masks,*_depth.png`; `none` reads images that look like masks too.
        split_from: of the reference: where splits come from: `folders`, `files`, `column` or `none`.
        batch_size: images at once.
        seed: of the samples; image i of a seed is always the same.
        dtype: of the pipeline's weights.
        save_images: keep the samples as PNG in `images/`, one folder for each set of options.

    Returns:
        The folder, with `evaluation.json`, `evaluation.md`, `evaluation.png`, `neighbours.png`, and `settings.png`
        if there are several settings.

    Raises:
        FileExistsError: if `output_dir` holds the evaluation of another model.
        ValueError: for invalid options, a reference that does not match, or weights that cannot be obtained.
    """
    # Refuse invalid options before anything is loaded.
    _check_options(num_samples, batch_size, seed)

    # Load the two sides of the comparison.
    device = ranks().device
    net = load_features(features, feature_weights, device)
    pipeline = load_pipeline(model, device, dtype=getattr(torch, dtype))
    folder = _report_folder(model, output_dir)
    resolution = "x".join(map(str, pipeline.resolution))  # HxW in pixels
    options = SourceOptions(
        split=split,
        num_images=num_images,
        image_column=image_column,
        conditions=parse_conditions(conditions),
        exclude=parse_exclude(exclude),
        split_from=split_from,
    )
    images = _open_images(model, reference, resolution, crop, options)
    statistics = _load_statistics(reference, images, folder, net, resolution, batch_size)

    # Measure every combination of guidance scale and steps.
    settings = _combine_settings(guidance_scale, num_inference_steps, pipeline.config.guidance_scale)
    evaluation = Evaluation(
        pipeline, net, statistics, images, folder, num_samples, batch_size, seed, dtype, save_images
    )
    with disk_errors(f"output_dir {folder}"):
        evaluation.run(_model_name(model), settings, own_folder=output_dir is None)
        if output_dir is None and ranks().is_main_process:
            write_run_card(Path(model), pipeline, exported_summary(Path(model)))
    return folder


@dataclass(frozen=True)
class Evaluation:
    """A model, the reference that it is compared with, and the protocol.

    Attributes:
        pipeline: The model.
        net: The feature network.
        reference: Features of the real images.
        reference_images: The real images themselves; None if only their statistics are at hand.
        folder: Folder of the report and of the features.
        num_samples: Number of images to generate.
        batch_size: Images at once.
        seed: Seed of the samples and of every random choice.
        dtype: Precision of the pipeline's weights, as torch spells it.
        save_images: Whether the samples are kept as PNG.
    """

    pipeline: LatentDiTPipeline
    net: FeatureNet
    reference: Reference
    reference_images: ReferenceImages | None
    folder: Path
    num_samples: int
    batch_size: int
    seed: int
    dtype: str
    save_images: bool

    def run(self, name: str, settings: list[dict[str, Any]], own_folder: bool) -> None:
        """Generate, measure and report; must be called on all ranks.

        Args:
            name: The model's name in the report.
            settings: Combinations of `guidance_scale` and `num_inference_steps`; the first one is reported.
            own_folder: Whether the folder belongs to the model; its weights may have changed since.
        """
        conditions = list(self.pipeline.transformer.config.conditions or {})
        requested = self.reference.attributes(conditions, self.pipeline.config.condition_labels)
        identity = describe_model(self.pipeline)
        if not own_folder:
            self._check_same_model(name, identity)
        elif ranks().is_main_process:
            self._remove_stale_features(identity)

        # Features of samples and of reconstructions; all ranks share this work.
        samples = [self._generate(requested, identity, setting) for setting in settings]
        held_out, rest = self._split()
        rebuilt = self._reconstruct(held_out)
        if not ranks().is_main_process:
            return

        # The attribute head learns the reference's own class ids, which may differ from the model's.
        rows_of_reference = self.reference.attributes(conditions)
        head = self._train_head(rows_of_reference)
        measured = [
            self._measure(features, setting, rows_of_reference, head)
            for features, setting in zip(samples, settings, strict=True)
        ]
        neighbours = find_neighbours(samples[0], self.reference.features, self.seed)

        # The report is of the first setting, beside a row for each of the others.
        first = measured[0]
        real = self.reference.features[held_out]
        report = {
            "name": figure_name(self.net.label, self.num_samples),
            "model": {"name": name, **identity},
            "protocol": self._protocol(requested, settings[0]),
            "figures": {k: v for k, v in first.items() if k not in (*settings[0], "accuracy", "attributes")},
            "floor": {"vae": self._floor(rebuilt, rest), "real": self._floor(real, rest)},
            "bias": bias_note(self.num_samples, self.net.dim),
            "memorisation": neighbours.figures() | {"closest": describe_pairs(neighbours)},
            "attributes": first["attributes"],
            "settings": [{k: v for k, v in row.items() if k != "attributes"} for row in measured],
        }
        self._save_neighbours_grid(neighbours, requested, settings[0])
        write_report(self.folder, report, neighbours)
        print(f"\n{markdown(report)}\nthe whole report is in {self.folder / EVALUATION_REPORT}", flush=True)

    def _check_same_model(self, name: str, identity: dict[str, Any]) -> None:
        """Refuse to replace another model's report.

        Models in another precision than the report's can only be compared by name, because their hashes differ.
        """
        path = self.folder / EVALUATION_REPORT
        if not path.is_file():
            return
        previous = read_report(path)
        previous_name = previous["model"].pop("name", None)
        same_precision = previous["protocol"]["dtype"] == self.dtype
        same_model = previous["model"] == identity if same_precision else previous_name == name
        if not same_model:
            problem = f"holds the evaluation of another model, {previous_name}"
            raise FileExistsError(folder_taken(f"output_dir {self.folder}", problem))

    def _remove_stale_features(self, identity: dict[str, Any]) -> None:
        """Remove the features of samples that other weights than `identity` generated in this precision."""
        for path in (self.folder / "features").glob(f"*/*/{IDENTITY}"):
            try:
                metadata = read_json(path)
            except ValueError:  # whose features these are is not known any more
                metadata = {"dtype": self.dtype}
            # Reconstructions have no `dtype`: the VAE alone decides them.
            if metadata.get("dtype") == self.dtype and metadata.get("model") != identity:
                shutil.rmtree(path.parent)

    def _generate(
        self, requested: list[Attributes] | None, identity: dict[str, Any], setting: dict[str, Any]
    ) -> np.ndarray:
        """Generate the samples of one setting and return their features, float32 [num_samples, dim]."""
        # These keys are hashed into the folder's name: other keys would orphan the features of earlier calls.
        metadata = {"model": identity, "setting": setting, "seed": self.seed, "dtype": self.dtype}
        metadata |= {"asked": _hash_rows(requested) if requested else None}
        name = f"guidance-{setting['guidance_scale']:g}-steps-{setting['num_inference_steps']}"
        image_folder = self.folder / "images" / name / hash_json(metadata)[:12]
        if self.save_images:
            metadata |= {"images": True}  # features of a call without --save_images have no PNGs beside them

        def read(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            images = generate_images(self.pipeline, numbers, requested, self.seed, **setting)
            if self.save_images:
                image_folder.mkdir(parents=True, exist_ok=True)
                for image, number in zip(images, numbers, strict=True):
                    Image.fromarray(image).save(image_folder / f"{number:06d}.png")
            return images, np.array(numbers)

        folder = self.folder / "features" / name
        return collect(folder, self.net, read, range(self.num_samples), self.batch_size, metadata, name).features

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Split the reference at random: indices of `num_samples` images (at most half), and of the rest."""
        order = np.random.default_rng(self.seed).permutation(len(self.reference.features))
        count = min(self.num_samples, len(order) // 2)
        return np.sort(order[:count]), np.sort(order[count:])

    def _reconstruct(self, held_out: np.ndarray) -> np.ndarray | str:
        """Return the features of the VAE's reconstructions of those real images, or the reason why there are none."""
        if self.reference_images is None:
            return "statistics hold no images; give --reference their source"
        if "vae_sha256" in self.reference_images.summary:
            return "the reference's images are themselves decoded latents"
        # In float32 whatever the pipeline's precision, so that the floor does not depend on it.
        vae = copy.deepcopy(self.pipeline.vae).float()
        rebuild = reconstruction_reader(self.reference_images, vae)

        def read(rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            return rebuild(rows), np.array(rows)

        rows = self.reference.rows[held_out]
        metadata = {"vae_sha256": weights_sha256(vae), "pictures": self.reference.info["pictures"]}
        name = "reconstructions"
        folder = self.folder / "features" / name
        return collect(folder, self.net, read, rows, self.batch_size, metadata, name).features

    def _train_head(self, rows: list[Attributes] | None) -> AttributeHead | None:
        if not rows:
            return None
        conditions = {name: self.reference.conditions[name] for name in rows[0]}
        return train_head(self.reference.features, conditions, self.seed)

    def _measure(
        self,
        features: np.ndarray,
        setting: dict[str, Any],
        requested: list[Attributes] | None,
        head: AttributeHead | None,
    ) -> dict[str, Any]:
        """Return one row of results: the setting, its figures, and how often the requested attributes are shown."""
        figures = measure(features, self.reference.features, self.reference.gaussian, self.seed)
        accuracy = None
        if head is not None and requested is not None:
            accuracy = head.accuracy(features, [requested[i % len(requested)] for i in range(len(features))])
        return {**setting, **figures, "accuracy": accuracy["accuracy"] if accuracy else None, "attributes": accuracy}

    def _floor(self, features: np.ndarray | str, rest: np.ndarray) -> dict[str, Any]:
        """Measure real images, or their reconstructions, against the disjoint rest of the reference."""
        if isinstance(features, str):
            return {"reason": features}
        others = self.reference.features[rest]
        return measure(features, others, Gaussian.of(others), self.seed)

    def _save_neighbours_grid(
        self, neighbours: Neighbours, requested: list[Attributes] | None, setting: dict[str, Any]
    ) -> None:
        """Write `neighbours.png`, an image grid of the closest pairs; statistics alone have no images to show."""
        (self.folder / "neighbours.png").unlink(missing_ok=True)
        if self.reference_images is None:
            return
        closest = neighbours.closest()
        samples = generate_images(self.pipeline, closest, requested, self.seed, **setting)
        real = self.reference_images.read(self.reference.rows[neighbours.rows[closest]].tolist())
        grid = make_pairs_grid(samples, real, neighbours.distances[closest])
        save_grid(grid, self.folder / "neighbours.png")

    def _protocol(self, requested: list[Attributes] | None, setting: dict[str, Any]) -> dict[str, Any]:
        """Return everything that another evaluation must share for its figures to be comparable."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        names = dict.fromkeys(name for row in requested or [] for name in row)
        attributes = f"of the reference's rows, in order: {', '.join(names)}" if requested else "unconditional"
        return {
            "num_samples": self.num_samples,
            **setting,
            "seed": self.seed,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "ranks": ranks().num_processes,
            "attributes": attributes,
            "features": self.net.identity(),
            "reference": self.reference.info["pictures"],
            "kid": "mean of 100 random subsets of up to 1,000 images a side, kernel (x y / dim + 1)^3",
            "precision_and_recall": f"{NEIGHBOURS} nearest neighbours",
            "standard_error": "jackknife with 20 groups of samples left out in turn, the reference fixed",
            "floor": "as many real images, or their reconstructions, against the others of the reference",
            "machine": gpu or f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "versions": versions() | {"torchmetrics": version("torchmetrics")},
        }


def _check_options(num_samples: int, batch_size: int, seed: int) -> None:
    """Refuse numbers that are too low, and a machine without torchmetrics."""
    for name, value, least in (
        ("num_samples", num_samples, MIN_SAMPLES),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if num_samples > MAX_IMAGES:
        raise ValueError(f"num_samples={num_samples} must be at most {MAX_IMAGES:,}")
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("evaluation needs torchmetrics, which computes the KID: pip install torchmetrics")


def _combine_settings(
    guidance_scale: float | list[float] | None, num_inference_steps: int | list[int], default_scale: float
) -> list[dict[str, Any]]:
    """Return every combination of guidance scale (None is `default_scale`) and steps, scale by scale."""
    scales = guidance_scale if isinstance(guidance_scale, list) else [guidance_scale]
    steps = num_inference_steps if isinstance(num_inference_steps, list) else [num_inference_steps]
    settings = [
        {"guidance_scale": default_scale if scale is None else scale, "num_inference_steps": count}
        for scale in scales
        for count in steps
    ]
    if not settings:
        raise ValueError("guidance_scale and num_inference_steps must have a value")
    return settings


def _hash_rows(rows: list[Attributes]) -> str:
    """Return the SHA-256 of the requested ids, column by column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    digest = hashlib.sha256(json.dumps(names).encode())
    for name in names:
        digest.update(np.array([row.get(name, -1) for row in rows], np.int64).tobytes())
    return digest.hexdigest()


def _model_name(model: str) -> str:
    """Return a Hub id as it is, or the name of the run's folder; never a path of this machine."""
    path = Path(model).resolve()
    if not path.exists():
        return model
    return path.parent.name if path.name == "pipeline" else path.name


def _report_folder(model: str, output_dir: str | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    if not RunFolder(Path(model)).pipeline.is_dir():
        raise ValueError(f"{model} is not a run's folder; give --output_dir, the report's folder")
    return RunFolder(Path(model)).evaluation


def _open_images(
    model: str, reference: str | None, resolution: str, crop: str, options: SourceOptions
) -> ReferenceImages | None:
    """Open the reference's images, by default those that the run was trained on; None for statistics."""
    if reference is None:
        return open_training_images(model, resolution, options)
    if (Path(reference) / INFO).is_file():
        return None
    return open_reference_images(reference, resolution, crop, options, verbose=ranks().is_main_process)


def _load_statistics(
    source: str | None, images: ReferenceImages | None, folder: Path, net: FeatureNet, resolution: str, batch_size: int
) -> Reference:
    """Load the reference's statistics, or compute those of `images` in `folder`, and check that they fit the model."""
    if images is None:
        statistics = load_reference(Path(str(source)))
    elif images.summary["resolution"] != resolution:  # only a latent cache has a size of its own
        raise ValueError(
            f"{source}: expected images of {resolution} px, the model's size, got {images.summary['resolution']}"
        )
    else:
        # Named by its content, so that one evaluation folder can hold several references.
        content = {CONTENT: images.content_sha256} if images.content_sha256 else {}
        name = f"reference-{hash_json(statistics_identity(images, net) | content)[:12]}"
        statistics = make_reference(folder / name, images, net, batch_size)
    statistics.check(net, resolution)
    count, least = len(statistics.features), 2 * MIN_SAMPLES
    if count < least:
        raise ValueError(f"expected at least {least} reference images, got {count}")
    return statistics
