"""Build a latent cache: images encoded once by a VAE into one Arrow dataset that training reads."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import ClassLabel, Dataset, load_from_disk
from tqdm import tqdm

from ..data.contents import Missing, SourceOptions, SplitFrom, parse_conditions
from ..data.image_folder import CACHE_INFO
from ..data.sources import MAX_LEFT_OUT, Source, open_source
from ..data.transforms import Geometry, parse_resolution
from ..devices import memory_errors, peak_memory
from ..storage import (
    disk_errors,
    folder_taken,
    hash_json,
    locked,
    partial_folder,
    put_in_place,
    read_manifest,
    write_manifest,
    write_text,
)
from .cache import (
    EARLIER_FORMAT,
    FORMAT_VERSION,
    cache_identity,
    check_same_identity,
    earlier_identity,
    finished_identity,
    format_identity,
    parse_identity,
    push_latents,
)
from .card import quality, save_reconstruction_grid, write_cache_card
from .encode import ShardEncoder, encode_in_processes
from .reuse import SOURCE_FILES, Comparison, compare_images, read_source_files, write_source_files
from .shards import IMAGE_SHA256, Job, ShardNotes, cache_features, latent_columns, plan_sizes, spell_features
from .vae import VAE, latent_shape, load_vae, weights_sha256

PATCH_SIZE = 2  # of every preset: latents that it does not divide could not be trained on


@dataclass(frozen=True)
class CacheSpec:
    """The cache to build.

    Attributes:
        source: The opened images.
        vae: The VAE that encodes them.
        geometry: Crop and resolution; the resolution is set.
        flip: Whether each image is encoded mirrored too.
        max_left_out: The share of images that may be left out.
        batch_size: Images that the VAE encodes at once; None chooses by their size.
        settings: Options of `prepare_latents` that `latents.json` and the card quote.
        identity: See [`cache_identity`].
    """

    source: Source
    vae: VAE
    geometry: Geometry
    flip: bool
    max_left_out: float
    batch_size: int | None
    settings: dict[str, Any]
    identity: dict[str, Any]

    def identity_as(self, version: int) -> dict[str, Any]:
        """Return the identity of this cache in a format."""
        return earlier_identity(self.identity, self.source) if version == EARLIER_FORMAT else self.identity


def prepare_latents(
    source: str,
    output_dir: str,
    vae: str = "stabilityai/sd-vae-ft-ema",
    resolution: str = "256",
    crop: str = "center",
    split: str | None = None,
    flip: bool = False,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    conditions: str | None = None,
    split_from: SplitFrom | None = None,
    missing: Missing = "null",
    allow_partial: bool = False,
    num_proc: int = 1,
    batch_size: int | None = None,
    max_left_out: float = MAX_LEFT_OUT,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Encode the images of any source into a latent cache; an interrupted build resumes where it stopped.

    Under `accelerate launch` or `torchrun` every rank encodes its part. The cache is the same however often the build
    was interrupted, and for any number of processes, provided that the VAE's kernels give the same bits with another
    number of threads (on a CPU, those of Stable Diffusion's VAE differ by rounding).

    Args:
        source: a folder of images (CelebA with its lists, CelebA-HQ, subfolders that are classes or splits,
            metadata.csv, ...), parquet or webdataset shards, a dataset on the Hub (`OWNER/NAME`), or `avatars`.
        output_dir: the cache's folder. If it already holds the finished cache of the same images (by content), labels,
            VAE and geometry, only images that could not be read are tried again.
        vae: Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`) or folder of a diffusers `AutoencoderKL`,
            `AutoencoderTiny` or `AutoencoderDC`, or `avatar`, the bundled one.
        resolution: `N` or `HxW` in pixels, divisible by twice the VAE's reduction of a side (patches are of 2).
        crop: `celeba-178`, `celeba-140`, `center` or `none`.
        split: encode only this split (`train`, `validation` or `test`) of a source that has splits.
        flip: also encode each image mirrored (latents themselves are never mirrored).
        num_images: encode so many images of the training split (or of `split`), spread over classes and folders.
        seed: seed of the avatars and of the choice of `num_images`.
        dataset_config_name: the configuration of a dataset on the Hub.
        image_column: the column of images, where a dataset has several.
        conditions: the columns that are conditions, separated by commas (`class` is the folder's name), or `none`; by
            default all columns of yes and no, and of classes.
        split_from: where splits come from: `folders`, `files`, `column` or `none`.
        missing: `null` keeps images without a value of a condition, which train that condition's unconditional case;
            `leave_out` does not encode them.
        allow_partial: accept requested conditions that a whole split lacks.
        num_proc: on a CPU, encode in this many processes.
        batch_size: images that the VAE encodes at once; by default 64, 16 of 256 px, 4 of 512 px. It is halved when
            memory runs out.
        max_left_out: the share of images that may be left out because they cannot be used; more stop the build.
        dry_run: only print what was understood of the source.
        push_to_hub: upload the finished cache as this dataset (`OWNER/NAME`).
        private: make that repository private if it is a new one.

    Returns:
        The folder, which `datasets.load_from_disk` opens: `id`, `split`, `image_sha256` (of the stored file),
        `latent_mean`, `latent_std` (fp16, channels first, flattened; std only if the VAE has a posterior), with `flip`
        also `latent_mean_flip` and `latent_std_flip`, and one column per condition (null where its value is missing).

    Raises:
        FileExistsError: if `output_dir` holds something else, or a cache of other images, labels, VAE or geometry
            (the message names the difference).
        ValueError: for options that do not fit, or if too many of the images cannot be used.
        OSError: if the folder cannot be written, or the disk or the GPU's memory is full.
    """
    # Options. The timeout is long because the ranks wait for the slowest, and for the main one to finish the cache.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    _check_num_proc(num_proc, state)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    geometry = Geometry(parse_resolution(resolution), crop)
    if geometry.resolution is None:
        raise ValueError("resolution is needed: all latents of a cache have one shape")
    final = Path(output_dir)
    options = SourceOptions(
        dataset_config_name=dataset_config_name,
        split=split,
        num_images=num_images,
        seed=seed,
        avatar_size=max(geometry.resolution),
        image_column=image_column,
        conditions=parse_conditions(conditions),
        split_from=split_from,
        missing=missing,
        allow_partial=allow_partial,
    )

    # Source and VAE. The main rank downloads or renders first; the others find the result on the disk.
    with state.main_process_first():
        opened = open_source(source, options)
    if state.is_main_process:
        print("\n".join(opened.plan.lines()), flush=True)
    if dry_run:
        return final
    with state.main_process_first():
        model = load_vae(vae, state.device)
    settings = {"source": opened.name, "split": split, "num_images": num_images, "seed": seed}
    settings |= {"vae": model.config._name_or_path, "resolution": resolution, "crop": crop, "flip": flip}
    identity = cache_identity(opened, model, geometry, flip)
    spec = CacheSpec(opened, model, geometry, flip, max_left_out, batch_size, settings, identity)

    # Everything that can be refused is refused before any file is written. The main rank looks at the folder for all.
    job = _plan(final, spec)
    _LeftOut(max_left_out, opened)
    finished = [state.is_main_process and _is_finished(final, spec, job)]
    broadcast_object_list(finished)
    if not finished[0]:
        advice = "a smaller --batch_size or --resolution needs less"
        with disk_errors(f"output_dir {final}"), memory_errors(advice):
            _build(final, spec, num_proc, state)

    # Report and upload.
    if state.is_main_process:
        _report(final, finished[0])
        if push_to_hub:
            push_latents(final, push_to_hub, private)
    return final


