"""Reference statistics: features of real images with all that says what they are, kept to be compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..data.conditions import remap_class_ids
from ..pipelines.guidance import Attributes
from ..storage import disk_errors, is_missing_or_empty, new_folder, partial_folder, read_manifest, write_manifest
from .extract import Collected, collect, ranks
from .features import FeatureNet, load_features
from .metrics import Gaussian
from .reference_images import ReferenceImages, check_left_out, open_reference_images

INFO = "reference.json"
STATISTICS = "statistics.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Reference:
    """Real images as a feature network sees them.

    Attributes:
        info: What `reference.json` says: images, feature network, versions.
        features: float32 [count, dim].
        rows: Rows of the source they are of, int64 [count].
        conditions: Ids of each condition by name, [count].
        labels: Names of the values of those conditions that are classes.
        gaussian: Their mean and covariance.
    """

    info: dict[str, Any]
    features: np.ndarray
    rows: np.ndarray
    conditions: dict[str, np.ndarray]
    labels: dict[str, list[str]]
    gaussian: Gaussian

    def attributes(self, known: list[str], labels: Mapping[str, list[str]] | None = None) -> list[Attributes] | None:
        """The rows' conditions that are among `known`, in order, as ids; None without any.

        With `labels`, names of a pipeline's values, the ids are the pipeline's.

        Raises:
            ValueError: for a class that has no such name.
        """
        names = [name for name in self.conditions if name in known]
        if not names:
            return None
        ids = {name: self.conditions[name] for name in names}
        if labels is not None:
            ids = {n: remap_class_ids(n, ids[n], self.labels.get(n), labels.get(n)) for n in names}
        return [dict(zip(names, row, strict=True)) for row in zip(*(ids[n].tolist() for n in names), strict=True)]

    def check(self, net: FeatureNet, resolution: str) -> None:
        """Refuse to be compared with what is not comparable.

        Raises:
            ValueError: naming what differs.
        """
        before, now = self.info["features"], net.identity()
        different = [f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before[name] != value]
        if self.info["pictures"]["resolution"] != resolution:
            different.append(f"images of {self.info['pictures']['resolution']} px, now {resolution}")
        if different:
            raise ValueError(f"the reference does not match what is evaluated: {'; '.join(different)}")


def reference(
    source: str,
    output_dir: str = "runs/reference",
    features: str = "efficientnet-lite0",
    feature_weights: str | None = None,
    resolution: str = "256",
    crop: str = "center",
    split: str | None = None,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
    batch_size: int = 64,
) -> Path:
    """Compute reference statistics of the images of any source; a call that was killed goes on where it was.

    Under `accelerate launch` or `torchrun` every rank does its part.

    Args:
        source: a folder of images, parquet or webdataset shards, a data set of the Hub, `avatars` (see
            prepare-latents), or a latent cache, whose latents are decoded.
        output_dir: the statistics' folder.
        features: `inception`, `inception-clean`, `legacy64`, `dinov2`, `efficientnet-lite0`,
            `efficientnet-lite0-1280`, or the id or path of a vision model of transformers.
        feature_weights: Inception's weights: a file, a URL, or `OWNER/NAME/FILE` on the Hub.
        resolution: `N` or `HxW` pixels, those of the model that will be evaluated (a cache has its own).
        crop: `celeba-178`, `celeba-140`, `center` or `none`.
        split: only this part of a source that comes divided.
        num_images: only so many images.
        seed: which avatars.
        dataset_config_name: which configuration of a data set on the Hub.
        batch_size: images at once.

    Returns:
        The folder: `statistics.safetensors` (mean and covariance in float64, features, rows, conditions) and
        `reference.json`, with hashes of the images and of the feature network's weights.

    Raises:
        FileExistsError: if `output_dir` holds other statistics, or something else.
        ValueError: for options that do not fit, or if too many of the images cannot be read.
    """
    net = load_features(features, feature_weights, ranks().device)
    pictures = open_reference_images(source, resolution, crop, split, num_images, seed, dataset_config_name)
    made = make_reference(Path(output_dir), pictures, net, batch_size)
    if ranks().is_main_process:
        print(f"{output_dir}: {describe(made)}", flush=True)
    return Path(output_dir)


def make_reference(folder: Path, pictures: ReferenceImages, net: FeatureNet, batch_size: int) -> Reference:
    """The statistics of `pictures`, of `folder` where they are there already; to be called on all ranks.

    Raises:
        FileExistsError: if the folder holds others, or something else.
        ValueError: if too many of the images cannot be read.
    """
    state, asked = ranks(), statistics_identity(pictures, net)
    parts = partial_folder(folder).with_name(f".{folder.name}.features")
    finished = (folder / INFO).is_file()
    if not (finished or is_missing_or_empty(folder)):
        raise FileExistsError(f"output_dir {folder} holds something else (no {INFO}); name a new folder")
    state.wait_for_everyone()  # all ranks have seen the same
    if not finished:
        with disk_errors(f"output_dir {folder}"):
            found = collect(
                parts,
                net,
                pictures.read_whole,
                range(pictures.count),
                batch_size,
                {"pictures": asked["pictures"]},
                "real images",
            )
            check_left_out(pictures, found.rows)
            if state.is_main_process:
                _write(folder, pictures, asked, found)
                shutil.rmtree(parts)
        state.wait_for_everyone()
    made = load_reference(folder)
    if made.info["asked"] != asked:
        raise FileExistsError(f"{folder} holds other statistics ({describe(made)}); name a new folder")
    return made


def statistics_identity(pictures: ReferenceImages, net: FeatureNet) -> dict[str, Any]:
    """What decides the statistics, as JSON has it."""
    return {"pictures": json.loads(json.dumps(pictures.facts)), "features": net.identity()}


def load_reference(folder: Path) -> Reference:
    """Read what `dit-hf reference` wrote.

    Raises:
        ValueError: if it is damaged or of another version.
    """
    info = read_manifest(folder, INFO)
    if info["format"] != FORMAT_VERSION:
        raise ValueError(f"{folder} holds statistics of format {info['format']}, not {FORMAT_VERSION}")
    tensors = load_file(folder / STATISTICS)
    mean, covariance = (torch.from_numpy(tensors[name]) for name in ("mean", "covariance"))
    features = tensors["features"]
    few = len(features) <= features.shape[1]
    return Reference(
        info=info,
        features=features,
        rows=tensors["rows"],
        conditions={name: tensors[f"condition.{name}"] for name in info["conditions"]},
        labels=info.get("condition_labels", {}),
        gaussian=Gaussian.of(features) if few else Gaussian.of_statistics(mean, covariance, len(features)),
    )


def describe(made: Reference) -> str:
    """A line that says what statistics these are."""
    pictures, features = made.info["pictures"], made.info["features"]
    return (
        f"{len(made.features):,} images of {pictures['source']} ({pictures['pixels_sha256'][:12]}), "
        f"{pictures['resolution']} px, {features['name']} ({features['weights_sha256'][:12]})"
    )


def versions() -> dict[str, str]:
    """Of what can change a figure."""
    names = ("torch", "diffusers", "transformers", "numpy", "pillow")
    from .. import __version__

    return {"dit_hf": __version__} | {name: version(name) for name in names}


def _write(folder: Path, pictures: ReferenceImages, asked: dict[str, Any], found: Collected) -> None:
    values, rows = found.features.astype(np.float64), found.rows
    tensors = {
        "mean": values.mean(0),
        "covariance": np.atleast_2d(np.cov(values, rowvar=False)),
        "features": found.features,
        "rows": rows,
        **{f"condition.{name}": np.array(ids, np.int16)[rows] for name, ids in pictures.conditions.items()},
    }
    with new_folder(folder) as partial:
        save_file(tensors, partial / STATISTICS)
        write_manifest(
            partial,
            INFO,
            format=FORMAT_VERSION,
            pictures={**asked["pictures"], "pictures": len(rows), "pixels_sha256": found.pixels_sha256},
            features=asked["features"],
            conditions=list(pictures.conditions),
            condition_labels=pictures.labels,
            asked=asked,
            versions=versions(),
        )
