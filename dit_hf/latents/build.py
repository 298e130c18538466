"""Build a latent cache: reuse what is there, encode the shards that are not, and put the cache in place."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ..data.files import CACHE_INFO
from ..storage import (
    folder_taken,
    hash_json,
    link_or_copy,
    locked,
    partial_folder,
    put_in_place,
    read_json,
    write_json,
)
from .cache import (
    EARLIER_FORMAT,
    FORMAT_VERSION,
    CacheSpec,
    check_same_identity,
    finished_identity,
    format_identity,
    parse_identity,
    read_cache_info,
)
from .encode import ShardEncoder, encode_in_processes
from .finish import finish
from .grow import copied_bytes, take_over
from .progress import LeftOut, Progress
from .reuse import SOURCE_FILES, Comparison, compare_images, read_source_files, write_source_files
from .shards import Job, cache_features, plan_sizes
from .vae import latent_shape

PATCH_SIZE = 2  # of every preset: latents that it does not divide could not be trained on


def is_finished(final: Path, spec: CacheSpec, job: Job, verify: bool) -> bool:
    """Check whether `final` holds the finished cache of the same images, whose every byte is compared with `verify`.

    Raises:
        FileExistsError: if it holds another cache, or something else.
        ValueError: if it is damaged.
    """
    before, place = finished_identity(final, verify), f"output_dir {final}"
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
        shards = {shard: recorded.stamps[job.rows_of(shard).start : job.rows_of(shard).stop] for shard in shards}
    compared = compare_images(spec.source.rows, job, final, shards)
    _check_unchanged(compared, len(spec.source.rows), place, "a cache")
    if compared.readable and recorded is not None:
        print(f"{final}: images that were left out can be read now; their shards are encoded again", flush=True)
        return False
    if compared.readable:
        print(f"{final}: some images that were left out can be read now; name a new folder to encode them", flush=True)
    elif recorded is not None and any((compared.stamps[shard] != shards[shard]).any() for shard in shards):
        with contextlib.suppress(OSError):  # the folder may be read-only
            stamps = np.concatenate(list(compared.stamps.values()))
            write_source_files(final / SOURCE_FILES, recorded._replace(stamps=stamps))
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


def build(final: Path, spec: CacheSpec, num_proc: int, state: PartialState) -> None:
    """Encode the unfinished shards on all ranks, complete the cache and put it in place."""
    partial = partial_folder(final)
    _check_space(plan_job(partial, spec), partial, spec)
    lock = locked(partial / "building" / "lock", str(partial))
    with lock if state.is_main_process else contextlib.nullcontext():
        try:
            # The main rank prepares the folder before the others look for finished shards in it.
            if state.is_main_process:
                _open_partial(partial, final, spec)
            state.wait_for_everyone()
            job = plan_job(partial, spec)
            complete = (partial / CACHE_INFO).is_file()
            shards = [] if complete else job.unfinished()
            # Every rank must have listed the unfinished shards before any rank finishes another one.
            state.wait_for_everyone()

            _encode(final, job, spec, shards, num_proc, state)
            state.wait_for_everyone()
            if state.is_main_process:
                if not complete:
                    finish(job, spec)
                shutil.rmtree(partial / "building")
                put_in_place(partial, final)
        except BaseException:
            # A folder without any latents would only keep its name from being used for something else.
            if state.is_main_process and not _holds_latents(partial):
                shutil.rmtree(partial, ignore_errors=True)
            raise
    state.wait_for_everyone()


def _holds_latents(partial: Path) -> bool:
    """Check whether an unfinished cache holds any image, or may."""
    notes = [path for path in partial.glob("building/*.json") if path.stem.isdigit()]
    try:
        return (partial / CACHE_INFO).is_file() or any(read_json(path).get("count") for path in notes)
    except ValueError:
        return True


def _encode(final: Path, job: Job, spec: CacheSpec, shards: list[int], num_proc: int, state: PartialState) -> None:
    """Encode this rank's part of `shards`, stopping as soon as too many images cannot be used."""
    left_out = LeftOut(spec)
    done = job.num_rows - sum(len(job.rows_of(shard)) for shard in shards)
    if done and state.is_main_process:
        print(f"{final}: resuming after {done} of {job.num_rows} images", flush=True)
    mine = shards[state.process_index :: state.num_processes]
    with Progress(job, mine, num_proc, shown=state.is_main_process) as progress:
        if num_proc > 1:
            encoded = encode_in_processes(job, spec.source.rows, mine, num_proc, progress.update)
        else:
            encoded = ShardEncoder(job, spec.source.rows, spec.vae, progress.update).encode_shards(mine)
        for shard in encoded:
            left_out.add(job.notes(shard).left_out)


