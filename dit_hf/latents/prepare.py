"""The latent cache: images encoded once by a VAE into one Arrow data set that training reads."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, load_from_disk
from tqdm import tqdm

from ..data.image_folder import CACHE_INFO
from ..data.sources import AVATARS, MAX_LEFT_OUT, Source, open_source
from ..data.transforms import Geometry, parse_resolution
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
from .cache import cache_identity, check_same_identity, is_finished, push_latents
from .card import save_reconstruction_grid, write_cache_card
from .encode import Job, ShardEncoder, cache_features, encode_in_processes, latent_columns, no_bars, plan_sizes
from .vae import VAE, latent_shape, load_vae, weights_sha256


def prepare_latents(
    output_dir: str,
    source: str = AVATARS,
    vae: str = "stabilityai/sd-vae-ft-ema",
    resolution: str = "256",
    crop: str = "center",
    split: str | None = None,
    flip: bool = False,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
    num_proc: int = 1,
    max_left_out: float = MAX_LEFT_OUT,
    push_to_hub: str | None = None,
    private: bool = False,
) -> Path:
    """Encode the images of any source into a latent cache; a build that was stopped goes on where it was.

    Under `accelerate launch` or `torchrun` every rank encodes its part. The cache is the same however often the build
    was stopped, and for any number of processes (as far as the VAE's kernels give the same bits with another number
    of threads: Stable Diffusion's on a CPU differ by their rounding).

    Args:
        output_dir: the cache's folder. If it holds the finished cache of the same images, VAE and geometry, that is
            the result.
        source: a folder of images (CelebA with its lists, CelebA-HQ, subfolders that are classes or splits,
            metadata.csv, ...), parquet or webdataset shards, a data set of the Hub (`OWNER/NAME`), or `avatars`.
        vae: Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`) or folder of a diffusers `AutoencoderKL`,
            `AutoencoderTiny` or `AutoencoderDC`, or `avatar`, the bundled one.
        resolution: `N` or `HxW` pixels, divisible by what the VAE reduces a side by.
        crop: `celeba-178`, `celeba-140`, `center` or `none`.
        split: only this part (`train`, `validation` or `test`) of a source that comes divided.
        flip: also encode each image mirrored (latents themselves are never mirrored).
        num_images: only so many images.
        seed: which avatars.
        dataset_config_name: which configuration of a data set on the Hub.
        num_proc: on a CPU, encode in so many processes.
        max_left_out: the share of images that may be left out because they cannot be used; more stop the build.
        push_to_hub: upload the finished cache as this data set (`OWNER/NAME`).
        private: make that repository private if it is a new one.

    Returns:
        The folder, which `datasets.load_from_disk` opens: `id`, `split`, `latent_mean`, `latent_std` (fp16, channels
        first, flattened; std only where the VAE has a posterior), with `flip` also `latent_mean_flip` and
        `latent_std_flip`, and one column a condition.

    Raises:
        FileExistsError: if `output_dir` holds something else, or a cache of other images, VAE or geometry (the
            difference is said).
        ValueError: for options that do not fit, or if too many of the images cannot be used.
        OSError: if the folder cannot be written or the disk is full.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    if num_proc < 1 or (num_proc > 1 and (state.num_processes > 1 or state.device.type != "cpu")):
        raise ValueError(f"num_proc={num_proc}: it is for CPUs and one rank; several GPUs want `accelerate launch`")
    geometry = Geometry(parse_resolution(resolution), crop)
    if geometry.resolution is None:
        raise ValueError("resolution is needed: all latents of a cache have one shape")
    final = Path(output_dir)
    with state.main_process_first():  # who is first downloads or renders, the others find it
        opened = open_source(source, dataset_config_name, split, num_images, seed, max(geometry.resolution))
        model = load_vae(vae, state.device)
    settings = {"source": opened.name, "split": split, "num_images": num_images, "seed": seed}
    settings |= {"vae": model.config._name_or_path, "resolution": resolution, "crop": crop, "flip": flip}
    identity = cache_identity(opened, model, geometry, flip, settings)
    if opened.unused and state.is_main_process:
        print(f"{source}: columns that are no conditions: {', '.join(opened.unused)}", flush=True)
    finished = is_finished(final, identity)
    state.wait_for_everyone()
    if not finished:
        with disk_errors(f"output_dir {final}"), _memory_errors():
            _build(final, opened, model, identity, settings, num_proc, max_left_out, state)
    if state.is_main_process:
        counts = read_manifest(final, CACHE_INFO)["counts"]
        text = f"{counts['train']} training, {counts['validation']} validation, {counts['test']} test images"
        already = "already holds " if finished else ""
        print(f"{final}: {already}{text}, {counts['left_out']} left out", flush=True)
        if push_to_hub:
            push_latents(final, push_to_hub, private)
    return final


def _build(
    final: Path,
    source: Source,
    vae: VAE,
    identity: dict[str, Any],
    settings: dict[str, Any],
    num_proc: int,
    max_left_out: float,
    state: PartialState,
) -> None:
    """Encode what is not encoded yet, on all ranks, and put the whole in place."""
    partial = partial_folder(final)
    lock = locked(partial / "building" / "lock", str(partial))
    with lock if state.is_main_process else contextlib.nullcontext():
        if state.is_main_process:
            _open_partial(partial, vae, identity)
        state.wait_for_everyone()
        job = _plan(partial, source, vae, identity)
        whole = (partial / CACHE_INFO).is_file()
        shards = [] if whole else job.unfinished()
        state.wait_for_everyone()  # all ranks have seen the same shards unfinished
        _check_space(job, vae, shards)
        left_out = _LeftOut(max_left_out, source)
        done = job.num_rows - sum(len(job.rows_of(shard)) for shard in shards)
        if done and state.is_main_process:
            print(f"{final}: going on after {done} of {job.num_rows} images", flush=True)
        mine = shards[state.process_index :: state.num_processes]
        total = sum(len(job.rows_of(shard)) for shard in mine)
        with tqdm(total=total, desc="encoding", unit="pictures", disable=not state.is_main_process) as progress:
            if num_proc > 1:
                encoded = encode_in_processes(job, source.rows, mine, num_proc, progress)
            else:
                encoded = ShardEncoder(job, source.rows, vae, progress.update).encode_shards(mine)
            for shard in encoded:
                left_out.add(job.notes(shard).left_out)
        state.wait_for_everyone()
        if state.is_main_process:
            if not whole:
                _finish(job, source, vae, identity, settings, max_left_out)
            shutil.rmtree(partial / "building")
            put_in_place(partial, final)
    state.wait_for_everyone()


def _open_partial(partial: Path, vae: VAE, identity: dict[str, Any]) -> None:
    """Begin a build, or check that the one that stands there is the same; what was half-written goes."""
    begun, what = partial / "building" / "identity.json", f"{partial} holds an unfinished cache"
    if (partial / CACHE_INFO).is_file():  # all that was left to do was to put it in place
        check_same_identity(read_manifest(partial, CACHE_INFO)["identity"], identity, what)
        return
    if begun.is_file():
        check_same_identity(json.loads(begun.read_text(encoding="utf-8")), identity, what)
    for path in (partial / "building").iterdir():
        if path.suffix not in (".json", "") or path.name.startswith("."):
            path.unlink()
    if not begun.is_file():
        vae.save_pretrained(partial / "vae")
        write_text(begun, json.dumps(identity))


def _plan(partial: Path, source: Source, vae: VAE, identity: dict[str, Any]) -> Job:
    height, width = (int(side) for side in identity["resolution"].split("x"))
    shape = latent_shape(vae, (height, width))
    batch_size, shard_size = plan_sizes(len(source.rows), (height, width))
    divided = "split" in source.rows.column_names
    return Job(
        folder=partial,
        geometry=Geometry((height, width), identity["crop"]),
        latent_shape=shape,
        flip=identity["flip"],
        hold_out=not divided or "validation" not in set(source.rows["split"]),
        features=cache_features(source.rows, vae, shape, identity["flip"]),
        num_rows=len(source.rows),
        batch_size=batch_size,
        shard_size=shard_size,
        sha256=hash_json(identity),
    )


def _check_space(job: Job, vae: VAE, shards: list[int]) -> None:
    """Whether the shards fit the disk, before any work."""
    bytes_a_row = 2 * math.prod(job.latent_shape) * len(latent_columns(vae, job.flip)) + 64
    needed = bytes_a_row * sum(len(job.rows_of(shard)) for shard in shards)
    free = shutil.disk_usage(job.folder).free
    if needed > free:
        raise OSError(f"the cache needs {needed / 1e6:,.0f} MB more and {job.folder} has {free / 1e6:,.0f} MB free")


class _LeftOut:
    """Counts what is left out, and stops the build when it is more than `share`: of the source what its lists say
    already, however little of it is asked for, and of what is asked for the broken images."""

    def __init__(self, share: float, source: Source):
        self.share, self.source, self.broken = share, source, list[tuple[str, str]]()
        self.add([])

    def all(self) -> list[tuple[str, str]]:
        return self.source.left_out + self.broken

    def add(self, broken: list[tuple[str, str]]) -> None:
        self.broken += broken
        counts = (len(self.source.left_out), self.source.total), (len(self.broken), len(self.source.rows))
        if sum(count / max(1, total) for count, total in counts) > self.share:
            told = " and ".join(f"{count} of {total} images" for count, total in counts if count)
            first = "; ".join(f"{image_id}: {reason}" for image_id, reason in self.all()[:3])
            raise ValueError(f"{told} cannot be used, more than max_left_out={self.share:g} of them: {first}")


def _finish(
    job: Job, source: Source, vae: VAE, identity: dict[str, Any], settings: dict[str, Any], max_left_out: float
) -> None:
    """Write what belongs to the shards: the data set's own files, the list of what was left out, facts, card."""
    notes = [job.notes(shard) for shard in range(job.num_shards)]
    left_out = _LeftOut(max_left_out, source)
    left_out.add([(image_id, reason) for note in notes for image_id, reason in note.left_out])
    with open(job.folder / "left_out.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "reason"), *left_out.all()])
    _write_index(job)
    cache = load_from_disk(str(job.folder))
    if not len(cache):
        raise ValueError(f"no image of {source.name} can be used: {': '.join(left_out.all()[0])}")
    labels = {k: feature.names for k, feature in cache.features.items() if isinstance(feature, ClassLabel)}
    names = [name for name in job.features if name not in ("id", "split", *latent_columns(vae, job.flip))]
    splits = cache["split"][:]
    info = {
        "identity": identity,
        "settings": settings,
        "latent_shape": list(job.latent_shape),
        "conditions": {name: len(labels[name]) if name in labels else 2 for name in names},
        "condition_labels": labels,
        "statistics": _statistics(notes),
        "scaling_factor": vae.config.get("scaling_factor") or 1.0,
        "shift_factor": vae.config.get("shift_factor") or 0.0,
        "vae_sha256": weights_sha256(vae),
        "counts": {name: splits.count(name) for name in ("train", "validation", "test")}
        | {"left_out": len(left_out.all())},
    }
    info["psnr"] = save_reconstruction_grid(cache, source.rows, vae, job, job.folder / "reconstructions.png")
    write_cache_card(job.folder, info, left_out.all())
    write_manifest(job.folder, CACHE_INFO, "building", **info)


def _write_index(job: Job) -> None:
    """The two files by which `load_from_disk` knows the shards: those of an empty data set, with the shards named."""
    empty = job.folder / "building" / "index"
    with no_bars():
        Dataset.from_dict({name: [] for name in job.features}, job.features).save_to_disk(str(empty))
    state = json.loads((empty / "state.json").read_text(encoding="utf-8"))
    state["_data_files"] = [{"filename": job.path(shard).name} for shard in range(job.num_shards)]
    state["_fingerprint"] = job.sha256[:16]
    write_text(job.folder / "state.json", json.dumps(state, indent=2, sort_keys=True))
    write_text(job.folder / "dataset_info.json", (empty / "dataset_info.json").read_text(encoding="utf-8"))
    shutil.rmtree(empty)


def _statistics(notes: list[Any]) -> dict[str, list[float]]:
    """Mean and standard deviation by channel of samples of the posteriors (law of total variance)."""
    sums = torch.tensor([note.sums for note in notes], dtype=torch.float64).sum(0)
    mean, mean_square, variance = sums / sum(note.count for note in notes)
    return {"mean": mean.tolist(), "std": (mean_square - mean.square() + variance).sqrt().tolist()}


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """A GPU too small, in words."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"out of GPU memory at this resolution: {str(error).partition('.')[0]}") from error
