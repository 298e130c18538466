"""`dit-hf reference`: statistics of real images, stored with everything that identifies them."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from ..data.conditions import remap_class_ids
from ..data.contents import SourceOptions, SplitFrom, parse_conditions, parse_exclude
from ..data.transforms import Faces, Geometry, parse_resolution
from ..devices import on_first_rank
from ..pipelines.attributes import Attributes
from ..storage import (
    check_own_folder,
    disk_errors,
    folder_taken,
    new_folder,
    partial_folder,
    read_json,
    read_manifest,
    read_tensors,
    write_manifest,
    write_text,
)
from .extract import Collected, Extraction, locked_for_ranks, ranks
from .features import FeatureNet, load_features
from .metrics import Gaussian
from .reference_images import ReferenceImages, check_left_out, open_reference_images

INFO = "reference.json"
STATISTICS = "statistics.safetensors"
FORMAT_VERSION = 1
_KEYS = ("format", "pictures", "features", "conditions", "asked")
SOURCE_FILES = "source_files.json"
CONTENT = "content_sha256"  # the key of the hash of the images' bytes, from version 0.2.0 on


@dataclass(frozen=True)
class Reference:
    """Real images as a feature network represents them.

    Attributes:
        info: Content of `reference.json`: the images' summary, the feature network, versions.
        features: float32 [count, dim].
        rows: Rows of the source that the features belong to, int64 [count].
        conditions: Ids of each condition by name, [count]; -1 is missing.
        labels: Value names of those conditions that are classes.
        mean: Of the features, float64 [dim].
        covariance: Of the features, float64 [dim, dim].
    """

    info: dict[str, Any]
    features: np.ndarray
    rows: np.ndarray
    conditions: dict[str, np.ndarray]
    labels: dict[str, list[str]]
    mean: torch.Tensor
    covariance: torch.Tensor

    @functools.cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance of the features, factorized, which takes as long as it has dimensions, cubed."""
        count, dim = self.features.shape
        # With few images the features themselves are the smaller factor of the covariance.
        return (
            Gaussian.of(self.features) if count <= dim else Gaussian.of_statistics(self.mean, self.covariance, count)
        )

    def attributes(
        self, valid_names: list[str], labels: Mapping[str, list[str]] | None = None
    ) -> list[Attributes] | None:
        """Return the conditions of each row, as ids, in order.

        Args:
            valid_names: The model's conditions; others of the reference are left out.
            labels: Value names of the model's conditions; if given, ids are the model's instead of the reference's.

        Returns:
            A dict for each row, without the names that it has no value of, or None if the model and the reference
            share no condition.

        Raises:
            ValueError: for a class whose name the model does not have.
        """
        names = [name for name in self.conditions if name in valid_names]
        if not names:
            return None
        ids = {name: self.conditions[name] for name in names}
        if labels is not None:
            ids = {n: remap_class_ids(n, ids[n], self.labels.get(n), labels.get(n)) for n in names}
        rows = zip(*(ids[name].tolist() for name in names), strict=True)
        return [{name: value for name, value in zip(names, row, strict=True) if value >= 0} for row in rows]

    def check(self, net: FeatureNet, resolution: str) -> None:
        """Check that features of `net` at `resolution` are comparable with these.

        Raises:
            ValueError: if not, naming every difference.
        """
        before, now = self.info["features"], net.identity()
        differences = [
            f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value
        ]
        if self.info["pictures"]["resolution"] != resolution:
            differences.append(f"images of {self.info['pictures']['resolution']} px, now {resolution}")
        if differences:
            raise ValueError(f"the reference does not match what is evaluated: {'; '.join(differences)}")


