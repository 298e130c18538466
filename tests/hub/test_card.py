"""The model card: valid metadata, figures with their protocol, terms of the data."""

import importlib.metadata
import json
import re
from email.message import EmailMessage

import pytest
import torch
import yaml
from conftest import tiny_pipeline
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from repositories import read_snippets

from dit_hf import LatentDiTPipeline
from dit_hf.hub.card import card_data, eval_results, example_attributes, write_card, write_run_card
from dit_hf.hub.push import write_repository
from dit_hf.latents.vae import weights_sha256
from dit_hf.runs import exported_summary, load_pipeline
from dit_hf.storage import write_json
from dit_hf.training.trainer import train
from dit_hf_cli import main

# The keys that the Hub's documentation allows (hub-docs: modelcard.md, repositories-licenses.md, model-cards.md).
KEYS = {
    *("library_name", "license", "license_name", "license_link", "pipeline_tag", "tags", "datasets"),
    *("base_model", "base_model_relation", "model-index"),
}
LICENSES = {"apache-2.0", "other", "unknown", "mit"}
TRAINING = {
    "recipe": "optim: {}\n",
    "pictures": 1234,
    "source": "celeba",
    "crop": "celeba-178",
    "resolution": "256",
    "vae": "a/vae",
    "columns": ["Male", "5_o_Clock_Shadow"],
    "steps": 10,
    "max_steps": 20,
    "images_seen": 80,
    "last_loss": 0.5,
    "logging_steps": 5,
    "validation_loss": 0.25,
    "validation_images": 50,
    "base_model": None,
}
FIGURES = {"frechet_distance": 12.5, "kid": 0.01, "precision": 0.75, "recall": 0.5}


def report(pipeline):
    """Return a short version of a report of `dit-hf evaluate`."""
    reference = {"source": "celeba", "pictures": 1000, "resolution": "256", "split": "validation"}
    protocol = {"num_samples": 512, "num_inference_steps": 25, "guidance_scale": 2.0, "seed": 0, "dtype": "float32"}
    protocol |= {"features": {"name": "efficientnet-lite0"}, "reference": reference | {"pixels_sha256": "ab"}}
    figures = FIGURES | {"num_samples": 512}
    other = {"floor": {"vae": figures, "real": figures}, "attributes": None, "settings": []}
    other["model"] = {"transformer_sha256": weights_sha256(pipeline.transformer)}
    return {"name": "FD-512", "protocol": protocol, "figures": figures, "path": "/home/me/x", **other}


def write_evaluation(folder, pipeline):
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(report(pipeline)))


def read_metadata(folder):
    text = (folder / "README.md").read_text()
    return text, yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def test_metadata_is_the_hubs_and_round_trips(tmp_path):
    pipeline = tiny_pipeline()
    write_evaluation(tmp_path, pipeline)
    write_card(tmp_path, pipeline, "faces", "you/faces", {**TRAINING, "base_model": "you/earlier@v2"})
    text, metadata = read_metadata(tmp_path)
    assert set(metadata) <= KEYS
    assert metadata["library_name"] == "diffusers"
    assert metadata["pipeline_tag"] == "unconditional-image-generation"
    assert metadata["license"] == "other"
    assert re.fullmatch(r"[a-z0-9-.]+", metadata["license_name"])
    assert metadata["license_link"].startswith("https://")
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("you/earlier", "finetune")
    assert {"diffusers", "dit_hf"} <= set(metadata["tags"])
    assert "datasets" not in metadata
    # Through huggingface_hub's own classes, and back.
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == metadata
    assert [type(result) for result in card.data.eval_results] == [EvalResult] * 4
    assert card.data.model_name == "faces"
    (model,) = metadata["model-index"]
    (entry,) = model["results"]
    assert entry["task"] == {"type": "unconditional-image-generation"}
    assert set(entry["dataset"]) <= {"type", "name", "config", "split", "revision", "args"}
    assert [metric["value"] for metric in entry["metrics"]] == list(FIGURES.values())
    assert entry["metrics"][0]["name"] == "FD-512"
    for metric in entry["metrics"]:
        assert metric["args"]["num_samples"] == 512  # no figure without its protocol
    assert "| FD-512 | 12.5 |" in text
    assert text.count("reference celeba, 1,000 images of 256 px") == 1


