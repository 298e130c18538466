"""The model card: how to load a model, its training, figures, data and limits, with metadata that the Hub reads."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..card_blocks import sign_blocks
from ..data.sources import AVATARS
from ..hub_ids import is_hub_id, is_pull_request, split_revision
from ..latents.vae import weights_sha256
from ..pipelines.attributes import AttributeValue
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import EVALUATION_REPORT, RunFolder
from ..storage import read_json, shipped_file, write_text

TASK = "unconditional-image-generation"
TAGS = ["diffusers", "latent-diffusion", "diffusion-transformer", "dit", "dit_hf"]
# What is read of the report of an evaluation.
_REPORT = {
    "model": {"transformer_sha256"},
    "protocol": {"dtype", "features", "guidance_scale", "num_inference_steps", "reference", "seed"},
    "figures": {"frechet_distance", "kid", "num_samples", "precision", "recall"},
    "floor": {"real", "vae"},
}
CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


def write_card(
    folder: Path,
    pipeline: LatentDiTPipeline,
    name: str,
    source: str,
    training: dict[str, Any] | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    **template_values: Any,
) -> None:
    """Fill the template `model_card.md` and write it as `folder`'s README.md.

    Args:
        folder: The card's folder; figures are those of `evaluation/evaluation.json` in it.
        pipeline: The model.
        name: Title of the card.
        source: What the snippets load: a Hub id, or a folder beside the card.
        training: Summary of the run, see `exported_summary`; None if it is unknown.
        license: See `card_data`.
        datasets: See `card_data`.
        template_values: `sheet` and `curve`, image files beside the card; `revision`, which the snippets load; and
            `builtin`, the entries of an export to diffusers' own pipeline, see `BuiltinExport.card_entries`.
    """
    training = training or {}
    results = eval_results(RunFolder(folder).evaluation / EVALUATION_REPORT, pipeline)
    values = {
        "name": name,
        "source": source,
        "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "conditions": list(pipeline.transformer.config.conditions or {}),
        "example": _literal(example_attributes(pipeline)),
        "guidance_scale": pipeline.config.guidance_scale,
        "training": training,
        "results": [(result.metric_name or result.metric_type, result.metric_value) for result in results],
        "protocol": _protocol(results[0]) if results else None,
        **_project(),
        "celeba": CELEBA if is_celeba(training) else None,
        "avatars": training.get("source") == AVATARS,
        # The template tests these, so they must be defined.
        **dict.fromkeys(("sheet", "curve", "revision", "builtin")),
        **template_values,
    }
    if is_pull_request(values["revision"]):  # which is merged into main, where the card is read
        values["revision"] = None
    data = card_data(name, training, results, license, datasets)
    card = ModelCard.from_template(data, template_path=str(shipped_file("model_card.md")), **values)
    write_text(folder / "README.md", sign_blocks(str(card)))


def card_data(
    name: str,
    training: dict[str, Any],
    results: list[EvalResult],
    license: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCardData:
    """Return the card's metadata, with the keys of https://huggingface.co/docs/hub/model-cards.

    Args:
        name: Name of the model in the `model-index`.
        training: Summary of the run; {} if it is unknown.
        results: Figures for the `model-index`.
        license: One of the Hub's identifiers; None derives it from the training data, `unknown` if its terms are.
        datasets: Ids on the Hub; None is the training data, if it came from the Hub.
    """
    # Terms: avatars are free, CelebA is for research, and of any other data nothing is certain.
    # A revision has no place in metadata; the card's text names it.
    source, base = (split_revision(str(training.get(key) or ""))[0] for key in ("source", "base_model"))
    terms: dict[str, Any] = {"license": license or ("apache-2.0" if source == AVATARS else "unknown")}
    if license is None and is_celeba(training):
        terms = {"license": "other", "license_name": "celeba-non-commercial-research", "license_link": CELEBA}
    if is_hub_id(base):
        terms |= {"base_model": base, "base_model_relation": "finetune"}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=datasets or ([source] if is_hub_id(source) else None),
        model_name=name if results else None,
        eval_results=results or None,
        **terms,
    )


def write_run_card(run: Path, pipeline: LatentDiTPipeline, training: dict[str, Any]) -> None:
    """Write the README.md of a run's folder; call it again after an evaluation."""
    write_card(run, pipeline, run.name, "pipeline", training, **RunFolder(run).card_images())


