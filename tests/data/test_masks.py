"""Images that belong to others: masks, depth maps, thumbnails."""

import pytest
from layouts import read, write


@pytest.mark.parametrize(
    ("patterns", "option"),
    [
        (["images*3", "masks*3"], "masks"),
        (["train/images*2", "train/masks*2", "val/images*2", "val/masks*2"], "masks"),
        (["0.png", "1.png", "0_mask.png", "1_mask.png"], "*_mask.*"),
        (["images/a.jpg", "images/b.jpg", "annotations/trimaps/a.png", "annotations/trimaps/b.png"], "annotations"),
        (["img/0.jpg", "img/1.jpg", "SegmentationClass/0.png"], "SegmentationClass"),
        (["0.png", "1.png", "thumbnails*2"], "thumbnails"),
    ],
)
def test_masks_are_not_trained_on_unless_that_is_requested(tmp_path, patterns, option):
    write(tmp_path, *patterns)
    with pytest.raises(ValueError, match="look like masks, labels or thumbnails of others") as caught:
        read(tmp_path)
    assert f"--exclude '{option}' leaves them out, --exclude none reads all" in str(caught.value)
    everything, images = read(tmp_path, exclude=[], conditions=[]), read(tmp_path, exclude=[option])
    assert 0 < len(images.rows) < len(everything.rows)
    assert not any("mask" in name or name.endswith("trimaps") for name in images.rows["id"])
    assert "excluded" in images.plan.contents.unused.values()
    assert images.plan.conditions == {}


def test_classes_that_only_sound_like_masks_are_classes(tmp_path):
    write(tmp_path, "with_mask/a.png", "with_mask/b.png", "without_mask/c.png", "without_mask/d.png")
    assert "2 classes" in read(tmp_path).plan.conditions["class"]
    write(tmp_path / "x-ray", "NORMAL*2", "PNEUMONIA*2")
    assert "2 classes" in read(tmp_path / "x-ray").plan.conditions["class"]
