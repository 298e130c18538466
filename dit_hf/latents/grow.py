"""Add images to a finished cache: find those that it does not have, by content, and take over the rows that it has.

The grown cache is a folder of its own, whose first shards are those of the cache before: the same files, by links,
where nothing in them changes. So runs on the cache before can still resume, and no row is stored twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, Features

from ..data.anonymous import DIGITS
from ..data.contents import condition_names, image_count, shortened
from ..data.sources import Source
from ..data.splits import is_held_out
from ..data.transforms import photo_of
from ..storage import hash_json, link_or_copy, sync
from .cache import (
    EARLIER_FORMAT,
    GROWN,
    Base,
    content_sha256,
    earlier_contents,
    holds_out,
    identity_differences,
    read_cache_info,
)
from .reuse import hash_images, read_source_files
from .shards import IMAGE_SHA256, Job, load_rows, open_shards, rewrite_shard, shard_files, shard_name


def read_base(folder: Path, source: Source, encoding: dict[str, Any], anonymous: bool, verify: bool) -> dict[str, Any]:
    """Return the content of `latents.json` of the cache that images are to be added to.

    Args:
        folder: The cache.
        source: The opened images.
        encoding: How they are to be encoded, see [`encoding_identity`]; without a VAE it is not compared.
        anonymous: Whether their ids are to be hashes.
        verify: Compare every byte with the hashes that were recorded.

    Raises:
        ValueError: naming the difference, if images cannot be added to it in this way.
    """
    info, place = read_cache_info(folder, hashes=verify), f"add_to {folder}"
    identity = info["identity"]
    if identity["format"] == EARLIER_FORMAT:
        raise ValueError(f"{place}: a cache of format {EARLIER_FORMAT} has no hashes of its images; make it again")
    if "part" in identity:
        raise ValueError(f"{place} is part {identity['part']} of a cache; dit-hf merge-latents joins the parts first")
    differences = identity_differences({name: identity.get(name) for name in {**encoding, "faces": None}}, encoding)
    before, conditions = list(info["conditions"]), condition_names(source.rows.column_names)
    if set(before) != set(conditions):
        named = [", ".join(sorted(names)) or "none" for names in (before, conditions)]
        differences.append(f"conditions were {named[0]} and are {named[1]} (--conditions chooses)")
    if differences:
        raise ValueError(f"{place} was made with other settings: {'; '.join(differences)}")
    first = open_shards(shard_files(folder)).select(["id", IMAGE_SHA256]).slice(0, 1).to_pylist()[0]
    if (photo_of(first["id"], encoding["crop"]) == first[IMAGE_SHA256][:DIGITS]) != anonymous:
        word = "has the images' paths as ids: leave out" if anonymous else "has anonymous ids: add"
        raise ValueError(f"{place} {word} --anonymous_ids")
    if holds_out(info) and "split" in source.rows.column_names and "validation" in source.rows.unique("split"):
        raise ValueError(
            f"{place} holds out 2 % of its training images for validation, and {source.name} has validation images of "
            "its own; --split train reads the training images alone"
        )
    return info


def hash_source(source: Source, folder: Path, crop: str) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Return what [`hash_images`] does of a source whose images may be those of a finished cache."""
    cache, recorded = open_shards(shard_files(folder)), read_source_files(folder)
    photos = _photos(cache, crop)
    stamps = np.zeros((len(photos), 3), np.int64) if recorded is None else recorded.of_rows(photos)
    likely = _index_in(pa.array(source.rows["id"][:], pa.string()), pa.array(photos, pa.string()))
    return hash_images(source.rows, likely, cache.column(IMAGE_SHA256), stamps)


