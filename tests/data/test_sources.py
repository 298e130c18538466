from celeba import celeba_image, save_image

from dit_hf.data.contents import SourceOptions
from dit_hf.data.sources import open_source


def test_a_folder_named_like_the_embedded_dataset_is_distinguished(tmp_path):
    save_image(tmp_path / "avatars" / "a.png")
    assert open_source(str(tmp_path / "avatars")).name == "avatars (a folder)"


def test_the_hash_changes_with_the_source(tmp_path):
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "one" / name)
        save_image(tmp_path / "two" / name)
    first = open_source(str(tmp_path / "one"))
    assert first.sha256 == open_source(str(tmp_path / "two")).sha256
    assert first.name == "one"
    celeba_image(0).save(tmp_path / "two" / "b.png")
    assert first.sha256 != open_source(str(tmp_path / "two")).sha256
    assert first.sha256 != open_source(str(tmp_path / "one"), SourceOptions(num_images=1)).sha256


def test_a_folder_with_unusable_rows_has_the_hash_that_version_0_1_0_gave_it(tmp_path):
    """The reasons are hashed too: other words for them would make every such cache another one."""
    celeba, own = tmp_path / "faces", tmp_path / "own"
    (celeba / "img_align_celeba").mkdir(parents=True)
    for name in ("000001.jpg", "000002.jpg", "000003.jpg", "000003.png"):
        (celeba / "img_align_celeba" / name).write_bytes(b"x" * len(name))
    rows = "000001.jpg,1,-1\n000002.jpg,-1,2\n000003.jpg,1,1\n000009.jpg,1,1\n000001.jpg,1,1\n"
    (celeba / "list_attr_celeba.csv").write_text(f"image_id,Smiling,Male\n{rows}")
    assert open_source(str(celeba)).sha256 == "5b92e6e682264c0794d0a53d6e5d87d43fd1f6c72eefe11411e637899d49d7c6"
    own.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (own / name).write_bytes(b"x" * 7)
    (own / "d.jxl").write_bytes(b"x")
    (own / "metadata.csv").write_text("file_name,smiling\na.jpg,1\nb.jpg,0\nz.jpg,1\nc.jpg,\n")
    # Version 0.1.0 left out rows without a value.
    own_rows = open_source(str(own), SourceOptions(missing="leave_out"))
    assert own_rows.sha256 == "1852950fb9bb75463f5b704220cf0129d38d9b74887094dc822880a2f3ef3ed9"
