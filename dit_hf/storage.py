"""How files are written so that nothing half-written is ever read, and what is said where that fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield a folder beside `final` to fill; when the block ends well it is synced and takes `final`'s place.

    A folder that already stands at `final` stays until then; what an interrupted call left beside it is removed.
    """
    partial = partial_folder(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_in_place(partial, final)


def partial_folder(final: Path) -> Path:
    """The folder beside `final`, or beside what it is a link to, in which it is written.

    Raises:
        OSError: if `final` is a mount point, whose place no folder can take.
    """
    final = Path(final).resolve()
    if os.path.ismount(final):
        raise OSError(f"{final} is a mount point; name a folder inside it")
    return final.with_name(f".{final.name}.partial")


def put_in_place(partial: Path, final: Path) -> None:
    """Sync everything in `partial` and rename it to `final`, whose old content goes after the new one stands."""
    final = Path(final).resolve()
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether nothing is there yet, or an empty folder: what `new_folder` may take without a loss."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; when the block ends well the file is synced and takes `path`'s place."""
    partial = path.with_name(f".{path.name}.partial")
    yield partial
    sync(partial)
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Replace the file at `path` by `text` in one step."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_manifest(folder: Path, name: str = MANIFEST, skip: str | None = None, **facts: Any) -> None:
    """Write `facts`, and size and SHA-256 of every file of `folder` but those in its subfolder `skip`, as `name`."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in (name, skip)
    }
    write_text(folder / name, json.dumps({**facts, "files": files}, indent=2) + "\n")


def read_manifest(folder: Path, name: str = MANIFEST, hashes: bool = False) -> dict[str, Any]:
    """Read what `write_manifest` wrote and compare sizes (and `hashes`, which reads every byte).

    Raises:
        ValueError: if the manifest or a file is missing or differs, naming it.
    """
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is not whole: no readable {name}") from error
    for file, expected in manifest["files"].items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != expected["size"]:
            raise ValueError(f"{folder} is damaged: {file} is missing or has another size than when it was written")
        if hashes and sha256(path) != expected["sha256"]:
            raise ValueError(f"{folder} is damaged: {file} has other content than when it was written")
    return manifest


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(facts: dict[str, Any]) -> str:
    """SHA-256 of what can be JSON, in whatever order it is written."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(lock: Path, place: str) -> Iterator[None]:
    """Keep other processes out of `place`; the system lets go of the lock when this process dies.

    Raises:
        FileExistsError: if another process holds it.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"{place} is being written by another process; wait for it") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()


@contextlib.contextmanager
def disk_errors(place: str) -> Iterator[None]:
    """Errors of the disk while `place` is written, in words that say what to do.

    Raises:
        OSError: for a full disk, or a place that cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        known = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors tells
        number = error.errno if isinstance(error, OSError) else int(known[1]) if known else None
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            what = "make room and call again: what is finished is kept"
        elif number in (errno.EACCES, errno.EROFS, errno.EPERM):
            what = "name a folder that can be written"
        else:
            raise
        raise OSError(f"{place}: {os.strerror(number)}; {what}") from error


def first_line(error: Exception) -> str:
    """What went wrong, in one line without a full stop, for errors of others that say more than that."""
    lines = (line.strip().removesuffix(".") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def shipped_file(name: str) -> Path:
    """A file that comes with dit_hf: inside the package in a wheel, beside it in a clone.

    Raises:
        FileNotFoundError: if there is none of that name.
    """
    package = Path(__file__).parent
    for root in (package, package.parent):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f"{name}: no such file")
