import csv
import json

import pytest
from celeba import save_image
from datasets import Dataset

from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import open_source


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_metadata(tmp_path, name):
    for i in range(4):
        save_image(tmp_path / "images" / f"{i}.png")
    rows = [
        {"file_name": "images/0.png", "smiling": True, "age": "old", "caption": "a red square"},
        {"file_name": "images/1.png", "smiling": False, "age": "young", "caption": "a square that is red"},
        {"file_name": "images/2.png", "smiling": False, "age": "young", "caption": "red, square"},
        {"file_name": "images/2.png", "smiling": True, "age": "young", "caption": "again"},
        {"file_name": "images/9.png", "smiling": True, "age": "old", "caption": "nothing"},
    ]
    if name == "metadata.csv":
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name == "metadata.parquet":
        Dataset.from_list(rows).to_parquet(tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    source = open_source(str(tmp_path))
    assert source.rows["id"] == ["images/0.png", "images/1.png", "images/2.png"]
    assert source.rows["smiling"] == [1, 0, 0]
    assert "caption" not in source.rows.column_names
    assert source.plan.contents.unused == {
        "column age": "2 different texts in 3 rows",  # too few to be classes
        "column caption": "3 different texts (--conditions reads them as classes)",
    }
    left_out = dict(source.left_out)
    assert left_out["images/2.png"].startswith("duplicate row: 4")
    assert left_out["images/3.png"] == f"no row in {name}"
    assert left_out["images/9.png"].startswith("no such picture")
    assert len(left_out) == (4 if name == "metadata.jsonl" else 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\na", "no column file_name"),
        ("file_name,label,label\na.png,1,2", "columns of one name: label"),
        (f'file_name,text\na,"{"x" * 200_000}', "metadata.csv cannot be read .*is there a quote that is not closed"),
    ],
)
def test_bad_metadata_is_a_one_line_error(tmp_path, text, message):
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_rows_that_cannot_be_read_are_left_out_with_their_number(tmp_path):
    for i in range(4):
        save_image(tmp_path / f"{i}.png")
    rows = ["file_name,split,smiling", "0.png,Val,1", "1.png,holdout,1", "2.png,train", "3.png,train,0", ",train,0"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    source = open_source(str(tmp_path))
    assert source.rows["id"] == ["0.png", "3.png"]
    assert source.rows["split"] == ["validation", "train"]
    assert {
        ("1.png", "split 'holdout' is unknown, in row 2 of metadata.csv"),
        ("2.png", "row 3 of metadata.csv is ragged"),
        ("metadata.csv:5", "a row without file_name"),
    } <= set(source.left_out)


@pytest.mark.parametrize("value", ["[" * 200_000 + "]" * 200_000, "9" * 5000])
def test_a_row_of_absurd_depth_or_length_is_left_out(tmp_path, value):
    for i in range(4):
        save_image(tmp_path / f"{i}.png")
    rows = [f'{{"file_name": "{i}.png", "smiling": {value if i == 2 else i % 2}}}' for i in range(4)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    source = open_source(str(tmp_path))
    assert source.rows["id"] == ["0.png", "1.png", "3.png"]
    assert ("metadata.jsonl:3", "not a JSON object") in source.left_out


def test_a_row_of_a_missing_image_is_named_by_it_beside_an_index_column(tmp_path):
    save_image(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(",file_name,smiling\n0,0.png,1\n1,gone.png,0\n")
    assert [name for name, _ in open_source(str(tmp_path)).left_out] == ["gone.png"]


def test_a_csv_of_excel_with_spaces_in_its_header_and_a_capital_split(tmp_path):
    for i in range(4):
        save_image(tmp_path / "cat" / f"{i}.png")
    lines = [
        "file_name, breed,Split",
        *(f"cat/{i}.png, {'pug' if i % 2 else 'lab'},{'Val' if i else 'Train'}" for i in range(4)),
    ]
    (tmp_path / "metadata.csv").write_bytes("\r\n".join(lines).encode("utf-16"))
    source = open_source(str(tmp_path))
    assert source.plan.counts == {"train": 1, "validation": 3}
    assert source.rows.features["breed"].names == ["lab", "pug"]


def test_rows_of_which_none_can_be_used_are_an_error_with_the_first_reason(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,breed\na,pug\n")
    with pytest.raises(ValueError, match="none of its 1 images can be used; first a: no such picture"):
        open_source(str(tmp_path))


def test_two_files_that_describe_the_same_images_are_refused(tmp_path):
    save_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,smiling\na.png,1\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "hat": 1}\n')
    with pytest.raises(
        ValueError, match=r"metadata\.csv and metadata\.jsonl both describe a\.png: --exclude metadata"
    ):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), SourceOptions(exclude=["metadata.csv"], conditions=["hat"]))
    assert source.rows["hat"] == [1]


def test_a_file_in_another_encoding_is_refused_with_the_way_out(tmp_path):
    save_image(tmp_path / "café.png")
    for name in ("metadata.csv", "list_attr_celeba.csv"):
        (tmp_path / name).write_bytes("file_name,smiling\ncafé.png,1\n".encode("cp1252"))
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 \(byte 0xe9; .*: save it as UTF-8"):
            open_source(str(tmp_path))
        (tmp_path / name).unlink()


def test_an_image_with_a_ragged_row_is_left_out_once(tmp_path):
    for name in "ab":
        save_image(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text("file_name,smiling\na.png,1\nb.png\n")
    source = open_source(str(tmp_path))
    assert source.left_out == [("b.png", "row 2 of metadata.csv is ragged")]
    assert source.total == 2


def test_columns_that_tell_splits_apart_are_no_conditions(tmp_path):
    for i in range(8):
        save_image(tmp_path / ("val" if i > 5 else "train") / f"{i}.png")
    rows = [
        f"{'val' if i > 5 else 'train'}/{i}.png,{'val' if i > 5 else 'train'},{int(i < 6)},{i % 2}" for i in range(8)
    ]
    text = "\n".join(["file_name,subset,is_train,hat", *rows])
    (tmp_path / "metadata.csv").write_text(text)
    source = open_source(str(tmp_path))
    assert list(source.plan.conditions) == ["hat"]
    assert "only a column called split is read so" in source.plan.contents.unused["column subset"]
    assert "--conditions is_train" in source.plan.contents.unused["column is_train"]
    assert "subset" in open_source(str(tmp_path), SourceOptions(conditions=["subset"])).plan.conditions
    # A column that contradicts the folders counts, which the plan says.
    (tmp_path / "metadata.csv").write_text(text.replace("subset", "split").replace(",val,", ",train,"))
    source = open_source(str(tmp_path))
    assert source.plan.counts == {"train": 8}
    assert "2 images in folders of another split, first val/6.png" in source.plan.contents.choices[0]


def test_paths_that_windows_wrote(tmp_path):
    for i in range(2):
        save_image(tmp_path / f"images/{i}.png")
    save_image(tmp_path / "a\\b.png")  # a name elsewhere
    (tmp_path / "metadata.csv").write_text("file_name,hat\nimages\\0.png,yes\nimages\\1.png,no\na\\b.png,yes\n")
    source = open_source(str(tmp_path))
    assert dict(zip(source.rows["id"], source.rows["hat"], strict=True)) == {
        "a\\b.png": 1,
        "images/0.png": 1,
        "images/1.png": 0,
    }
