"""Turn the columns of a source into conditions: binary attributes and classes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Value

MAX_CLASSES = 1000
# True and False need no entries, as they equal 1 and 0. CelebA's lists have 1 and -1.
_BINARY = {1: 1, 0: 0, -1: 0, "1": 1, "0": 0, "-1": 0, "true": 1, "false": 0}
# Not "001" and the like: these are names.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)")


@dataclass
class Column:
    """Column that may become a condition.

    Attributes:
        values: One value per row; None is missing.
        labels: Names of the values, if the source declares the column as classes; values are then ids.
    """

    values: list[Any]
    labels: list[str] | None = None


def infer_condition(
    values: Sequence[Any], labels: list[str] | None = None
) -> tuple[list[int], Value | ClassLabel] | None:
    """Return a column as condition ids (-1 for a missing value) and their feature; None if it cannot be a condition.

    True and false, 1 and 0, and CelebA's 1 and -1 become int8. Up to 1,000 whole numbers or names that each appear at
    least twice on average become classes: numbers below 1,000 are their own ids, others (`001` too) become names.
    Free text, running numbers, negative numbers and measurements are not conditions.
    """
    # Classes that the source declares.
    if labels is not None:
        return [-1 if value is None else value for value in values], ClassLabel(names=labels)

    # Binary attributes.
    values = [_simplified(value) for value in values]
    distinct = {value for value in values if value is not None}
    if not distinct or not all(isinstance(value, bool | int | float | str) for value in distinct):
        return None
    if all(value in _BINARY for value in distinct):
        return [-1 if value is None else _BINARY[value] for value in values], Value("int8")

    # Neither binary nor classes.
    enough_and_few = 1 < len(distinct) <= min(MAX_CLASSES, len(values) // 2)
    if not enough_and_few or any(isinstance(value, float) for value in distinct):
        return None
    numbers = [int(value) for value in distinct if _NUMBER.fullmatch(str(value))]
    if any(number < 0 for number in numbers):
        return None

    # Classes by number, then by name.
    if len(numbers) == len(distinct) and max(numbers) < MAX_CLASSES:
        return [-1 if value is None else int(value) for value in values], ClassLabel(num_classes=max(numbers) + 1)
    names = sorted({str(value) for value in distinct})
    ids = {name: number for number, name in enumerate(names)}
    return [-1 if value is None else ids[str(value)] for value in values], ClassLabel(names=names)


def _simplified(value: Any) -> Any:
    """Return a value of a text file in its simplest form: no spaces around it, `True` in lower case, empty as None."""
    if not isinstance(value, str):
        return value if isinstance(value, bool | int | float) or value is None else str(value)
    value = value.strip()
    return value.lower() if value.lower() in _BINARY else value or None


def remap_class_ids(
    name: str, ids: np.ndarray, data_names: list[str] | None, model_names: list[str] | None
) -> np.ndarray:
    """Map ids of a condition from the classes of a dataset to those of a model, by the names of the classes.

    The ids stay as they are if either has no names or names that are only numbers, or if equally many names have none
    in common, as with WordNet ids and words.

    Args:
        name: Name of the condition, for the error.
        ids: Integer ids [images] in the order of `data_names`.
        data_names: Names of the dataset's classes, in the order of their ids.
        model_names: Names of the model's classes, in the order of their ids.

    Raises:
        ValueError: for a class of `ids` that the model does not have.
    """
    if data_names is None or model_names is None or data_names == model_names:
        return ids
    unknown = [data_names[number] for number in np.unique(ids) if data_names[number] not in model_names]
    if unknown:
        numbered = any(names == [str(number) for number in range(len(names))] for names in (data_names, model_names))
        if numbered or (len(data_names) == len(model_names) and not {*data_names} & {*model_names}):
            return ids
        valid = ", ".join(model_names[:10]) + (", ..." if len(model_names) > 10 else "")
        raise ValueError(f"{name}={unknown[0]!r} is unknown to the model; valid names are {valid}")

    # -1 stands for classes that `ids` does not contain.
    mapping = [model_names.index(value) if value in model_names else -1 for value in data_names]
    return np.array(mapping, ids.dtype)[ids]
