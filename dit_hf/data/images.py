"""Open the images of any source as one `datasets.Dataset` with `id`, `image` and one column per condition."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, Image, concatenate_datasets

from .contents import Missing, SourceOptions, SplitFrom, parse_conditions, parse_exclude
from .photographs import check_faces, open_faces
from .sources import DEFAULT_AVATAR_SIZE, Source, open_source
from .stored_images import Stamp, image_paths, in_any_order, parse_address, shard_version, stored_bytes
from .transforms import Faces, Geometry, decode_image, parse_resolution


def open_images(
    source: str,
    resolution: int | str | tuple[int, int] | None = None,
    crop: str = "center",
    num_images: int | None = None,
    split: str | None = None,
    seed: int = 0,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    conditions: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    split_from: SplitFrom | None = None,
    missing: Missing = "null",
    allow_partial: bool = False,
    faces: Faces = "all",
    min_face_size: int | None = None,
    verbose: bool = False,
) -> Dataset:
    """Open the images of any source as a dataset with `id`, `image` and one column per condition.

    [`describe_source`] tells how a source is read.

    Args:
        source: `"avatars"`, the embedded dataset; a folder of images (CelebA with its lists, CelebA-HQ, subfolders
            that are classes or splits, `metadata.csv` or `metadata.jsonl`, or only images); a parquet or webdataset
            file or a folder of them, or a folder of `save_to_disk`; or the id of a dataset on the Hub.
        resolution: `N`, `"HxW"` or `(H, W)` in pixels; None keeps the size of each image (avatars: 64).
        crop: `"face"`, `"celeba-178"`, `"celeba-140"`, `"center"` or `"none"`, see [`Geometry`]. With `"face"` all
            photographs are searched at once, and each row is a face, with the id `PHOTO#0`, `PHOTO#1`, the largest
            first; conditions of a photograph of which several faces are taken are None.
        num_images: take this many images of the training split (or of `split`), spread over classes and folders by
            the seed; None is all (avatars: 8,000).
        split: `"train"`, `"validation"` or `"test"`, for sources that have splits.
        seed: seed of the avatars and of the choice of `num_images`; images are in the order of their names or rows.
        dataset_config_name: the configuration of a dataset on the Hub.
        image_column: the column of images, where a dataset has several.
        conditions: the columns that are conditions, as a list or separated by commas (`class` is the name of the
            folder), or `"none"`; None is all columns of yes and no and of classes.
        exclude: patterns of files and folders that are not read, as a list or separated by commas, such as
            `"masks,*_depth.png"`; `"none"` reads images that look like masks too.
        split_from: where splits come from: `"folders"`, `"files"`, `"column"` or `"none"`.
        missing: `"null"` keeps images without a value of a condition, which is then None; `"leave_out"` does not.
        allow_partial: accept requested conditions that a whole split lacks.
        faces: with crop `"face"`, `"all"` faces of a photograph or the `"largest"`.
        min_face_size: with crop `"face"`, the smallest side of a face's crop in pixels of the photograph, about twice
            the width of the face; None is half the resolution.
        verbose: print what was understood of the source.

    Returns:
        A dataset whose `image` is decoded, cropped and resized to an RGB `PIL.Image` when a row is read, with `id`,
        `split` if the source has splits, and one column per condition: attributes as int8 (1 is yes), classes as
        `ClassLabel`.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: for options that do not fit the source, a source that can be read in two ways, or (when a row is
            read) an image that cannot be decoded.
    """
    geometry = Geometry(parse_resolution(resolution), crop, faces=faces, min_face_size=min_face_size)
    check_faces(geometry, missing)
    options = SourceOptions(
        dataset_config_name=dataset_config_name,
        split=split,
        num_images=num_images,
        seed=seed,
        avatar_size=max(geometry.resolution or (DEFAULT_AVATAR_SIZE,)),  # squares, large enough for both sides
        image_column=image_column,
        conditions=parse_conditions(conditions),
        exclude=parse_exclude(exclude),
        split_from=split_from,
        missing=missing,
        allow_partial=allow_partial,
    )
    opened = _with_random_access(open_source(source, options))
    opened = open_faces(opened, geometry)
    if verbose:
        print("\n".join(opened.plan.lines()), flush=True)
    return opened.rows.with_transform(functools.partial(_decode_batch, geometry=geometry))


def describe_source(source: str, **options: Any) -> dict[str, Any]:
    """Return how a source is read: what `dit-hf prepare-latents --dry_run` prints.

    No image is decoded, unless `crop="face"` asks for the faces of all photographs.

    Args:
        source: See [`open_images`].
        options: Those of [`open_images`].

    Returns:
        `source`, `kind`, `image_column`, number of `images` by split, where the `splits` come from, `conditions` with
        kind and counts, what is `not_used` and why, `left_out` by reason, and `choices`: how something ambiguous is
        read, and which option changes that. With crop `face` also `faces`.

    Raises:
        FileNotFoundError: if the source does not exist or holds no image.
        ValueError: for options that do not fit the source, or a source that can be read in two ways.
    """
    options["conditions"] = parse_conditions(options.get("conditions"))
    options["exclude"] = parse_exclude(options.get("exclude"))
    shape = {name: options.pop(name) for name in ("crop", "faces", "min_face_size") if name in options}
    geometry = Geometry(parse_resolution(options.pop("resolution", None)), **shape)
    return open_faces(open_source(source, SourceOptions(**options)), geometry).plan.as_dict()


def _with_random_access(source: Source) -> Source:
    """Return a source whose images can be read in any order: those in parquet files or on the Hub are copied once.

    A parquet file is compressed in groups of rows, of which one image takes the whole. `datasets` keeps the copy in
    its cache.
    """
    if not source.plan.contents.addressed:
        return source
    rows, paths = source.rows, image_paths(source.rows)
    files = {address.file for path in paths if (address := parse_address(path)) and not in_any_order(address)}
    if not files:
        return source
    versions = tuple(sorted((file, shard_version(file)) for file in files))
    images = Dataset.from_generator(
        _read_all,
        features=Features({"image": Image(decode=False)}),
        gen_kwargs={"paths": tuple(paths), "versions": versions},
    )
    copied = concatenate_datasets([rows.remove_columns("image"), images], axis=1)
    return dataclasses.replace(source, rows=copied.select_columns(rows.column_names))


def _read_all(paths: tuple[str | None, ...], versions: tuple[tuple[str, Stamp], ...]) -> Iterator[dict[str, Any]]:
    """Yield the images at these addresses; `versions` tell `datasets` whether it has copied them before."""
    for path in paths:
        yield {"image": {"bytes": stored_bytes({"bytes": None, "path": path}), "path": None}}


def _decode_batch(batch: dict[str, list], geometry: Geometry) -> dict[str, list]:
    """Decode the images of a batch of rows, of which any subset of the columns may have been selected."""
    if "image" not in batch:
        return batch
    ids = batch.get("id", batch["image"])  # used in error messages alone
    images = [
        decode_image({"id": image_id, "image": stored}, geometry)
        for image_id, stored in zip(ids, batch["image"], strict=True)
    ]
    return {**batch, "image": images}
