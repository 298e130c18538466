"""Prepare a latent cache: the verb, its options and its report."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..data.anonymous import with_anonymous_ids
from ..data.contents import Missing, SourceOptions, SplitFrom, parse_conditions, parse_exclude
from ..data.files import CACHE_INFO
from ..data.near_duplicates import note_near_duplicates
from ..data.photographs import check_faces, open_faces
from ..data.shared_source import open_on_first_rank
from ..data.sources import MAX_LEFT_OUT, Source, open_source
from ..data.transforms import Faces, Geometry, parse_resolution
from ..devices import memory_errors
from ..hub_ids import check_repo_id
from ..storage import check_own_folder, disk_errors
from .build import build, is_finished, plan_job
from .cache import Base, CacheSpec, Part, cache_identity, encoding_identity, holds_out, push_latents, read_cache_info
from .card import describe_copies, quality
from .grow import find_new_images, grown_identity, hash_source, read_base
from .parts import parse_part, take_part
from .progress import LeftOut, check_share
from .shards import check_name
from .vae import VAE, load_vae


def prepare_latents(
    source: str,
    output_dir: str,
    vae: str = "stabilityai/sd-vae-ft-ema",
    resolution: str = "256",
    crop: str = "center",
    faces: Faces = "all",
    min_face_size: int | None = None,
    drop_near_duplicates: bool = False,
    split: str | None = None,
    flip: bool = False,
    num_images: int | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    conditions: str | None = None,
    exclude: str | None = None,
    split_from: SplitFrom | None = None,
    missing: Missing = "null",
    allow_partial: bool = False,
    num_proc: int = 1,
    batch_size: int | None = None,
    max_left_out: float = MAX_LEFT_OUT,
    verify: bool = True,
    dry_run: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    anonymous_ids: bool = False,
    add_to: str | None = None,
    drop_gone: bool = False,
    part: str | None = None,
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
        vae: Hub id (`OWNER/NAME` or `OWNER/NAME/SUBFOLDER`, with `@REVISION` or without) or folder of a diffusers
            `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`, or a bundled one, `avatar` or `avatar-robust`.
        resolution: `N` or `HxW` in pixels, divisible by twice the VAE's reduction of a side (patches are of 2).
        crop: `center` (the largest centered box), `face` (each face of a photograph, aligned by eyes and mouth),
            `celeba-178` or `celeba-140` (squares of CelebA's aligned images), or `none` (stretch the whole image).
        faces: with crop `face`, `all` faces of a photograph or the `largest`.
        min_face_size: with crop `face`, the smallest side of a face's crop in pixels of the photograph, about
            twice the width of the face; by default half the resolution, which is enlarged twice.
        drop_near_duplicates: encode only the first of near copies, such as a burst's photographs.
        split: encode only this split (`train`, `validation` or `test`) of a source that has splits.
        flip: also encode each image mirrored (latents themselves are never mirrored).
        num_images: encode so many images of the training split (or of `split`), spread over classes and folders.
        seed: seed of the avatars and of the choice of `num_images`.
        dataset_config_name: the configuration of a dataset on the Hub.
        image_column: the column of images, where a dataset has several.
        conditions: the columns that are conditions, separated by commas (`class` is the folder's name), or `none`; by
            default all columns of yes and no, and of classes.
        exclude: patterns of files and folders that are not read, separated by commas, such as `masks,*_depth.png`;
            `none` reads images that look like masks too.
        split_from: where splits come from: `folders`, `files`, `column` or `none`.
        missing: `null` keeps images without a value of a condition, which train that condition's unconditional case;
            `leave_out` does not encode them.
        allow_partial: accept requested conditions that a whole split lacks.
        num_proc: on a CPU, encode in this many processes.
        batch_size: images that the VAE encodes at once; by default 64, 16 of 256 px, 4 of 512 px. It is halved when
            memory runs out.
        max_left_out: the share of images that may be left out because they cannot be used; more stop the build.
        verify: compare every byte of a finished cache with the hashes that were recorded.
        dry_run: only print what was understood of the source.
        push_to_hub: upload the finished cache as this dataset (`OWNER/NAME`).
        private: make that repository private if it is new, and refuse one that is public; by default only with crop
            `face`.
        anonymous_ids: replace the images' ids, which are their paths, by hashes of their content.
        add_to: a finished cache with these options, which stays as it is: encode only the images that it does not
            have, by content. The new cache has its rows first, in the same files where the file system has links.
        drop_gone: with `add_to`, drop the rows of images that the source does not have any more; by default they stay.
        part: `K/N`: encode only part K of N, on one of several machines that share no disk; `dit-hf merge-latents`
            joins the parts.

    Returns:
        The folder, which `datasets.load_from_disk` opens: `id`, `split`, `image_sha256` (of the stored file),
        `latent_mean`, `latent_std` (fp16, channels first, flattened; std only if the VAE has a posterior), with `flip`
        also `latent_mean_flip` and `latent_std_flip`, and one column per condition (null where its value is missing).

    Raises:
        FileExistsError: if `output_dir` holds something else, or a cache of other images, labels, VAE or geometry
            (the message names the difference).
        ValueError: for options that do not fit, if too many of the images cannot be used, if the cache of `add_to` has
            another VAE, geometry or other conditions, or if there is nothing to add to it.
        OSError: if the folder cannot be written, or the disk or the GPU's memory is full.
    """
    # The timeout is long because the ranks wait for the slowest, and for the main one to finish the cache.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    final = Path(output_dir)
    _check_work(num_proc, batch_size, max_left_out, state)
    geometry = Geometry(parse_resolution(resolution), crop, faces=faces, min_face_size=min_face_size)
    check_faces(geometry, missing)
    if geometry.resolution is None:
        raise ValueError("resolution is needed: all latents of a cache have one shape")
    check_name(final)
    check_own_folder(final, CACHE_INFO)
    if push_to_hub is not None:
        check_repo_id(push_to_hub, "push_to_hub")
    own_part = None if part is None else parse_part(part)
    _check_growth(final, add_to, drop_gone, part, push_to_hub)
    options = SourceOptions(
        dataset_config_name=dataset_config_name,
        split=split,
        num_images=num_images,
        seed=seed,
        avatar_size=max(geometry.resolution),
        image_column=image_column,
        conditions=parse_conditions(conditions),
        exclude=parse_exclude(exclude),
        split_from=split_from,
        missing=missing,
        allow_partial=allow_partial,
    )

    # The main rank downloads, renders and compares; the others find the result on the disk.
    opened = open_on_first_rank(lambda: open_source(source, options))
    model, base = None, None
    if add_to is None:
        opened = _named(opened, anonymous_ids)
    else:  # what does not fit the cache is refused before images are compared
        model = None if dry_run else _load_vae(vae, state)
        encoding = encoding_identity(model, geometry, flip)
        before = read_base(Path(add_to), opened, encoding, anonymous_ids, verify and state.is_main_process)
        opened, base = _additions(_named(opened, anonymous_ids), Path(add_to), before, drop_gone, crop, state)
    if crop == "face" or drop_near_duplicates:
        compared = opened
        opened = open_on_first_rank(lambda: note_near_duplicates(compared, drop_near_duplicates))
    if dry_run:
        opened = open_faces(opened, geometry)
    if state.is_main_process:
        print("\n".join(opened.plan.lines()), flush=True)
    if dry_run:
        return final

    if model is None:
        model = _load_vae(vae, state)
    settings = {"source": opened.name, "split": split, "num_images": num_images, "seed": seed}
    settings |= {"vae": model.config._name_or_path, "resolution": resolution, "crop": crop, "flip": flip}
    spec = _spec(opened, model, geometry, flip, max_left_out, batch_size, settings, base, own_part)
    was_there = _build(final, spec, num_proc, verify, state)
    if state.is_main_process:
        _report(final, was_there)
        if push_to_hub:
            push_latents(final, push_to_hub, crop == "face" if private is None else private)
    return final


