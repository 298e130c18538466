# Copyright 2026 The dit_hf authors. Licensed under the Apache License, Version 2.0.
"""Attributes that a call requests, and the condition ids that the model takes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

AttributeValue = bool | int | str | None
Attributes = Mapping[str, AttributeValue]


def check_attributes(
    attributes: Attributes | Sequence[Attributes] | None, batch_size: int, name: str = "attributes"
) -> None:
    """Check that `attributes`, the argument of this name, is None, a dict or a list of dicts that fits `batch_size`.

    Raises:
        ValueError: for another type, a `batch_size` that differs from the number of rows, or no image at all.
    """
    rows = [attributes] if attributes is None or isinstance(attributes, Mapping) else attributes
    if not isinstance(rows, list | tuple) or not all(row is None or isinstance(row, Mapping) for row in rows):
        raise ValueError(f"expected a dict like {{'Smiling': True}} or a list of dicts, got {name}={attributes!r}")
    if isinstance(attributes, Sequence) and batch_size not in (1, len(attributes)):
        raise ValueError(f"batch_size={batch_size}, but attributes has {len(attributes)} rows; leave one out")
    if batch_size < 1 or (attributes is not None and len(rows) == 0):
        raise ValueError("expected at least one image: batch_size is below 1, or attributes is empty")


def check_condition_labels(labels: object, conditions: Mapping[str, int]) -> None:
    """Check that `labels` names every value of conditions: a dict of lists of text.

    Raises:
        ValueError: for another type, or a condition that has more or fewer values than names.
    """
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"expected condition_labels to be a dict such as {{'class': ['cat', 'dog']}}, got {labels!r:.80}"
        )
    for name, values in labels.items():
        if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"expected condition_labels[{name!r}] to be a list of names, got {values!r:.80}")
        if len(values) != conditions.get(name, len(values)):
            raise ValueError(
                f"condition_labels has {len(values)} names for {name!r}, which has {conditions[name]} values"
            )


def attribute_rows(
    attributes: Attributes | Sequence[Attributes] | None, batch_size: int, num_images_per_row: int = 1
) -> list[Attributes]:
    """Return one row of attributes an image, each row of `attributes` repeated `num_images_per_row` times in a row."""
    if num_images_per_row < 1:
        raise ValueError(f"num_images_per_prompt={num_images_per_row} must be at least 1")
    rows = [attributes] * batch_size if attributes is None or isinstance(attributes, Mapping) else attributes
    return [row or {} for row in rows for _ in range(num_images_per_row)]


def condition_ids(
    rows: Sequence[Attributes], conditions: Mapping[str, int], labels: Mapping[str, list[str]]
) -> torch.Tensor:
    """Return the condition ids of rows of attributes, int64 [rows, conditions].

    Args:
        rows: Attributes by name; a name left out is the null condition.
        conditions: Name to number of values, in the order of the model's config.
        labels: Name to the names of its values, for the conditions that have them.

    Raises:
        ValueError: for a name or value that the model does not have; the message lists the valid ones.
    """
    # All null to begin with: the null id of a condition is its number of values.
    ids = torch.tensor([list(conditions.values())] * len(rows), dtype=torch.int64)
    columns = {name: column for column, name in enumerate(conditions)}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if name not in conditions:
                valid = f"valid names are {', '.join(conditions)}" if conditions else "this model is unconditional"
                raise ValueError(f"attribute {name!r} is unknown; {valid}")
            ids[number, columns[name]] = _value_id(name, value, conditions[name], labels.get(name))
    return ids


def _value_id(name: str, value: AttributeValue, count: int, labels: list[str] | None) -> int:
    """Return the id of a value of the condition `name`, which has `count` values."""
    if value is None:
        return count  # the null condition
    if isinstance(value, str):
        if labels is None or value not in labels:
            valid = ", ".join(labels) if labels else f"0 to {count - 1}"
            raise ValueError(f"{name}={value!r} is unknown; valid values are {valid}")
        return labels.index(value)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):  # a list, NaN, infinity and the like
        number = -1
    # The comparison with `value` refuses 0.9, which int() would truncate.
    if number != value or not 0 <= number < count:
        raise ValueError(f"expected {name} between 0 and {count - 1}, got {value}")
    return number