@pytest.mark.parametrize(
    ("training", "options", "expected"),
    [
        ({"source": "avatars", "columns": ["5_o_Clock_Shadow"]}, {}, {"license": "apache-2.0"}),
        ({"source": "mine"}, {}, {"license": "unknown"}),
        ({"source": "mine"}, {"license": "mit", "datasets": ["a/b"]}, {"license": "mit", "datasets": ["a/b"]}),
        ({"source": "you/flowers"}, {}, {"license": "unknown", "datasets": ["you/flowers"]}),
        ({"source": "pics", "crop": "celeba-140"}, {}, {"license": "other"}),
        ({"source": "pics", "columns": ["5_o_Clock_Shadow"]}, {}, {"license": "other"}),
        ({"source": "CelebAMask-HQ", "base_model": "earlier"}, {}, {"license": "other"}),
        ({}, {}, {"license": "unknown"}),
    ],
)
def test_terms_and_data_sets(training, options, expected):
    data = card_data("x", training, [], **options).to_dict()
    assert {key: data[key] for key in expected} == expected
    assert data["license"] in LICENSES
    assert ("license_name" in data) == (data["license"] == "other")
    assert "base_model" not in data
    assert ("datasets" in data) == ("datasets" in expected)


@pytest.mark.parametrize(
    ("training", "expected", "unexpected"),
    [
        (TRAINING, ["non-commercial research only", "annotators", "of 20", "up to 50 held-out"], ["Avataaars"]),
        ({**TRAINING, "source": "avatars", "crop": "none"}, ["Avataaars"], ["annotators", "people"]),
        (
            {**TRAINING, "source": "rockets", "crop": "none", "columns": []},
            ["at their source"],
            ["generated face", "annotators"],
        ),
        ({}, ["at their source", "not measured"], ["## Training", "images of `"]),
    ],
)
def test_the_card_describes_the_data(tmp_path, training, expected, unexpected):
    write_card(tmp_path, tiny_pipeline(), "faces", "you/faces", training)
    text = (tmp_path / "README.md").read_text()
    assert all(phrase in text for phrase in expected)
    assert not any(phrase in text for phrase in unexpected)
    assert "{{" not in text
    assert "None" not in text


def test_the_snippets_of_a_run_and_of_a_repository_run_unchanged(config, tmp_path, monkeypatch, capsys):
    config.data.conditions = ["Male", "Smiling"]
    run = train(config)
    write_repository(tmp_path / "repository", load_pipeline(str(run), "cpu"), str(run), "faces", ".")
    for folder, sheet in ((run, "samples/step-8.png"), (tmp_path / "repository", "samples.png")):
        monkeypatch.chdir(folder)
        text = (folder / "README.md").read_text()
        snippets = read_snippets(text)
        for code, kind in zip(snippets, ["LatentDiTPipeline"] * 2 + ["ModularPipeline"], strict=True):
            names: dict = {}
            exec(code, names)
            with Image.open("image.png") as image:
                assert image.size == (16, 16)
            assert type(names["pipe"]).__name__ == kind
        assert f"![samples]({sheet})" in text
        for image in re.findall(r"!\[\w+\]\(([^)]*)\)", text):
            Image.open(folder / image).verify()
        assert 'pipe({"Male": True}, num_inference_steps=25)' in text
        assert re.search(r"\| steps \| 8 \|", text)
        assert "| optimizer | torch AdamW (fused) |" in text
        # The recipe in the card is a valid one.
        (tmp_path / "again.yaml").write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
        capsys.readouterr()
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--config", str(tmp_path / "again.yaml"), "--print_config"])
        read = yaml.safe_load(capsys.readouterr().out)
        assert read["train"]["max_train_steps"] == 8
        assert all(read[section].items() >= values.items() for section, values in config.resume_keys().items())


