"""Datasets on the Hub, whose shards are read where they are."""

import io
import tarfile
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dit_hf.data import stored_images
from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import open_source
from dit_hf.data.stored_images import image_stamp, with_bytes

COUNT = 12  # images of a shard


def noise(seed):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def parquet(images):
    file = io.BytesIO()
    rows = {"image": [{"bytes": image, "path": None} for image in images], "smiling": [i % 2 for i in range(COUNT)]}
    pq.write_table(pa.table(rows), file, row_group_size=5)
    return file.getvalue()


def archive(images):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for i, image in enumerate(images):
            for name, content in ((f"{i:03}.png", image), (f"{i:03}.json", b'{"smiling": %d}' % (i % 2))):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(params=["parquet", "tar"])
def repository(hub, request, monkeypatch):
    """A dataset of three shards on the Hub; the images of all of them."""
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    fsspec.filesystem("hf").clear_instance_cache()
    images = [noise(i) for i in range(3 * COUNT)]
    write = parquet if request.param == "parquet" else archive
    shards = {f"data/train-{n}.{request.param}": write(images[n * COUNT : (n + 1) * COUNT]) for n in range(3)}
    hub.repositories["datasets/you/faces"] = shards
    yield images
    fsspec.filesystem("hf").clear_instance_cache()


def copied_bytes():
    """The size of everything that `datasets` and the Hub's client keep on the disk."""
    return sum(path.stat().st_size for path in Path(datasets.config.HF_CACHE_HOME).rglob("*") if path.is_file())


def test_shards_are_read_without_a_copy(repository, hub):
    before = copied_bytes()
    rows = open_source("you/faces").rows
    assert [with_bytes(row["image"])["bytes"] for row in rows] == repository
    assert rows["smiling"] == [i % 2 for i in range(COUNT)] * 3
    assert copied_bytes() - before < sum(map(len, repository)) / 10
    # Unchanged shards are known by their content, without being read.
    sent = hub.sent.total()
    assert len({image_stamp(row["image"]) for row in rows}) == len(rows)
    assert hub.sent.total() == sent


@pytest.mark.parametrize("repository", ["parquet"], indirect=True)
def test_listing_parquet_reads_no_images(repository, hub, monkeypatch):
    monkeypatch.setattr(stored_images, "_LABELS_AT_ONCE", 1000)
    assert open_source("you/faces").rows["smiling"] == [i % 2 for i in range(COUNT)] * 3
    # Of the first shard an image too, to see that it is one; of each the last 64 KB, where Arrow looks for the footer.
    first, *others = (hub.sent[f"datasets/you/faces/data/train-{n}.parquet"] for n in range(3))
    assert first < sum(map(len, repository[:COUNT]))
    assert max(others) < 2**16 + 10_000


def test_num_images_reads_no_more_shards_than_it_needs(repository, hub):
    source = open_source("you/faces", SourceOptions(num_images=5))
    assert len(source.rows) == 5
    assert "--num_images reads 1 of the 3 shards of train" in source.plan.contents.choices
    taken = [with_bytes(row["image"])["bytes"] for row in source.rows]
    assert all(image in repository for image in taken)
    assert sum(name.endswith((".parquet", ".tar")) for name in hub.sent) == 1
    # The same ones again, and others with another seed.
    again = [open_source("you/faces", SourceOptions(num_images=5, seed=seed)).rows for seed in (0, 1, 2, 3)]
    assert again[0]["image"] == source.rows["image"]
    assert len({rows[0]["image"]["path"].partition("::")[2] for rows in again}) > 1


def test_a_connection_that_breaks_ends_the_reading(repository, hub):
    rows = open_source("you/faces").rows
    with_bytes(rows[0]["image"])
    hub.denied["datasets/you/faces"] = (403, "GatedRepo")
    with pytest.raises(OSError, match=r"train-2.* cannot be read: "):
        with_bytes(rows[3 * COUNT - 1]["image"])
