"""The model card: what a model is, how to load it, what it was trained on and how good it is, as the Hub reads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.sources import AVATARS
from ..latents.vae import weights_sha256
from ..pipelines.guidance import AttributeValue
from ..pipelines.pipeline_latent_dit import LatentDiTPipeline
from ..runs import EVALUATION_REPORT, RunFolder
from ..storage import shipped_file, write_text

TASK = "unconditional-image-generation"
TAGS = ["diffusers", "latent-diffusion", "diffusion-transformer", "dit", "dit_hf"]
CELEBA = "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


def write_card(
    folder: Path,
    pipeline: LatentDiTPipeline,
    name: str,
    source: str,
    training: dict[str, Any] | None = None,
    license: str | None = None,
    datasets: list[str] | None = None,
    **shown: Any,
) -> None:
    """Fill the card's template, `model_card.md`, as `folder`'s README.md.

    Args:
        folder: Where it goes; `evaluation/evaluation.json` there gives it its figures.
        pipeline: What it describes.
        name: Its title.
        source: What the snippets load: a Hub id, or a folder beside the card.
        training: What is known of the run (`exported_summary`); None is nothing.
        license: See `card_data`.
        datasets: See `card_data`.
        shown: `sheet` and `curve`, files beside the card; `revision`, which the snippets load; and `builtin`, what
            there is to say of an export to diffusers' own pipeline.
    """
    training, results = training or {}, eval_results(RunFolder(folder).evaluation / EVALUATION_REPORT, pipeline)
    facts = {
        "name": name,
        "source": source,
        "parameters": sum(p.numel() for p in pipeline.transformer.parameters()),
        "conditions": list(pipeline.transformer.config.conditions or {}),
        "example": _literal(example_attributes(pipeline)),
        "guidance_scale": pipeline.config.guidance_scale,
        "training": training,
        "results": [(r.metric_name or r.metric_type, r.metric_value, _protocol(r)) for r in results],
        "celeba": CELEBA if is_celeba(training) else None,
        "avatars": training.get("source") == AVATARS,
        **dict.fromkeys(("sheet", "curve", "revision", "builtin")),
        **shown,
    }
    data = card_data(name, training, results, license, datasets)
    card = ModelCard.from_template(data, template_path=str(shipped_file("model_card.md")), **facts)
    write_text(folder / "README.md", str(card))


def card_data(
    name: str,
    training: dict[str, Any],
    results: list[EvalResult],
    license: str | None = None,
    datasets: list[str] | None = None,
) -> ModelCardData:
    """The metadata, in the Hub's words (https://huggingface.co/docs/hub/model-cards).

    Args:
        name: The model's, in the `model-index`.
        training: What is known of the run.
        results: Figures for the `model-index`.
        license: One of the Hub's identifiers; None is what the data's terms leave, `unknown` where they are not known.
        datasets: Ids on the Hub; None is the one it was trained on, if it came from there.
    """
    source, base = training.get("source"), training.get("base_model")
    terms: dict[str, Any] = {"license": license or ("apache-2.0" if source == AVATARS else "unknown")}
    if license is None and is_celeba(training):
        terms = {"license": "other", "license_name": "celeba-non-commercial-research", "license_link": CELEBA}
    if is_hub_id(base):
        terms |= {"base_model": base, "base_model_relation": "finetune"}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=datasets or ([str(source)] if is_hub_id(source) else None),
        model_name=name if results else None,
        eval_results=results or None,
        **terms,
    )


def write_run_card(run: Path, pipeline: LatentDiTPipeline, training: dict[str, Any]) -> None:
    """Write the README.md of a run's folder; to be called again where there are new figures."""
    write_card(run, pipeline, run.name, "pipeline", training, **RunFolder(run).card_images())


def model_index(report: dict[str, Any]) -> list[EvalResult]:
    """The entries of a model card's `model-index`, of what `evaluation.json` holds."""
    protocol, figures = report["protocol"], report["figures"]
    pictures = protocol["reference"]
    floor = {name: column.get("frechet_distance") for name, column in report["floor"].items()}
    shared: dict[str, Any] = {
        "task_type": "unconditional-image-generation",
        "dataset_type": pictures["source"],
        "dataset_name": f"{pictures['source']}, {pictures['pictures']:,} images of {pictures['resolution']} px",
        "dataset_split": pictures["split"],
        "metric_config": protocol["features"]["name"],
        "metric_args": {"num_samples": figures["num_samples"]}
        | {name: protocol[name] for name in ("num_inference_steps", "guidance_scale", "seed")}
        | {"reference_sha256": pictures["pixels_sha256"], "floor": floor},
    }
    values = {
        report["name"]: figures["frechet_distance"],
        "KID": figures["kid"],
        "precision": figures["precision"],
        "recall": figures["recall"],
    }
    if report["attributes"]:
        values["attributes found"] = report["attributes"]["accuracy"]
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
    """The figures of an evaluation's report for the card's `model-index`; none where it is of other weights."""
    if not report.is_file():
        return []
    content = json.loads(report.read_text(encoding="utf-8"))
    dtype = getattr(torch, content["protocol"]["dtype"])
    if content["model"]["transformer_sha256"] != weights_sha256(pipeline.transformer, dtype):
        return []
    return model_index(content)


def is_celeba(training: dict[str, Any]) -> bool:
    """Whether the images are CelebA's or CelebA-HQ's, whose terms allow non-commercial research only."""
    source, crop = str(training.get("source", "")).lower(), str(training.get("crop", ""))
    drawn = source == AVATARS
    return not drawn and ("celeb" in source or "celeba" in crop or "5_o_Clock_Shadow" in training.get("columns", []))


def is_hub_id(name: str | None) -> bool:
    """Whether it reads like `OWNER/NAME`."""
    return name is not None and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def example_attributes(pipeline: LatentDiTPipeline) -> dict[str, AttributeValue]:
    """Something that the pipeline can be asked for; nothing, if it is unconditional."""
    for name, values in (pipeline.transformer.config.conditions or {}).items():
        labels = pipeline.config.condition_labels.get(name)
        return {name: labels[0] if labels else True if values == 2 else 0}
    return {}


def _literal(attributes: dict[str, AttributeValue]) -> str:
    """As it is written in a program; empty if nothing is asked for."""
    items = [f"{json.dumps(k)}: {json.dumps(v) if isinstance(v, str) else v}" for k, v in attributes.items()]
    return f"{{{', '.join(items)}}}" if items else ""


def _protocol(result: EvalResult) -> str:
    """How a figure was got, in one line."""
    args = dict(result.metric_args or {})
    floor = {f"floor ({name})": value and f"{value:.4g}" for name, value in args.pop("floor", {}).items()}
    reference = args.pop("reference_sha256", None)
    facts = {"reference": result.dataset_name, "sha256": reference and f"{reference[:12]}…"}
    facts |= {"features": result.metric_config, **args, **floor}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items() if value is not None)
