"""The shards of a latent cache: parts of some hundred images that are encoded, written and kept one by one.

A shard is finished when its notes (a JSON file beside it) are there; it is never encoded again, whoever goes on with
the build. Shards and what is in them depend on the source alone, not on the number of processes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from tqdm import tqdm

from ..data.splits import is_held_out
from ..data.transforms import Geometry, decode_image
from ..devices import available_cpus
from ..storage import sha256, sync, write_text
from .vae import VAE, encode, has_posterior, load_vae

MIN_SHARD, MAX_SHARD, NUM_SHARDS = 512, 65536, 256
MAX_BATCH, BATCH_PIXELS = 64, 64 * 256 * 256
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Job:
    """What every process must know to encode shards of one cache.

    Attributes:
        folder: Where the shards go; `folder / "vae"` is the VAE.
        geometry: Of the images; its resolution is set.
        latent_shape: (channels, height, width).
        flip: Whether each image is encoded mirrored too.
        hold_out: Whether 2 % of the training images become validation, the source having none.
        features: Of the cache.
        num_rows: Of the source.
        batch_size: Images that go through the VAE at once.
        shard_size: Images of one shard; a multiple of the batch.
        sha256: Of all that decides about the latents.
    """

    folder: Path
    geometry: Geometry
    latent_shape: tuple[int, int, int]
    flip: bool
    hold_out: bool
    features: Features
    num_rows: int
    batch_size: int
    shard_size: int
    sha256: str

    @property
    def num_shards(self) -> int:
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Rows of the source that go into `shard`."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def path(self, shard: int) -> Path:
        """The shard's file, named as `datasets` names the files of a saved data set."""
        return self.folder / f"data-{shard:05}-of-{self.num_shards:05}.arrow"

    def notes_path(self, shard: int) -> Path:
        return self.folder / "building" / f"{shard:05}.json"

    def notes(self, shard: int) -> Notes:
        return Notes(**json.loads(self.notes_path(shard).read_text(encoding="utf-8")))

    def unfinished(self) -> list[int]:
        """Shards that are still to be encoded; a finished one whose file is not whole is among them."""
        return [shard for shard in range(self.num_shards) if not self._is_finished(shard)]

    def _is_finished(self, shard: int) -> bool:
        if not self.notes_path(shard).is_file():
            return False
        path, notes = self.path(shard), self.notes(shard)
        return path.is_file() and path.stat().st_size == notes.size and sha256(path) == notes.sha256


@dataclass
class Notes:
    """What is known of a shard besides its rows.

    Attributes:
        left_out: Id and reason of the images that could not be read.
        sums: Over all latents by channel [3][channels]: mean, mean squared, variance.
        count: Latent pixels that were summed up.
        size, sha256: Of the shard's file.
    """

    left_out: list[tuple[str, str]] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)
    count: int = 0
    size: int = 0
    sha256: str = ""