def find_new_images(
    source: Source,
    folder: Path,
    info: dict[str, Any],
    hashed: tuple[pa.ChunkedArray, np.ndarray],
    drop_gone: bool,
    crop: str,
) -> tuple[Source, Base]:
    """Compare a source with a finished cache, by content.

    Args:
        source: The opened images; its plan tells what is found.
        folder: The cache.
        info: What [`read_base`] returned.
        hashed: What [`hash_source`] returned.
        drop_gone: Whether rows of images that the source does not have any more are dropped.
        crop: The crop of the images.

    Returns:
        The source with those images alone that the cache does not have, and what is taken over from the cache.

    Raises:
        ValueError: if there is nothing to add, if labels of images that the cache has are other ones now, or if a new
            image has the id of another one.
    """
    place, paths = f"add_to {folder}", shard_files(folder)
    rows, features, notes = _with_labels_of(source.rows, load_rows(folder).features, place)
    cache, (hashes, found) = open_shards(paths), hashed
    sha256s, photos, ids = cache.column(IMAGE_SHA256), _photos(cache, crop), rows["id"][:]

    # Which row of the cache each image of the source is: of several with its content the one with its id.
    likely = _index_in(pa.array(ids, pa.string()), pa.array(photos, pa.string()))
    expected = sha256s.take(pa.array(likely, mask=likely < 0))
    is_likely = pc.fill_null(pc.equal(hashes, expected), False).to_numpy()
    row_of = np.where(is_likely, likely, _index_in(hashes, sha256s))
    is_new = row_of < 0
    _check_labels(rows, cache, row_of, info, crop, place)

    # Images that are gone, and the rows that are kept.
    source_row = _index_in(sha256s, hashes)
    gone = source_row < 0
    kept = ~gone if drop_gone else np.ones(len(photos), bool)
    if not is_new.any() and kept.all():
        raise nothing_to_add(place, source.name)
    _check_ids(ids, is_new, photos, kept, source.name, place)
    stamps = np.zeros((len(photos), 3), np.int64)
    stamps[~gone] = found[source_row[~gone]]
    stamps[row_of[~is_new]] = found[~is_new]

    count = int(is_new.sum())
    notes.insert(0, f"{count:,} of {image_count(len(ids))}, to the {len(photos):,} of {folder.name}")
    if gone.any():
        names = shortened([photo for photo, is_gone in zip(photos, gone, strict=True) if is_gone], 3)
        advice = "are dropped" if drop_gone else "stay (--drop_gone drops them)"
        notes.append(f"{image_count(int(gone.sum()))} of {folder.name} are gone and {advice}: {names}")
    source.plan.added += notes
    ids = [image_id if row < 0 else photos[row] for image_id, row in zip(ids, row_of.tolist(), strict=True)]
    base = Base(folder, info, [path.name for path in paths], features, kept, stamps[kept], rows, ids)
    return dataclasses.replace(source, rows=rows.select(np.flatnonzero(is_new))), base


def nothing_to_add(place: str, name: str) -> ValueError:
    """Return the error that a source has no image for a cache which it does not have already."""
    return ValueError(f"{place} has every image of {name} that can be read; there is nothing to add")


def _photos(cache: pa.Table, crop: str) -> list[str]:
    """Return the id of the source's image that each row of a cache is from."""
    return [photo_of(image_id, crop) for image_id in cache.column("id").to_pylist()]


