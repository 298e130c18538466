"""Images inside shards: read where they are, in their order and at random."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image
from PIL import Image as PILImage

from dit_hf import open_images
from dit_hf.data import stored_images
from dit_hf.data.parquet_shards import load_parquet
from dit_hf.data.sources import open_source
from dit_hf.data.stored_images import image_size, image_stamp, parse_address, stored_bytes, with_bytes


def png(number):
    """Return an image that differs from those of other numbers."""
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), (number % 256, number // 256, 0)).save(file, "png")
    return file.getvalue()


def write_parquet(path, images, row_group_size=100, column="image"):
    structs = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    table = pa.table({column: structs, "smiling": [i % 2 for i in range(len(images))]})
    pq.write_table(table, path, row_group_size=row_group_size)


@pytest.mark.parametrize("row_group_size", [7, 1000])
def test_parquet_images_are_read_in_any_order(tmp_path, row_group_size):
    images = [png(i) for i in range(300)]
    write_parquet(tmp_path / "a.parquet", images[:200], row_group_size)
    write_parquet(tmp_path / "b.parquet", images[200:], row_group_size)
    rows = load_parquet([tmp_path / "a.parquet", tmp_path / "b.parquet"]).cast_column("image", Image(decode=False))
    for order in (range(300), range(299, -1, -5), np.random.default_rng(0).permutation(300)[:60].tolist()):
        assert [with_bytes(rows[row]["image"])["bytes"] for row in order] == [images[row] for row in order]


def test_images_in_columns_of_bytes_and_in_structs(tmp_path):
    images = [png(i) for i in range(40)]
    data = [{"photo": {"bytes": image, "path": None}, "smiling": i % 2} for i, image in enumerate(images)]
    pq.write_table(pa.table({"data": data}), tmp_path / "nested.parquet")
    pq.write_table(pa.table({"img": images, "embedding": [b"\0\1"] * 40}), tmp_path / "bytes.parquet")
    for name, column in (("nested", "data.photo"), ("bytes", "img")):
        source = open_source(str(tmp_path / f"{name}.parquet"))
        assert source.plan.contents.image_column == column
        assert [stored_bytes(row["image"]) for row in source.rows] == images
    assert open_source(str(tmp_path / "nested.parquet")).rows["smiling"] == [0, 1] * 20


def test_missing_images_are_none_and_others_keep_their_rows(tmp_path):
    structs = [None if i % 3 == 0 else {"bytes": png(i), "path": None} for i in range(100)]
    structs[1] = {"bytes": None, "path": None}
    pq.write_table(pa.table({"image": structs}), tmp_path / "a.parquet", row_group_size=30)
    source = open_source(str(tmp_path / "a.parquet"))
    expected = [struct["bytes"] if struct else None for struct in structs]
    assert [stored_bytes(row["image"]) for row in source.rows] == expected
    assert source.plan.left_out == {"no image": 35}


def test_a_path_that_a_row_brings_along_is_no_address(tmp_path):
    """It would read any file of the machine that is a tar or parquet file."""
    write_parquet(tmp_path / "private.parquet", [png(1)])
    (tmp_path / "public").mkdir()
    stolen = f"parquet://image.bytes/0::{tmp_path / 'private.parquet'}"
    structs = [{"bytes": None, "path": stolen}, {"bytes": png(2), "path": stolen}]
    pq.write_table(pa.table({"image": structs}), tmp_path / "public" / "a.parquet")
    stolen_rows = pa.table({"image": structs[:1]}).cast(Features({"image": Image()}).arrow_schema)
    with pa.OSFile(str(tmp_path / "stolen.arrow"), "wb") as file, pa.ipc.new_stream(file, stolen_rows.schema) as arrow:
        arrow.write_table(stolen_rows)
    found = [stored_bytes(row["image"]) for row in open_source(str(tmp_path / "public")).rows]
    assert found == [None, png(2)]
    assert [stored_bytes(row["image"]) for row in open_source(str(tmp_path / "stolen.arrow")).rows] == [None]


def test_a_stamp_tells_files_and_places_apart(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(1), png(2)])
    first, second = ({"bytes": None, "path": f"parquet://image.bytes/{i}::{tmp_path / 'a.parquet'}"} for i in range(2))
    before = image_stamp(first)
    assert before == image_stamp(first) != image_stamp(second)
    write_parquet(tmp_path / "a.parquet", [png(3), png(2)])
    assert image_stamp(first) != before
    assert stored_bytes(first) == png(3)  # not of the file that was open


def test_a_shard_that_is_gone_is_an_error_of_the_shard(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(i) for i in range(3)])
    rows = open_source(str(tmp_path / "a.parquet")).rows
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(OSError, match=r"a\.parquet cannot be read: .*No such file"):
        with_bytes(rows[0]["image"])


def test_sizes_are_those_of_the_images(tmp_path):
    images = [png(i) + bytes(i) for i in range(70)]
    write_parquet(tmp_path / "a.parquet", images, 30)
    with tarfile.open(tmp_path / "b [x]*.tar", "w") as archive:
        for i, image in enumerate(images):
            entry = tarfile.TarInfo(f"{i:03}.png")
            entry.size = len(image)
            archive.addfile(entry, io.BytesIO(image))
    for name in ("a.parquet", "b [x]*.tar"):
        rows = open_source(str(tmp_path / name)).rows
        assert [image_size(parse_address(row["image"]["path"])) for row in rows] == [len(image) for image in images]
        assert [stored_bytes(row["image"]) for row in rows] == images


def test_decoding_needs_only_the_rows_around(tmp_path, monkeypatch):
    """A whole shard may be one row group, which must not be decompressed at once."""
    write_parquet(tmp_path / "a.parquet", [png(i) for i in range(1000)], 1000)
    rows, read = open_source(str(tmp_path / "a.parquet")).rows, []
    without_structs = stored_images.without_structs
    monkeypatch.setattr(stored_images, "without_structs", lambda v: read.append(len(v)) or without_structs(v))
    for row in range(100):
        with_bytes(rows[row]["image"])
    assert max(read) <= 32
    assert sum(read) <= 132


def test_open_images_shuffles_parquet_without_reading_it_again(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(i) for i in range(50)])
    opened = open_images(str(tmp_path / "a.parquet"), resolution=8)
    for row in np.random.default_rng(0).permutation(50).tolist():
        assert opened[row]["image"].getpixel((0, 0)) == (row, 0, 0)
    assert opened.column_names == ["id", "image", "split", "smiling"]
