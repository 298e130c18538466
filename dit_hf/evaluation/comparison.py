"""The comparison of a model's samples with real images: features of both, figures, floors and the report."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..devices import on_first_rank
from ..hub.card import read_report
from ..image_grid import save_grid
from ..latents.vae import weights_sha256
from ..pipelines.attributes import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import EVALUATION_REPORT
from ..sampling.generate import describe_model, generate_images
from ..storage import folder_taken, hash_json, read_json
from .announce import RECONSTRUCTIONS, SAMPLES
from .attribute_probe import AttributeHead, train_head
from .extract import IDENTITY, Extraction, ranks
from .features import FeatureNet
from .memorization import Neighbours, describe_pairs, find_neighbours, make_pairs_grid
from .metrics import MANIFOLD_IMAGES, NEIGHBOURS, Gaussian, Manifold, measure
from .reference import Reference, versions
from .reference_images import ReferenceImages, reconstruction_reader
from .report import REPORT, bias_note, figure_name, headline, table, write_report


@dataclass(frozen=True)
class Comparison:
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

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Hashes of the model."""
        return describe_model(self.pipeline)

    @functools.cached_property
    def requested(self) -> list[Attributes] | None:
        """The attributes of the samples, with the model's class ids; None for an unconditional model."""
        return self._attributes(self.pipeline.config.condition_labels)

    def missing(self, settings: list[dict[str, Any]]) -> dict[str, int]:
        """Return the numbers of images whose features no earlier call has computed, by kind."""
        samples = sum(self._samples(setting).missing() for setting in settings)
        rebuilt = 0 if no_reconstructions(self.reference_images) else self._reconstructions().missing()
        return {SAMPLES: samples, RECONSTRUCTIONS: rebuilt}

    def run(self, name: str, settings: list[dict[str, Any]], own_folder: bool) -> None:
        """Generate, measure and report; must be called on all ranks.

        Args:
            name: The model's name in the report.
            settings: Combinations of `guidance_scale` and `num_inference_steps`; the first one is reported.
            own_folder: Whether the folder belongs to the model; its weights may have changed since.
        """
        if not own_folder:
            self._check_same_model(name)
        elif ranks().is_main_process:
            self._remove_stale_features()

        # Features of samples and of reconstructions; all ranks share this work.
        samples = [self._samples(setting) for setting in settings]
        rebuilt = None if no_reconstructions(self.reference_images) else self._reconstructions()
        for extraction in [*samples, *([rebuilt] if rebuilt else [])]:
            extraction.extract()
        on_first_rank(lambda: self._report(name, settings, samples, rebuilt))

    def _report(
        self, name: str, settings: list[dict[str, Any]], extracted: list[Extraction], rebuilt: Extraction | None
    ) -> None:
        """Measure the features that all ranks have extracted, and write the report; see `run`."""
        # The attribute head learns the reference's own class ids, which may differ from the model's.
        rows_of_reference = self._attributes()
        head = self._train_head(rows_of_reference)
        samples = [extraction.join().features for extraction in extracted]
        # The reference's manifold is the same for all settings.
        manifold = Manifold.of(self.reference.features)
        measured = [
            self._measure(features, setting, manifold, rows_of_reference, head)
            for features, setting in zip(samples, settings, strict=True)
        ]
        neighbours = find_neighbours(samples[0], self.reference.features, self.seed)

        # The report is of the first setting, beside a row for each of the others.
        first = measured[0]
        report = {
            "name": figure_name(self.net.label, self.num_samples),
            "model": {"name": name, **self.identity},
            "protocol": self._protocol(settings[0]),
            "figures": {k: v for k, v in first.items() if k not in (*settings[0], "accuracy", "attributes")},
            "floor": self._floors(rebuilt),
            "bias": bias_note(self.num_samples, self.net.dim),
            "memorisation": neighbours.figures() | {"closest": describe_pairs(neighbours)},
            "attributes": first["attributes"],
            "settings": [{k: v for k, v in row.items() if k != "attributes"} for row in measured],
        }
        self._save_neighbours_grid(neighbours, settings[0])
        write_report(self.folder, report, neighbours)
        print(f"\n{table(report)}\n\n{headline(report)}; the protocol is in {self.folder / REPORT}", flush=True)

    def _attributes(self, labels: Mapping[str, list[str]] | None = None) -> list[Attributes] | None:
        """Return the attributes of the reference's rows, see [`Reference.attributes`].

        Of more rows than samples only as many are taken, evenly spread: the rows may be sorted by class.
        """
        rows = self.reference.attributes(list(self.pipeline.transformer.config.conditions or {}), labels)
        if not rows or len(rows) <= self.num_samples:
            return rows
        return [rows[sample * len(rows) // self.num_samples] for sample in range(self.num_samples)]

    def _check_same_model(self, name: str) -> None:
        """Refuse to replace another model's report.

        Models in another precision than the report's can only be compared by name, because their hashes differ.
        """
        path = self.folder / EVALUATION_REPORT
        if not path.is_file():
            return
        previous = read_report(path)
        previous_name = previous["model"].pop("name", None)
        same_precision = previous["protocol"]["dtype"] == self.dtype
        same_model = previous["model"] == self.identity if same_precision else previous_name == name
        if not same_model:
            problem = f"holds the evaluation of another model, {previous_name}"
            raise FileExistsError(folder_taken(f"output_dir {self.folder}", problem))

    def _remove_stale_features(self) -> None:
        """Remove the features of samples that other weights generated in this precision."""
        for path in (self.folder / "features").glob(f"*/*/{IDENTITY}"):
            try:
                metadata = read_json(path)
            except ValueError:  # whose features these are is not known any more
                metadata = {"dtype": self.dtype}
            # Reconstructions have no `dtype`: the VAE alone decides them.
            if metadata.get("dtype") == self.dtype and metadata.get("model") != self.identity:
                shutil.rmtree(path.parent)

    def _samples(self, setting: dict[str, Any]) -> Extraction:
        """Return the extraction of the features of one setting's samples, which generates them."""
        # These keys are hashed into the folder's name: other keys would orphan the features of earlier calls.
        metadata = {"model": self.identity, "setting": setting, "seed": self.seed, "dtype": self.dtype}
        metadata |= {"asked": _hash_rows(self.requested) if self.requested else None}
        name = f"guidance-{setting['guidance_scale']:g}-steps-{setting['num_inference_steps']}"
        image_folder = self.folder / "images" / name / hash_json(metadata)[:12]
        if self.save_images:
            metadata |= {"images": True}  # features of a call without --save_images have no PNGs beside them

        def read(numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            images = generate_images(self.pipeline, numbers, self.requested, self.seed, **setting)
            if self.save_images:
                image_folder.mkdir(parents=True, exist_ok=True)
                for image, number in zip(images, numbers, strict=True):
                    Image.fromarray(image).save(image_folder / f"{number:06d}.png")
            return images, np.array(numbers)

        folder = self.folder / "features" / name
        title = f"samples (guidance {setting['guidance_scale']:g}, {setting['num_inference_steps']} steps)"
        return Extraction(folder, self.net, read, range(self.num_samples), self.batch_size, metadata, title)

    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Split the reference at random: indices of `num_samples` images (at most half), and of the rest."""
        order = np.random.default_rng(self.seed).permutation(len(self.reference.features))
        count = min(self.num_samples, len(order) // 2)
        return np.sort(order[:count]), np.sort(order[count:])

    def _reconstructions(self) -> Extraction:
        """Return the extraction of the features of the held-out real images, as the VAE reconstructs them."""
        assert self.reference_images is not None  # see `no_reconstructions`
        # In float32 whatever the pipeline's precision, so that the floor does not depend on it.
        vae = copy.deepcopy(self.pipeline.vae).float()
        rebuild = reconstruction_reader(self.reference_images, vae)

        def read(rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
            return rebuild(rows), np.array(rows)

        rows = self.reference.rows[self._split()[0]]
        metadata = {"vae_sha256": weights_sha256(vae), "pictures": self.reference.info["pictures"]}
        name = "reconstructions"
        folder = self.folder / "features" / name
        return Extraction(folder, self.net, read, rows.tolist(), self.batch_size, metadata, name)

    def _train_head(self, rows: list[Attributes] | None) -> AttributeHead | None:
        if not rows:
            return None
        conditions = {name: self.reference.conditions[name] for name in rows[0]}
        return train_head(self.reference.features, conditions, self.seed)

    def _measure(
        self,
        features: np.ndarray,
        setting: dict[str, Any],
        manifold: Manifold,
        requested: list[Attributes] | None,
        head: AttributeHead | None,
    ) -> dict[str, Any]:
        """Return one row of results: the setting, its figures, and how often the requested attributes are shown."""
        figures = measure(features, self.reference.features, self.reference.gaussian, manifold, self.seed)
        accuracy = None
        if head is not None and requested is not None:
            accuracy = head.accuracy(features, [requested[i % len(requested)] for i in range(len(features))])
        return {**setting, **figures, "accuracy": accuracy["accuracy"] if accuracy else None, "attributes": accuracy}

    def _floors(self, rebuilt: Extraction | None) -> dict[str, dict[str, Any]]:
        """Measure real images, and their reconstructions by the VAE, against the disjoint rest of the reference."""
        held_out, rest = self._split()
        others = self.reference.features[rest]
        gaussian, manifold = Gaussian.of(others), Manifold.of(others)

        def floor(features: np.ndarray) -> dict[str, Any]:
            return measure(features, others, gaussian, manifold, self.seed)

        vae = floor(rebuilt.join().features) if rebuilt else {"reason": no_reconstructions(self.reference_images)}
        return {"vae": vae, "real": floor(self.reference.features[held_out])}

    def _save_neighbours_grid(self, neighbours: Neighbours, setting: dict[str, Any]) -> None:
        """Write `neighbours.png`, an image grid of the closest pairs; statistics alone have no images to show."""
        (self.folder / "neighbours.png").unlink(missing_ok=True)
        if self.reference_images is None:
            return
        closest = neighbours.closest()
        samples = generate_images(self.pipeline, closest, self.requested, self.seed, **setting)
        real = self.reference_images.read(self.reference.rows[neighbours.rows[closest]].tolist())
        grid = make_pairs_grid(samples, real, neighbours.distances[closest])
        save_grid(grid, self.folder / "neighbours.png")

    def _protocol(self, setting: dict[str, Any]) -> dict[str, Any]:
        """Return everything that another evaluation must share for its figures to be comparable."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        names = dict.fromkeys(name for row in self.requested or [] for name in row)
        order = "in order" if len(self.reference.features) <= self.num_samples else "evenly spread"
        of_many = ""
        if max(self.num_samples, len(self.reference.features)) > MANIFOLD_IMAGES:
            of_many = f", of at most {MANIFOLD_IMAGES:,} images a side, evenly spread"
        attributes = f"of the reference's rows, {order}: {', '.join(names)}" if names else "unconditional"
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
            "precision_and_recall": f"{NEIGHBOURS} nearest neighbours{of_many}",
            "standard_error": "jackknife with 20 groups of samples left out in turn, the reference fixed",
            "floor": "as many real images, or their reconstructions, against the others of the reference",
            "machine": gpu or f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            "versions": versions() | {"torchmetrics": version("torchmetrics")},
        }


def no_reconstructions(images: ReferenceImages | None) -> str | None:
    """Return the reason why the VAE's reconstructions of the reference cannot be measured, or None if they can."""
    if images is None:
        return "statistics hold no images; give --reference their source"
    if "vae_sha256" in images.summary:
        return "the reference's images are themselves decoded latents"
    return None


def _hash_rows(rows: list[Attributes]) -> str:
    """Return the SHA-256 of the requested ids, column by column."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    digest = hashlib.sha256(json.dumps(names).encode())
    for name in names:
        digest.update(np.array([row.get(name, -1) for row in rows], np.int64).tobytes())
    return digest.hexdigest()
