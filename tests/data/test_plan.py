import json

from celeba import save_image
from layouts import read, write

from dit_hf import describe_source


def test_the_plan_names_everything_that_is_not_used(tmp_path):
    write(tmp_path, "train*3", "test*2", ".hidden.png", "@eaDir/a.png", "__MACOSX/a.png", "__old/a.png", "spare*1")
    rows = [f"train/{i}.png,{i % 2},{i / 3:.2f},NA" for i in range(3)] + ["test/0.png,1,0.5,NA", "test/9.png,1,0,NA"]
    (tmp_path / "metadata.csv").write_text("file_name,smiling,score,note\n" + "\n".join(rows))
    (tmp_path / "readme.txt").write_text("")
    (tmp_path / "logo.svg").write_text("")
    lines = read(tmp_path).plan.lines()
    assert lines == [
        f"{tmp_path.name}: folder of images with metadata.csv",
        "  images      3 train, 1 test (by folder)",
        "  smiling     yes 2, no 2 (metadata.csv)",
        "  not used    folder __old/: its name begins with __",
        "  not used    files: 1 .svg, 1 .txt",
        "  not used    column score: numbers, 0 to 0.67",
        "  not used    column note: no values",
        "  left out    3 images or rows: 1 no such picture; it has a row in metadata.csv, 2 no row in metadata.csv",
    ]
    avatars = read("avatars", num_images=10).plan.lines()
    assert avatars[2].endswith("Eyeglasses, Smiling, Mouth_Slightly_Open, Wearing_Hat, Bald, … (22 in all)")
    plan = describe_source(str(tmp_path), conditions="none", split_from="none")
    assert plan["images"] == {"train": 4}
    assert plan["not_used"]["column smiling"] == "not requested"
    assert json.loads(json.dumps(plan)) == plan


def test_the_plan_of_many_columns_and_folders_stays_short(tmp_path):
    for i in range(30):
        save_image(tmp_path / f"__{i}" / "a.png")
    write(tmp_path, "train*2", "test*2", *(f"extra{i}*1" for i in range(30)))
    lines = read(tmp_path).plan.lines()
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 118


def test_lines_break_between_words_and_nowhere_else(tmp_path):
    names = [f"a name of a class that is quite long with number {i}" for i in range(4)]
    write(tmp_path, *(f"{name}*2" for name in names))
    lines = read(tmp_path).plan.lines()
    assert max(map(len, lines)) <= 118
    assert lines[2].endswith(" …")
    assert lines[2].removesuffix(" …").endswith(tuple(f"number {i} 2" for i in range(4)))
    (tmp_path / "metadata.csv").write_text(
        "file_name,hat\n" + "".join(f'"{name}/{i}.png","big\n red"\n' for name in names for i in range(2))
    )
    assert "  hat         1 classes: big red 8 (metadata.csv)" in read(tmp_path, conditions=["hat"]).plan.lines()


def test_classes_that_may_be_one_are_noted(tmp_path):
    write(tmp_path, "Golden Retriever*2", "golden_retriever*2", "pug*2")
    plan = read(tmp_path).plan
    assert len(plan.conditions) == 1
    assert "  note        class: Golden Retriever and golden_retriever are two classes" in plan.lines()