def plan_sizes(num_rows: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Batch and shard size: batches of at most 64 images of 256 px, at most 256 shards up to 16 million images."""
    batch = max(1, min(MAX_BATCH, BATCH_PIXELS // (resolution[0] * resolution[1])))
    shard = min(MAX_SHARD, max(MIN_SHARD, -(-num_rows // NUM_SHARDS)))
    return batch, -(-shard // batch) * batch


def latent_columns(vae: VAE, flip: bool) -> list[str]:
    """The columns of latents of a cache."""
    names = ["latent_mean", "latent_std"] if has_posterior(vae) else ["latent_mean"]
    return names + [f"{name}_flip" for name in names] if flip else names


def cache_features(rows: Dataset, vae: VAE, shape: tuple[int, int, int], flip: bool) -> Features:
    """Features of the cache that `rows` become: id, split, latents, conditions.

    Raises:
        ValueError: if a condition has the name of a column of latents.
    """
    latent = List(Value("float16"), length=int(np.prod(shape)))
    conditions = {k: feature for k, feature in rows.features.items() if k not in ("id", "split", "image")}
    latents = dict.fromkeys(latent_columns(vae, flip), latent)
    taken = conditions.keys() & latents.keys()
    if taken:
        raise ValueError(f"the source has a column {min(taken)}, as the cache has; give it another name")
    return Features({"id": Value("string"), "split": Value("string"), **latents, **conditions})


class ShardEncoder:
    """Encodes shards of `job`, decoding the next images while the VAE works on the last.

    Args:
        job: The cache.
        rows: All rows of the source, images not decoded.
        vae: The VAE, which is laid out channels last in memory.
        on_batch: Called with the number of images after each batch.
    """

    def __init__(self, job: Job, rows: Dataset, vae: VAE, on_batch: Any = lambda count: None):
        self.job, self.rows, self.on_batch = job, rows, on_batch
        self.vae = vae.to(memory_format=torch.channels_last)

    def encode_shards(self, shards: list[int]) -> Iterator[int]:
        """Encode `shards` in order; yields each when it is finished."""
        with ThreadPoolExecutor(available_cpus()) as pool:
            pictures = self._decode_ahead(shards, pool)
            try:
                for shard in shards:
                    self._encode_shard(shard, pictures)
                    yield shard
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _encode_shard(self, shard: int, pictures: Iterator[list[np.ndarray | str]]) -> None:
        job, notes = self.job, Notes()
        sums = torch.zeros(3, job.latent_shape[0], dtype=torch.float64)
        written = job.folder / "building" / f"{job.path(shard).stem}-{os.getpid()}.arrow"
        rows = self.rows.select(job.rows_of(shard)).remove_columns("image")
        with no_bars():
            rows.map(
                functools.partial(self._encode_batch, pictures=pictures, notes=notes, sums=sums),
                batched=True,
                batch_size=job.batch_size,
                remove_columns=rows.column_names,
                features=job.features,
                cache_file_name=str(written),
                # A map function that holds a VAE hashes differently in every process, so the fingerprint is ours.
                new_fingerprint=f"{job.sha256[:16]}-{shard:05}",
            )
        sync(written)
        notes.sums, notes.size, notes.sha256 = sums.tolist(), written.stat().st_size, sha256(written)
        written.rename(job.path(shard))
        sync(job.folder)
        write_text(job.notes_path(shard), json.dumps(notes.__dict__))

    def _encode_batch(
        self, batch: dict[str, list], pictures: Iterator[list[np.ndarray | str]], notes: Notes, sums: torch.Tensor
    ) -> dict[str, Any]:
        decoded = next(pictures)
        kept = [row for row, picture in enumerate(decoded) if not isinstance(picture, str)]
        notes.left_out += [(batch["id"][row], text) for row, text in enumerate(decoded) if isinstance(text, str)]
        columns: dict[str, Any] = {name: [values[row] for row in kept] for name, values in batch.items()}
        splits = columns.get("split", ["train"] * len(kept))
        if self.job.hold_out:
            pairs = zip(columns["id"], splits, strict=True)
            splits = ["validation" if split == "train" and is_held_out(name) else split for name, split in pairs]
        columns["split"] = splits
        images = [picture for picture in decoded if not isinstance(picture, str)]
        columns |= self._encode_images(images, "", notes, sums)
        if self.job.flip:
            columns |= self._encode_images([image[:, ::-1] for image in images], "_flip", notes, sums)
        self.on_batch(len(decoded))
        return columns

    def _encode_images(
        self, images: list[np.ndarray], suffix: str, notes: Notes, sums: torch.Tensor
    ) -> dict[str, np.ndarray]:
        """Latents of the images, flattened, and their share of the statistics."""
        names = (
            [f"latent_mean{suffix}", f"latent_std{suffix}"] if has_posterior(self.vae) else [f"latent_mean{suffix}"]
        )
        if not images:
            return {name: np.zeros((0, int(np.prod(self.job.latent_shape))), np.float16) for name in names}
        mean, std = encode(self.vae, torch.from_numpy(np.stack(images)))
        mean, std = mean.cpu(), std.cpu() if std is not None else None
        exact = mean.double()
        variance = std.double().square() if std is not None else torch.zeros_like(exact)
        sums += torch.stack([x.sum((0, 2, 3)) for x in (exact, exact.square(), variance)])
        notes.count += mean[:, 0].numel()
        latents = [x.flatten(1).numpy() for x in (mean, std) if x is not None]
        return dict(zip(names, latents, strict=True))

    def _decode_ahead(self, shards: list[int], pool: ThreadPoolExecutor) -> Iterator[list[np.ndarray | str]]:
        """The decoded images batch by batch (or why one cannot be), always two batches ahead of the VAE."""
        waiting: deque[list[Future]] = deque()
        pictures = self.rows.select_columns(["id", "image"])
        for shard in shards:
            rows = self.job.rows_of(shard)
            for start in range(rows.start, rows.stop, self.job.batch_size):
                batch = pictures[start : min(start + self.job.batch_size, rows.stop)]
                pairs = zip(batch["id"], batch["image"], strict=True)
                waiting.append([pool.submit(self._decode, name, stored) for name, stored in pairs])
                if len(waiting) > BATCHES_AHEAD:
                    yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]

    def _decode(self, image_id: str, stored: dict[str, Any]) -> np.ndarray | str:
        try:
            return np.asarray(decode_image({"id": image_id, "image": stored}, self.job.geometry))
        except ValueError as error:
            return str(error).removeprefix(f"{image_id}: ")


def encode_in_processes(job: Job, rows: Dataset, shards: list[int], num_proc: int, progress: tqdm) -> Iterator[int]:
    """Encode `shards` on a CPU in `num_proc` processes, each with its share of the cores; yields those finished."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, available_cpus() // num_proc)
    with ProcessPoolExecutor(num_proc, context, _start_process, (job, rows, threads)) as pool:
        futures = {pool.submit(_encode_in_process, shard): shard for shard in shards}
        try:
            for future in as_completed(futures):
                future.result()
                progress.update(len(job.rows_of(futures[future])))
                yield futures[future]
        except BrokenProcessPool as error:
            raise OSError(
                f"one of {num_proc} processes was killed, perhaps for want of memory; call again with a smaller "
                "num_proc: what is finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encoder: ShardEncoder


def _start_process(job: Job, rows: Dataset, threads: int) -> None:
    global _encoder
    torch.set_num_threads(threads)
    _encoder = ShardEncoder(job, rows, load_vae(str(job.folder / "vae"), "cpu"), _exit_with_parent)


def _encode_in_process(shard: int) -> None:
    list(_encoder.encode_shards([shard]))


def _exit_with_parent(_count: int) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """datasets' own progress bars off, without a word on what they are set to otherwise."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