def _open_partial(partial: Path, final: Path, spec: CacheSpec) -> None:
    """Begin a build, or check that the unfinished one in `partial` is the same and remove half-written files.

    If `final` is a finished cache, some images that it left out can be read now: its other shards are taken over.
    """
    begun = partial / "building" / "identity.json"
    if (partial / CACHE_INFO).is_file():  # complete: it was interrupted before it was put in place
        _compare_partial(parse_identity(read_cache_info(partial, hashes=True)["identity"]), partial, spec)
        return
    if begun.is_file():
        identity = read_json(begun, f"delete {partial} to encode all images again")
        _compare_partial(parse_identity(identity), partial, spec)

    # Only what belongs to finished shards (.json, .npy) and the lock survive; half-written files begin with a dot.
    for path in (partial / "building").iterdir():
        if path.suffix not in (".json", ".npy", "") or path.name.startswith("."):
            path.unlink()
    for path in partial.glob(".*.partial"):
        path.unlink()

    # Each time, because what an interrupted call left may be damaged; processes that encode read it.
    spec.vae.save_pretrained(partial / "vae")
    if not begun.is_file():
        if (final / CACHE_INFO).is_file():
            _take_over(final, plan_job(partial, spec))
        write_json(begun, format_identity(spec.identity))
        if (final / CACHE_INFO).is_file():
            _compare_partial(spec.identity, partial, spec)
    if spec.base is not None:  # each time too: it takes no time where there are links
        take_over(spec.base, plan_job(partial, spec))


def _take_over(final: Path, job: Job) -> None:
    """Link the shards of a finished cache into the folder of `job`, with what it noted of them."""
    recorded = read_source_files(final)
    assert recorded is not None  # or the cache would have counted as finished
    for shard in range(job.num_shards):
        link_or_copy(final / job.file_name(shard), job.path(shard))
        np.save(job.stamps_path(shard), recorded.stamps[job.rows_of(shard).start : job.rows_of(shard).stop])
        write_json(job.notes_path(shard), asdict(recorded.notes[shard]))


def _compare_partial(before: dict[str, Any], partial: Path, spec: CacheSpec) -> None:
    """Check that an unfinished cache is of the same images, and forget shards that can have more of them now.

    Raises:
        FileExistsError: if it is of other images, or made with other options.
    """
    version = _known_format(before, str(partial))
    check_same_identity(before, spec.identity_as(version), str(partial), "an unfinished cache")
    if (partial / CACHE_INFO).is_file():
        return
    job = plan_job(partial, spec)
    job.forget_damaged()
    if version == EARLIER_FORMAT:
        return
    unfinished = job.unfinished()
    shards: dict[int, np.ndarray | None] = {
        shard: job.stamps(shard) for shard in range(job.num_shards) if shard not in unfinished
    }
    compared = compare_images(spec.source.rows, job, partial, shards)
    _check_unchanged(compared, len(spec.source.rows), str(partial), "an unfinished cache")
    for shard in compared.readable:
        job.notes_path(shard).unlink()


def plan_job(folder: Path, spec: CacheSpec) -> Job:
    """Return the job that encodes the cache in `folder`, the same on all ranks and after every interruption.

    Raises:
        ValueError: if the resolution does not fit, or a condition has the name of another column.
    """
    resolution = spec.geometry.resolution
    assert resolution is not None  # `prepare_latents` refuses None
    rows = spec.source.rows
    shape = latent_shape(spec.vae, resolution, PATCH_SIZE)
    # The parts of a cache have the shards of the whole, as if they were ranks.
    batch_size, shard_size = plan_sizes(spec.num_planned, resolution)
    version = _begun_format(folder)
    first = len(spec.base.files) if spec.base else spec.part.number - 1 if spec.part else 0
    return Job(
        folder=folder,
        geometry=spec.geometry,
        latent_shape=shape,
        flip=spec.flip,
        hold_out=spec.hold_out,
        features=cache_features(rows, spec.vae, shape, spec.flip, image_sha256=version != EARLIER_FORMAT),
        num_rows=len(rows),
        batch_size=spec.batch_size or batch_size,
        shard_size=shard_size,
        # Of the written form, since the hash is part of the cache's files.
        sha256=hash_json(format_identity(spec.identity_as(version))),
        total=-(-spec.num_planned // shard_size) + (len(spec.base.files) if spec.base else 0),
        first=first,
        step=spec.part.of if spec.part else 1,
    )


def _begun_format(folder: Path) -> int:
    """Return the format of the unfinished cache in `folder`, or the newest if none was begun."""
    with contextlib.suppress(OSError, ValueError):
        begun = read_json(folder / "building" / "identity.json")
        if begun.get("format") == EARLIER_FORMAT:
            return EARLIER_FORMAT
    return FORMAT_VERSION


def _check_space(job: Job, partial: Path, spec: CacheSpec) -> None:
    """Check before any work that the shards, and the VAE that is kept with them, fit on the disk.

    Raises:
        OSError: naming needed and free space in MB, if they do not.
    """
    finished = [shard for shard in range(job.num_shards) if job.notes_path(shard).is_file()]
    needed = job.bytes_per_row * (job.num_rows - sum(len(job.rows_of(shard)) for shard in finished))
    if not (partial / "vae").is_dir():
        needed += sum(weight.numel() * weight.element_size() for weight in spec.vae.state_dict().values())
    place = next(folder for folder in (partial, *partial.parents) if folder.is_dir())
    if spec.base is not None and not any(partial.glob("data-*.arrow")):
        needed += copied_bytes(spec.base, place)
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"the cache needs {needed / 1e6:,.0f} MB more and {place} has {free / 1e6:,.0f} MB free")
