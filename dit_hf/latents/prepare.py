"""Build a latent cache: images encoded once by a VAE into one Arrow dataset that training reads."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import shutil
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, load_from_disk
from tqdm import tqdm

from ..data.contents import Missing, SourceOptions, SplitFrom, parse_conditions
from ..data.image_folder import CACHE_INFO
from ..data.sources import MAX_LEFT_OUT, Source, open_source
from ..data.transforms import Geometry, parse_resolution
from ..devices import memory_errors
from ..storage import (
    disk_errors,
    hash_json,
    locked,
    partial_folder,
    put_in_place,
    read_manifest,
    write_manifest,
    write_text,
)
from .cache import cache_identity, check_same_identity, format_identity, is_finished, parse_identity, push_latents
from .card import save_reconstruction_grid, write_cache_card
from .encode import (
    Job,
    ShardEncoder,
    ShardNotes,
    cache_features,
    encode_in_processes,
    hidden_progress_bars,
    latent_columns,
    plan_sizes,
)
from .vae import VAE, latent_shape, load_vae, weights_sha256


@dataclass(frozen=True)
class CacheSpec:
    """The cache to build.

    Attributes:
        source: The opened images.
        vae: The VAE that encodes them.
        geometry: Crop and resolution; the resolution is set.
        flip: Whether each image is encoded mirrored too.
        max_left_out: The share of images that may be left out.
        settings: Options of `prepare_latents` that `latents.json` and the card quote.
        identity: See [`cache_identity`].
    """

    source: Source
    vae: VAE
    geometry: Geometry
    flip: bool
    max_left_out: float
    settings: dict[str, Any]
    identity: dict[str, Any]


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
        output_dir: the cache's folder. If it already holds the finished cache of the same images, VAE and geometry,
            nothing is done.
        vae: Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`) or folder of a diffusers `AutoencoderKL`,
            `AutoencoderTiny` or `AutoencoderDC`, or `avatar`, the bundled one.
        resolution: `N` or `HxW` in pixels, divisible by the VAE's reduction of a side.
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
        max_left_out: the share of images that may be left out because they cannot be used; more stop the build.
        dry_run: only print what was understood of the source.
        push_to_hub: upload the finished cache as this dataset (`OWNER/NAME`).
        private: make that repository private if it is a new one.

    Returns:
        The folder, which `datasets.load_from_disk` opens: `id`, `split`, `latent_mean`, `latent_std` (fp16, channels
        first, flattened; std only if the VAE has a posterior), with `flip` also `latent_mean_flip` and
        `latent_std_flip`, and one column per condition.

    Raises:
        FileExistsError: if `output_dir` holds something else, or a cache of other images, VAE or geometry (the
            message names the difference).
        ValueError: for options that do not fit, or if too many of the images cannot be used.
        OSError: if the folder cannot be written, or the disk or the GPU's memory is full.
    """
    # Options. The timeout is long because the ranks wait for the slowest, and for the main one to finish the cache.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    _check_num_proc(num_proc, state)
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
    spec = CacheSpec(opened, model, geometry, flip, max_left_out, settings, identity)

    # Build. All ranks look at the folder before any of them changes it.
    finished = is_finished(final, identity)
    state.wait_for_everyone()
    if not finished:
        _build(final, spec, num_proc, state)

    # Report and upload.
    if state.is_main_process:
        _report(final, finished)
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
    """Print how many images a finished cache holds."""
    counts = read_manifest(folder, CACHE_INFO)["counts"]
    text = f"{counts['train']} training, {counts['validation']} validation, {counts['test']} test images"
    print(f"{folder}: {'already holds ' if was_there else ''}{text}, {counts['left_out']} left out", flush=True)


def _build(final: Path, spec: CacheSpec, num_proc: int, state: PartialState) -> None:
    """Encode the unfinished shards on all ranks, complete the cache and put it in place."""
    partial = partial_folder(final)
    lock = locked(partial / "building" / "lock", str(partial)) if state.is_main_process else contextlib.nullcontext()
    advice = "a smaller --resolution needs less"
    with disk_errors(f"output_dir {final}"), memory_errors(advice), lock:
        # The main rank prepares the folder before the others look for finished shards in it.
        if state.is_main_process:
            _open_partial(partial, spec)
        state.wait_for_everyone()
        job = _plan(partial, spec)
        complete = (partial / CACHE_INFO).is_file()
        shards = [] if complete else job.unfinished()
        # Every rank must have listed the unfinished shards before any rank finishes another one.
        state.wait_for_everyone()
        _check_space(job, spec.vae, shards)

        _encode(final, job, spec, shards, num_proc, state)
        state.wait_for_everyone()
        if state.is_main_process:
            if not complete:
                _finish(job, spec)
            shutil.rmtree(partial / "building")
            put_in_place(partial, final)
    state.wait_for_everyone()


def _encode(final: Path, job: Job, spec: CacheSpec, shards: list[int], num_proc: int, state: PartialState) -> None:
    """Encode this rank's part of `shards`, stopping as soon as too many images cannot be used."""
    left_out = _LeftOut(spec.max_left_out, spec.source)
    done = job.num_rows - sum(len(job.rows_of(shard)) for shard in shards)
    if done and state.is_main_process:
        print(f"{final}: resuming after {done} of {job.num_rows} images", flush=True)
    mine = shards[state.process_index :: state.num_processes]
    total = sum(len(job.rows_of(shard)) for shard in mine)
    with tqdm(total=total, desc="encoding", unit="images", disable=not state.is_main_process) as progress:
        if num_proc > 1:
            encoded = encode_in_processes(job, spec.source.rows, mine, num_proc, progress)
        else:
            encoded = ShardEncoder(job, spec.source.rows, spec.vae, progress.update).encode_shards(mine)
        for shard in encoded:
            left_out.add(job.notes(shard).left_out)