def _check_work(num_proc: int, batch_size: int | None, max_left_out: float, state: PartialState) -> None:
    """Refuse numbers out of range, and several processes where ranks or a GPU share the work already."""
    if num_proc < 1 or (num_proc > 1 and (state.num_processes > 1 or state.device.type != "cpu")):
        raise ValueError(
            f"num_proc={num_proc}: expected 1, or more on a CPU with one rank; several GPUs need `accelerate launch`"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    check_share(max_left_out)


def _check_growth(final: Path, add_to: str | None, drop_gone: bool, part: str | None, push_to_hub: str | None) -> None:
    """Refuse options of additions and parts that do not fit each other."""
    if drop_gone and add_to is None:
        raise ValueError("drop_gone needs add_to, the cache whose rows are dropped")
    if add_to is not None and final.resolve() == Path(add_to).resolve():
        raise ValueError(
            f"output_dir {final} is the cache of --add_to: name a new folder, which shares its files, so that runs on "
            "the cache before can still resume"
        )
    if part is not None and add_to is not None:
        raise ValueError("part and add_to: images are added to a whole cache; build parts and join them first")
    if part is not None and push_to_hub is not None:
        raise ValueError("part and push_to_hub: a part is not pushed; join the parts first, dit-hf merge-latents")


def _load_vae(vae: str, state: PartialState) -> VAE:
    """Load a VAE on each rank, first on the main one, which downloads it."""
    with state.main_process_first():
        return load_vae(vae, state.device)


def _named(opened: Source, anonymous_ids: bool) -> Source:
    """Return the source with the ids that the cache gets."""
    return open_on_first_rank(lambda: with_anonymous_ids(opened)) if anonymous_ids else opened


def _additions(
    opened: Source, cache: Path, before: dict[str, Any], drop_gone: bool, crop: str, state: PartialState
) -> tuple[Source, Base]:
    """Compare the source with the cache that it is added to: return the images that are new, and what stays."""
    hashed: list[Any] = [hash_source(opened, cache, crop) if state.is_main_process else None]
    broadcast_object_list(hashed)
    return find_new_images(opened, cache, before, hashed[0], drop_gone, crop)


def _spec(
    opened: Source,
    model: VAE,
    geometry: Geometry,
    flip: bool,
    max_left_out: float,
    batch_size: int | None,
    settings: dict[str, Any],
    base: Base | None,
    part: Part | None,
) -> CacheSpec:
    """Return everything that defines the cache, on all ranks alike."""
    identity = cache_identity(opened, model, geometry, flip)
    hold_out = "split" not in opened.rows.column_names or "validation" not in opened.rows.unique("split")
    if base is not None:
        identity, hold_out = grown_identity(identity, base), holds_out(base.info)
    if part is not None:
        assert geometry.resolution is not None  # `prepare_latents` refuses None
        identity["part"] = str(part)
        opened = dataclasses.replace(opened, rows=take_part(opened.rows, part, geometry.resolution))
    return CacheSpec(opened, model, geometry, flip, max_left_out, batch_size, settings, identity, hold_out, base, part)


def _build(final: Path, spec: CacheSpec, num_proc: int, verify: bool, state: PartialState) -> bool:
    """Build a cache unless the folder already holds it; return whether it did."""
    # Everything that can be refused is refused before any file is written. The main rank looks at the folder for all.
    job = plan_job(final, spec)
    LeftOut(spec)
    finished = [state.is_main_process and is_finished(final, spec, job, verify)]
    broadcast_object_list(finished)
    if not finished[0]:
        advice = "a smaller --batch_size or --resolution needs less"
        with disk_errors(f"output_dir {final}"), memory_errors(advice):
            build(final, spec, num_proc, state)
    return finished[0]


def _report(folder: Path, was_there: bool) -> None:
    """Print how many images a finished cache holds, and how well its VAE reconstructs them."""
    info = read_cache_info(folder)
    counts = info["counts"]
    text = f"{counts['train']} training, {counts['validation']} validation, {counts['test']} test images"
    part = f", part {info['identity']['part']} of a cache" if "part" in info["identity"] else ""
    print(f"{folder}: {'already holds ' if was_there else ''}{text}, {counts['left_out']} left out{part}", flush=True)
    if "faces" in info.get("plan", {}):  # which caches of version 0.1.0 do not have
        print(f"faces.png: {info['plan']['faces']}; look at them before training", flush=True)
    for sentence in describe_copies(info):
        print(f"warning: {sentence}", flush=True)
    print(f"reconstructions.png: PSNR {info['psnr']:.1f} dB, {quality(info['psnr'])}", flush=True)