def _check_num_proc(num_proc: int, state: PartialState) -> None:
    """Refuse several processes where ranks or a GPU share the work already."""
    if num_proc < 1 or (num_proc > 1 and (state.num_processes > 1 or state.device.type != "cpu")):
        raise ValueError(
            f"num_proc={num_proc}: expected 1, or more on a CPU with one rank; several GPUs need `accelerate launch`"
        )


def _report(folder: Path, was_there: bool) -> None:
    """Print how many images a finished cache holds, and how well its VAE reconstructs them."""
    info = read_manifest(folder, CACHE_INFO)
    counts = info["counts"]
    text = f"{counts['train']} training, {counts['validation']} validation, {counts['test']} test images"
    print(f"{folder}: {'already holds ' if was_there else ''}{text}, {counts['left_out']} left out", flush=True)
    print(f"reconstructions.png: PSNR {info['psnr']:.1f} dB, {quality(info['psnr'])}", flush=True)


def _is_finished(final: Path, spec: CacheSpec, job: Job) -> bool:
    """Check whether `final` holds the finished cache of the same images.

    Raises:
        FileExistsError: if it holds another cache, or something else.
    """
    before, place = finished_identity(final), f"output_dir {final}"
    if before is None:
        return False
    version = _known_format(before, place)
    check_same_identity(before, spec.identity_as(version), place, "a cache")
    if version == EARLIER_FORMAT:
        return True

    # The images by content. Stamps that have changed although the images have not are written for the next call.
    recorded = read_source_files(final)
    shards: dict[int, np.ndarray | None] = dict.fromkeys(range(job.num_shards))
    if recorded is not None:
        shards = {shard: recorded[0][job.rows_of(shard).start : job.rows_of(shard).stop] for shard in shards}
    compared = compare_images(spec.source.rows, job, final, shards)
    _check_unchanged(compared, len(spec.source.rows), place, "a cache")
    if compared.readable and recorded is not None:
        print(f"{final}: images that were left out can be read now; their shards are encoded again", flush=True)
        return False
    if compared.readable:
        print(f"{final}: some images that were left out can be read now; name a new folder to encode them", flush=True)
    elif recorded is not None and any((compared.stamps[shard] != shards[shard]).any() for shard in shards):
        with contextlib.suppress(OSError):  # the folder may be read-only
            write_source_files(final / SOURCE_FILES, np.concatenate(list(compared.stamps.values())), recorded[1])
    return True