def _open_partial(partial: Path, spec: CacheSpec) -> None:
    """Begin a build, or check that the unfinished one in `partial` is the same and remove half-written files."""
    begun = partial / "building" / "identity.json"
    if (partial / CACHE_INFO).is_file():  # complete: it was interrupted before it was put in place
        written = read_manifest(partial, CACHE_INFO)["identity"]
        check_same_identity(parse_identity(written), spec.identity, str(partial), "an unfinished cache")
        return
    if begun.is_file():
        written = json.loads(begun.read_text(encoding="utf-8"))
        check_same_identity(parse_identity(written), spec.identity, str(partial), "an unfinished cache")

    # Only notes of finished shards (.json) and the lock survive; partial files of `write_text` begin with a dot.
    for path in (partial / "building").iterdir():
        if path.suffix not in (".json", "") or path.name.startswith("."):
            path.unlink()

    # identity.json comes last: once it is there, the VAE beside it is complete.
    if not begun.is_file():
        spec.vae.save_pretrained(partial / "vae")
        write_text(begun, json.dumps(format_identity(spec.identity)))


def _plan(partial: Path, spec: CacheSpec) -> Job:
    """Return the job that encodes the cache in `partial`, the same on all ranks and after every interruption."""
    resolution = spec.geometry.resolution
    assert resolution is not None  # `prepare_latents` refuses None
    rows = spec.source.rows
    shape = latent_shape(spec.vae, resolution)
    batch_size, shard_size = plan_sizes(len(rows), resolution)
    has_validation = "split" in rows.column_names and "validation" in set(rows["split"])
    return Job(
        folder=partial,
        geometry=spec.geometry,
        latent_shape=shape,
        flip=spec.flip,
        hold_out=not has_validation,
        features=cache_features(rows, spec.vae, shape, spec.flip),
        num_rows=len(rows),
        batch_size=batch_size,
        shard_size=shard_size,
        # Of the written form, since the hash is part of the cache's files.
        sha256=hash_json(format_identity(spec.identity)),
    )


def _check_space(job: Job, vae: VAE, shards: list[int]) -> None:
    """Check before any work that the shards fit on the disk.

    Raises:
        OSError: naming needed and free space in MB, if they do not.
    """
    bytes_a_row = 2 * math.prod(job.latent_shape) * len(latent_columns(vae, job.flip)) + 64
    needed = bytes_a_row * sum(len(job.rows_of(shard)) for shard in shards)
    free = shutil.disk_usage(job.folder).free
    if needed > free:
        raise OSError(f"the cache needs {needed / 1e6:,.0f} MB more and {job.folder} has {free / 1e6:,.0f} MB free")


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
    write_cache_card(job.folder, info, left_out.all())
    write_manifest(job.folder, CACHE_INFO, "building", **info)


def _cache_info(
    job: Job, spec: CacheSpec, cache: Dataset, notes: list[ShardNotes], num_left_out: int
) -> dict[str, Any]:
    """Return the content of `latents.json`, but for the PSNR and the list of files."""
    labels = {k: feature.names for k, feature in cache.features.items() if isinstance(feature, ClassLabel)}
    names = [name for name in job.features if name not in ("id", "split", *latent_columns(spec.vae, job.flip))]
    splits = cache["split"][:]
    return {
        "identity": format_identity(spec.identity),
        "settings": spec.settings,
        "latent_shape": list(job.latent_shape),
        "conditions": {name: len(labels[name]) if name in labels else 2 for name in names},
        "condition_labels": labels,
        "statistics": _statistics(notes),
        "scaling_factor": spec.vae.config.get("scaling_factor") or 1.0,
        "shift_factor": spec.vae.config.get("shift_factor") or 0.0,
        "vae_sha256": weights_sha256(spec.vae),
        "counts": {name: splits.count(name) for name in ("train", "validation", "test")} | {"left_out": num_left_out},
    }


def _write_index(job: Job) -> None:
    """Write the two files by which `load_from_disk` finds the shards: those of an empty dataset, with shards named."""
    empty = job.folder / "building" / "index"
    with hidden_progress_bars():
        Dataset.from_dict({name: [] for name in job.features}, job.features).save_to_disk(str(empty))
    # The keys of state.json are private to datasets (read in 5.2).
    state = json.loads((empty / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": job.path(shard).name} for shard in range(job.num_shards)]
    state["_fingerprint"] = job.sha256[:16]
    write_text(job.folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
    write_text(job.folder / "dataset_info.json", (empty / "dataset_info.json").read_text(encoding="utf-8"))
    shutil.rmtree(empty)


def _statistics(notes: list[ShardNotes]) -> dict[str, list[float]]:
    """Return mean and standard deviation, by channel, of samples of the posteriors (law of total variance)."""
    sums = torch.tensor([note.sums for note in notes], dtype=torch.float64).sum(0)  # [3, channels]
    mean, mean_square, variance = sums / sum(note.count for note in notes)
    return {"mean": mean.tolist(), "std": (mean_square - mean.square() + variance).sqrt().tolist()}
