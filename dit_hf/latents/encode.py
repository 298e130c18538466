"""Encode the shards of a latent cache: parts of at least 512 images, each written as a file of its own.

A shard is finished once its notes (a JSON file) exist; a resumed build never encodes it again. Which images a shard
holds depends on the source alone, not on the number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    """Everything that a process needs to encode shards of one cache, beside the rows of the source.

    Attributes:
        folder: The folder of the shards; `folder / "vae"` is the VAE.
        geometry: Crop and resolution of the images; the resolution is set.
        latent_shape: (channels, height, width).
        flip: Whether each image is encoded mirrored too.
        hold_out: Whether 2 % of the training images become validation images, because the source has none.
        features: Features of the cache.
        num_rows: Rows of the source.
        batch_size: Images that are encoded at once.
        shard_size: Images in one shard; a multiple of `batch_size`.
        sha256: Hash of the cache's identity.
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
        """Number of shards of the cache; the last one may be shorter."""
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard: int) -> range:
        """Return the rows of the source that go into `shard`."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def path(self, shard: int) -> Path:
        """Return the shard's file, named as `datasets` names the files of a saved dataset."""
        return self.folder / f"data-{shard:05}-of-{self.num_shards:05}.arrow"

    def notes_path(self, shard: int) -> Path:
        """Return the file whose existence marks the shard as finished."""
        return self.folder / "building" / f"{shard:05}.json"

    def notes(self, shard: int) -> ShardNotes:
        """Read the notes of a finished shard."""
        return ShardNotes(**json.loads(self.notes_path(shard).read_text(encoding="utf-8")))

    def unfinished(self) -> list[int]:
        """Return the shards to encode, among them finished ones whose file is damaged."""
        return [shard for shard in range(self.num_shards) if not self._is_finished(shard)]

    def _is_finished(self, shard: int) -> bool:
        if not self.notes_path(shard).is_file():
            return False
        path, notes = self.path(shard), self.notes(shard)
        return path.is_file() and path.stat().st_size == notes.size and sha256(path) == notes.sha256


@dataclass
class ShardNotes:
    """Summary of an encoded shard.

    Attributes:
        left_out: Id and reason of each image that could not be decoded.
        sums: Sums over all latent pixels of mean, squared mean and variance of the posterior, [3][channels].
        count: Number of latent pixels in each sum.
        size: Size of the shard's file in bytes.
        sha256: SHA-256 of the shard's file.
    """

    left_out: list[tuple[str, str]] = field(default_factory=list)
    sums: list[list[float]] = field(default_factory=list)
    count: int = 0
    size: int = 0
    sha256: str = ""


