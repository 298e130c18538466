"""`dit-hf push`: write a model as a repository that everyone can load, to a folder or to the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from ..card_blocks import LICENSE
from ..devices import default_device
from ..hub_ids import check_branch, check_repo_id, split_revision
from ..image_grid import make_grid, save_grid
from ..pipelines.attributes import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..recipe_file import read_config
from ..runs import (
    CARD,
    CONFIG,
    EVALUATION_PLOT,
    EVALUATION_REPORT,
    EXPORT,
    LOG,
    LOSS_CURVE,
    SETTINGS_PLOT,
    RunFolder,
    checkpoint_summary,
    exported_summary,
    find_run,
    is_checkpoint,
    load_pipeline,
)
from ..sampling.generate import generate_images
from ..storage import (
    disk_errors,
    folder_taken,
    locked_beside,
    new_folder,
    read_json,
    temporary_folder,
    write_json,
    write_text,
)
from ..upload import PUSHED_FILES, Content, Repository, upload_folder
from .card import example_attributes, read_report, write_card
from .space import is_space_file, upload_space, write_space
from .to_diffusers import BuiltinExport, to_builtin

GRID_SIZE = 8
_EVALUATION = (EVALUATION_REPORT, EVALUATION_PLOT, SETTINGS_PLOT)
# Folders and files of a repository, all that a push writes.
_FOLDERS = ("transformer", "scheduler", "vae", "evaluation")
_CARD_IMAGES = {"sheet": "samples.png", "curve": LOSS_CURVE}
_FILES = (
    CARD,
    "model_index.json",
    "modular_config.json",
    "pipeline.py",
    LOG,
    CONFIG,
    EXPORT,
    *_CARD_IMAGES.values(),
    PUSHED_FILES,  # of a repository that was downloaded
)
# Weights in one file or in shards, and the index of the latter.
_WEIGHTS = re.compile(r"(transformer|vae)/diffusion_pytorch_model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")  # left by file managers


def push(
    model: str,
    repo_id: str | None = None,
    output_dir: str | None = None,
    builtin: bool = False,
    attributes: dict[str, bool | int | str] | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    license: str | None = None,
    datasets: list[str] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    space: bool = False,
) -> None:
    """Share a model: weights, card, image grid, recipe, log and evaluation, as a repository of the Hub or a folder.

    Args:
        model: the folder of a run, of one of its checkpoints or of a pipeline, or a Hub id (`OWNER/NAME@REVISION`).
        repo_id: the repository (`OWNER/NAME`), which is created if it does not exist.
        output_dir: write the repository to this folder (too).
        builtin: as diffusers' own `DiTPipeline`, which loads without dit_hf and without remote code.
        attributes: for `builtin`, what a model with several conditions generates, e.g. '{"Smiling": true}'.
        private: make a new repository private, and refuse one that is public.
        revision: push to this branch, which is created if it does not exist, or to an open pull request, `refs/pr/1`.
        create_pr: open a pull request with the push.
        license: one of the Hub's identifiers, e.g. `apache-2.0`; by default derived from the training data.
        datasets: ids of the training data on the Hub.
        max_shard_size: largest size of a file of weights.
        overwrite: replace another model, or, on the Hub, any other content and the card, whatever was changed in it. A
            folder that holds files which no push has written is never replaced.
        space: also push a Space of the same name, which runs the app with this model; of a folder, the files of the
            Space are in `OUTPUT_DIR-space`.

    Raises:
        FileExistsError: if the folder or the repository holds something else and `overwrite` is not set, or the folder
            holds files that no push has written.
        ValueError: if there is no such model, it does not fit `builtin`, or the Hub refuses it.
        OSError: if the disk is full, or the Hub cannot be reached.
    """
    # Refuse before the model is loaded.
    if repo_id is None and output_dir is None:
        raise ValueError("where to? Name a repository (dit-hf push MODEL OWNER/NAME) or a folder (--output_dir)")
    if repo_id is not None and Path(repo_id).is_dir() and not Path(model).exists():
        raise ValueError(f"{repo_id} is a folder: the model comes first (dit-hf push {repo_id} {model})")
    if repo_id is not None:
        check_repo_id(repo_id, "REPO_ID")
    if attributes is not None and not builtin:
        raise ValueError("--attributes is for --builtin; other exports generate any attributes")
    if not re.fullmatch(r"\d+ *[KMGT]B", max_shard_size.upper()):
        raise ValueError(f"max_shard_size={max_shard_size!r}: expected a size such as 500MB or 5GB")
    if space and (repo_id is None or builtin or private or create_pr or revision is not None):
        raise ValueError(
            "--space loads a public OWNER/NAME: it takes no --builtin, --private, --revision or --create_pr"
        )
    if create_pr and (repo_id is None or revision is not None):
        raise ValueError("--create_pr opens a pull request to the main branch of OWNER/NAME: it takes no --revision")
    check_branch(revision)
    folder = Path(output_dir) if output_dir is not None else None

    with contextlib.ExitStack() as stack:
        if folder is not None:
            # Checked under the lock, since another push may be about to fill the folder.
            stack.enter_context(disk_errors(str(folder)))
            stack.enter_context(locked_beside(folder))
            if folder.exists():
                _check_folder(folder, overwrite)
        else:  # a push to the Hub alone is written to a temporary folder
            folder = stack.enter_context(temporary_folder("push")) / "repository"
        space_folder = folder.with_name(f"{folder.name}-space")
        if space and space_folder.exists():
            _check_folder(space_folder, overwrite)

        pipeline = load_pipeline(model, "cpu")
        card_options: dict[str, Any] = {"revision": revision, "license": license, "datasets": datasets}
        if is_checkpoint(model):
            card_options["training"] = checkpoint_summary(Path(model))
        with disk_errors(str(folder)), new_folder(folder) as partial:
            name = (repo_id or str(folder)).rsplit("/", 1)[-1]
            export = to_builtin(pipeline, attributes) if builtin else None
            write_repository(partial, pipeline, model, name, repo_id or ".", max_shard_size, export, **card_options)
            if license is None and not (partial / EXPORT).is_file():
                print("the training data is unknown: name its terms by --license", flush=True)
        # Before anything is uploaded, because the wheel may not be built.
        if space and repo_id is not None:
            with new_folder(space_folder) as partial:
                write_space(partial, repo_id)
        if output_dir is not None:
            print(f"{folder} holds the repository{f', {space_folder} the Space' if space else ''}", flush=True)
        if repo_id is not None:
            given = (*(LICENSE if license else ()), *(("datasets",) if datasets else ()))
            place = upload(folder, repo_id, private, revision, create_pr, overwrite, given)
            print(f"{model} is now {place}", flush=True)
            if space:
                print(f"its Space is {upload_space(space_folder, repo_id, overwrite)}", flush=True)


def write_repository(
    folder: Path,
    pipeline: LatentDiTPipeline,
    model: str,
    name: str,
    source: str,
    max_shard_size: str = "5GB",
    export: BuiltinExport | None = None,
    training: dict[str, Any] | None = None,
    **card_options: Any,
) -> None:
    """Fill `folder` with the repository: no optimizer state, and no path of this machine.

    Args:
        folder: An empty folder.
        pipeline: The model.
        model: Where it came from; if that is a run, its recipe, log, curve, image grid and evaluation are copied.
        name: Title of the card.
        source: What the card's snippets load.
        max_shard_size: Largest size of a file of weights.
        export: A [`BuiltinExport`] to save instead of `pipeline`.
        training: Summary of the training for the card; None is the one that the run has stored.
        card_options: Further options of `write_card`.
    """
    saved = pipeline if export is None else export.pipeline
    saved.save_pretrained(folder, max_shard_size=max_shard_size)

    # The summary travels with the model, so that a push of the pushed model still has it.
    run = find_run(model)
    training = training if training is not None else exported_summary(run or _metadata_folder(model))
    if training:
        write_json(folder / EXPORT, {"training": training})
        # Log, image grid and figures describe the run's last step, not an earlier checkpoint.
        if run is not None and not is_checkpoint(model):
            card_options |= _copy_run(run, folder)

    # An image grid: of the export, of the run, or generated now.
    if export is not None:
        card_options |= {"builtin": export.card_entries(), "sheet": _CARD_IMAGES["sheet"]}
        save_grid(make_grid(export.generate(GRID_SIZE), 4, min_side=96), folder / _CARD_IMAGES["sheet"])
    elif "sheet" not in card_options and pipeline.vae is not None:
        _save_example_grid(pipeline, folder / _CARD_IMAGES["sheet"])
        card_options["sheet"] = _CARD_IMAGES["sheet"]
    write_card(folder, pipeline, name, source, training, **card_options)


def upload(
    folder: Path,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    overwrite: bool = False,
    metadata: Collection[str] = (),
) -> str:
    """Upload `folder` as the newest commit of a model repository, see [`upload_folder`], and return its address.

    Args:
        folder: The repository's files.
        repo_id: See [`upload_folder`], as for the following ones.
        private: Make a new repository private, and refuse one that is public.
        revision: A branch or `refs/pr/1`.
        create_pr: Open a pull request.
        overwrite: Also replace another model or other content.
        metadata: Keys of the card's metadata that count more than what its owner changed.

    Raises:
        FileExistsError: if the repository holds another model or other content, and `overwrite` is False.
    """

    def check(repository: Repository) -> None:
        _check_same_model(repository, folder, revision)

    # The figures always are those of the weights.
    content = Content("model", "Upload a model by dit_hf", check, _is_model_file, ("model-index", *metadata))
    return upload_folder(folder, repo_id, content, private, revision, create_pr, overwrite)


def _is_model_file(name: str) -> bool:
    """Check whether a file of this name describes or holds weights that a push replaces."""
    in_evaluation = (f"{RunFolder(Path()).evaluation.name}/{file}" for file in _EVALUATION)
    return name in in_evaluation or _WEIGHTS.fullmatch(name) is not None


def _metadata_folder(model: str) -> Path:
    """Return the folder of `model`; for a Hub id, a local folder with the summary that its repository holds."""
    if Path(model).is_dir():
        return Path(model)
    repo_id, revision = split_revision(model)
    with contextlib.suppress(EntryNotFoundError):
        return Path(hf_hub_download(repo_id, EXPORT, revision=revision)).parent
    return Path(model)


def _copy_run(run: Path, folder: Path) -> dict[str, str]:
    """Copy images, log, recipe and evaluation of a run, and return the card's options for the images."""
    images = RunFolder(run).card_images()
    for option, name in images.items():
        _copy(run, run / name, folder / _CARD_IMAGES[option])
    _copy(run, run / LOG, folder / LOG)
    recipe = without_paths(dataclasses.asdict(read_config(run / CONFIG)))
    # Always paths, even where they look like a Hub id or no longer exist.
    for section, key in (("data", "latents"), ("train", "output_dir")):
        recipe[section][key] = Path(recipe[section][key]).name
    write_text(folder / CONFIG, yaml.safe_dump(recipe, sort_keys=False))
    # Not the grid of nearest neighbours: it shows training images, which are not ours to share.
    for name in _EVALUATION:
        path = RunFolder(run).evaluation / name
        if path.is_file():
            RunFolder(folder).evaluation.mkdir(exist_ok=True)
            _copy(run, path, RunFolder(folder).evaluation / name)
    report = RunFolder(folder).evaluation / EVALUATION_REPORT
    if report.is_file():
        # Read where it came from, so that an error names that file and not the copy.
        write_json(report, without_paths(read_report(RunFolder(run).evaluation / EVALUATION_REPORT)))
    return {option: _CARD_IMAGES[option] for option in images}