def reference(
    source: str,
    output_dir: str = "runs/reference",
    features: str = "efficientnet-lite0",
    feature_weights: str | None = None,
    resolution: str = "256",
    crop: str = "center",
    faces: Faces = "all",
    min_face_size: int | None = None,
    split: str | None = None,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    conditions: str | None = None,
    exclude: str | None = None,
    split_from: SplitFrom | None = None,
    allow_partial: bool = False,
    batch_size: int = 64,
) -> Path:
    """Compute reference statistics of the images of any source; a killed call is resumed by calling it again.

    Under `accelerate launch` or `torchrun` every rank does its part.

    Args:
        source: a folder of images, parquet or webdataset shards, a dataset on the Hub, `avatars` (see
            prepare-latents), or a latent cache, whose latents are decoded.
        output_dir: the statistics' folder.
        features: `inception`, `inception-clean`, `legacy64`, `dinov2`, `efficientnet-lite0`,
            `efficientnet-lite0-1280`, or the id or path of a vision model of transformers.
        feature_weights: Inception's weights: a file, a URL, or `OWNER/NAME/FILE` on the Hub.
        resolution: `N` or `HxW` pixels, those of the model that will be evaluated (a cache has its own).
        crop: `center` (the largest centered box), `face` (each face of a photograph, aligned by eyes and mouth),
            `celeba-178` or `celeba-140` (squares of CelebA's aligned images), or `none` (stretch the whole image).
        faces: with crop `face`, `all` faces of a photograph or the `largest`.
        min_face_size: with crop `face`, the smallest side of a face's crop in pixels of the photograph, about
            twice the width of the face; by default half the resolution, which is enlarged twice.
        split: only this split of a source that has several.
        num_images: take so many images of the training split (or of `split`), spread over classes and folders.
        seed: seed of the avatars and of the choice of `num_images`.
        dataset_config_name: configuration of a dataset on the Hub.
        image_column: the column of images, where a dataset has several.
        conditions: the columns that are conditions, separated by commas (`class` is the folder's name), or `none`; by
            default all columns of yes and no, and of classes.
        exclude: patterns of files and folders that are not read, separated by commas, such as `masks,*_depth.png`;
            `none` reads images that look like masks too.
        split_from: where splits come from: `folders`, `files`, `column` or `none`.
        allow_partial: accept requested conditions that a whole split lacks.
        batch_size: images at once.

    Returns:
        The folder: `statistics.safetensors` (mean and covariance in float64, features, rows, conditions) and
        `reference.json`, with hashes of the images and of the feature network's weights.

    Raises:
        FileExistsError: if `output_dir` holds other statistics, or something else.
        ValueError: for options that do not fit, or if too many of the images cannot be read.
    """
    check_own_folder(Path(output_dir), INFO)
    net = load_features(features, feature_weights, ranks().device)
    options = SourceOptions(
        dataset_config_name=dataset_config_name,
        split=split,
        num_images=num_images,
        seed=seed,
        image_column=image_column,
        conditions=parse_conditions(conditions),
        exclude=parse_exclude(exclude),
        split_from=split_from,
        allow_partial=allow_partial,
    )
    geometry = Geometry(parse_resolution(resolution), crop, faces=faces, min_face_size=min_face_size)
    images = open_reference_images(source, geometry, options, verbose=ranks().is_main_process)
    if images.count < 2:
        raise ValueError(f"source {source}: a covariance needs at least two images, got {images.count} (--num_images)")
    # Finished statistics are only read, maybe from a disk that takes no lock.
    finished = (Path(output_dir) / INFO).is_file()
    with contextlib.nullcontext() if finished else locked_for_ranks(Path(output_dir)):
        statistics = make_reference(Path(output_dir), images, net, batch_size)
    if ranks().is_main_process:
        print(f"{output_dir}: {describe(statistics)}", flush=True)
    return Path(output_dir)


def make_reference(folder: Path, images: ReferenceImages, net: FeatureNet, batch_size: int) -> Reference:
    """Compute the statistics of `images`, or read them from `folder`; must be called on all ranks.

    Raises:
        FileExistsError: if the folder holds other statistics, those of images that were changed since, or something
            else.
        ValueError: if too many of the images cannot be read.
    """
    state, identity, place = ranks(), statistics_identity(images, net), f"output_dir {folder}"
    finished = (folder / INFO).is_file()
    check_own_folder(folder, INFO)
    # All ranks must have looked at the folder before the main process writes to it.
    state.wait_for_everyone()
    content = _content_sha256(folder, images)
    # Features are collected beside the folder, so that it appears complete or not at all.
    parts = partial_folder(folder).with_name(f".{folder.name}.features")
    if finished and state.is_main_process:
        shutil.rmtree(parts, ignore_errors=True)  # of a call that was killed while it did so
    if not finished:
        with disk_errors(place):
            extraction = Extraction(
                parts,
                net,
                images.read_intact,
                range(images.count),
                batch_size,
                {"pictures": identity["pictures"]} | ({CONTENT: content} if content else {}),
                "reference",
            )
            extraction.extract()

            def write() -> None:
                collected = extraction.join()
                check_left_out(images, collected.rows)
                _write(folder, images, identity, collected, content)
                shutil.rmtree(parts)

            # The other ranks read the folder next.
            on_first_rank(write)
    if state.is_main_process:
        _note_files(folder, images, content)
    statistics = load_reference(folder)
    if statistics.info["asked"] != identity:
        raise FileExistsError(folder_taken(place, f"holds other statistics ({describe(statistics)})"))
    before = statistics.info.get(CONTENT)
    if content and before is None and state.is_main_process:
        print(f"{place} was written by version 0.1.0: its images are compared by name and size alone", flush=True)
    if content and before not in (None, content):
        source = statistics.info["pictures"]["source"]
        raise FileExistsError(folder_taken(place, f"holds statistics of {source} before its images were changed"))
    return statistics


def _content_sha256(folder: Path, images: ReferenceImages) -> str | None:
    """Return the hash of all images, without reading them if their files are those that it was noted for."""
    stamps = images.stamps_sha256  # before the images are read
    try:
        noted = read_json(folder / SOURCE_FILES, keys=("stamps_sha256", CONTENT))
    except (OSError, ValueError):  # none were noted
        return images.content_sha256
    return noted[CONTENT] if noted["stamps_sha256"] == stamps else images.content_sha256