def plan_sizes(num_rows: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """Return batch size and shard size for `num_rows` images of `resolution` (height, width).

    A batch has at most 64 images, fewer above 256 px. There are at most 256 shards, up to 16 million images.
    """
    batch = max(1, min(MAX_BATCH, BATCH_PIXELS // (resolution[0] * resolution[1])))
    shard = min(MAX_SHARD, max(MIN_SHARD, -(-num_rows // NUM_SHARDS)))
    return batch, -(-shard // batch) * batch  # rounded up to whole batches


def latent_columns(vae: VAE, flip: bool) -> list[str]:
    """Return the names of a cache's latent columns."""
    names = ["latent_mean", "latent_std"] if has_posterior(vae) else ["latent_mean"]
    return names + [f"{name}_flip" for name in names] if flip else names


def cache_features(rows: Dataset, vae: VAE, shape: tuple[int, int, int], flip: bool) -> Features:
    """Return the features of a cache of `rows`: id, split, latents of `shape`, conditions.

    Raises:
        ValueError: if a condition has the name of a latent column.
    """
    latent = List(Value("float16"), length=int(np.prod(shape)))
    conditions = {k: feature for k, feature in rows.features.items() if k not in ("id", "split", "image")}
    latents = dict.fromkeys(latent_columns(vae, flip), latent)
    taken = conditions.keys() & latents.keys()
    if taken:
        raise ValueError(f"the source has a column {min(taken)}, which is a column of the cache too; rename it")
    return Features({"id": Value("string"), "split": Value("string"), **latents, **conditions})


class ShardEncoder:
    """Encode shards of `job`, decoding the next images while the VAE encodes the current batch.

    Args:
        job: The cache to encode.
        rows: All rows of the source, images not decoded.
        vae: The VAE; its memory format is changed to channels last.
        on_batch: Called after each batch with the number of its images.
    """

    def __init__(self, job: Job, rows: Dataset, vae: VAE, on_batch: Any = lambda count: None):
        self.job, self.rows, self.on_batch = job, rows, on_batch
        self.vae = vae.to(memory_format=torch.channels_last)

    def encode_shards(self, shards: list[int]) -> Iterator[int]:
        """Encode `shards` in order and yield each one when it is finished."""
        with ThreadPoolExecutor(available_cpus()) as pool:
            batches = self._decode_ahead(shards, pool)
            try:
                for shard in shards:
                    self._encode_shard(shard, batches)
                    yield shard
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _encode_shard(self, shard: int, batches: Iterator[list[np.ndarray | str]]) -> None:
        """Encode one shard with the next of the decoded `batches`, and write its file and its notes."""
        job, notes = self.job, ShardNotes()
        sums = torch.zeros(3, job.latent_shape[0], dtype=torch.float64)
        written = job.folder / "building" / f"{job.path(shard).stem}-{os.getpid()}.arrow"

        # The images come decoded from `batches`, whose order is that of the rows, so `map` need not read them.
        rows = self.rows.select(job.rows_of(shard)).remove_columns("image")
        with hidden_progress_bars():
            rows.map(
                functools.partial(self._encode_batch, batches=batches, notes=notes, sums=sums),
                batched=True,
                batch_size=job.batch_size,
                remove_columns=rows.column_names,
                features=job.features,
                cache_file_name=str(written),
                # A map function that holds a VAE hashes differently in every process, so the fingerprint is ours.
                new_fingerprint=f"{job.sha256[:16]}-{shard:05}",
            )

        # Content before name, name before notes: notes must never describe a file that a crash can still lose.
        sync(written)
        notes.sums = sums.tolist()
        notes.size = written.stat().st_size
        notes.sha256 = sha256(written)
        written.rename(job.path(shard))
        sync(job.folder)
        write_text(job.notes_path(shard), json.dumps(dataclasses.asdict(notes)))

    def _encode_batch(
        self, batch: dict[str, list], batches: Iterator[list[np.ndarray | str]], notes: ShardNotes, sums: torch.Tensor
    ) -> dict[str, Any]:
        """Return the cache's columns for a batch of rows, adding to `notes` and `sums` [3, channels]."""
        # Images that cannot be decoded are left out, with the reason.
        decoded = next(batches)
        images = [image for image in decoded if not isinstance(image, str)]
        readable = [row for row, image in enumerate(decoded) if not isinstance(image, str)]
        notes.left_out += [(batch["id"][row], reason) for row, reason in enumerate(decoded) if isinstance(reason, str)]
        columns: dict[str, Any] = {name: [values[row] for row in readable] for name, values in batch.items()}

        # Splits.
        splits = columns.get("split", ["train"] * len(readable))
        if self.job.hold_out:
            pairs = zip(columns["id"], splits, strict=True)
            splits = ["validation" if split == "train" and is_held_out(name) else split for name, split in pairs]
        columns["split"] = splits

        # Latents. The image is mirrored, not the latent: a VAE is not equivariant to mirroring.
        columns |= self._encode_images(images, "", notes, sums)
        if self.job.flip:
            columns |= self._encode_images([image[:, ::-1] for image in images], "_flip", notes, sums)
        self.on_batch(len(decoded))
        return columns

    def _encode_images(
        self, images: list[np.ndarray], suffix: str, notes: ShardNotes, sums: torch.Tensor
    ) -> dict[str, np.ndarray]:
        """Return the flattened latents of `images` and add their statistics to `notes` and `sums`."""
        names = (
            [f"latent_mean{suffix}", f"latent_std{suffix}"] if has_posterior(self.vae) else [f"latent_mean{suffix}"]
        )
        if not images:
            return {name: np.zeros((0, int(np.prod(self.job.latent_shape))), np.float16) for name in names}
        mean, std = encode(self.vae, torch.from_numpy(np.stack(images)))  # [batch, channels, height, width]
        mean = mean.cpu()
        std = std.cpu() if std is not None else None

        # Sums in float64: millions of latent pixels are added up.
        exact = mean.double()
        variance = std.double().square() if std is not None else torch.zeros_like(exact)
        sums += torch.stack([x.sum((0, 2, 3)) for x in (exact, exact.square(), variance)])
        notes.count += mean[:, 0].numel()
        latents = [x.flatten(1).numpy() for x in (mean, std) if x is not None]  # [batch, channels * height * width]
        return dict(zip(names, latents, strict=True))

    def _decode_ahead(self, shards: list[int], pool: ThreadPoolExecutor) -> Iterator[list[np.ndarray | str]]:
        """Yield batches of decoded images, uint8 [height, width, 3], or the reason why one cannot be decoded.

        Two further batches are being decoded whenever one is yielded.
        """
        waiting: deque[list[Future]] = deque()
        undecoded = self.rows.select_columns(["id", "image"])
        for shard in shards:
            rows = self.job.rows_of(shard)
            for start in range(rows.start, rows.stop, self.job.batch_size):
                batch = undecoded[start : min(start + self.job.batch_size, rows.stop)]
                pairs = zip(batch["id"], batch["image"], strict=True)
                waiting.append([pool.submit(self._decode, name, stored) for name, stored in pairs])
                if len(waiting) > BATCHES_AHEAD:
                    yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]

    def _decode(self, image_id: str, stored: dict[str, Any]) -> np.ndarray | str:
        """Return one decoded image, or the reason why it cannot be decoded."""
        try:
            return np.asarray(decode_image({"id": image_id, "image": stored}, self.job.geometry))
        except ValueError as error:
            return str(error).removeprefix(f"{image_id}: ")


def encode_in_processes(job: Job, rows: Dataset, shards: list[int], num_proc: int, progress: tqdm) -> Iterator[int]:
    """Encode `shards` on a CPU in `num_proc` processes and yield each one when it is finished.

    Raises:
        OSError: if a process was killed.
    """
    # Spawned, not forked: torch's threads do not survive a fork.
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
                f"one of {num_proc} processes was killed, perhaps because memory ran out; call again with a smaller "
                "num_proc: what is finished is kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_encoder: ShardEncoder  # of a worker process


def _start_process(job: Job, rows: Dataset, threads: int) -> None:
    """Load the VAE in a worker process, once for all of its shards."""
    global _encoder
    torch.set_num_threads(threads)
    _encoder = ShardEncoder(job, rows, load_vae(str(job.folder / "vae"), "cpu"), _exit_with_parent)


def _encode_in_process(shard: int) -> None:
    """Encode one shard in a worker process."""
    list(_encoder.encode_shards([shard]))


def _exit_with_parent(_count: int) -> None:
    """End a worker whose parent was killed, which nobody else does; called after each batch."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        os._exit(1)


@contextlib.contextmanager
def hidden_progress_bars() -> Iterator[None]:
    """Disable datasets' progress bars and restore their setting afterwards."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
