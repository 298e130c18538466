"""Encode the shards of a latent cache, in this process or in several.

Images are read and decoded by threads while the VAE encodes the current batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..data.contents import condition_names
from ..data.faces import TOO_SMALL
from ..data.splits import is_held_out
from ..data.stored_images import NO_STAMP, Stamp, read_image, with_bytes
from ..data.transforms import Crop, decode_crops
from ..devices import available_cpus
from ..processes import start_worker
from ..storage import sha256, sync, write_json
from .shards import IMAGE_SHA256, Job, ShardNotes, ShardWriter, latent_array
from .vae import VAE, encode, load_vae

BATCHES_AHEAD = 2


@dataclass
class Decoded:
    """An image that was read.

    Attributes:
        crops: What it becomes, in most cases one image; none if it cannot be used.
        left_out: Id and reason of it, or of those of its faces that are left out.
        seconds: Time that reading it took, of one thread.
        sha256: SHA-256 of its stored bytes.
        stamp: Of its file.
    """

    crops: list[Crop] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    sha256: str = ""
    stamp: Stamp = NO_STAMP


@dataclass
class Speed:
    """How fast photographs are read, faces found and aligned, beside the VAE.

    Attributes:
        read: Number of images that were read.
        reading: Seconds that threads took for it, added up.
        encoded: Number of images that the VAE encoded.
        encoding: Seconds that it took.
    """

    read: int = 0
    reading: float = 0.0
    encoded: int = 0
    encoding: float = 0.0

    def describe(self) -> str:
        """Return both speeds in one line."""
        threads = available_cpus()
        return (
            f"speed       {threads} threads find and align the faces of {threads * self.read / self.reading:,.1f} "
            f"photos/s, beside the VAE, which encodes {self.encoded / self.encoding:,.1f} images/s"
        )


class ShardEncoder:
    """Encode shards of `job`, decoding the next images while the VAE encodes the current batch.

    Args:
        job: The cache to encode.
        rows: All rows of the source, images not decoded.
        vae: The VAE; its memory format is changed to channels last.
        on_batch: Called after each batch with the number of its images.
    """

    def __init__(self, job: Job, rows: Dataset, vae: VAE, on_batch: Callable[[int], Any] = lambda count: None):
        self.job, self.rows, self.on_batch = job, rows, on_batch
        self.vae = vae.to(memory_format=torch.channels_last)
        self.batch_size = job.batch_size  # becomes smaller when memory runs out
        self.speed = Speed()

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
        if self.job.geometry.crop == "face" and self.speed.encoded and multiprocessing.parent_process() is None:
            print(self.speed.describe(), flush=True)

    def _encode_shard(self, shard: int, batches: Iterator[list[Decoded]]) -> None:
        """Encode one shard with the next of the decoded `batches`, and write its file and its notes."""
        job, notes = self.job, ShardNotes()
        sums = torch.zeros(3, job.latent_shape[0], dtype=torch.float64)
        written = job.folder / "building" / f"{job.path(shard).stem}-{os.getpid()}.arrow"
        stamps: list[Stamp] = []

        # The images come decoded from `batches`, whose order is that of the rows.
        rows = self.rows.select(job.rows_of(shard)).remove_columns("image").with_format("arrow")
        with contextlib.closing(ShardWriter(written, job.features)) as writer:
            for table in rows.iter(job.batch_size):
                decoded = next(batches)
                columns = self._encode_batch(table, decoded, notes, sums)
                if columns:
                    writer.write(columns)
                stamps += [image.stamp for image in decoded]
                self.speed.read += len(decoded)
                self.speed.reading += sum(image.seconds for image in decoded)
                self.on_batch(len(decoded))

        # Content before name, name before notes: notes must never describe a file that a crash can still lose.
        sync(written)
        notes.sums = sums.tolist()
        notes.size = written.stat().st_size
        notes.sha256 = sha256(written)
        written.replace(job.path(shard))
        np.save(job.stamps_path(shard), np.array(stamps, np.int64).reshape(-1, 3))
        sync(job.stamps_path(shard))
        sync(job.folder)
        write_json(job.notes_path(shard), dataclasses.asdict(notes))

    def _encode_batch(
        self, table: pa.Table, decoded: list[Decoded], notes: ShardNotes, sums: torch.Tensor
    ) -> dict[str, pa.Array]:
        """Return the cache's columns for a batch of rows, adding to `notes` and `sums` [3, channels].

        Nothing is returned if no image of the batch can be decoded.
        """
        # Images that cannot be used are left out, with the reason; a photograph may become several.
        for image in decoded:
            notes.left_out += image.left_out
        taken = [(row, crop) for row, image in enumerate(decoded) for crop in image.crops]
        if not taken:
            return {}
        numbers = [row for row, _ in taken]
        table = table.take(numbers)
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        columns["id"] = pa.array([crop.id for _, crop in taken], pa.string())
        if self.job.geometry.crop == "face":
            notes.faces += [(crop.id, crop.face.side, crop.face.score) for _, crop in taken if crop.face]
            columns |= _unambiguous(columns, [len(decoded[row].crops) == 1 for row in numbers])

        # Splits. The faces of a photograph are in the same one.
        splits = table.column("split").to_pylist() if "split" in columns else ["train"] * len(taken)
        if self.job.hold_out:
            pairs = zip(table.column("id").to_pylist(), splits, strict=True)
            splits = ["validation" if split == "train" and is_held_out(name) else split for name, split in pairs]
        columns["split"] = pa.array(splits, pa.string())
        columns[IMAGE_SHA256] = pa.array([decoded[row].sha256 for row in numbers], pa.string())

        # Latents. The image is mirrored, not the latent: a VAE is not equivariant to mirroring.
        images = [crop.pixels for _, crop in taken]
        began = time.monotonic()
        columns |= self._encode_images(images, "", notes, sums)
        if self.job.flip:
            columns |= self._encode_images([image[:, ::-1] for image in images], "_flip", notes, sums)
        self.speed.encoded += len(images)
        self.speed.encoding += time.monotonic() - began
        return columns

    def _encode_images(
        self, images: list[np.ndarray], suffix: str, notes: ShardNotes, sums: torch.Tensor
    ) -> dict[str, pa.Array]:
        """Return the flattened latents of `images` and add their statistics to `notes` and `sums`."""
        mean, std = self._encode_halving(torch.from_numpy(np.stack(images)))  # [batch, channels, height, width]
        mean = mean.cpu()
        std = std.cpu() if std is not None else None

        # Sums in float64: millions of latent pixels are added up.
        exact = mean.double()
        variance = std.double().square() if std is not None else torch.zeros_like(exact)
        sums += torch.stack([x.sum((0, 2, 3)) for x in (exact, exact.square(), variance)])
        notes.count += mean[:, 0].numel()
        latents = {f"latent_mean{suffix}": mean, f"latent_std{suffix}": std}
        return {name: latent_array(x.flatten(1).numpy()) for name, x in latents.items() if x is not None}

    def _encode_halving(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encode `images`, halving the batch as often as memory runs out."""
        before = self.batch_size
        while True:
            try:
                encoded = encode(self.vae, images, self.batch_size)
                break
            except RuntimeError as error:
                if self.batch_size == 1 or not _is_out_of_memory(error):
                    raise
            # Outside of `except`, whose error would keep the tensors of the failed attempt.
            self.batch_size = max(1, min(self.batch_size, len(images)) // 2)
            if self.vae.device.type == "cuda":
                torch.cuda.empty_cache()
        if self.batch_size < before:
            print(f"out of memory: encoding {self.batch_size} images at once from here on (--batch_size)", flush=True)
        return encoded

    def _decode_ahead(self, shards: list[int], pool: ThreadPoolExecutor) -> Iterator[list[Decoded]]:
        """Yield batches of decoded images; two further batches are being decoded whenever one is yielded."""
        waiting: deque[Future[list[Future]]] = deque()
        undecoded = self.rows.select_columns(["id", "image"])

        def read(start: int, stop: int) -> list[Future]:
            batch = undecoded[start:stop]
            images = [with_bytes(stored) for stored in batch["image"]]
            return [pool.submit(self._decode, *pair) for pair in zip(batch["id"], images, strict=True)]

        with ThreadPoolExecutor(1) as reader:  # one thread, because shards are read in order
            for shard in shards:
                rows = self.job.rows_of(shard)
                for start in range(rows.start, rows.stop, self.job.batch_size):
                    waiting.append(reader.submit(read, start, min(start + self.job.batch_size, rows.stop)))
                    if len(waiting) > BATCHES_AHEAD:
                        yield [future.result() for future in waiting.popleft().result()]
            while waiting:
                yield [future.result() for future in waiting.popleft().result()]

    def _decode(self, image_id: str, stored: dict[str, Any] | None) -> Decoded:
        """Read, hash and decode one image."""
        began = time.monotonic()
        try:
            data, stamp = read_image(stored)
            found = decode_crops({"id": image_id, "image": {**(stored or {}), "bytes": data}}, self.job.geometry)
        except OSError as error:
            return Decoded(left_out=[(image_id, error.strerror or str(error))])
        except ValueError as error:
            return Decoded(left_out=[(image_id, str(error).removeprefix(f"{image_id}: "))])
        too_small = [(face_id, TOO_SMALL) for face_id in found.too_small]
        sha256 = hashlib.sha256(data or b"").hexdigest()
        # A stamp tells of rows in the cache: an image that gives none is tried again by the next call.
        stamp = stamp if found.crops else NO_STAMP
        return Decoded(found.crops, too_small, time.monotonic() - began, sha256, stamp)


def _unambiguous(columns: dict[str, pa.Array], alone: list[bool]) -> dict[str, pa.Array]:
    """Return the conditions with null for each face that is not alone in its photograph: whose they are is unknown."""
    return {name: pc.if_else(pa.array(alone), columns[name], None) for name in condition_names(columns)}


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Check whether an error of torch is about memory; the CPU's has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("can't allocate memory", "out of memory", "bad_alloc")
    )


