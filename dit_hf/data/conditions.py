"""What a source says of its images as conditions: yes/no attributes and classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Value

MAX_CLASSES = 1000
_BINARY = {1: 1, 0: 0, -1: 0, "1": 1, "0": 0, "-1": 0, "true": 1, "false": 0}  # True is 1
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")


@dataclass
class Column:
    """A column that may become a condition: one value a row, and the names of its values where it is a class."""

    values: list[Any]
    labels: list[str] | None = None


def infer_condition(
    values: Sequence[Any], labels: list[str] | None = None
) -> tuple[list[int], Value | ClassLabel] | None:
    """A column as a condition: ids (-1 where there is no value) and the feature; None if it cannot be one.

    Yes and no (also 1 and 0, CelebA's 1 and -1) are int8. Whole numbers and names of which each appears at least twice
    on average are classes, up to 1,000 of them: numbers below 1,000 by themselves, others (`001` too) by their names.
    Free text, running numbers, numbers below 0, measurements and the like are no conditions.
    """
    if labels is not None:
        return [-1 if value is None else value for value in values], ClassLabel(names=labels)
    values = [_simplified(value) for value in values]
    known = {value for value in values if value is not None}
    if not known or not all(isinstance(value, bool | int | float | str) for value in known):
        return None
    if all(value in _BINARY for value in known):
        return [-1 if value is None else _BINARY[value] for value in values], Value("int8")
    if not 1 < len(known) <= min(MAX_CLASSES, len(values) // 2) or any(isinstance(value, float) for value in known):
        return None
    numbers = [int(value) for value in known if _NUMBER.fullmatch(str(value))]
    if any(number < 0 for number in numbers):
        return None
    if len(numbers) == len(known) and max(numbers) < MAX_CLASSES:
        return [-1 if value is None else int(value) for value in values], ClassLabel(num_classes=max(numbers) + 1)
    names = sorted({str(value) for value in known})
    ids = {name: number for number, name in enumerate(names)}
    return [-1 if value is None else ids[str(value)] for value in values], ClassLabel(names=names)


def _simplified(value: Any) -> Any:
    """Strings as lists in files have them: `True` in any case, empty as None."""
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float) or value is None else str(value)
    value = value.strip()
    return value.lower() if value.lower() in _BINARY else value or None


def remap_class_ids(name: str, ids: np.ndarray, there: list[str] | None, here: list[str] | None) -> np.ndarray:
    """Ids of the condition `name` of one data set as those of another, by the names of their values.

    Where one of them has no names, or mere numbers for such, and where of equally many none is the same (as numbers of
    synsets and words are not), the ids are those of both.

    Raises:
        ValueError: for a value whose name is not known here.
    """
    if there is None or here is None or there == here:
        return ids
    unknown = [there[number] for number in np.unique(ids) if there[number] not in here]
    if unknown:
        numbered = any(names == [str(number) for number in range(len(names))] for names in (there, here))
        if numbered or (len(there) == len(here) and not {*there} & {*here}):
            return ids
        known = ", ".join(here[:10]) + (", ..." if len(here) > 10 else "")
        raise ValueError(f"{name}={unknown[0]!r} is unknown to the model; known are {known}")
    return np.array([here.index(value) if value in here else -1 for value in there], ids.dtype)[ids]
