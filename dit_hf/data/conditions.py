"""Turn the columns of a source into conditions: yes/no attributes and classes."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import numpy as np
from datasets import ClassLabel, Value

from .contents import Column, shortened

MAX_CLASSES = 1000  # of a column that does not declare its classes and was not requested
_YES_NO = {"1": 1, "0": 0, "true": 1, "false": 0, "yes": 1, "no": 0, "1.0": 1, "0.0": 0}
# Columns of texts that tell what an image shows, in the field's data sets; other texts of many words are such too.
_FREE_TEXT = {"caption", "captions", "text", "texts", "prompt", "prompts", "description", "descriptions"}
_MAX_WORDS = 4  # of a class's name, on average
_MISSING = {"", "na", "n/a", "nan", "null", "none", "<na>"}
# Not "001" and the like: these are names.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.0+)?")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?", re.IGNORECASE)


def infer_condition(name: str, column: Column, requested: bool = False) -> tuple[np.ndarray, Value | ClassLabel] | str:
    """Return a column as condition ids and their feature, or the reason why it is not a condition.

    1 and 0, true and false, yes and no become int8 attributes (of CelebA's lists also 1 and -1). Names that appear at
    least twice on average become classes, in alphabetical order. Whole numbers are classes only if the source declares
    them so or the column is requested; measurements never are. Captions are classes only if the column is requested.

    Args:
        name: Name of the column.
        column: The column.
        requested: Whether the user named it as a condition.

    Returns:
        Ids, int64 [rows], of which -1 is missing, and the feature.
    """
    try:
        values, rows = column.encode()
    except TypeError:
        return "lists or structures"

    # Classes that the source declares with names.
    if column.labels is not None:
        # -1 is how datasets on the Hub spell that a test image has no label.
        own = [-1 if _is_missing(value) else max(-1, int(value)) for value in values]
        return _take(own, rows), ClassLabel(names=column.labels)

    # Names of folders are names, even if one is called NA.
    texts = [value if column.origin == "folder" else _simplified(value) for value in values]
    distinct = sorted({text for text in texts if text is not None})
    if not distinct:
        return "no values"

    # Yes and no. -1 is a third value everywhere but in CelebA's lists.
    yes_no = {**_YES_NO, "-1": 0} if column.signed else _YES_NO
    if not column.declared and all(text.lower() in yes_no for text in distinct):
        return _ids(texts, rows, {text: yes_no[text.lower()] for text in distinct}), Value("int8")

    # Numbers.
    if all(_NUMBER.fullmatch(text) for text in distinct) and not any(_is_name(text) for text in distinct):
        numbers = sorted({float(text) for text in distinct})
        span = f"{numbers[0]:g} to {numbers[-1]:g}"
        if not all(_WHOLE_NUMBER.fullmatch(text) for text in distinct):
            return f"numbers, {span}"
        if len(numbers) == 1 and not column.declared:
            return f"always {distinct[0]}"
        if not column.declared and not requested:
            return f"{len(distinct):,} values, {span} (--conditions reads them as classes)"
        number_ids, feature = _number_classes(distinct)
        return _ids(texts, rows, number_ids), feature

    # Names.
    if not requested and not column.declared and _are_captions(name, distinct):
        return f"{len(distinct):,} different texts (--conditions reads them as classes)"
    limit = len(rows) // 2 if column.declared else min(MAX_CLASSES, len(rows) // 2)
    if not requested and len(distinct) > limit:
        return f"{len(distinct):,} different texts in {len(rows):,} rows"
    if len(distinct) == 1 and not requested and not column.declared:
        return f"always {distinct[0]}"
    return _ids(texts, rows, {text: i for i, text in enumerate(distinct)}), ClassLabel(names=distinct)


def _are_captions(name: str, texts: list[str]) -> bool:
    """Check whether texts describe images, by the name of their column or by their number of words."""
    return name.lower() in _FREE_TEXT or sum(len(text.split()) for text in texts) > _MAX_WORDS * len(texts)


def _ids(texts: list[str | None], rows: np.ndarray, ids: dict[str, int]) -> np.ndarray:
    """Return the id of each row, given the position of its text; -1 is missing."""
    return _take([-1 if text is None else ids[text] for text in texts], rows)


def _take(ids: list[int], rows: np.ndarray) -> np.ndarray:
    """Return the ids at these positions; position -1 is a row without a value."""
    return np.array([*ids, -1], np.int64)[rows]


def _number_classes(distinct: list[str]) -> tuple[dict[str, int], ClassLabel]:
    """Return whole numbers as classes: their own ids if they are few and begin near 0, otherwise by name."""
    numbers = {text: int(float(text)) for text in distinct}
    if min(numbers.values()) >= 0 and max(numbers.values()) < MAX_CLASSES:
        return numbers, ClassLabel(num_classes=max(numbers.values()) + 1)
    names = sorted({*numbers.values()})
    positions = {number: i for i, number in enumerate(names)}
    return {text: positions[number] for text, number in numbers.items()}, ClassLabel(names=[*map(str, names)])


def describe_condition(ids: list[int | None], feature: Value | ClassLabel) -> str:
    """Return a condition's kind, names and counts for the plan, as `2 classes: cat 6, dog 6; 3 without a value`."""
    counts = Counter(value for value in ids if value is not None)
    without = len(ids) - counts.total()
    if isinstance(feature, ClassLabel):
        named = [f"{feature.names[number]} {count:,}" for number, count in sorted(counts.items())]
        text = f"{len(named):,} classes: {shortened(named)}"
    else:
        text = f"yes {counts[1]:,}, no {counts[0]:,}"
    return f"{text}; {without:,} without a value" if without else text


def _simplified(value: Any) -> str | None:
    """Return a value as text without spaces around it, alike in csv, jsonl and parquet; None is missing."""
    if _is_missing(value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _is_missing(value: Any) -> bool:
    if isinstance(value, float) and math.isnan(value):
        return True
    return value is None or (isinstance(value, str) and value.strip().lower() in _MISSING)


def _is_name(value: str) -> bool:
    """Check for digits that are a name, such as 001."""
    return value.isdigit() and len(value) > 1 and value.startswith("0")


def remap_class_ids(
    name: str, ids: np.ndarray, data_names: list[str] | None, model_names: list[str] | None
) -> np.ndarray:
    """Map ids of a condition from the classes of a dataset to those of a model, by the names of the classes.

    The ids stay as they are if either has no names or names that are only numbers, or if equally many names have none
    in common, as with WordNet ids and words.

    Args:
        name: Name of the condition, for the error.
        ids: Integer ids [images] in the order of `data_names`; -1 is missing and stays.
        data_names: Names of the dataset's classes, in the order of their ids.
        model_names: Names of the model's classes, in the order of their ids.

    Raises:
        ValueError: for a class of `ids` that the model does not have.
    """
    if data_names is None or model_names is None or data_names == model_names:
        return ids
    present, positions = np.unique(ids[ids >= 0]), {value: i for i, value in enumerate(model_names)}
    unknown = [data_names[number] for number in present if data_names[number] not in positions]
    if unknown:
        numbered = any(names == [str(number) for number in range(len(names))] for names in (data_names, model_names))
        if numbered or (len(data_names) == len(model_names) and not {*data_names} & {*model_names}):
            return ids
        valid = ", ".join(model_names[:10]) + (", ..." if len(model_names) > 10 else "")
        raise ValueError(f"{name}={unknown[0]!r} is unknown to the model; valid names are {valid}")

    # -1 stands for classes that `ids` does not contain; the last entry is that of a missing value.
    mapping = [positions.get(value, -1) for value in data_names]
    return np.array([*mapping, -1], ids.dtype)[ids]
