"""Replace the ids of a source, which are paths, by hashes of the images' content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from typing import Any

from datasets import Value

from ..progress import hidden_progress_bars
from .parallel import map_rows
from .sources import Source
from .stored_images import stored_bytes

DIGITS = 20
COPY = "copy of an earlier image"


def with_anonymous_ids(source: Source) -> Source:
    """Return a source whose ids are hashes of the images' bytes, 20 hexadecimal digits; reads every image.

    Of several images with the same bytes the first is kept. The plan names no path of an image any more; the list of
    what is left out does.
    """
    rows, ids = source.rows, source.rows["id"][:]

    def hash_image(row: dict[str, Any]) -> str:
        data = None
        with contextlib.suppress(OSError):  # it cannot be encoded either, which names the reason
            data = stored_bytes(row["image"])
        return hashlib.sha256(row["id"].encode() if data is None else data).hexdigest()[:DIGITS]

    hashes = [*map_rows(hash_image, rows.select_columns(["id", "image"]), "hashing", "images")]
    first = {name: row for row, name in reversed(list(enumerate(hashes)))}
    kept = sorted(first.values())
    copies = [(ids[row], COPY) for row, name in enumerate(hashes) if first[name] != row]

    names: Any = [hashes[row] for row in kept]  # datasets types it as an array
    with hidden_progress_bars():
        anonymous = rows.select(kept).remove_columns("id").add_column("id", names, feature=Value("string"))
    source.plan.examples.clear()
    digest = hashlib.sha256("\n".join([source.sha256, *hashes]).encode()).hexdigest()
    return dataclasses.replace(
        source, rows=anonymous.select_columns(rows.column_names), left_out=source.left_out + copies, sha256=digest
    )
