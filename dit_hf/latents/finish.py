"""Complete a latent cache once its shards are encoded: everything beside them."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features

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
from .grow import base_sums, grown_info, nothing_to_add
from .parts import write_part
from .progress import LeftOut
from .reuse import SOURCE_FILES, SourceFiles, write_source_files
from .shards import IMAGE_SHA256, Job, ShardNotes, latent_columns, load_rows, shard_name, spell_features
from .vae import weights_sha256


def finish(job: Job, spec: CacheSpec) -> None:
    """Write everything beside the shards: index, list of images left out, reconstructions, card and latents.json.

    Raises:
        ValueError: if no image can be used, or, of those to add to a cache, none that it does not have.
    """
    notes, base = [job.notes(shard) for shard in range(job.num_shards)], spec.base

    # Images that are left out.
    left_out = LeftOut(spec)
    left_out.add([(image_id, reason) for note in notes for image_id, reason in note.left_out])
    write_left_out(job.folder, left_out.all())

    # The dataset's own files, without which it cannot be opened.
    names = [shard_name(number, job.total) for number in range(len(base.files) if base else 0)]
    names += [job.file_name(shard) for shard in range(job.num_shards)]
    write_index(job.folder, names, job.features, job.sha256)
    cache = load_rows(job.folder)
    if base is not None and base.kept.all() and len(cache) == len(base.kept):
        raise nothing_to_add(f"add_to {base.folder}", spec.source.name)
    if not len(cache):
        raise ValueError(f"no image of {spec.source.name} can be used: {': '.join(left_out.all()[0])}")

    if spec.part is not None:  # before the plan tells of faces, which those of other parts are added to
        write_part(job.folder, spec, notes)
    if any(note.faces for note in notes):
        describe_faces(spec.source.plan, len(spec.source.rows), spec.source.rows.column_names, notes)
        save_faces_grid(job, spec, notes, job.folder / FACES_GRID)

    # Card and metadata; latents.json comes last because it lists the hashes of all other files.
    info = _cache_info(job, spec, cache, notes, len(left_out.all()))
    grid = job.folder / "reconstructions.png"
    rows, ids = (spec.source.rows, spec.source.rows["id"][:]) if base is None else (base.images, base.ids)
    info["psnr"] = save_reconstruction_grid(cache, rows, ids, spec.vae, job, grid)
    write_cache_card(job.folder, info, left_out.all(), spec.source.plan.lines())
    if IMAGE_SHA256 in job.features:  # for the next call on this machine
        stamps = [job.stamps(shard) for shard in range(job.num_shards)] or [np.zeros((0, 3), np.int64)]
        of_base = [base.stamps] if base else []
        write_source_files(job.folder / SOURCE_FILES, SourceFiles(np.concatenate(stamps), notes, *of_base))
    write_manifest(job.folder, CACHE_INFO, ("building", SOURCE_FILES), **info)


def write_left_out(folder: Path, left_out: list[tuple[str, str]]) -> None:
    """Write the list of images that are left out: id and reason."""
    with open(folder / "left_out.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "reason"), *left_out])


def _cache_info(
    job: Job, spec: CacheSpec, cache: Dataset, notes: list[ShardNotes], num_left_out: int
) -> dict[str, Any]:
    """Return the content of `latents.json`, but for the PSNR and the list of files."""
    labels = {k: feature.names for k, feature in cache.features.items() if isinstance(feature, ClassLabel)}
    others = ("id", "split", IMAGE_SHA256, *latent_columns(spec.vae, job.flip))
    names = [name for name in job.features if name not in others]
    identity = spec.identity_as(FORMAT_VERSION if IMAGE_SHA256 in job.features else EARLIER_FORMAT)
    return {
        "identity": format_identity(identity),
        **content_hash(identity, cache),
        **(grown_info(spec.base) if spec.base else {}),
        "settings": spec.settings,
        "plan": spec.source.plan.as_dict(),
        "latent_shape": list(job.latent_shape),
        "conditions": {name: len(labels[name]) if name in labels else 2 for name in names},
        "condition_labels": labels,
        "statistics": statistics(notes, base_sums(spec.base, job.latent_shape) if spec.base else None),
        "scaling_factor": spec.vae.config.get("scaling_factor") or 1.0,
        "shift_factor": spec.vae.config.get("shift_factor") or 0.0,
        "vae_sha256": weights_sha256(spec.vae),
        **count_rows(cache, num_left_out),
    }


def count_rows(cache: Dataset, num_left_out: int) -> dict[str, Any]:
    """Return the entries of `latents.json` that count: `copies` of training images, and `counts` by split."""
    splits = cache["split"][:]
    counts = {name: splits.count(name) for name in ("train", "validation", "test")} | {"left_out": num_left_out}
    return {"copies": _copies(cache), "counts": counts}


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


def content_hash(identity: dict[str, Any], cache: Dataset) -> dict[str, str]:
    """Return the hash of images and labels that [`content_sha256`] reads; nothing in format 2, which has none."""
    if IMAGE_SHA256 not in cache.column_names:
        return {}
    images = hashlib.sha256("".join(cache[IMAGE_SHA256][:]).encode()).hexdigest()
    parts = {"ids": identity["source"]["sha256"], "labels": identity["labels"], "images": images}
    parts |= {"faces": identity["faces"]} if "faces" in identity else {}
    return {"content_sha256": hash_json(parts)[:12]}


def write_index(folder: Path, names: list[str], features: Features, fingerprint: str) -> None:
    """Write the two files by which `load_from_disk` finds the shards: those of an empty dataset, with shards named.

    Args:
        folder: The cache.
        names: The files of the shards, in their order.
        features: Features of the cache.
        fingerprint: Hash of the cache's identity.
    """
    empty = folder / "building" / "index"
    with hidden_progress_bars():
        Dataset.from_dict({name: [] for name in features}, features).save_to_disk(str(empty))
    # The keys of state.json are private to datasets (read in 5.2).
    state = read_json(empty / "state.json")
    state["_data_files"] = [{"filename": name} for name in names]
    state["_fingerprint"] = fingerprint[:16]
    write_text(folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
    info = read_json(empty / "dataset_info.json")
    info["features"] = spell_features(features)
    write_text(folder / "dataset_info.json", json.dumps(info, indent=2))
    shutil.rmtree(empty)


def statistics(notes: list[ShardNotes], others: tuple[torch.Tensor, int] | None = None) -> dict[str, list[float]]:
    """Return mean and standard deviation, by channel, of samples of the posteriors (law of total variance).

    Args:
        notes: The notes of the shards.
        others: Sums [3, channels] and count of other rows.
    """
    parts = [(torch.tensor(note.sums, dtype=torch.float64), note.count) for note in notes]
    parts += [others] if others is not None else []
    sums = torch.stack([part for part, _ in parts]).sum(0)  # [3, channels]
    mean, mean_square, variance = sums / sum(count for _, count in parts)
    return {"mean": mean.tolist(), "std": (mean_square - mean.square() + variance).sqrt().tolist()}
