"""`dit-hf push`: a model as a repository that everyone can load, in a folder or on the Hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image

from ..devices import default_device
from ..image_grid import make_grid, save_grid
from ..pipelines.guidance import Attributes
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
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
    exported_summary,
    find_run,
    is_checkpoint,
    load_pipeline,
)
from ..sampling.generate import generate_images
from ..storage import disk_errors, new_folder, write_text
from ..upload import upload_folder
from .card import example_attributes, write_card
from .to_diffusers import BuiltinExport, to_builtin

GRID_SIZE = 8
_EVALUATION = (EVALUATION_REPORT, EVALUATION_PLOT, SETTINGS_PLOT)
# What a push replaces as a whole: weights that are not part of it any more go.
_FOLDERS = ("transformer", "scheduler", "vae", "evaluation")
_PICTURES = {"sheet": "samples.png", "curve": LOSS_CURVE}
_FILES = (
    CARD,
    "model_index.json",
    "pipeline.py",
    LOG,
    CONFIG,
    EXPORT,
    *_PICTURES.values(),
)
_SYSTEM_FILES = (".DS_Store", "Thumbs.db", "desktop.ini")  # that file managers leave


def push(
    model: str,
    repo_id: str | None = None,
    output_dir: str | None = None,
    builtin: bool = False,
    attributes: dict[str, bool | int | str] | None = None,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Share a model: weights, card, image grid, recipe, log and evaluation, as a repository of the Hub or a folder.

    Args:
        model: the folder of a run, of one of its checkpoints or of a pipeline, or a Hub id.
        repo_id: the repository (`OWNER/NAME`); it is made if it is not there.
        output_dir: write the repository to this folder (too).
        builtin: as diffusers' own `DiTPipeline`, which loads without dit_hf and without code of ours.
        attributes: what `builtin` is to draw of a model with several conditions, e.g. '{"Smiling": true}'.
        private: make the repository private if it is a new one.
        revision: push to this branch, which is made if it is not there.
        license: one of the Hub's identifiers, e.g. `apache-2.0`; by default what the data's terms leave.
        datasets: ids of the data on the Hub.
        max_shard_size: weights are stored in files of at most this size.
        overwrite: write over what is there even if it is another model, or, on the Hub, none. A folder with anything
            else in it than a push has written is left alone.

    Raises:
        FileExistsError: if the folder or the repository holds something else and `overwrite` was not asked for, or
            the folder what no push has written.
        ValueError: if there is no such model, it does not fit `builtin`, or the Hub does not take it.
        OSError: if the disk is full, or the Hub cannot be reached.
    """
    if repo_id is None and output_dir is None:
        raise ValueError("where to? Name a repository (dit-hf push MODEL OWNER/NAME) or a folder (--output_dir)")
    if attributes is not None and not builtin:
        raise ValueError("--attributes is for --builtin; other exports can be asked for any attributes")
    folder = Path(output_dir) if output_dir is not None else None
    if folder is not None and folder.exists():
        _check_folder(folder, overwrite)
    pipeline = load_pipeline(model, "cpu")
    shown: dict[str, Any] = {"revision": revision, "license": license, "datasets": datasets}
    if is_checkpoint(model):
        from ..runs import checkpoint_summary

        shown["training"] = checkpoint_summary(Path(model))
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit_hf-push-"))) / "repository"
        with disk_errors(str(folder)), new_folder(folder) as partial:
            name = (repo_id or str(folder)).rsplit("/", 1)[-1]
            export = to_builtin(pipeline, attributes) if builtin else None
            write_repository(partial, pipeline, model, name, repo_id or ".", max_shard_size, export, **shown)
            if license is None and not (partial / EXPORT).is_file():
                print("what it was trained on is not known: name its terms by --license", flush=True)
        if output_dir is not None:
            print(f"{folder} holds the repository", flush=True)
        if repo_id is not None:
            print(f"{model} is now {upload(folder, repo_id, private, revision, overwrite)}", flush=True)


def write_repository(
    folder: Path,
    pipeline: LatentDiTPipeline,
    model: str,
    name: str,
    source: str,
    max_shard_size: str = "5GB",
    export: BuiltinExport | None = None,
    training: dict[str, Any] | None = None,
    **shown: Any,
) -> None:
    """Fill `folder` with what is pushed: no optimizer state, and no path of this machine.

    Args:
        folder: An empty one.
        pipeline: The model.
        model: Where it came from; if that is a run, its recipe, log, curve, image grid and evaluation are taken too.
        name: The card's title.
        source: What the card's snippets load.
        max_shard_size: Of the files of weights.
        export: A [`BuiltinExport`] that is saved instead.
        training: What the card says of the training; None is what the run has written down.
        shown: Further options of `write_card`.
    """
    saved = pipeline if export is None else export.pipeline
    saved.save_pretrained(folder, max_shard_size=max_shard_size)
    run = find_run(model)
    training = training if training is not None else exported_summary(run or _local_folder(model))
    if training:  # for who pushes it on
        write_text(folder / EXPORT, json.dumps({"training": training}, indent=2) + "\n")
        if run is not None and not is_checkpoint(model):  # whose log, image grid and figures are not the run's last
            shown |= _copy_run(run, folder)
    if export is not None:
        shown |= {"builtin": export.facts(), "sheet": _PICTURES["sheet"]}
        save_grid(make_grid(export.draw(GRID_SIZE), 4, min_side=96), folder / _PICTURES["sheet"])
    elif "sheet" not in shown and pipeline.vae is not None:
        _save_example_grid(pipeline, folder / _PICTURES["sheet"])
        shown["sheet"] = _PICTURES["sheet"]
    write_card(folder, pipeline, name, source, training, **shown)


