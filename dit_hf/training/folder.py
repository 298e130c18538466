"""Where a run may write: a new folder, a run's own, or one in which nothing is in its way."""

from __future__ import annotations

from pathlib import Path

from ..recipe_file import read_recipe
from ..runs import RunFolder, read_log
from ..storage import MANIFEST, check_folder, folder_taken, is_missing_or_empty


def check_run_folder(run: Path, resumed: bool) -> None:
    """Refuse a folder with files of others where a run writes, and, unless `resumed`, one that holds a run.

    A start that failed before the first row of the log leaves nothing that would be lost, and blocks no other.

    Raises:
        FileExistsError: naming what is in the way.
    """
    folder, place = RunFolder(run), f"train.output_dir {run}"
    check_folder(run, "train.output_dir")
    is_run = folder.config.is_file() and _is_recipe(folder.config)
    has_checkpoints, rows = bool(folder.checkpoints()), _readable_rows(run)
    if not resumed and is_run and (has_checkpoints or rows):
        advice = "or resume it with --train.resume_from_checkpoint latest"
        raise FileExistsError(f"{folder_taken(place, 'holds a run')}, {advice}")
    if not resumed and has_checkpoints:
        raise FileExistsError(folder_taken(place, "holds checkpoints of something else"))
    if has_checkpoints or (is_run and rows):
        check_pipeline_folder(run)
        return

    # Nothing was trained here. What a run writes must be free; its recipe may stand there already.
    results = [folder.best, folder.pipeline, folder.export, folder.card, folder.loss_curve]
    taken = [path for path in (*results, *folder.sample_grids().values()) if path.exists()]
    if folder.config.exists() and not is_run:
        taken.append(folder.config)
    if folder.log.exists() and rows != []:
        taken.append(folder.log)
    if taken:
        names = ", ".join(str(path.relative_to(run)) for path in taken[:3])
        raise FileExistsError(folder_taken(place, f"holds {names}, which no run has written"))


def check_pipeline_folder(run: Path) -> None:
    """Refuse to export a pipeline in the place of something that no run has written.

    Raises:
        FileExistsError: naming the folder.
    """
    folder = RunFolder(run).pipeline
    exported = any((folder / name).is_file() for name in (MANIFEST, "model_index.json"))
    if not exported and not is_missing_or_empty(folder):
        raise FileExistsError(f"{folder} holds something else (no model_index.json); move it and call again")


def _is_recipe(path: Path) -> bool:
    try:
        return bool(read_recipe(path))
    except (ValueError, OSError):
        return False


def _readable_rows(run: Path) -> list[dict[str, str]] | None:
    """Return the rows of a run's log, or None if it cannot be read."""
    try:
        return read_log(run)
    except ValueError:
        return None
