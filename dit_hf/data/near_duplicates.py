"""Find near copies among photographs, such as those of a burst, by a perceptual hash."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
from datasets import Dataset

from ..pipelines.image_inputs import open_image, upright
from .parallel import map_rows
from .sources import Source
from .stored_images import stored_bytes

NEAR_DUPLICATE = "near duplicate of an earlier image"
# Bits of 64 in which the hashes of two photographs may differ. Unrelated ones differ in about 32, re-encoded or
# slightly brightened copies in 0 to 4.
MAX_DISTANCE = 6
_HASHED_SIDE = 256


def note_near_duplicates(source: Source, drop: bool) -> Source:
    """Count the near copies among the images of a source in its plan and, if asked, leave out all but the first.

    Args:
        source: The opened source; its plan gets a note if there are any.
        drop: Whether to leave them out.

    Raises:
        ValueError: if the package that hashes is not installed.
    """
    copies = near_duplicates(source.rows)
    if not copies:
        return source
    ids = source.rows["id"][:]
    first, original = next(iter(copies.items()))
    advice = "left out" if drop else "--drop_near_duplicates keeps one of each"
    source.plan.contents.choices.append(
        f"{len(copies):,} images are near copies of others (first {ids[first]} of {ids[original]}); {advice}"
    )
    if not drop:
        return source
    left_out = source.left_out + [(ids[row], NEAR_DUPLICATE) for row in copies]
    rows = source.rows.select([row for row in range(len(ids)) if row not in copies])
    return dataclasses.replace(source, rows=rows, left_out=left_out)


def near_duplicates(rows: Dataset) -> dict[int, int]:
    """Return, for each row that is a near copy of an earlier one, the first row of its kind.

    Images that cannot be read are no copies of any.

    Raises:
        ValueError: if the package that hashes is not installed.
    """
    hashes = _hash_all(rows)
    kept, kept_rows = np.zeros(len(hashes), np.uint64), np.zeros(len(hashes), np.int64)
    count, copies = 0, {}
    for row, value in enumerate(hashes):
        if value is None:
            continue
        distances = np.bitwise_count(kept[:count] ^ np.uint64(value))
        if count and distances.min() <= MAX_DISTANCE:
            copies[row] = int(kept_rows[distances.argmin()])
        else:
            kept[count], kept_rows[count] = value, row
            count += 1
    return copies


def _hash_all(rows: Dataset) -> list[int | None]:
    """Return the perceptual hash of each image, 64 bits, None if it cannot be read."""
    try:
        import imagehash
    except ImportError as error:
        raise ValueError(f"near duplicates are found by one more package: pip install ImageHash ({error})") from error

    def hash_image(row: dict[str, Any]) -> int | None:
        # Broken bytes make decoders raise anything; encoding names the reason.
        with contextlib.suppress(Exception), open_image(stored_bytes(row["image"]) or b"") as image:
            image.draft("L", (_HASHED_SIDE, _HASHED_SIDE))  # JPEG is decoded at a fraction of its size
            return int(str(imagehash.phash(upright(image))), 16)
        return None

    return [*map_rows(hash_image, rows.select_columns(["image"]), "looking for near copies", "images")]