def _copy(run: Path, path: Path, target: Path) -> None:
    """Copy a file of a run's folder.

    Raises:
        ValueError: if it is a link out of that folder: somebody else's run could share any file of this machine so.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"{path} is a link that leads out of {run}; put the file itself there, or delete the link")
    shutil.copyfile(path, target)


def without_paths(value: Any) -> Any:
    """Return `value` with every string that is a path shortened to its last part; Hub ids and addresses stay."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if text.startswith(("/", "~", ".")):
        return True
    if "://" in text or ", " in text or " / " in text or "\n" in text:  # an address, or prose
        return False
    # A Hub id has one slash before its revision, and so may a relative path, which is known by its existence.
    text, _ = split_revision(text)
    return text.count("/") > 1 or ("/" in text and Path(text).exists())


def _save_example_grid(pipeline: LatentDiTPipeline, path: Path) -> None:
    """Generate and save an image grid: example attributes and unconditional images in turn."""
    pipeline.to(default_device())
    example = example_attributes(pipeline)
    rows: list[Attributes] = [example, {}] if example else [{}]
    images = [Image.fromarray(image) for image in generate_images(pipeline, range(GRID_SIZE), rows, seed=0)]
    captions = [", ".join(f"{k}: {v}" for k, v in rows[i % len(rows)].items()) or "any" for i in range(GRID_SIZE)]
    save_grid(make_grid(images, 4, captions, min_side=96), path)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds files of others, or, without `overwrite`, an earlier push.

    Raises:
        FileExistsError: naming up to three such files.
    """
    place, names = f"output_dir {folder}", sorted(path.name for path in folder.iterdir())
    known = (*_FOLDERS, *_FILES, *_SYSTEM_FILES)
    others = [name for name in names if name not in known and not is_space_file(name)]
    if others:
        raise FileExistsError(folder_taken(place, f"holds {', '.join(others[:3])}, which no push has written"))
    if names and not overwrite:
        raise FileExistsError(f"{folder_taken(place, 'is not empty')}, or give --overwrite true")


def _check_same_model(repository: Repository, folder: Path, revision: str | None) -> None:
    """Refuse a repository that holds anything but a model of the same architecture and conditions.

    Raises:
        FileExistsError: if it holds another model, or something else.
    """
    name = "transformer/config.json"
    if name in repository.files:
        remote, local = read_json(repository.download(name)), read_json(folder / name)
        # The same model saved by another version of diffusers is the same model.
        if {**remote, "_diffusers_version": None} == {**local, "_diffusers_version": None}:
            return
    content = "another model" if "model_index.json" in repository.files else "something else"
    place = f"{repository.repo_id}{f' (revision {revision})' if revision else ''}"
    raise FileExistsError(
        f"{place} holds {content} already; name another repository or another --revision, or give --overwrite true"
    )
