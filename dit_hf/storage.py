"""Atomic writes, manifests and locks, so that nothing half-written is ever read, and one-line errors for failures."""

from __future__ import annotations

import contextlib
import difflib
import errno
import filecmp
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file

MANIFEST = "manifest.json"
# Bytes up to which the files of a manifest are always compared by content: it takes no time.
SMALL_FILE = 2**20
_ON_WINDOWS = os.name == "nt"
_OWN_SHA256 = "json_sha256"  # the key of the hash of a JSON file's other keys


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` to fill; when the block succeeds, sync it and move it to `final`.

    A folder that already exists at `final` stays until then. What an interrupted call left beside it is removed first.
    """
    partial = partial_folder(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_in_place(partial, final)


def partial_folder(final: Path) -> Path:
    """Return the folder beside `final` (beside its target, if `final` is a link) in which it is written.

    Raises:
        OSError: if `final` is a mount point, which cannot be replaced by renaming.
    """
    final = Path(final).resolve()
    if os.path.ismount(final):
        raise OSError(f"{final} is a mount point; name a folder inside it")
    return final.with_name(f".{final.name}.partial")


def put_in_place(partial: Path, final: Path) -> None:
    """Sync everything in `partial` and rename it to `final`; the old content is deleted once the new one is there."""
    final = Path(final).resolve()
    # Before the rename: a crash of the machine must not leave a folder in place whose files are still empty.
    for path in [*partial.rglob("*"), partial]:
        sync(path)

    # A folder that is not empty cannot be renamed over, so the old one moves aside first.
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def check_folder(folder: Path, place: str) -> None:
    """Refuse a file, or a link that leads nowhere or to itself, as a folder to write.

    Raises:
        FileExistsError: naming `place`, the option.
        ValueError: for a name that cannot be written into cards and logs, which are UTF-8, or that no folder can have.
    """
    if "\0" in str(folder) or not _is_unicode(str(folder)):
        raise ValueError(f"{place} {str(folder)!a}: a name of characters that are not UTF-8; name another folder")
    # Resolving such a path and opening it lead to two different places.
    if ".." in folder.parts and not folder.parent.exists():
        raise ValueError(f"{place} {folder}: there is no folder {folder.parent}")
    if folder.is_symlink() and not folder.exists():
        raise FileExistsError(folder_taken(f"{place} {folder}", "is a link that leads nowhere"))
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(folder_taken(f"{place} {folder}", "is a file"))


def _is_unicode(name: str) -> bool:
    """Check that a name has none of the surrogates by which Python represents bytes that are not UTF-8."""
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)


def is_missing_or_empty(folder: Path) -> bool:
    """Check whether `folder` is missing or empty, so that `new_folder` replaces nothing."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def check_own_folder(folder: Path, marker: str) -> None:
    """Refuse an `output_dir` that holds something other than what is recognized by the file `marker`.

    Raises:
        FileExistsError: naming the folder.
    """
    if not (is_missing_or_empty(folder) or (folder / marker).is_file()):
        raise FileExistsError(folder_taken(f"output_dir {folder}", missing=marker))


def folder_taken(place: str, problem: str = "holds something else", missing: str | None = None) -> str:
    """Return the sentence that refuses to write to `place`, such as "output_dir runs/a".

    Args:
        place: The option and the folder that it names.
        problem: The reason, as a predicate.
        missing: The file by which the folder would have been recognized.
    """
    return f"{place} {problem}{f' (no {missing})' if missing else ''}; name a new folder"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; when the block succeeds, sync the file and move it to `path`."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    sync(partial)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, replacing the file that is there."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object atomically, with a hash of its content by which `read_json` notices any change."""
    write_text(path, json.dumps({**content, _OWN_SHA256: hash_json(content)}, indent=2) + "\n")


def write_manifest(folder: Path, name: str = MANIFEST, skip: Collection[str] = (), **metadata: Any) -> None:
    """Write a JSON file with `metadata` and the size and SHA-256 of every file of `folder`.

    Args:
        folder: The folder that the manifest describes.
        name: File name of the manifest inside `folder`.
        skip: Files and subfolders that are not listed.
        metadata: Further keys of the manifest.
    """
    # An earlier call may have been killed while it wrote the manifest.
    (folder / f".{name}.partial").unlink(missing_ok=True)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (name, *skip)
    }
    write_json(folder / name, {**metadata, "files": files})


def read_manifest(
    folder: Path,
    name: str = MANIFEST,
    hashes: bool | str = False,
    editable: Collection[str] = (),
    remedy: str = "",
    keys: Collection[str] = (),
) -> dict[str, Any]:
    """Read what `write_manifest` wrote and compare the files with it.

    Args:
        folder: The folder that the manifest describes.
        name: File name of the manifest inside `folder`.
        hashes: Compare the SHA-256 of all files too, which reads every byte, or of those of a subfolder; without it
            the sizes of large files alone are compared.
        editable: Files that are their owner's to change or delete, and are not compared.
        remedy: What to do if something is damaged.
        keys: Keys that the manifest must have.

    Raises:
        ValueError: naming the file and `remedy`, if the manifest or a file is missing or differs.
    """
    advice = f"; {remedy}" if remedy else ""
    try:
        manifest = read_json(folder / name, keys=keys)
        files = [(file, int(entry["size"]), str(entry["sha256"])) for file, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is incomplete: no readable {name}{advice}") from error
    for file, size, digest in files:
        path = folder / file
        if file in editable:
            continue
        if not path.is_file() or path.stat().st_size != size:
            problem = "is missing or has changed in size since it was written"
            raise ValueError(f"{folder} is damaged: {file} {problem}{advice}")
        is_read = size <= SMALL_FILE or (file.startswith(f"{hashes}/") if isinstance(hashes, str) else hashes)
        if is_read and sha256(path) != digest:
            raise ValueError(f"{folder} is damaged: {file} has changed in content since it was written{advice}")
    return manifest


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from anywhere.

    Raises:
        ValueError: if it is not JSON, or nested deeper than Python can follow.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read_json(path: Path, remedy: str = "", keys: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object that one of our commands wrote.

    Args:
        path: The file.
        remedy: What to do if it is damaged.
        keys: Keys that it must have.

    Raises:
        ValueError: naming the file and `remedy`, if it is damaged: cut, of other content or of another type.
        OSError: if it cannot be read.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("not an object")
        digest = content.pop(_OWN_SHA256, None)
        if digest not in (None, hash_json(content)):
            raise ValueError("its content has changed since it was written")
        missing = [key for key in keys if key not in content]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}){f'; {remedy}' if remedy else ''}") from error
    return content


def read_tensors(path: Path, remedy: str = "") -> dict[str, torch.Tensor]:
    """Read a safetensors file of ours, onto the CPU.

    Raises:
        ValueError: naming the file and `remedy`, if it is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}){f'; {remedy}' if remedy else ''}") from error


def read_arrays(path: Path, remedy: str = "") -> dict[str, np.ndarray]:
    """Read a npz file of ours, whose checksums are compared.

    Raises:
        ValueError: naming the file and `remedy`, if it is damaged.
        OSError: if it cannot be read.
    """
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except OSError:
        raise
    except Exception as error:  # numpy, zipfile and zlib have an exception for each kind of damage
        raise ValueError(f"{path} is damaged ({first_line(error)}){f'; {remedy}' if remedy else ''}") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder of ours: of a link the link alone. A half-removed folder never keeps the name."""
    if folder.is_symlink():
        folder.unlink()
        return
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file of ours, which is never written to again, to `target`, or copy it where links do not work.

    What is at `target` is replaced. A half-made copy has another name.
    """
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        with new_file(target) as partial:
            shutil.copyfile(source, partial)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def same_content(one: Path, other: Path) -> bool:
    """Check whether two files have the same bytes."""
    return filecmp.cmp(one, other, shallow=False)


def nearest_folder(path: Path) -> Path | None:
    """Return the existing folder beside `path` whose name is most like its own, or None if none is like it."""
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1)
    return path.parent / near[0] if near else None


def hash_json(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a dict that can be written as JSON; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content or a folder's entries have reached the disk."""
    if _ON_WINDOWS and path.is_dir():  # which it does not open
        return
    # Windows syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if _ON_WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(lock: Path, place: str) -> Iterator[None]:
    """Lock other processes out of `place`; the system releases the lock when this process dies.

    Raises:
        FileExistsError: if another process holds the lock.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        with warnings.catch_warnings():
            # On a disk without locks the file itself is the lock, which a killed process leaves behind.
            warnings.filterwarnings("ignore", "flock not supported")
            held.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(
            f"{place} is being written by another process; wait for it (delete {lock} only if there is no such "
            "process)"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOLCK:
            message = f"{place}: {os.strerror(errno.ENOLCK)} on its disk; name a folder on another one"
            raise OSError(message) from error
        raise
    try:
        yield
    finally:
        # Unlink while the lock is still held, so that it cannot be another process' file that is removed. On Windows,
        # which unlinks no open file, `release` does it.
        if not _ON_WINDOWS:
            lock.unlink(missing_ok=True)
        held.release()


def locked_beside(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Lock other processes out of a folder that is written as a whole (see `new_folder`), by a file beside it."""
    final = folder.resolve()
    return locked(final.with_name(f".{final.name}.lock"), f"output_dir {folder}")


@contextlib.contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Turn disk errors raised while `place` is written into one line that says what to do.

    Raises:
        OSError: for a full disk or a place that cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        # A SafetensorError has the number only in its message (read in safetensors 0.8).
        match = re.search(r"\(os error (\d+)\)", str(error))
        number = error.errno if isinstance(error, OSError) else int(match[1]) if match else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "make room and call again: what is finished is kept"
        elif number in (errno.EACCES, errno.EROFS, errno.EPERM):
            advice = "name a folder that can be written"
        else:
            raise
        raise OSError(f"{place}: {os.strerror(number)}; {advice}") from error


@contextlib.contextmanager
def temporary_folder(purpose: str) -> Iterator[Path]:
    """Make a folder for temporary files, and remove it in the end.

    Args:
        purpose: Part of its name.

    Raises:
        OSError: naming TMPDIR, if there is no room for it.
    """
    place = f"the temporary folder {tempfile.gettempdir()} (TMPDIR)"
    with disk_errors(place), tempfile.TemporaryDirectory(prefix=f"dit_hf-{purpose}-") as folder:
        yield Path(folder)


def is_lfs_pointer(path: Path) -> bool:
    """Check for the few lines that a clone without git-lfs has in the place of a large file."""
    with open(path, "rb") as file:
        return file.read(32).startswith(b"version https://git-lfs")


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, without its full stop."""
    lines = (line.strip().removesuffix(".") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def shipped_file(name: str) -> Path:
    """Return the path of a file that comes with dit_hf: inside the package in a wheel, beside it in a clone.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    package = Path(__file__).parent
    for root in (package, package.parent):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{name}: no such file")