def encode_in_processes(
    job: Job, rows: Dataset, shards: list[int], num_proc: int, on_shard: Callable[[int], Any]
) -> Iterator[int]:
    """Encode `shards` on a CPU in `num_proc` processes and yield each one when it is finished.

    Args:
        job: The cache to encode.
        rows: All rows of the source, images not decoded.
        shards: The shards to encode.
        num_proc: Number of processes.
        on_shard: Called for each finished shard with the number of its images.

    Raises:
        OSError: if a process was killed.
    """
    # Spawned, not forked: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    threads = max(1, available_cpus() // num_proc)
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(num_proc, context, _start_process, (job, rows, threads)) as pool:
        try:
            with _interrupts_held_back():
                futures = {pool.submit(_encode_in_process, shard): shard for shard in shards}
            for future in as_completed(futures):
                future.result()
                on_shard(len(job.rows_of(futures[future])))
                yield futures[future]
        except BrokenProcessPool as error:
            raise OSError(
                f"one of {num_proc} processes was killed, perhaps because memory ran out; call again with a smaller "
                "num_proc: what is finished is kept"
            ) from error
        except BaseException:  # a shard may take minutes: nobody waits for it after an error or Ctrl-C
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Deliver Ctrl-C only after the block, and never to processes that are started in it.

    A terminal sends Ctrl-C to all processes; those that are still importing would print tracebacks. They inherit the
    signals that are held back, and are ended by this process.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: ShardEncoder  # of a worker process


def _start_process(job: Job, rows: Dataset, threads: int) -> None:
    """Load the VAE in a worker process, once for all of its shards."""
    global _encoder
    start_worker()
    torch.set_num_threads(threads)
    _encoder = ShardEncoder(job, rows, load_vae(str(job.folder / "vae"), "cpu"))


def _encode_in_process(shard: int) -> None:
    """Encode one shard in a worker process."""
    list(_encoder.encode_shards([shard]))
