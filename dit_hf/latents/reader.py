"""Read batches of a latent cache whose content is a pure function of seed, step and position in the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..data.conditions import remap_class_ids
from .cache import read_cache_info
from .shards import open_shards, shard_files


class LatentReader:
    """Reader of batches of latents from the memory-mapped Arrow file of a cache.

    Image j of a run over n images is `perm(seed, j // n)[j % n]`, and step k (from 0) of global batch size b holds
    images k b … (k + 1) b - 1. There is no state to save, and the number of processes does not matter.

    Args:
        folder: A cache made by `dit-hf prepare-latents`.
        split: `"train"`, `"validation"` or `"test"`.
        conditions: Columns to read as condition ids, in this order; None is all.
        posterior: Whether batches also hold `latent_std`, if the cache has it.

    Raises:
        ValueError: if the cache is incomplete, has no image in the split, lacks a condition, or holds a value of one
            that it does not have.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", conditions: list[str] | None = None, posterior: bool = True
    ):
        self.info = read_cache_info(folder)
        self.folder = str(folder)

        # Conditions, with the number of values of each.
        available = self.info["conditions"]
        names = list(available) if conditions is None else list(conditions)
        missing = [name for name in names if name not in available]
        if missing:
            valid = ", ".join(available) or "none"
            raise ValueError(f"{folder} has no condition {', '.join(missing)}; it has {valid}")
        self.conditions = {name: available[name] for name in names}

        # The files of the shards, which `datasets` would map for reading in order (see `open_shards`).
        self._table = open_shards(shard_files(Path(folder)))

        # Latents.
        self.latent_shape = tuple(self.info["latent_shape"])
        self.columns = ["latent_mean"]
        if posterior and "latent_std" in self._table.column_names:
            self.columns.append("latent_std")
        self.has_flip = "latent_mean_flip" in self._table.column_names

        # One of the highest value fits all: 40 attributes of ten million images are 400 MB.
        highest = max(self.conditions.values(), default=0)
        self._condition_ids = np.zeros((len(self._table), len(names)), np.min_scalar_type(highest))
        for position, (name, num_values) in enumerate(self.conditions.items()):
            self._read_condition(name, num_values, self._condition_ids[:, position])

        self.split, self.indices = split, self._rows_of_split(split)
        self._views: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}
        self._permutation: tuple[tuple[int, int], np.ndarray] | None = None

    def of_split(self, split: str) -> LatentReader:
        """Return a reader of another split that shares the open table and the condition ids with this one.

        Raises:
            ValueError: if the cache has no image in the split.
        """
        other = object.__new__(LatentReader)  # `copy` would reopen the cache, as `pickle` does
        other.__dict__.update(self.__dict__)
        other.split, other.indices, other._permutation = split, self._rows_of_split(split), None
        return other

    def _rows_of_split(self, split: str) -> np.ndarray:
        """Return the rows of a split, int64 [images]."""
        rows = np.flatnonzero(pc.equal(self._table.column("split"), split).to_numpy())
        if not len(rows):
            raise ValueError(f"{self.folder} has no {split} images")
        return rows

    def _read_condition(self, name: str, num_values: int, out: np.ndarray) -> None:
        """Read a condition of all rows into `out` [rows]; a missing value becomes the null, which is `num_values`."""
        column = self._table.column(name)
        if column.null_count:  # through int64, because the null may not fit the column's own type
            column = pc.fill_null(column.cast(pa.int64()), num_values)
        ids = column.to_numpy()
        if len(ids) and not 0 <= ids.min() <= ids.max() <= num_values:
            raise ValueError(f"{self.folder}: expected values of {name} from 0 to {num_values - 1}, got others")
        out[:] = ids

    def __len__(self) -> int:
        """Return the number of images of the split."""
        return len(self.indices)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by reopening: views of memory-mapped files cannot be sent to another process."""
        return LatentReader, (self.folder, self.split, list(self.conditions), "latent_std" in self.columns)

    def rows(self, seed: int, first: int, count: int) -> np.ndarray:
        """Return the rows of the cache that are images `first` … `first + count - 1` of a run with `seed`, [count]."""
        total, rows = len(self.indices), []
        while count:  # one turn an epoch
            epoch, offset = divmod(first, total)
            taken = self._permuted(seed, epoch)[offset : offset + count]
            rows.append(taken)
            first, count = first + len(taken), count - len(taken)
        return self.indices[np.concatenate(rows)]

    def read(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Return a copy of the latents of `rows`, fp16 [len(rows), channels, height, width]."""
        # `searchsorted` finds the chunk of each row by the first row of each chunk.
        starts, views = self._column_views(column)
        chunks = np.searchsorted(starts, rows, side="right") - 1

        # Rows are copied one by one: 48 times as fast as `datasets` with Array3D and torch format.
        out = np.empty((len(rows), *self.latent_shape), np.float16)
        flat = out.reshape(len(rows), int(np.prod(self.latent_shape)))
        for position, (chunk, row) in enumerate(zip(chunks, rows - starts[chunks], strict=True)):
            flat[position] = views[chunk][row]
        return out

    def batch(self, seed: int, first: int, count: int, flip: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return images `first` … `first + count - 1` of a run with `seed`.

        Args:
            seed: Seed of the run, which decides the order of the images.
            first: Number of the first image in the run.
            count: Number of images.
            flip: Boolean [count], true for images to read mirrored; ignored if the cache has no mirrored latents.

        Returns:
            `latent_mean` and, if it is read, `latent_std`, fp16 [count, channels, height, width]; `condition_ids`,
            int64 [count, conditions].
        """
        rows = self.rows(seed, first, count)
        batch = {name: self.read(name, rows) for name in self.columns}
        if flip is not None and self.has_flip:
            for name, latents in batch.items():
                latents[flip] = self.read(f"{name}_flip", rows[flip])
        return {**batch, "condition_ids": self.condition_ids(rows)}

    def condition_ids(self, rows: np.ndarray) -> np.ndarray:
        """Return the conditions of `rows`, int64 [len(rows), conditions]."""
        return self._condition_ids[rows].astype(np.int64)

    def attributes(self, count: int, labels: Mapping[str, list[str]] | None = None) -> list[dict[str, int]] | None:
        """Return the condition ids of the first `count` images in the order of the cache, repeated if there are fewer.

        Args:
            count: Number of images.
            labels: Names of a pipeline's condition values, by condition, to return ids of the pipeline.

        Returns:
            One dict per image, from the name of a condition to its id, without conditions whose value is missing;
            None without conditions.

        Raises:
            ValueError: if a class of these images has no such name in `labels`.
        """
        if not self.conditions:
            return None
        rows = self.indices[np.arange(count) % len(self.indices)]
        own, attributes = self.info["condition_labels"], [dict[str, int]() for _ in rows]
        for (name, null), ids in zip(self.conditions.items(), self.condition_ids(rows).T, strict=True):
            known = np.flatnonzero(ids != null)
            values = ids[known]
            if labels is not None:
                values = remap_class_ids(name, values, own.get(name), labels.get(name))
            for row, value in zip(known.tolist(), values.tolist(), strict=True):
                attributes[row][name] = value
        return attributes

    def _permuted(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order of the images in an epoch, keeping the last one that was computed."""
        if self._permutation is None or self._permutation[0] != (seed, epoch):
            order = np.random.default_rng([seed, epoch]).permutation(len(self.indices))
            self._permutation = ((seed, epoch), order)
        return self._permutation[1]

    def _column_views(self, column: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the first row and a zero-copy view [rows, values] of each chunk of a column of latents."""
        if column not in self._views:
            chunks = [chunk for chunk in self._table.column(column).chunks if len(chunk)]
            size = int(np.prod(self.latent_shape))
            views = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, size) for chunk in chunks]
            self._views[column] = np.cumsum([0, *map(len, views[:-1])]), views
        return self._views[column]


class BatchPrefetcher:
    """Loader of batches onto the device; a thread reads and pins the next batch while the current one is in use.

    Args:
        read: Function that reads the batch of a key (step, micro-batch) as arrays by name; it must be pure.
        device: Device of the tensors; copies to a GPU are asynchronous.
    """

    def __init__(self, read: Callable[[tuple[int, int]], dict[str, np.ndarray]], device: torch.device):
        self.read, self.device = read, device
        self._thread = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[tuple[int, int], Future] | None = None

    def get(self, key: tuple[int, int], following: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the batch of `key` as tensors, and begin to read that of `following`."""
        # Another batch than the announced one may be requested; reading is pure, so that one is simply dropped.
        if self._ahead is not None and self._ahead[0] == key:
            future = self._ahead[1]
        else:
            future = self._thread.submit(self._read_pinned, key)
        batch = future.result()
        following_future = self._thread.submit(self._read_pinned, following)
        self._ahead = (following, following_future)
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _read_pinned(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Read a batch, in pinned memory if it goes to a GPU: only from there is a copy asynchronous."""
        batch = {name: torch.from_numpy(values) for name, values in self.read(key).items()}
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.device.type == "cuda" else batch
