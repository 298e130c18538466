import csv

import pytest
from celeba import make_celeba, save_image
from datasets import Value

from dit_hf import open_images
from dit_hf.data.avatars import ATTRIBUTES
from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import open_source


def write_lists_as_txt(celeba):
    """Replace the lists of Kaggle by those of the original CelebA."""
    for stem in ("list_attr_celeba", "list_eval_partition"):
        with open(celeba.folder / f"{stem}.csv", newline="") as file:
            header, *rows = csv.reader(file)
        lines = [" ".join(row) for row in rows]
        if stem == "list_attr_celeba":
            lines = [str(len(rows)), " ".join(header[1:]), *lines]
        (celeba.folder / f"{stem}.txt").write_text("\n".join(lines) + "\n")
        (celeba.folder / f"{stem}.csv").unlink()


def check_celeba(celeba, source, left_out):
    rows = source.rows
    good = [row for row in rows["id"] if not row.startswith("9000")]
    assert good == list(celeba.attributes)
    for row in rows.remove_columns("image"):
        if row["id"] in good:
            assert {name: row[name] for name in ATTRIBUTES} == celeba.attributes[row["id"]]
            assert row["split"] == celeba.splits[row["id"]]
    assert rows.features["Smiling"] == Value("int8")
    reasons = dict(source.left_out)
    assert set(reasons) == set(left_out)
    for name, reason in left_out.items():
        assert reason in reasons[name]


@pytest.mark.parametrize("lists", ["csv", "txt"])
def test_celeba_as_kaggle_ships_it_and_with_the_original_lists(tmp_path, lists):
    celeba = make_celeba(tmp_path / "celeba", 20)
    if lists == "txt":
        write_lists_as_txt(celeba)
    decoded_later = [f"90000{i}.{'png' if i == 4 else 'jpg'}" for i in range(1, 6)]
    left_out = {k: v.replace(".csv", f".{lists}") for k, v in celeba.left_out.items() if k not in decoded_later}
    check_celeba(celeba, open_source(str(celeba.folder)), left_out)


def test_celeba_flat_with_and_without_lists(tmp_path):
    celeba = make_celeba(tmp_path / "celeba", 20, faults=False)
    flat = tmp_path / "flat"
    (celeba.folder / "img_align_celeba" / "img_align_celeba").rename(flat)
    without = open_source(str(flat))
    assert without.rows.column_names == ["id", "image"]
    assert without.rows["id"] == list(celeba.attributes)
    for path in celeba.folder.glob("*.csv"):
        path.rename(flat / path.name)
    check_celeba(celeba, open_source(str(flat)), {})


def test_of_images_with_one_number_the_first_counts(tmp_path):
    for name in ("000001.jpg", "000001.png", "000002.jpg"):
        save_image(tmp_path / "img_align_celeba" / name)
    (tmp_path / "list_attr_celeba.csv").write_text("image_id,Smiling\n000001.jpg,1\n000002.jpg,-1\n")
    source = open_source(str(tmp_path))
    assert source.rows["id"] == ["000001.jpg", "000002.jpg"]
    assert source.rows["Smiling"] == [1, 0]
    assert source.left_out == [("img_align_celeba/000001.png", "another picture has the same number")]


def test_celeba_splits(tmp_path):
    celeba = make_celeba(tmp_path, 20, faults=False)
    for split, count in (("train", 16), ("validation", 2), ("test", 2)):
        rows = open_images(str(tmp_path), 32, "celeba-178", split=split)
        assert rows["id"] == [name for name, of in celeba.splits.items() if of == split]
        assert len(rows) == count
    assert len(open_images(str(tmp_path), split="train", num_images=5)) == 5
    with pytest.raises(ValueError, match="valid names are train, validation, test"):
        open_images(str(tmp_path), split="held_out")


def test_celeba_hq_without_its_masks_and_with_the_partition_of_celeba(tmp_path):
    root = tmp_path / "CelebAMask-HQ"
    for i in range(3):
        save_image(root / "CelebA-HQ-img" / f"{i}.jpg")
        save_image(root / "CelebAMask-HQ-mask-anno" / "0" / f"0000{i}_hair.png")
    lines = ["3", " Male Smiling", *(f"{i}.jpg  {-1 if i else 1}  1" for i in range(3))]
    (root / "CelebAMask-HQ-attribute-anno.txt").write_text("\n".join(lines))
    (root / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx     orig_idx     orig_file\n0   7   000008.jpg\n1   3   000004.jpg\n2   8   000009.jpg\n"
    )
    (root / "list_eval_partition.txt").write_text("000004.jpg 2\n000008.jpg 1\n000009.jpg 0\n000010.jpg 0\n")
    source = open_source(str(root))
    assert source.left_out == []
    assert source.rows["id"] == ["0.jpg", "1.jpg", "2.jpg"]
    assert source.rows["split"] == ["validation", "test", "train"]
    assert source.rows["Male"] == [1, 0, 0]


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_list_that_a_spreadsheet_saved_with_another_separator(tmp_path, mark):
    celeba = make_celeba(tmp_path / "celeba", 10, faults=False)
    for path in celeba.folder.glob("*.csv"):
        path.write_text(path.read_text().replace(",", mark))
    check_celeba(celeba, open_source(str(celeba.folder)), {})


def test_the_original_list_without_its_number_of_rows(tmp_path):
    celeba = make_celeba(tmp_path / "celeba", 10, faults=False)
    path = celeba.folder / "list_attr_celeba.csv"
    header, *rows = path.read_text().splitlines()
    lines = [" ".join(header.split(",")[1:]), *(row.replace(",", " ") for row in rows)]
    path.with_suffix(".txt").write_text("\n".join(lines))
    path.unlink()
    check_celeba(celeba, open_source(str(celeba.folder)), {})


def test_the_partition_can_be_left_aside(tmp_path):
    celeba = make_celeba(tmp_path / "celeba", 10, faults=False)
    assert open_source(str(celeba.folder), SourceOptions(split_from="none")).plan.counts == {"train": 10}
    assert open_source(str(celeba.folder), SourceOptions(split_from="column")).plan.counts["validation"] == 1