def model_index(report: dict[str, Any]) -> list[EvalResult]:
    """Return the entries of a card's `model-index` for the content of an `evaluation.json`."""
    protocol, figures = report["protocol"], report["figures"]
    reference = protocol["reference"]
    # Every metric carries the whole protocol, since the Hub shows each by itself.
    floor = {name: column.get("frechet_distance") for name, column in report["floor"].items()}
    shared: dict[str, Any] = {
        "task_type": "unconditional-image-generation",
        "dataset_type": reference["source"],
        "dataset_name": f"{reference['source']}, {reference['pictures']:,} images of {reference['resolution']} px",
        "dataset_split": reference["split"],
        "metric_config": protocol["features"]["name"],
        "metric_args": {"num_samples": figures["num_samples"]}
        | {name: protocol[name] for name in ("num_inference_steps", "guidance_scale", "seed")}
        | {"reference_sha256": reference["pixels_sha256"], "floor": floor},
    }
    values = {
        report["name"]: figures["frechet_distance"],
        "KID": figures["kid"],
        "precision": figures["precision"],
        "recall": figures["recall"],
    }
    if report["attributes"]:
        values["attributes found"] = report["attributes"]["accuracy"]
    # The Hub's metric type `fid` is reserved for Inception's features.
    kinds = {report["name"]: "fid" if protocol["features"]["name"].startswith("inception") else "frechet-distance"}
    return [
        EvalResult(
            metric_type=kinds.get(name, name.lower().replace(" ", "-")),
            metric_name=name,
            metric_value=float(f"{value:.6g}"),
            **shared,
        )
        for name, value in values.items()
    ]


def eval_results(report: Path, pipeline: LatentDiTPipeline) -> list[EvalResult]:
    """Return the `model-index` entries of a report, or none if it is missing or belongs to other weights."""
    if not report.is_file():
        return []
    content = read_report(report)
    # A model that was evaluated in half precision is compared in half precision.
    dtype = getattr(torch, content["protocol"]["dtype"])
    if content["model"]["transformer_sha256"] != weights_sha256(pipeline.transformer, dtype):
        return []
    return model_index(content)


def read_report(path: Path) -> dict[str, Any]:
    """Read the report of an evaluation.

    Raises:
        ValueError: naming the file, if it is damaged.
    """
    remedy = "delete it, or evaluate again"
    report = read_json(path, remedy, keys=("name", "attributes", *_REPORT))
    for section, keys in _REPORT.items():
        if not isinstance(report[section], dict) or not keys <= report[section].keys():
            raise ValueError(f"{path} is damaged (no {section} with {', '.join(sorted(keys))}); {remedy}")
    return report


def is_celeba(training: dict[str, Any]) -> bool:
    """Check whether the training data is CelebA or CelebA-HQ, whose terms allow non-commercial research only.

    The name of the source, the crop and a column's name are taken as signs, but not of avatars, which share columns.
    """
    source, crop = str(training.get("source", "")).lower(), str(training.get("crop", ""))
    if source == AVATARS:
        return False
    return "celeb" in source or "celeba" in crop or "5_o_Clock_Shadow" in training.get("columns", [])


def example_attributes(pipeline: LatentDiTPipeline) -> dict[str, AttributeValue]:
    """Return attributes that the pipeline accepts, a value of its first condition; {} if it is unconditional."""
    for name, values in (pipeline.transformer.config.conditions or {}).items():
        labels = pipeline.config.condition_labels.get(name)
        return {name: labels[0] if labels else True if values == 2 else 0}
    return {}


def project_address() -> str | None:
    """Return the public address of dit_hf's repository from the package's metadata, or None if it has none yet."""
    try:
        urls = importlib.metadata.metadata("dit_hf").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # it runs from its folder and was never installed
        return None
    return next((url.partition(", ")[2] for url in urls if url.lower().startswith(("repository,", "source,"))), None)


def _project() -> dict[str, str]:
    """Return dit_hf as a link and the command that installs it, by its address if it has one."""
    address = project_address()
    if address is None:
        return {"project": "dit_hf", "install": "in a clone of it: `pip install .`"}
    return {"project": f"[dit_hf]({address})", "install": f"`pip install git+{address}`"}


def _literal(attributes: dict[str, AttributeValue]) -> str:
    """Return attributes as Python code; '' if there are none."""
    items = [f"{json.dumps(k)}: {json.dumps(v) if isinstance(v, str) else v}" for k, v in attributes.items()]
    return f"{{{', '.join(items)}}}" if items else ""


def _protocol(result: EvalResult) -> str:
    """Return the protocol of a figure, which is that of all, in one line."""
    args = dict(result.metric_args or {})
    floor = {f"floor ({name})": value and f"{value:.4g}" for name, value in args.pop("floor", {}).items()}
    reference = args.pop("reference_sha256", None)
    entries = {"reference": result.dataset_name, "sha256": reference and f"{reference[:12]}…"}
    entries |= {"features": result.metric_config, **args, **floor}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in entries.items() if value is not None)