def _known_format(before: dict[str, Any], place: str) -> int:
    """Return the format in which an identity is compared, and print what format 2 leaves open."""
    if before.get("format") != EARLIER_FORMAT:
        return FORMAT_VERSION
    print(
        f"{place}: a cache of format {EARLIER_FORMAT}, which did not record the content of its images; they count as "
        "unchanged if names, sizes and labels are the same",
        flush=True,
    )
    return EARLIER_FORMAT


def _check_unchanged(compared: Comparison, total: int, place: str, contents: str) -> None:
    """Refuse to reuse latents of images that have changed.

    Raises:
        FileExistsError: with their number and the first of them.
    """
    if compared.changed:
        problem = f"{len(compared.changed)} of {total} images have changed, first {compared.changed[0]}"
        raise FileExistsError(folder_taken(place, f"holds {contents} of other images: {problem}"))


def _build(final: Path, spec: CacheSpec, num_proc: int, state: PartialState) -> None:
    """Encode the unfinished shards on all ranks, complete the cache and put it in place."""
    partial = partial_folder(final)
    _check_space(_plan(partial, spec), partial)
    lock = locked(partial / "building" / "lock", str(partial))
    with lock if state.is_main_process else contextlib.nullcontext():
        try:
            # The main rank prepares the folder before the others look for finished shards in it.
            if state.is_main_process:
                _open_partial(partial, final, spec)
            state.wait_for_everyone()
            job = _plan(partial, spec)
            complete = (partial / CACHE_INFO).is_file()
            shards = [] if complete else job.unfinished()
            # Every rank must have listed the unfinished shards before any rank finishes another one.
            state.wait_for_everyone()

            _encode(final, job, spec, shards, num_proc, state)
            state.wait_for_everyone()
            if state.is_main_process:
                if not complete:
                    _finish(job, spec)
                shutil.rmtree(partial / "building")
                put_in_place(partial, final)
        except BaseException:
            # A folder without any latents would only keep its name from being used for something else.
            if state.is_main_process and not _holds_latents(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    state.wait_for_everyone()


def _holds_latents(partial: Path) -> bool:
    """Check whether an unfinished cache holds any image."""
    notes = [path for path in partial.glob("building/*.json") if path.stem.isdigit()]
    return (partial / CACHE_INFO).is_file() or any(json.loads(path.read_text())["count"] for path in notes)


def _encode(final: Path, job: Job, spec: CacheSpec, shards: list[int], num_proc: int, state: PartialState) -> None:
    """Encode this rank's part of `shards`, stopping as soon as too many images cannot be used."""
    left_out = _LeftOut(spec.max_left_out, spec.source)
    done = job.num_rows - sum(len(job.rows_of(shard)) for shard in shards)
    if done and state.is_main_process:
        print(f"{final}: resuming after {done} of {job.num_rows} images", flush=True)
    mine = shards[state.process_index :: state.num_processes]
    with _Progress(job, mine, shown=state.is_main_process) as progress:
        if num_proc > 1:
            encoded = encode_in_processes(job, spec.source.rows, mine, num_proc, progress.update)
        else:
            encoded = ShardEncoder(job, spec.source.rows, spec.vae, progress.update).encode_shards(mine)
        for shard in encoded:
            left_out.add(job.notes(shard).left_out)


class _Progress:
    """Progress bar that prints once, after the first batches, what the encoding will take.

    Args:
        job: The cache that is encoded.
        shards: The shards that this process encodes.
        shown: Whether anything is printed.
    """

    def __init__(self, job: Job, shards: list[int], shown: bool):
        self.job, self.shown = job, shown
        total = sum(len(job.rows_of(shard)) for shard in shards)
        self.bar = tqdm(total=total, desc="encoding", unit="images", disable=not shown)
        self.done, self.total, self.calls = 0, total, 0
        self.first = (0, time.monotonic())  # images and time after the first batch, which warms up

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """Count `count` images that were encoded."""
        self.bar.update(count)
        self.done, self.calls = self.done + count, self.calls + 1
        if self.calls == 1:
            self.first = (self.done, time.monotonic())
        if self.calls == 3 and self.shown and self.done < self.total:
            images, seconds = self.done - self.first[0], time.monotonic() - self.first[1]
            self.bar.write(self.estimate(images / max(seconds, 1e-9)))

    def estimate(self, speed: float) -> str:
        """Return what is left to be encoded at `speed` images/s, and what it takes."""
        left = self.total - self.done
        return (
            f"{left:,} images left at {speed:,.1f} images/s: about {timedelta(seconds=round(left / speed))}, "
            f"{peak_memory()}, {left * self.job.bytes_per_row / 1e9:,.2f} GB on the disk"
        )


def _open_partial(partial: Path, final: Path, spec: CacheSpec) -> None:
    """Begin a build, or check that the unfinished one in `partial` is the same and remove half-written files.

    If `final` is a finished cache, some images that it left out can be read now: its other shards are taken over.
    """
    begun = partial / "building" / "identity.json"
    if (partial / CACHE_INFO).is_file():  # complete: it was interrupted before it was put in place
        _compare_partial(parse_identity(read_manifest(partial, CACHE_INFO)["identity"]), partial, spec)
        return
    if begun.is_file():
        _compare_partial(parse_identity(json.loads(begun.read_text(encoding="utf-8"))), partial, spec)

    # Only what belongs to finished shards (.json, .npy) and the lock survive; files of `write_text` begin with a dot.
    for path in (partial / "building").iterdir():
        if path.suffix not in (".json", ".npy", "") or path.name.startswith("."):
            path.unlink()

    # identity.json comes last: once it is there, the VAE beside it is complete.
    if not begun.is_file():
        if (final / CACHE_INFO).is_file():
            _take_over(final, _plan(partial, spec))
        spec.vae.save_pretrained(partial / "vae")
        write_text(begun, json.dumps(format_identity(spec.identity)))
        if (final / CACHE_INFO).is_file():
            _compare_partial(spec.identity, partial, spec)


def _take_over(final: Path, job: Job) -> None:
    """Link the shards of a finished cache into the folder of `job`, with what it noted of them."""
    recorded = read_source_files(final)
    assert recorded is not None  # or the cache would have counted as finished
    stamps, notes = recorded
    for shard in range(job.num_shards):
        job.path(shard).unlink(missing_ok=True)
        try:
            os.link(final / job.file_name(shard), job.path(shard))
        except OSError:  # the file system has no links
            shutil.copy2(final / job.file_name(shard), job.path(shard))
        np.save(job.stamps_path(shard), stamps[job.rows_of(shard).start : job.rows_of(shard).stop])
        write_text(job.notes_path(shard), json.dumps(notes[shard].__dict__))


def _compare_partial(before: dict[str, Any], partial: Path, spec: CacheSpec) -> None:
    """Check that an unfinished cache is of the same images, and forget shards that can have more of them now.

    Raises:
        FileExistsError: if it is of other images, or made with other options.
    """
    version = _known_format(before, str(partial))
    check_same_identity(before, spec.identity_as(version), str(partial), "an unfinished cache")
    if version == EARLIER_FORMAT or (partial / CACHE_INFO).is_file():
        return
    job = _plan(partial, spec)
    shards: dict[int, np.ndarray | None] = {
        shard: np.load(job.stamps_path(shard))
        for shard in range(job.num_shards)
        if job.notes_path(shard).is_file() and job.path(shard).is_file()
    }
    compared = compare_images(spec.source.rows, job, partial, shards)
    _check_unchanged(compared, len(spec.source.rows), str(partial), "an unfinished cache")
    for shard in compared.readable:
        job.notes_path(shard).unlink()


def _plan(folder: Path, spec: CacheSpec) -> Job:
    """Return the job that encodes the cache in `folder`, the same on all ranks and after every interruption.

    Raises:
        ValueError: if the resolution does not fit, or a condition has the name of another column.
    """
    resolution = spec.geometry.resolution
    assert resolution is not None  # `prepare_latents` refuses None
    rows = spec.source.rows
    shape = latent_shape(spec.vae, resolution, PATCH_SIZE)
    batch_size, shard_size = plan_sizes(len(rows), resolution)
    has_validation = "split" in rows.column_names and "validation" in set(rows.unique("split"))
    version = _begun_format(folder)
    return Job(
        folder=folder,
        geometry=spec.geometry,
        latent_shape=shape,
        flip=spec.flip,
        hold_out=not has_validation,
        features=cache_features(rows, spec.vae, shape, spec.flip, image_sha256=version != EARLIER_FORMAT),
        num_rows=len(rows),
        batch_size=spec.batch_size or batch_size,
        shard_size=shard_size,
        # Of the written form, since the hash is part of the cache's files.
        sha256=hash_json(format_identity(spec.identity_as(version))),
    )


def _begun_format(folder: Path) -> int:
    """Return the format of the unfinished cache in `folder`, or the newest if none was begun."""
    with contextlib.suppress(OSError, ValueError):
        begun = json.loads((folder / "building" / "identity.json").read_text(encoding="utf-8"))
        if begun.get("format") == EARLIER_FORMAT:
            return EARLIER_FORMAT
    return FORMAT_VERSION


def _check_space(job: Job, partial: Path) -> None:
    """Check before any work that the shards fit on the disk.

    Raises:
        OSError: naming needed and free space in MB, if they do not.
    """
    finished = [shard for shard in range(job.num_shards) if job.notes_path(shard).is_file()]
    needed = job.bytes_per_row * (job.num_rows - sum(len(job.rows_of(shard)) for shard in finished))
    place = next(folder for folder in (partial, *partial.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"the cache needs {needed / 1e6:,.0f} MB more and {place} has {free / 1e6:,.0f} MB free")


class _LeftOut:
    """The images that are left out: a list that raises as soon as it exceeds `share`.

    Two shares are added up: the rows that the source itself leaves out, of the whole source even if `num_images` takes
    only a few, and the broken images, of the images to encode.
    """

    def __init__(self, share: float, source: Source):
        self.share, self.source = share, source
        self.broken: list[tuple[str, str]] = []
        self.add([])

    def all(self) -> list[tuple[str, str]]:
        """Return id and reason of every image that is left out."""
        return self.source.left_out + self.broken

    def add(self, broken: list[tuple[str, str]]) -> None:
        """Add ids and reasons of images that cannot be decoded.

        Raises:
            ValueError: with the first reasons, if the share is exceeded.
        """
        self.broken += broken
        counts = (len(self.source.left_out), self.source.total), (len(self.broken), len(self.source.rows))
        if sum(count / max(1, total) for count, total in counts) > self.share:
            summary = " and ".join(f"{count} of {total} images" for count, total in counts if count)
            first = "; ".join(f"{image_id}: {reason}" for image_id, reason in self.all()[:3])
            raise ValueError(f"{summary} cannot be used, more than max_left_out={self.share:g} of them: {first}")


def _finish(job: Job, spec: CacheSpec) -> None:
    """Write everything beside the shards: index, list of images left out, reconstructions, card and latents.json."""
    notes = [job.notes(shard) for shard in range(job.num_shards)]

    # Images that are left out.
    left_out = _LeftOut(spec.max_left_out, spec.source)
    left_out.add([(image_id, reason) for note in notes for image_id, reason in note.left_out])
    with open(job.folder / "left_out.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "reason"), *left_out.all()])

    # The dataset's own files, without which it cannot be opened.
    _write_index(job)
    cache = load_from_disk(str(job.folder))
    if not len(cache):
        raise ValueError(f"no image of {spec.source.name} can be used: {': '.join(left_out.all()[0])}")

    # Card and metadata; latents.json comes last because it lists the hashes of all other files.
    info = _cache_info(job, spec, cache, notes, len(left_out.all()))
    grid = job.folder / "reconstructions.png"
    info["psnr"] = save_reconstruction_grid(cache, spec.source.rows, spec.vae, job, grid)
    write_cache_card(job.folder, info, left_out.all(), spec.source.plan.lines())
    write_manifest(job.folder, CACHE_INFO, "building", **info)

    # For the next call on this machine, after the manifest, which does not list it.
    if IMAGE_SHA256 in job.features:
        stamps = [np.load(job.stamps_path(shard)) for shard in range(job.num_shards)]
        write_source_files(job.folder / SOURCE_FILES, np.concatenate(stamps), notes)


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
        "counts": {name: splits.count(name) for name in ("train", "validation", "test")} | {"left_out": num_left_out},
    }


def _content_sha256(identity: dict[str, Any], cache: Dataset) -> dict[str, str]:
    """Return the hash of images and labels that [`content_sha256`] reads; nothing in format 2, which has none."""
    if IMAGE_SHA256 not in cache.column_names:
        return {}
    images = hashlib.sha256("".join(cache[IMAGE_SHA256][:]).encode()).hexdigest()
    parts = {"ids": identity["source"]["sha256"], "labels": identity["labels"], "images": images}
    return {"content_sha256": hash_json(parts)[:12]}


def _write_index(job: Job) -> None:
    """Write the two files by which `load_from_disk` finds the shards: those of an empty dataset, with shards named."""
    empty = job.folder / "building" / "index"
    with _hidden_progress_bars():
        Dataset.from_dict({name: [] for name in job.features}, job.features).save_to_disk(str(empty))
    # The keys of state.json are private to datasets (read in 5.2).
    state = json.loads((empty / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": job.path(shard).name} for shard in range(job.num_shards)]
    state["_fingerprint"] = job.sha256[:16]
    write_text(job.folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
    info = json.loads((empty / "dataset_info.json").read_text(encoding="utf-8"))
    info["features"] = spell_features(job.features)
    write_text(job.folder / "dataset_info.json", json.dumps(info, indent=2))
    shutil.rmtree(empty)


def _statistics(notes: list[ShardNotes]) -> dict[str, list[float]]:
    """Return mean and standard deviation, by channel, of samples of the posteriors (law of total variance)."""
    sums = torch.tensor([note.sums for note in notes], dtype=torch.float64).sum(0)  # [3, channels]
    mean, mean_square, variance = sums / sum(note.count for note in notes)
    return {"mean": mean.tolist(), "std": (mean_square - mean.square() + variance).sqrt().tolist()}


@contextlib.contextmanager
def _hidden_progress_bars() -> Iterator[None]:
    """Disable datasets' progress bars and restore their setting afterwards."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
