"""Complete a latent cache once its shards are encoded: everything beside them."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset

from ..data.files import CACHE_INFO
from ..progress import hidden_progress_bars
from ..storage import (
    hash_json,
    read_json,
    write_manifest,
    write_text,
)
from .cache import (
    EARLIER_FORMAT,
    FORMAT_VERSION,
    CacheSpec,
    format_identity,
)
from .card import save_reconstruction_grid, write_cache_card
from .faces import FACES_GRID, describe_faces, save_faces_grid
from .progress import LeftOut
from .reuse import SOURCE_FILES, write_source_files
from .shards import IMAGE_SHA256, Job, ShardNotes, latent_columns, load_rows, spell_features
from .vae import weights_sha256


def finish(job: Job, spec: CacheSpec) -> None:
    """Write everything beside the shards: index, list of images left out, reconstructions, card and latents.json."""
    notes = [job.notes(shard) for shard in range(job.num_shards)]

    # Images that are left out.
    left_out = LeftOut(spec.max_left_out, spec.source)
    left_out.add([(image_id, reason) for note in notes for image_id, reason in note.left_out])
    with open(job.folder / "left_out.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "reason"), *left_out.all()])

    # The dataset's own files, without which it cannot be opened.
    _write_index(job)
    cache = load_rows(job.folder)
    if not len(cache):
        raise ValueError(f"no image of {spec.source.name} can be used: {': '.join(left_out.all()[0])}")

    if job.geometry.crop == "face":
        describe_faces(spec, notes)
        save_faces_grid(job, spec, notes, job.folder / FACES_GRID)

    # Card and metadata; latents.json comes last because it lists the hashes of all other files.
    info = _cache_info(job, spec, cache, notes, len(left_out.all()))
    grid = job.folder / "reconstructions.png"
    info["psnr"] = save_reconstruction_grid(cache, spec.source.rows, spec.vae, job, grid)
    write_cache_card(job.folder, info, left_out.all(), spec.source.plan.lines())
    if IMAGE_SHA256 in job.features:  # for the next call on this machine
        stamps = [job.stamps(shard) for shard in range(job.num_shards)]
        write_source_files(job.folder / SOURCE_FILES, np.concatenate(stamps), notes)
    write_manifest(job.folder, CACHE_INFO, ("building", SOURCE_FILES), **info)


def _cache_info(
    job: Job, spec: CacheSpec, cache: Dataset, notes: list[ShardNotes], num_left_out: int
) -> dict[str, Any]:
    """Return the content of `latents.json`, but for the PSNR and the list of files."""
    labels = {k: feature.names for k, feature in cache.features.items() if isinstance(feature, ClassLabel)}
    others = ("id", "split", IMAGE_SHA256, *latent_columns(spec.vae, job.flip))
    names = [name for name in job.features if name not in others]
    splits = cache["split"][:]
    identity = spec.identity_as(FORMAT_VERSION if IMAGE_SHA256 in job.features else EARLIER_FORMAT)
    return {
        "identity": format_identity(identity),
        **_content_sha256(identity, cache),
        "settings": spec.settings,
        "plan": spec.source.plan.as_dict(),
        "latent_shape": list(job.latent_shape),
        "conditions": {name: len(labels[name]) if name in labels else 2 for name in names},
        "condition_labels": labels,
        "statistics": _statistics(notes),
        "scaling_factor": spec.vae.config.get("scaling_factor") or 1.0,
        "shift_factor": spec.vae.config.get("shift_factor") or 0.0,
        "vae_sha256": weights_sha256(spec.vae),
        "copies": _copies(cache),
        "counts": {name: splits.count(name) for name in ("train", "validation", "test")} | {"left_out": num_left_out},
    }


def _copies(cache: Dataset) -> dict[str, dict[str, Any]]:
    """Return, by held-out split, the number of images that are training images too, by content, and the first pair."""
    if IMAGE_SHA256 not in cache.column_names:
        return {}
    copies = {}
    table = cache.select_columns(["id", "split", IMAGE_SHA256]).with_format("arrow")[:]
    train = table.filter(pc.equal(table["split"], "train"))
    for split in ("validation", "test"):
        held_out = table.filter(pc.equal(table["split"], split))
        found = pc.index_in(train[IMAGE_SHA256], pc.unique(held_out[IMAGE_SHA256]))
        first = train.filter(pc.is_valid(found))
        if len(first):
            of_training = held_out.filter(pc.is_in(held_out[IMAGE_SHA256], first[IMAGE_SHA256].combine_chunks()))
            sha256, image_id = of_training[IMAGE_SHA256][0], of_training["id"][0].as_py()
            trained = first["id"][pc.index(first[IMAGE_SHA256], sha256).as_py()].as_py()
            copies[split] = {"count": len(of_training), "first": [image_id, trained]}
    return copies


def _content_sha256(identity: dict[str, Any], cache: Dataset) -> dict[str, str]:
    """Return the hash of images and labels that [`content_sha256`] reads; nothing in format 2, which has none."""
    if IMAGE_SHA256 not in cache.column_names:
        return {}
    images = hashlib.sha256("".join(cache[IMAGE_SHA256][:]).encode()).hexdigest()
    parts = {"ids": identity["source"]["sha256"], "labels": identity["labels"], "images": images}
    parts |= {"faces": identity["faces"]} if "faces" in identity else {}
    return {"content_sha256": hash_json(parts)[:12]}


def _write_index(job: Job) -> None:
    """Write the two files by which `load_from_disk` finds the shards: those of an empty dataset, with shards named."""
    empty = job.folder / "building" / "index"
    with hidden_progress_bars():
        Dataset.from_dict({name: [] for name in job.features}, job.features).save_to_disk(str(empty))
    # The keys of state.json are private to datasets (read in 5.2).
    state = read_json(empty / "state.json")
    state["_data_files"] = [{"filename": job.path(shard).name} for shard in range(job.num_shards)]
    state["_fingerprint"] = job.sha256[:16]
    write_text(job.folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
    info = read_json(empty / "dataset_info.json")
    info["features"] = spell_features(job.features)
    write_text(job.folder / "dataset_info.json", json.dumps(info, indent=2))
    shutil.rmtree(empty)


def _statistics(notes: list[ShardNotes]) -> dict[str, list[float]]:
    """Return mean and standard deviation, by channel, of samples of the posteriors (law of total variance)."""
    sums = torch.tensor([note.sums for note in notes], dtype=torch.float64).sum(0)  # [3, channels]
    mean, mean_square, variance = sums / sum(note.count for note in notes)
    return {"mean": mean.tolist(), "std": (mean_square - mean.square() + variance).sqrt().tolist()}