def _note_files(folder: Path, images: ReferenceImages, content: str | None) -> None:
    """Note for the next call on this machine of which files the hash of all images is; it is not in the manifest."""
    if content and images.stamps_sha256:
        text = json.dumps({"stamps_sha256": images.stamps_sha256, CONTENT: content})
        path = folder / SOURCE_FILES
        with contextlib.suppress(OSError):  # the folder may be read-only
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)


def statistics_identity(images: ReferenceImages, net: FeatureNet) -> dict[str, Any]:
    """Return everything that decides the statistics, in the types that JSON reads back."""
    return {"pictures": json.loads(json.dumps(images.summary)), "features": net.identity()}


def load_reference(folder: Path) -> Reference:
    """Read a folder of `dit-hf reference`.

    Raises:
        ValueError: if it is damaged or of another format version.
    """
    remedy = f"delete {folder} and compute it again"
    info = read_manifest(folder, INFO, hashes=True, remedy=remedy, keys=_KEYS)
    if info["format"] != FORMAT_VERSION:
        raise ValueError(f"{folder}: expected statistics of format {FORMAT_VERSION}, got format {info['format']}")
    tensors = read_tensors(folder / STATISTICS, remedy)
    problem = _problem(info, tensors)
    if problem:
        raise ValueError(f"{folder} is no statistics of images ({problem}); {remedy}")
    return Reference(
        info=info,
        features=tensors["features"].numpy(),
        rows=tensors["rows"].numpy(),
        conditions={name: tensors[f"condition.{name}"].numpy() for name in info["conditions"]},
        labels=info.get("condition_labels", {}),
        mean=tensors["mean"],
        covariance=tensors["covariance"],
    )


def _problem(info: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return what is wrong with statistics that may come from anybody, or None."""
    kinds = {"pictures": dict, "features": dict, "conditions": list, "condition_labels": dict}
    for key, kind in kinds.items():
        if not isinstance(info.get(key, kind()), kind):
            return f"{INFO}: {key} is no {kind.__name__}"
    for section, keys in (("pictures", ("source", "pixels_sha256", "resolution")), ("features", ("name",))):
        if not all(isinstance(info[section].get(key), str) for key in keys):
            return f"{INFO}: {section} without {' or '.join(keys)}"

    # Everything else has as many rows, or as many features, as `features`.
    features = tensors.get("features")
    if features is None or features.ndim != 2 or features.dtype != torch.float32:
        return f"{STATISTICS}: no features, [images, dim] in float32"
    count, dim = features.shape
    if info["pictures"].get("pictures") != count:
        return f"{INFO}: {info['pictures'].get('pictures')!r} images, but {count} features"
    conditions = {f"condition.{name}": (count,) for name in info["conditions"]}
    shapes: dict[str, tuple[int, ...]] = {"rows": (count,), "mean": (dim,), "covariance": (dim, dim), **conditions}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            return f"{STATISTICS}: expected {name} of shape {list(shape)}"
        if tensors[name].is_floating_point() != (name in ("mean", "covariance")):
            return f"{STATISTICS}: {name} in {tensors[name].dtype}"
        if not torch.isfinite(tensors[name]).all():
            return f"{STATISTICS}: {name} is not finite"
    return None


def describe(statistics: Reference) -> str:
    """Return one line that identifies statistics: number, source and hash of the images, size, feature network."""
    images, features = statistics.info["pictures"], statistics.info["features"]
    return (
        f"{len(statistics.features):,} images of {images['source']} ({images['pixels_sha256'][:12]}), "
        f"{images['resolution']} px, {features['name']} ({features['weights_sha256'][:12]})"
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that can change a figure."""
    names = ("torch", "diffusers", "transformers", "numpy", "pillow")
    from .. import __version__

    return {"dit_hf": __version__} | {name: version(name) for name in names}


def _write(
    folder: Path, images: ReferenceImages, identity: dict[str, Any], collected: Collected, content: str | None
) -> None:
    """Write statistics and manifest; features and conditions are those of the readable rows."""
    values, rows = collected.features.astype(np.float64), collected.rows
    tensors = {
        "mean": values.mean(0),  # [dim]
        "covariance": np.atleast_2d(np.cov(values, rowvar=False)),  # [dim, dim]
        "features": collected.features,  # [count, dim]
        "rows": rows,  # [count]
        **{f"condition.{name}": np.array(ids, np.int32)[rows] for name, ids in images.conditions.items()},
    }
    with new_folder(folder) as partial:
        save_file(tensors, partial / STATISTICS)
        write_manifest(
            partial,
            INFO,
            format=FORMAT_VERSION,
            pictures={**identity["pictures"], "pictures": len(rows), "pixels_sha256": collected.pixels_sha256},
            features=identity["features"],
            conditions=list(images.conditions),
            condition_labels=images.labels,
            asked=identity,
            **({CONTENT: content} if content else {}),
            versions=versions(),
        )
