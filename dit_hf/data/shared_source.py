"""Open a source once for all ranks: the first one lists it, the others map what it found."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import config, load_from_disk

from ..devices import on_first_rank
from ..progress import hidden_progress_bars
from .sources import Source


def open_on_first_rank(work: Callable[[], Source]) -> Source:
    """Call `work`, which opens or changes a source, on the first rank, and return its result on all ranks.

    The other ranks of this machine read the rows from the first one's files. Those of other machines, which may not
    see them, call `work` too.

    Raises:
        Exception: what `work` raised on the first rank, on all of them.
    """
    state = PartialState()
    if state.num_processes == 1:
        return work()
    folder = Path(config.HF_DATASETS_CACHE) / f"rows-{uuid.uuid4()}"
    try:
        opened = on_first_rank(lambda: _write_rows(work(), folder))
        # As bytes, because unpickling opens files, which must not fail inside of the broadcast.
        (pickled,) = broadcast_object_list([pickle.dumps(opened)])
        if opened is None:
            try:
                opened = pickle.loads(pickled)
            except FileNotFoundError:  # on another machine
                opened = work()
        state.wait_for_everyone()
    finally:
        if state.is_main_process:  # what is mapped stays readable
            shutil.rmtree(folder, ignore_errors=True)
    return opened


def _write_rows(source: Source, folder: Path) -> Source:
    """Return a source whose rows are read from files, which ranks can share."""
    # Images with their bytes are mapped from files already, which would be copied.
    if any(image is not None and image["bytes"] is not None for image in source.rows[:100]["image"]):
        return source
    with hidden_progress_bars():
        source.rows.save_to_disk(folder)
    return dataclasses.replace(source, rows=load_from_disk(folder))
