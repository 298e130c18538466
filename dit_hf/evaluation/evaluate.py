"""`dit-hf evaluate`: compare a model's samples with real images, and report floors, errors and the whole protocol."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.contents import SourceOptions, SplitFrom, parse_conditions, parse_exclude
from ..data.transforms import Faces, Geometry
from ..devices import on_first_rank
from ..hub.card import write_run_card
from ..runs import EVALUATION_REPORT, RunFolder, exported_summary, load_pipeline
from ..sampling.generate import MAX_IMAGES
from ..schedulers.accuracy import check_num_inference_steps
from ..storage import check_folder, disk_errors, folder_taken, hash_json, is_missing_or_empty
from .announce import (
    RECONSTRUCTIONS,
    REFERENCE,
    REFERENCE_PER_SAMPLE,
    SAMPLES,
    Timing,
    describe_reference,
    describe_samples,
    describe_time,
)
from .comparison import Comparison, no_reconstructions
from .extract import locked_for_ranks, ranks
from .features import FeatureNet, load_features
from .reference import CONTENT, INFO, Reference, load_reference, make_reference, statistics_identity
from .reference_cache import is_kept, keep, restore
from .reference_images import ReferenceImages, open_reference_images, open_training_images

MIN_SAMPLES = 16


def evaluate(
    model: str,
    reference: str | None = None,
    num_samples: int = 512,
    features: str = "efficientnet-lite0",
    feature_weights: str | None = None,
    output_dir: str | None = None,
    guidance_scale: float | list[float] | None = None,
    num_inference_steps: int | list[int] = 25,
    crop: str = "center",
    faces: Faces = "all",
    min_face_size: int | None = None,
    split: str | None = None,
    num_images: int | None = None,
    image_column: str | None = None,
    conditions: str | None = None,
    exclude: str | None = None,
    split_from: SplitFrom | None = None,
    batch_size: int = 32,
    seed: int = 0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    save_images: bool = False,
) -> Path:
    """Measure how far a model's samples are from real images; a call that was killed is resumed by calling it again.

    Under `accelerate launch` or `torchrun` every rank generates its part of the samples. The attributes requested from
    a conditional model are those of the reference's rows, in order. Lists of guidance scales or steps are measured in
    every combination and plotted; the first combination is the reported one. In a run's folder the figures go into the
    model card too. A call with other options replaces the report; features are kept for each set of options, so
    repeating an earlier call is quick.

    Args:
        model: the folder of a run, of one of its checkpoints or of a pipeline, or a Hub id (`OWNER/NAME@REVISION`).
        reference: a folder of `dit-hf reference`, or any source of images (see prepare-latents), including a latent
            cache, which is decoded; by default the images that the run was trained on.
        num_samples: how many images are generated.
        features: `inception`, `inception-clean`, `legacy64`, `dinov2`, `efficientnet-lite0`,
            `efficientnet-lite0-1280`, or the id or path of a vision model of transformers.
        feature_weights: Inception's weights: a file, a URL, or `OWNER/NAME/FILE` on the Hub.
        output_dir: the report's folder; by default `evaluation` in the run's folder.
        guidance_scale: guidance of the samples, or a list of scales; by default the pipeline's own.
        num_inference_steps: denoising steps of the samples, or a list of numbers.
        crop: crop of the reference's images, as for prepare-latents.
        faces: with crop `face`, `all` faces of a photograph or the `largest`.
        min_face_size: with crop `face`, the smallest side of a face's crop in pixels of the photograph.
        split: only this split of the reference, if it has several.
        num_images: only so many images of the reference; by default all, or of the images that the run was trained on
            ten for each sample, evenly spread.
        image_column: the column of images, where a dataset has several.
        conditions: the columns that are conditions, separated by commas (`class` is the folder's
            name), or `none`; by default all columns of yes and no, and of classes.
        exclude: patterns of files and folders that are not read, separated by commas, such as
            `masks,*_depth.png`; `none` reads images that look like masks too.
        split_from: where splits come from: `folders`, `files`, `column` or `none`.
        batch_size: images at once.
        seed: seed of the samples; image i of a seed is always the same.
        dtype: precision of the pipeline's weights.
        save_images: keep the samples as PNG in `images/`, one folder for each set of options.

    Returns:
        The folder, with `evaluation.json`, `evaluation.md`, `evaluation.png`, `neighbours.png`, and `settings.png`
        if there are several settings.

    Raises:
        FileExistsError: if `output_dir` holds the evaluation of another model.
        ValueError: for invalid options, a reference that does not match, or weights that cannot be obtained.
    """
    # Refuse invalid options before anything is loaded.
    _check_options(num_samples, batch_size, seed)

    # Load the two sides of the comparison.
    device = ranks().device
    net = load_features(features, feature_weights, device)
    pipeline = load_pipeline(model, device, dtype=getattr(torch, dtype))
    settings = _combine_settings(guidance_scale, num_inference_steps, pipeline.config.guidance_scale)
    for setting in settings:
        check_num_inference_steps(pipeline.scheduler, setting["num_inference_steps"])
    folder = _report_folder(model, output_dir)
    _check_folder(folder)
    resolution = "x".join(map(str, pipeline.resolution))  # HxW in pixels
    options = SourceOptions(
        split=split,
        num_images=num_images,
        image_column=image_column,
        conditions=parse_conditions(conditions),
        exclude=parse_exclude(exclude),
        split_from=split_from,
    )
    geometry = Geometry(pipeline.resolution, crop, faces=faces, min_face_size=min_face_size)
    images = _open_images(model, reference, resolution, geometry, options, REFERENCE_PER_SAMPLE * num_samples)
    place = _statistics_folder(reference, images, folder, net)

    # What is compared, and how long that takes. Where the reference is new, so is everything else.
    timing = Timing(pipeline, net, images, settings, batch_size)
    is_new = not (place / INFO).is_file() and not is_kept(place)
    if images is not None and is_new:
        _announce(num_samples, settings, images.summary)
        rebuilt = 0 if no_reconstructions(images) else min(num_samples, images.count // 2)
        left = {REFERENCE: images.count, SAMPLES: num_samples * len(settings), RECONSTRUCTIONS: rebuilt}
        _print_time(left, timing)

    with locked_for_ranks(folder):
        # The reference: given, of an earlier evaluation by the same images and network, or computed now.
        if images is None:
            statistics = load_reference(place)
        else:
            on_first_rank(lambda: restore(place))
            statistics = make_reference(place, images, net, batch_size)
            on_first_rank(lambda: keep(place))
        _check_statistics(statistics, net, resolution)

        # Every combination of guidance scale and steps.
        comparison = Comparison(
            pipeline, net, statistics, images, folder, num_samples, batch_size, seed, dtype, save_images
        )
        if not is_new:
            _announce(num_samples, settings, statistics.info["pictures"])
            _print_time(comparison.missing(settings), timing)
        with disk_errors(f"output_dir {folder}"):
            comparison.run(_model_name(model), settings, own_folder=output_dir is None)
            if output_dir is None and ranks().is_main_process:
                write_run_card(Path(model), pipeline, exported_summary(Path(model)))
    return folder


def _check_options(num_samples: int, batch_size: int, seed: int) -> None:
    """Refuse numbers that are too low, and a machine without torchmetrics."""
    for name, value, least in (
        ("num_samples", num_samples, MIN_SAMPLES),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if num_samples > MAX_IMAGES:
        raise ValueError(f"num_samples={num_samples} must be at most {MAX_IMAGES:,}")
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError("evaluation needs torchmetrics, which computes the KID: pip install torchmetrics")


def _combine_settings(
    guidance_scale: float | list[float] | None, num_inference_steps: int | list[int], default_scale: float
) -> list[dict[str, Any]]:
    """Return every combination of guidance scale (None is `default_scale`) and steps, scale by scale."""
    scales = guidance_scale if isinstance(guidance_scale, list) else [guidance_scale]
    steps = num_inference_steps if isinstance(num_inference_steps, list) else [num_inference_steps]
    settings = [
        {"guidance_scale": default_scale if scale is None else scale, "num_inference_steps": count}
        for scale in scales
        for count in steps
    ]
    if not settings:
        raise ValueError("guidance_scale and num_inference_steps must have a value")
    for setting in settings:
        if setting["guidance_scale"] < 0:
            raise ValueError(f"guidance_scale={setting['guidance_scale']:g} must be at least 0")
    return settings


def _model_name(model: str) -> str:
    """Return a Hub id as it is, or the name of the run's folder; never a path of this machine."""
    path = Path(model).resolve()
    if not path.exists():
        return model
    return path.parent.name if path.name == "pipeline" else path.name


