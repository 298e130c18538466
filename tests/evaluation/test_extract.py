"""Features are extracted batch by batch: a killed call resumes, and nothing of another identity is used."""

import numpy as np
import pytest
import torch

from dit_hf.evaluation.extract import Extraction
from dit_hf.evaluation.features import FeatureNet

COLORS = np.arange(30, dtype=np.uint8).reshape(10, 3) * 7
NET = FeatureNet(
    name="mean-color",
    dim=3,
    label="FD-mean-color",
    preprocessing="none",
    weights_sha256="none",
    network=lambda pixels: pixels.mean((2, 3)),
    prepare=lambda pixels: pixels,
    device=torch.device("cpu"),
)


@pytest.fixture
def extract(tmp_path):
    """A function that extracts the features of ten images, each of one color, and returns the rows read, too."""

    def extract(identity="colors", batch_size=4, broken=()):
        read_rows = []

        def read(rows):
            read_rows.extend(rows)
            intact = [row for row in rows if row not in broken]
            images = np.empty((len(intact), 5, 6, 3), np.uint8)
            images[:] = COLORS[intact][:, None, None]
            return images, np.array(intact, np.int64)

        extraction = Extraction(tmp_path, NET, read, range(10), batch_size, {"source": identity}, "colors")
        extraction.extract()
        return extraction.join(), read_rows

    return extract


def test_a_resumed_extraction_reads_only_the_missing_batches_and_gives_the_same_bits(extract, tmp_path):
    whole, read_rows = extract()
    assert read_rows == list(range(10))
    np.testing.assert_allclose(whole.features, COLORS, rtol=1e-6)
    (second,) = tmp_path.rglob("from-00000004.safetensors")
    second.unlink()
    resumed, read_rows = extract()
    assert read_rows == [4, 5, 6, 7]
    assert np.array_equal(resumed.features, whole.features)
    assert resumed.pixels_sha256 == whole.pixels_sha256
    assert extract()[1] == []


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "[]"])
def test_features_of_a_damaged_file_are_extracted_again(extract, tmp_path, damage):
    whole, _ = extract()
    (second,) = tmp_path.rglob("from-00000004.safetensors")
    data = second.read_bytes()
    flipped = data[:-20] + bytes([data[-20] ^ 4]) + data[-19:]
    second.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": flipped, "[]": b"[]"}[damage])
    again, read_rows = extract()
    assert read_rows == [4, 5, 6, 7]
    assert np.array_equal(again.features, whole.features)
    assert second.read_bytes() == data


def test_other_images_or_batches_never_use_features_that_are_there(extract):
    extract()
    for options in ({"identity": "others"}, {"batch_size": 5}):
        assert extract(**options)[1] == list(range(10))


def test_features_of_broken_images_are_left_out_with_their_rows(extract):
    collected, _ = extract(broken=(0, 4, 5, 6, 7))  # of which four are a whole batch
    assert collected.rows.tolist() == [1, 2, 3, 8, 9]
    np.testing.assert_allclose(collected.features, COLORS[[1, 2, 3, 8, 9]], rtol=1e-6)
