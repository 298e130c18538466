"""What was understood of a source: printed before any work, kept in `latents.json` and shown in the card."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset

from .conditions import describe_condition
from .contents import Contents, condition_names, shortened

MAX_LINES = 15
_MAX_CONDITIONS = 5  # more of them share a line
_WIDTH = 118


@dataclass
class Plan:
    """How a source is read.

    Attributes:
        name: The source's name.
        contents: What its reader returned.
        conditions: Kind, names and counts of each condition.
        counts: Number of images by split; all are `train` if there are no splits.
        left_out: Number of images and rows that cannot be used, by reason.
        examples: The first of them, by reason; empty with anonymous ids.
        faces: What was found in photographs, in one line; empty unless faces are cropped.
        added: Which images are added to a finished cache, and which of that are gone, a line each.
    """

    name: str
    contents: Contents
    conditions: dict[str, str] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    faces: str = ""
    added: list[str] = field(default_factory=list)

    def describe(self, rows: Dataset, left_out: list[tuple[str, str]]) -> None:
        """Count the rows by split and by the values of each condition, and what is left out by reason."""
        has_image = _has_image(rows)
        without = np.flatnonzero(~has_image)
        if len(without):  # encoding leaves them out
            left_out = left_out + [(image_id, "no image") for image_id in rows.select(without)["id"]]
            rows = rows.select(np.flatnonzero(has_image))
        counts = Counter(rows["split"][:] if "split" in rows.column_names else {"train": len(rows)})
        self.counts = {split: counts[split] for split in ("train", "validation", "test") if counts[split]}
        for image_id, reason in left_out:
            self.examples.setdefault(_general(reason), image_id)
        self.left_out = dict(Counter(_general(reason) for _, reason in left_out))
        features = rows.features  # copied by each access
        for name in condition_names(rows.column_names):
            if isinstance(features[name], ClassLabel):
                self._note_similar(name, features[name].names)
            origin = self.contents.columns[name].origin
            text = describe_condition(rows[name][:], features[name])
            self.conditions[name] = f"{text} ({origin})" if origin else text

    def add_faces(self, faces: str, ambiguity: str | None) -> None:
        """Add what was found in photographs, and a note of what is ambiguous."""
        self.faces = faces
        if ambiguity:
            self.contents.choices.append(ambiguity)

    def _note_similar(self, name: str, labels: list[str]) -> None:
        """Note classes whose names differ only in case, spaces or hyphens, which may be meant as one."""
        first: dict[str, str] = {}
        pairs = [(other, label) for label in labels if (other := first.setdefault(_folded(label), label)) != label]
        if pairs:
            others = f" ({len(pairs):,} such pairs)" if len(pairs) > 1 else ""
            self.contents.choices.append(f"{name}: {' and '.join(pairs[0])} are two classes{others}")

    @classmethod
    def from_dict(cls, plan: dict[str, Any], examples: dict[str, str]) -> Plan:
        """Return the plan that [`Plan.as_dict`] returned, with its examples."""
        contents = Contents(
            plan["kind"],
            image_column=plan["image_column"],
            split_origin=plan["splits"] or "",
            unused=plan["not_used"],
            choices=plan["choices"],
        )
        return cls(plan["source"], contents, plan["conditions"], plan["images"], plan["left_out"], examples)

    def as_dict(self) -> dict[str, Any]:
        """Return the whole plan for `latents.json` and [`dit_hf.describe_source`]."""
        contents = self.contents
        return {
            "source": self.name,
            "kind": contents.kind,
            "image_column": contents.image_column,
            "images": self.counts,
            **({"faces": self.faces} if self.faces else {}),
            **({"added": self.added} if self.added else {}),
            "splits": contents.split_origin or None,
            "conditions": self.conditions,
            "not_used": contents.unused,
            "left_out": self.left_out,
            "choices": contents.choices,
        }

    def lines(self) -> list[str]:
        """Return the plan as at most 15 lines; long lists end in a count."""
        contents = self.contents
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        origin = f" ({contents.split_origin})" if contents.split_origin else ""
        column = f", column {contents.image_column}" if contents.image_column else ""
        lines = [f"{self.name}: {contents.kind}{column}", f"  images      {counts}{origin}"]
        if self.faces:
            lines.append(f"  faces       {self.faces}")
        lines += [f"  added       {text}" for text in self.added]
        if not self.conditions:
            lines.append("  conditions  none")
        elif len(self.conditions) <= _MAX_CONDITIONS:
            lines += [f"  {name:<11} {text}" for name, text in self.conditions.items()]
        else:
            lines.append(f"  conditions  {shortened([*self.conditions], 6)}")
        by_reason: dict[str, list[str]] = {}
        for what, reason in contents.unused.items():
            by_reason.setdefault(reason, []).append(what)
        notes = [_not_used(whats, reason) for reason, whats in by_reason.items()]
        if self.left_out:
            notes.append(self._left_out_line())
        notes += [f"  note        {choice}" for choice in contents.choices]
        room = MAX_LINES - len(lines)
        if len(notes) > room:
            notes = [*notes[: room - 1], f"  …           {len(notes) - room + 1:,} more notes in latents.json"]
        return [_one_line(line) for line in lines + notes]

    def _left_out_line(self) -> str:
        """Return a line of what is left out by reason, with the first id of each if there is room for them."""
        plain = [f"{count:,} {reason}" for reason, count in self.left_out.items()]
        named = [
            f"{text} ({'first ' if self.left_out[reason] > 1 else ''}{self.examples[reason]})"
            if reason in self.examples
            else text
            for text, reason in zip(plain, self.left_out, strict=True)
        ]
        start = f"  left out    {sum(self.left_out.values()):,} images or rows: "
        line = start + shortened(named)
        return line if len(line) <= _WIDTH else start + shortened(plain)


def _has_image(rows: Dataset) -> np.ndarray:
    """Return for each row whether it has an image, or the path of one."""
    found = []
    for batch in rows.select_columns("image").with_format("arrow").iter(10_000):
        data, path = (pc.struct_field(batch["image"], name) for name in ("bytes", "path"))
        found.append(pc.or_(pc.is_valid(data), pc.is_valid(path)).to_numpy())
    return np.concatenate([*found, np.zeros(0, bool)])


def _folded(label: str) -> str:
    """Return a class's name without what may be spelled in several ways."""
    return re.sub(r"[-_ ]+", " ", label.strip()).casefold()


def _general(reason: str) -> str:
    """Return a reason without the numbers of rows, which would make each one another."""
    # What does not exist but is listed in its folder is a link; the reason itself is part of a source's hash.
    return re.sub(r"\b(row:?|line) \d+", r"\1 N", reason).replace("No such file or directory", "broken link")


def _not_used(whats: list[str], reason: str) -> str:
    """Return a line of what is not used for one reason, with as many names as leave room for the reason."""
    lines = [f"  not used    {shortened(whats, count)}: {reason}" for count in (4, 3, 2, 1)]
    return next((line for line in lines if len(line) <= _WIDTH), lines[-1])


def _one_line(text: str) -> str:
    """Return a text without line breaks; one that is too long ends between two values, or two words, and in a mark."""
    line = re.sub(r"\s*[\r\n\t\v\f]+\s*", " ", text)
    if len(line) <= _WIDTH:
        return line
    start = line[: _WIDTH - 2]
    ends = (start.rpartition(mark)[0] for mark in (", ", " "))
    return f"{next((end for end in ends if len(end) > _WIDTH // 2), start)} …"