def _index_in(values: Any, value_set: Any) -> np.ndarray:
    """Return the first position of each value, [values], -1 where there is none; null is nowhere."""
    positions = pc.index_in(values, value_set=value_set, skip_nulls=True)
    return pc.fill_null(positions, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _with_labels_of(rows: Dataset, features: Features, place: str) -> tuple[Dataset, Features, list[str]]:
    """Return the rows of a source with the conditions in the order of a cache, and their classes by its names.

    Returns:
        The rows; the features of the grown cache, where new classes come after those that the cache has; a note for
        each condition that has some.

    Raises:
        ValueError: if a condition has classes here and none there.
    """
    names, grown, notes = condition_names(rows.column_names), Features(features), list[str]()
    for name in names:
        before, now = features[name], rows.features[name]
        if isinstance(before, ClassLabel) != isinstance(now, ClassLabel):
            kinds = ["classes" if isinstance(kind, ClassLabel) else "yes or no" for kind in (before, now)]
            raise ValueError(f"{place}: condition {name} was {kinds[0]} and is {kinds[1]}")
        if not isinstance(before, ClassLabel) or before.names == now.names:
            continue
        values = np.array([-1 if value is None else value for value in rows[name][:]], np.int64)
        labels = _join_labels(before.names, now.names, values)
        if len(labels) > len(before.names):
            notes.append(f"{name}: new classes {shortened(labels[len(before.names) :])}, after those of the cache")
        grown[name] = ClassLabel(names=labels)
        numbers = {label: number for number, label in enumerate(labels)}
        mapped = np.array([*(numbers.get(label, -1) for label in now.names), -1])[values]
        column: Any = [None if value < 0 else value for value in mapped.tolist()]
        rows = rows.remove_columns(name).add_column(name, column, feature=grown[name])
    order = ["id", "image", *(["split"] if "split" in rows.column_names else [])]
    return rows.select_columns([*order, *(name for name in features if name in names)]), grown, notes


def _join_labels(before: list[str], now: list[str], values: np.ndarray) -> list[str]:
    """Return names of classes: those of before, then those of now that are new; `values` are the ids of now."""
    if now[: len(before)] == before:  # as with numbers, which are their own ids
        return now
    if before[: len(now)] == now:
        return before
    present = set(values.tolist())
    return before + [label for number, label in enumerate(now) if number in present and label not in before]


def _check_ids(ids: list[str], is_new: np.ndarray, photos: list[str], kept: np.ndarray, name: str, place: str) -> None:
    """Refuse new images that have the ids of others that the cache keeps.

    Raises:
        ValueError: with their number and the first of them.
    """
    left = pa.array([photo for photo, keep in zip(photos, kept, strict=True) if keep], pa.string())
    taken = np.flatnonzero(is_new & (_index_in(pa.array(ids, pa.string()), left) >= 0))
    if len(taken):
        raise ValueError(
            f"{place}: {image_count(len(taken))} of {name} have ids of other images there, first {ids[taken[0]]}; "
            "rename them, or let --drop_gone replace images that have changed"
        )


def _check_labels(
    rows: Dataset, cache: pa.Table, row_of: np.ndarray, info: dict[str, Any], crop: str, place: str
) -> None:
    """Refuse other splits and conditions than the cache has for its images.

    Raises:
        ValueError: with the number of images and the first of them.
    """
    known = np.flatnonzero(row_of >= 0)
    before = cache.select(["split", *info["conditions"]]).take(pa.array(row_of[known]))
    table = rows.select_columns([name for name in rows.column_names if name != "image"]).with_format("arrow")[:]
    now = table.take(pa.array(known))
    ids = cache.column("id").take(pa.array(row_of[known]))
    splits = now.column("split").to_pylist() if "split" in now.column_names else ["train"] * len(known)
    if holds_out(info):
        names = (photo_of(name, crop) for name in ids.to_pylist())
        pairs = zip(splits, names, strict=True)
        splits = ["validation" if split == "train" and is_held_out(name) else split for split, name in pairs]
    columns = {"split": pa.array(splits, pa.string()), **{name: now.column(name) for name in info["conditions"]}}
    for name, column in columns.items():
        one, other = (pc.fill_null(values.cast(pa.string()), "missing") for values in (before.column(name), column))
        different = pc.not_equal(one, other).to_numpy(zero_copy_only=False)
        if crop == "face":  # a photograph of several people has no values
            different &= before.column(name).is_valid().to_numpy()
        if different.any():
            raise ValueError(
                f"{place}: {name} of {image_count(int(different.sum()))} that it has is another one now, first of "
                f"{ids[int(different.argmax())]}; make a new cache"
            )


def grown_identity(identity: dict[str, Any], base: Base) -> dict[str, Any]:
    """Return the identity of a cache that has grown, from that of the images that are added."""
    before, kept = base.info["identity"], hashlib.sha256(base.kept.tobytes()).hexdigest()
    names = {**before["labels"], **identity["labels"]}
    labels = {name: [part["labels"].get(name) for part in (before, identity)] for name in names}
    content, added = content_sha256(base.info), identity["source"]
    source = {
        "name": added["name"],
        "num_images": int(base.kept.sum()) + added["num_images"],
        "sha256": hash_json({"added_to": content, "kept": kept, "added": added["sha256"]})[:12],
    }
    hashed = {name: hash_json({"parts": parts})[:12] for name, parts in labels.items()}
    return {**identity, "source": source, "labels": hashed, "added_to": content}


def grown_info(base: Base) -> dict[str, Any]:
    """Return what `latents.json` of the grown cache says of those that it has grown from."""
    contents = [content_sha256(base.info), *earlier_contents(base.info)]
    return {GROWN: {"from": contents, "hold_out": holds_out(base.info)}}


def take_over(base: Base, job: Job) -> None:
    """Put the shards of the cache before into the folder of `job`, those whose rows or classes change written anew."""
    start, same_names = 0, _has_same_classes(base)
    for number, name in enumerate(base.files):
        source, target = base.folder / name, job.folder / shard_name(number, job.total)
        count = len(open_shards([source]))
        kept = base.kept[start : start + count]
        if same_names and kept.all():
            link_or_copy(source, target)
        else:
            rewrite_shard(source, target, base.features, kept)
        start += count
    sync(job.folder)


def _has_same_classes(base: Base) -> bool:
    """Check whether the grown cache has no classes that the cache before does not name in each file."""
    return base.features == load_rows(base.folder).features


def copied_bytes(base: Base, place: Path) -> int:
    """Return the size of the cache before where its shards cannot be linked, 0 where they can."""
    if _has_same_classes(base) and base.kept.all() and base.folder.stat().st_dev == place.stat().st_dev:
        return 0
    return sum((base.folder / name).stat().st_size for name in base.files)


def base_sums(base: Base, latent_shape: tuple[int, int, int]) -> tuple[torch.Tensor, int]:
    """Return the sums of `ShardNotes` over the rows that are taken over, float64 [3, channels], and their count."""
    channels, height, width = latent_shape
    columns = [name for name in base.features if name.startswith("latent_mean")]
    pixels = height * width * len(columns)
    mean, std = (torch.tensor(base.info["statistics"][name], dtype=torch.float64) for name in ("mean", "std"))
    sums = torch.stack([mean, std.square() + mean.square(), torch.zeros_like(mean)]) * (len(base.kept) * pixels)

    # Those of the rows that are dropped. Mean squares and variances are added up anyway.
    table, start = open_shards([base.folder / name for name in base.files]), 0
    for batch in table.select([name for name in base.features if name.startswith("latent_")]).to_batches():
        dropped = batch.filter(pa.array(~base.kept[start : start + len(batch)]))
        start += len(batch)
        for name, column in zip(dropped.schema.names, dropped.columns, strict=True):
            values = torch.tensor(column.flatten().to_numpy().reshape(-1, channels, height, width)).double()
            sums[1] -= values.square().sum((0, 2, 3))
            if name in columns:
                sums[0] -= values.sum((0, 2, 3))
    return sums, int(base.kept.sum()) * pixels
