"""Statistics of references, kept in the Hub's cache folder for later evaluations by the same images and network."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from huggingface_hub import constants

from ..storage import link_or_copy, locked_beside, new_folder, read_manifest
from .reference import INFO, STATISTICS


def is_kept(statistics: Path) -> bool:
    """Check whether an earlier evaluation has kept statistics of this name, which tells their content."""
    return (_kept(statistics) / INFO).is_file()


def restore(statistics: Path) -> None:
    """Put statistics that an earlier evaluation kept in the place of those that are missing at `statistics`."""
    kept = _kept(statistics)
    if (statistics / INFO).is_file() or not (kept / INFO).is_file():
        return
    try:
        read_manifest(kept, INFO, hashes=True)
    except ValueError:  # damaged: they are computed and kept again
        shutil.rmtree(kept)
        return
    _copy(kept, statistics)
    print(f"reference: statistics of an earlier evaluation, from {kept}", flush=True)


def keep(statistics: Path) -> None:
    """Keep finished statistics for later evaluations, unless they are there or the cache cannot be written."""
    # A lock that another process holds is an OSError, too.
    with contextlib.suppress(OSError):
        if not is_kept(statistics):
            with locked_beside(_kept(statistics)):
                _copy(statistics, _kept(statistics))


def _kept(statistics: Path) -> Path:
    return Path(constants.HF_ASSETS_CACHE) / "dit_hf" / "references" / statistics.name


def _copy(source: Path, target: Path) -> None:
    """Copy statistics, as further names of the same files where the disk allows that: they are never written to."""
    with new_folder(target) as partial:
        for name in (STATISTICS, INFO):
            link_or_copy(source / name, partial / name)