def _report_folder(model: str, output_dir: str | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    if not RunFolder(Path(model)).pipeline.is_dir():
        raise ValueError(f"{model} is not a run's folder; give --output_dir, the report's folder")
    return RunFolder(Path(model)).evaluation


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds no evaluation, finished or killed, but something else."""
    check_folder(folder, "output_dir")
    ours = (EVALUATION_REPORT, "features", "reference-*", ".reference-*")
    if not is_missing_or_empty(folder) and not any(any(folder.glob(name)) for name in ours):
        raise FileExistsError(folder_taken(f"output_dir {folder}", missing=EVALUATION_REPORT))


def _open_images(
    model: str, reference: str | None, resolution: str, geometry: Geometry, options: SourceOptions, most: int
) -> ReferenceImages | None:
    """Open the reference's images, by default at most `most` that the run was trained on; None for statistics.

    Raises:
        ValueError: if they are of another size than the model's, which only a latent cache's can be.
    """
    if reference is None:
        return open_training_images(model, resolution, options, most)
    if (Path(reference) / INFO).is_file():
        return None
    images = open_reference_images(reference, geometry, options, verbose=ranks().is_main_process)
    if (got := images.summary["resolution"]) != resolution:
        raise ValueError(f"{reference}: expected images of {resolution} px, the model's size, got {got}")
    return images


def _statistics_folder(source: str | None, images: ReferenceImages | None, folder: Path, net: FeatureNet) -> Path:
    """Return where the statistics are, or those of `images` will be: kept in the evaluation's `folder`."""
    if images is None:
        return Path(str(source))
    # Named by its content, so that one evaluation folder can hold several references.
    content = {CONTENT: images.content_sha256} if images.content_sha256 else {}
    return folder / f"reference-{hash_json(statistics_identity(images, net) | content)[:12]}"


def _check_statistics(statistics: Reference, net: FeatureNet, resolution: str) -> None:
    """Refuse statistics that do not fit the model, or of too few images."""
    statistics.check(net, resolution)
    count, least = len(statistics.features), 2 * MIN_SAMPLES
    if count < least:
        raise ValueError(f"expected at least {least} reference images, got {count}")


def _announce(num_samples: int, settings: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    if ranks().is_main_process:
        print(describe_samples(num_samples, settings), describe_reference(summary), sep="\n", flush=True)


def _print_time(left: dict[str, int], timing: Timing) -> None:
    if ranks().is_main_process:
        print(describe_time(left, timing.seconds, ranks().num_processes), flush=True)
