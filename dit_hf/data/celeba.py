"""Read the lists of CelebA and CelebA-HQ: attributes, partition and mapping."""

from __future__ import annotations

import csv
from pathlib import Path, PurePosixPath

from .metadata import DELIMITERS, Table, check_names_differ, csv_errors, open_text

CELEBA_LISTS = ("list_attr_celeba", "CelebAMask-HQ-attribute-anno", "list_eval_partition")
CELEBA_HQ_MAPPING = "CelebA-HQ-to-CelebA-mapping"  # the image of CelebA that each image of CelebA-HQ was made of
# Folders of aligned faces; masks and unaligned images come in folders beside them.
CELEBA_FOLDERS = ("img_align_celeba", "img_align_celeba_png", "CelebA-HQ-img")
CELEBA_PARTITION = {"0": "train", "1": "validation", "2": "test"}


def celeba_images(sizes: dict[str, int], left_out: list[tuple[str, str]]) -> dict[str, str]:
    """Return the relative path of each image by its file name, which is how CelebA's lists name it.

    Args:
        sizes: Size of every image of the folder by its relative path.
        left_out: List to which images with a duplicate number are added.
    """
    # Images outside the folders of aligned faces count only if there is no such folder.
    aligned = [name for name in sizes if set(PurePosixPath(name).parts) & set(CELEBA_FOLDERS)]
    paths: dict[str, str] = {}
    stems: set[str] = set()
    for name in aligned or sizes:
        image_id, stem = PurePosixPath(name).name, PurePosixPath(name).stem
        if stem in stems:
            left_out.append((name, "another picture has the same number"))
        else:
            paths[image_id] = name
            stems.add(stem)
    return paths


def read_celeba_lists(folder: Path, names: list[str], left_out: list[tuple[str, str]]) -> list[Table]:
    """Read the attribute list and the partition; of a list in both formats, the .csv is read.

    Args:
        folder: The source.
        names: Relative paths of the lists.
        left_out: List to which images with a bad or duplicate row are added.

    Returns:
        One table per list. A bad row is None.
    """
    tables = []
    # In reverse order .txt comes before .csv, which then takes its place.
    chosen = {PurePosixPath(name).stem: name for name in sorted(names, reverse=True)}
    mapping = chosen.pop(CELEBA_HQ_MAPPING, None)
    for stem, name in sorted(chosen.items()):
        header, lines = _celeba_lines(folder / name)
        columns = ["split"] if stem == "list_eval_partition" else header
        table = Table(PurePosixPath(name).name)

        # Rows by the image's number, without the extension: lists that name .jpg files come with .png images too.
        for number, (image_id, *values) in lines:
            key = PurePosixPath(image_id).stem
            reason = _celeba_fault(stem, columns, values)
            if key in table.rows:
                left_out.append((image_id, f"duplicate row: line {number} of {table.name}"))
                continue
            table.spelled[key] = image_id
            if reason:
                left_out.append((image_id, f"{reason} in line {number} of {table.name}"))
                table.rows[key] = None
            else:
                if stem == "list_eval_partition":
                    values = [CELEBA_PARTITION[values[0]]]
                table.rows[key] = dict(zip(columns, values, strict=True))

        # The partition names images of CelebA, which the mapping translates to those of CelebA-HQ.
        if mapping and stem == "list_eval_partition":
            _, lines = _celeba_lines(folder / mapping)
            origins = {index: PurePosixPath(name).stem for _, (index, *_, name) in lines}
            table.rows = {index: table.rows[key] for index, key in origins.items() if key in table.rows}
            table.spelled = {index: table.spelled[origins[index]] for index in table.rows}
        tables.append(table)
    return tables


def _celeba_lines(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the column names and the numbered rows, without blank ones, of a .csv or .txt list.

    Raises:
        ValueError: if the first line of a .csv is not divided into columns, or the list names a column twice.
    """
    with csv_errors(path), open_text(path) as file:
        if path.suffix == ".csv":
            first = file.readline()
            mark = max(DELIMITERS, key=first.count)  # a spreadsheet may have saved it with another one
            rows = list(csv.reader([first, *file], delimiter=mark))
        else:
            rows = [line.split() for line in file]
    numbered = [(number, row) for number, row in enumerate(rows, 1) if row]
    if path.suffix == ".csv":
        header, numbered = (numbered[0][1][1:] if numbered else []), numbered[1:]
        if numbered and not header:
            raise ValueError(f"{path}: its first line names no columns separated by comma, semicolon or tab")
    else:
        # The number of rows, which is sometimes missing, then the names of columns, which the partition lacks.
        if numbered and len(numbered[0][1]) == 1:
            numbered = numbered[1:]
        has_names = bool(numbered) and not any("." in cell for cell in numbered[0][1])
        header, numbered = (numbered[0][1], numbered[1:]) if has_names else ([], numbered)
    check_names_differ(path, header)
    return header, numbered


def _celeba_fault(stem: str, columns: list[str], values: list[str]) -> str | None:
    """Return why a row cannot be used, or None if it can."""
    if len(values) != len(columns):
        return f"{len(values)} values instead of {len(columns)}"
    allowed = CELEBA_PARTITION if stem == "list_eval_partition" else ("-1", "0", "1")
    wrong = [value for value in values if value not in allowed]
    return f"{wrong[0]!r} is none of {', '.join(allowed)}" if wrong else None