def upload(
    folder: Path, repo_id: str, private: bool = False, revision: str | None = None, overwrite: bool = False
) -> str:
    """Make `folder` the newest commit of a model repository, see [`upload_folder`]; returns its address.

    Raises:
        FileExistsError: if the repository holds another model, or none, and `overwrite` is False.
    """

    def check(api: HfApi) -> None:
        if not overwrite:
            _check_same_model(api, folder, repo_id, revision)

    stale = [f"{name}/*" for name in _FOLDERS]
    message = "Upload a model by dit_hf"
    return upload_folder(folder, repo_id, "model", message, private, revision, delete_patterns=stale, check=check)


def _local_folder(model: str) -> Path:
    """The folder that `model` is, or, of a Hub id, one that holds what its repository says of the run."""
    if Path(model).is_dir():
        return Path(model)
    with contextlib.suppress(EntryNotFoundError):
        return Path(hf_hub_download(model, EXPORT)).parent
    return Path(model)


def _copy_run(run: Path, folder: Path) -> dict[str, str]:
    """Copy what a run tells of itself; returns what the card shows of it."""
    pictures = RunFolder(run).card_images()
    for what, name in pictures.items():
        shutil.copyfile(run / name, folder / _PICTURES[what])
    shutil.copyfile(run / LOG, folder / LOG)
    recipe = without_paths(yaml.safe_load((run / CONFIG).read_text(encoding="utf-8")))
    write_text(folder / CONFIG, yaml.safe_dump(recipe, sort_keys=False))
    for name in _EVALUATION:  # and not the image grid of nearest images, which are others' to share
        path = RunFolder(run).evaluation / name
        if path.is_file():
            RunFolder(folder).evaluation.mkdir(exist_ok=True)
            shutil.copyfile(path, RunFolder(folder).evaluation / name)
    report = RunFolder(folder).evaluation / EVALUATION_REPORT
    if report.is_file():
        content = without_paths(json.loads(report.read_text(encoding="utf-8")))
        write_text(report, json.dumps(content, indent=2) + "\n")
    return {what: _PICTURES[what] for what in pictures}


def without_paths(value: Any) -> Any:
    """The value with every text that is a path out of the working folder shortened to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~", "..")):
        return Path(value).name
    return value


def _save_example_grid(pipeline: LatentDiTPipeline, path: Path) -> None:
    """An image grid of what the pipeline draws when asked for something, and when asked for nothing."""
    pipeline.to(default_device())
    example = example_attributes(pipeline)
    rows: list[Attributes] = [example, {}] if example else [{}]
    images = [Image.fromarray(image) for image in generate_images(pipeline, range(GRID_SIZE), rows, seed=0)]
    captions = [", ".join(f"{k}: {v}" for k, v in rows[i % len(rows)].items()) or "any" for i in range(GRID_SIZE)]
    save_grid(make_grid(images, 4, captions, min_side=96), path)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Whether it is empty, or may be replaced: with `overwrite`, and if all in it was pushed there."""
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name not in (*_FOLDERS, *_FILES, *_SYSTEM_FILES)]
    if others:
        raise FileExistsError(f"output_dir {folder} holds {', '.join(others[:3])}, from no push; name a new folder")
    if names and not overwrite:
        raise FileExistsError(f"output_dir {folder} is not empty; name a new folder, or give --overwrite true")


def _check_same_model(api: HfApi, folder: Path, repo_id: str, revision: str | None) -> None:
    """Whether the repository holds nothing yet, or this very model: one of the same architecture and conditions."""
    files = api.list_repo_files(repo_id, revision=revision)
    if set(files) <= {".gitattributes"}:
        return
    name = "transformer/config.json"
    if name in files:
        there = json.loads(Path(api.hf_hub_download(repo_id, name, revision=revision)).read_text(encoding="utf-8"))
        here = json.loads((folder / name).read_text(encoding="utf-8"))
        if {**there, "_diffusers_version": None} == {**here, "_diffusers_version": None}:
            return
    what = "another model" if "model_index.json" in files else "something else"
    raise FileExistsError(
        f"{repo_id}{f' (branch {revision})' if revision else ''} holds {what} already; name another repository or "
        "another --revision, or give --overwrite true"
    )
