import errno
import fcntl
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dit_hf import storage
from dit_hf.storage import (
    check_folder,
    folder_taken,
    is_missing_or_empty,
    locked,
    new_folder,
    read_arrays,
    read_json,
    read_manifest,
    read_tensors,
    remove_folder,
    write_json,
    write_manifest,
    write_text,
)


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    final = tmp_path / "made"

    def break_off():
        with new_folder(final) as partial:
            (partial / "half.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert not final.exists()
    with new_folder(final) as partial:
        assert not list(partial.iterdir())
        (partial / "sub").mkdir()
        (partial / "sub" / "whole.txt").write_text("whole")
    assert (final / "sub" / "whole.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_new_folder_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        with new_folder(tmp_path / "made") as partial:
            (partial / f"{text}.txt").write_text(text)
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new.txt"]


def test_a_link_keeps_its_place_and_a_mount_point_is_refused(tmp_path):
    (tmp_path / "disk" / "scratch").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "scratch")
    with new_folder(tmp_path / "link") as partial:
        assert partial.parent == tmp_path / "disk"
        (partial / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk" / "scratch").iterdir()] == ["new.txt"]
    with pytest.raises(OSError, match="/ is a mount point; name a folder inside it"), new_folder(Path("/")):
        pass


def test_the_manifest_names_damaged_files(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "abc")
    write_text(tmp_path / "b.txt", "abc")
    write_manifest(tmp_path, color="red")
    assert read_manifest(tmp_path, hashes=True)["color"] == "red"
    (tmp_path / "b.txt").write_text("abd")
    with pytest.raises(ValueError, match=r"b\.txt has changed in content .*; call again$"):
        read_manifest(tmp_path, remedy="call again")  # small files are always compared
    monkeypatch.setattr(storage, "SMALL_FILE", 0)
    read_manifest(tmp_path)
    read_manifest(tmp_path, hashes="b")  # a folder that is not there
    with pytest.raises(ValueError, match=r"b\.txt has changed in content"):
        read_manifest(tmp_path, hashes=True)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt is missing"):
        read_manifest(tmp_path)
    for text in ("", "{", "[]", "null", "{}", '{"files": []}', '{"files": {"a.txt": 5}}', '{"files": {"a.txt": {}}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"is incomplete: no readable manifest\.json"):
            read_manifest(tmp_path)
    write_manifest(tmp_path)
    (tmp_path / "b.txt").write_text("edited")
    read_manifest(tmp_path, hashes=True, editable=["b.txt"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"5", b"\xff", b"[" * 100_000, b'{"a": 1}'])
def test_a_damaged_json_file_is_named_with_the_way_out(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is damaged \(.*\); delete it$"):
        read_json(tmp_path / "x.json", "delete it", keys=["b"])


def test_a_manifest_does_not_list_its_own_interrupted_write(tmp_path):
    (tmp_path / ".latents.json.partial").write_text("{")
    write_manifest(tmp_path, "latents.json")
    assert read_manifest(tmp_path, "latents.json", hashes=True) == {"files": {}}


def test_every_flipped_bit_of_a_json_file_of_ours_is_noticed(tmp_path):
    path, content = tmp_path / "x.json", {"statistics": {"mean": [0.125, -3.5]}, "name": "a"}
    write_json(path, content)
    assert read_json(path) == content
    written = path.read_bytes()
    for position in range(len(written)):
        path.write_bytes(written[:position] + bytes([written[position] ^ 1]) + written[position + 1 :])
        try:
            read = read_json(path)
        except ValueError:
            continue
        # White space, and the name of the key that holds the hash.
        assert {name: read[name] for name in content} == content


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "[]"])
@pytest.mark.parametrize("name", ["x.npz", "x.safetensors"])
def test_damaged_arrays_and_tensors_are_named_with_the_way_out(tmp_path, name, damage):
    path = tmp_path / name
    if name == "x.npz":
        np.savez(path, a=np.arange(100))
        assert read_arrays(path)["a"].tolist() == [*range(100)]
    else:
        save_file({"a": torch.arange(100)}, path)
        assert read_tensors(path)["a"].tolist() == [*range(100)]
    data = path.read_bytes()
    # Of a safetensors file its header: hashes are for the rest.
    position = 20 if name == "x.safetensors" else len(data) // 2
    flipped = data[:position] + bytes([data[position] ^ 64]) + data[position + 1 :]
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flipped": flipped, "[]": b"[]"}[damage])
    with pytest.raises(ValueError, match=r"x\.\w+ is damaged \(.*\); delete it$"):
        read_arrays(path, "delete it") if name == "x.npz" else read_tensors(path, "delete it")


def test_a_folder_is_removed_under_another_name_and_of_a_link_the_link_alone(tmp_path, monkeypatch):
    (tmp_path / "made").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed
        remove_folder(tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == [".made.replaced"]
    (tmp_path / "link").symlink_to(tmp_path / ".made.replaced")
    remove_folder(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == [".made.replaced"]


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSYS, None), (errno.ENOLCK, "run a: No locks available on its disk; name a folder")],
)
def test_a_disk_without_locks(tmp_path, monkeypatch, number, message):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = tmp_path / ".lock"
    if message:
        with pytest.raises(OSError, match=message), locked(lock, "run a"):
            pass
    else:
        with locked(lock, "run a"):
            # Another machine's lock file may be a dead process'.
            lock.write_text("1\nelsewhere\n")
            with (
                pytest.raises(FileExistsError, match=r"delete .*\.lock only if there is no such"),
                locked(lock, "run a"),
            ):
                pass


def test_a_taken_folder_is_refused_in_one_sentence(tmp_path):
    assert is_missing_or_empty(tmp_path)
    assert is_missing_or_empty(tmp_path / "missing")
    (tmp_path / "mine.txt").touch()
    assert not is_missing_or_empty(tmp_path)
    assert not is_missing_or_empty(tmp_path / "mine.txt")
    assert folder_taken("output_dir a", missing="b.json") == (
        "output_dir a holds something else (no b.json); name a new folder"
    )
    assert folder_taken("output_dir a", "is not empty") == "output_dir a is not empty; name a new folder"


def test_on_windows_no_folder_is_opened_and_no_open_file_unlinked(tmp_path, monkeypatch):
    """Windows refuses both, and syncs only a file that is open for writing."""
    opened, unlinked = {}, []

    def open_like_windows(path, flags, *args):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        opened[Path(path).name] = flags
        return os_open(path, flags, *args)

    os_open = os.open
    monkeypatch.setattr(storage, "_ON_WINDOWS", True)
    monkeypatch.setattr(os, "open", open_like_windows)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: unlinked.append(path))
    with locked(tmp_path / ".lock", "run a"), new_folder(tmp_path / "made") as partial:
        (partial / "a.txt").write_text("a")
    assert (tmp_path / "made" / "a.txt").read_text() == "a"
    assert opened["a.txt"] == os.O_RDWR
    assert not unlinked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("caf\udce9", "output_dir '.*caf.udce9': a name of characters that are not UTF-8"),
        ("a\0b", "a name of characters that are not UTF-8"),
        ("none/../a", "none/../a: there is no folder .*/none/.."),
    ],
)
def test_a_folder_that_cannot_be_named_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        check_folder(tmp_path / name, "output_dir")