def test_the_evaluation_is_copied_without_paths_and_neighbours(config, tmp_path):
    run = train(config)
    pipeline = load_pipeline(str(run), "cpu")
    write_evaluation(run, pipeline)
    (run / "evaluation" / "neighbours.png").write_bytes(b"images of the data")
    write_repository(tmp_path / "out", pipeline, str(run / "pipeline"), "faces", "you/faces")
    assert [path.name for path in (tmp_path / "out" / "evaluation").iterdir()] == ["evaluation.json"]
    assert json.loads((tmp_path / "out" / "evaluation" / "evaluation.json").read_text())["path"] == "x"
    assert "| FD-512 | 12.5 |" in (tmp_path / "out" / "README.md").read_text()
    write_run_card(run, pipeline, exported_summary(run))
    assert "| FD-512 | 12.5 |" in (run / "README.md").read_text()
    # Figures of half precision belong to the model too, those of other weights do not.
    half = load_pipeline(str(run), "cpu", dtype=torch.bfloat16)
    measured = report(half) | {"protocol": report(half)["protocol"] | {"dtype": "bfloat16"}}
    (run / "evaluation" / "evaluation.json").write_text(json.dumps(measured))
    for change in (0, 1):
        pipeline.transformer.proj_out.bias.data += change
        write_run_card(run, pipeline, exported_summary(run))
        assert ("| FD-512 | 12.5 |" in (run / "README.md").read_text()) is (change == 0)
    assert "not measured" in (run / "README.md").read_text()


@pytest.mark.parametrize("text", ["[]", "{}", "null", "", '{"model": 5}', "changed"])
def test_a_damaged_evaluation_is_named_with_the_way_out(tmp_path, text):
    pipeline, path = tiny_pipeline(), tmp_path / "evaluation" / "evaluation.json"
    path.parent.mkdir()
    write_json(path, report(pipeline))
    assert len(eval_results(path, pipeline)) == 4
    path.write_text(path.read_text().replace("12.5", "12.6") if text == "changed" else text)
    with pytest.raises(ValueError, match=r"evaluation\.json is damaged \(.*\); delete it, or evaluate again"):
        eval_results(path, pipeline)


def test_examples_of_attributes():
    pipeline = tiny_pipeline()
    assert example_attributes(pipeline) == {"Smiling": True}
    unconditional = LatentDiTPipeline(**{**pipeline.components, "condition_labels": {}})
    unconditional.transformer.register_to_config(conditions=None)
    assert example_attributes(unconditional) == {}


def test_the_card_says_where_dit_hf_lives(tmp_path, monkeypatch):
    """By the address in the package's metadata, once it has one."""
    write_card(tmp_path, tiny_pipeline(), "faces", "you/faces")
    assert "With dit_hf installed (in a clone of it: `pip install .`):" in (tmp_path / "README.md").read_text()
    metadata = EmailMessage()
    metadata["Project-URL"] = "Repository, https://github.com/you/dit_hf"
    monkeypatch.setattr(importlib.metadata, "metadata", lambda _: metadata)
    write_card(tmp_path, tiny_pipeline(), "faces", "you/faces")
    assert "`pip install git+https://github.com/you/dit_hf`" in (tmp_path / "README.md").read_text()


def test_a_card_is_written_where_the_package_was_never_installed(tmp_path, monkeypatch):
    """A folder on PYTHONPATH has no metadata; a finished training would end without its pipeline's card."""

    def metadata(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", metadata)
    write_card(tmp_path, tiny_pipeline(), "faces", "you/faces")
    assert "With dit_hf installed (in a clone of it: `pip install .`):" in (tmp_path / "README.md").read_text()
