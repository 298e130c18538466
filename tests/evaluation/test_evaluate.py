"""Evaluations of tiny models: protocol, floors, and figures that depend on neither kills, ranks nor batches."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from dit_hf.evaluation.evaluate import evaluate
from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.evaluation.reference import load_reference, reference
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import generate_images
from dit_hf.training.trainer import train
from dit_hf_cli import main

OPTIONS = {"num_samples": 40, "batch_size": 8, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Other tests have kept statistics of the same images."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.fixture(scope="module")
def run(model):
    return Path(model)


@pytest.fixture(scope="module")
def statistics(tmp_path_factory, net):
    """Reference statistics of 80 avatars at 16 px."""
    folder = tmp_path_factory.mktemp("reference") / "avatars"
    return reference("avatars", str(folder), net, resolution="16", num_images=80)


@pytest.fixture(scope="module")
def evaluated(run, statistics, net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "whole"
    return evaluate(str(run), str(statistics), features=net, output_dir=str(folder), **OPTIONS)


def report_of(folder):
    """Return a report without the hash of its own text."""
    report = json.loads((folder / "evaluation.json").read_text())
    del report["json_sha256"]
    return report


def test_the_figure_is_the_distance_of_the_generated_images(evaluated, run, net, statistics):
    real, network = load_reference(statistics), load_features(net)
    rows = real.attributes(["Smiling", "class"])[::2]  # 40 of 80, evenly spread
    pipeline = load_pipeline(str(run))
    images = [generate_images(pipeline, range(i, i + 8), rows, 0, num_inference_steps=2) for i in range(0, 40, 8)]
    report = report_of(evaluated)
    expected = frechet_distance(np.concatenate([network(part) for part in images]), real.features)
    assert report["figures"]["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert report["name"] == "FD-dino-40"
    assert report["protocol"]["attributes"].endswith("evenly spread: Smiling")
    assert report["floor"]["real"]["frechet_distance"] < report["figures"]["frechet_distance"]
    assert "statistics hold no images" in report["floor"]["vae"]["reason"]
    assert 0 <= report["attributes"]["accuracy"] <= 1
    assert str(run.parent) not in (evaluated / "evaluation.json").read_text()


def test_a_resumed_evaluation_gives_the_same_bits(evaluated, run, net, statistics, tmp_path):
    options = {"features": net, "output_dir": str(tmp_path / "again"), **OPTIONS}
    again = evaluate(str(run), str(statistics), **options)
    files = sorted((again / "features").rglob("from-*.safetensors"))
    assert len(files) == 5
    for file in files[1:4]:
        file.unlink()
    (again / "evaluation.json").unlink()
    evaluate(str(run), str(statistics), **options)
    assert report_of(again) == report_of(evaluated)


def test_half_precision_is_another_protocol_of_about_the_same_figure(evaluated, run, net, statistics, tmp_path):
    options = {"features": net, "output_dir": str(tmp_path / "half"), "dtype": "bfloat16", **OPTIONS}
    report, whole = report_of(evaluate(str(run), str(statistics), **options)), report_of(evaluated)
    assert report["protocol"]["dtype"] == "bfloat16"
    assert report["figures"]["frechet_distance"] == pytest.approx(whole["figures"]["frechet_distance"], rel=0.2)


def test_another_protocol_replaces_the_report_and_the_earlier_one_reuses_its_features(
    evaluated, run, net, statistics, tmp_path, capsys
):
    folder = shutil.copytree(evaluated, tmp_path / "copy")
    options = {"features": net, "output_dir": str(folder), **OPTIONS}
    evaluate(str(run), str(statistics), seed=1, **options)
    assert report_of(folder)["protocol"]["seed"] == 1
    assert report_of(folder)["figures"] != report_of(evaluated)["figures"]
    capsys.readouterr()
    evaluate(str(run), str(statistics), **options)
    assert report_of(folder) == report_of(evaluated)
    assert "images/s" not in capsys.readouterr().err  # no image was generated again


def test_a_run_is_compared_with_other_images_and_by_other_features_in_its_own_folder(config, net):
    run = train(config)
    for features, count in ((net, 64), ("efficientnet-lite0", 48)):
        evaluate(str(run), "avatars", features=features, num_images=count, **OPTIONS)
        report = report_of(run / "evaluation")
        assert report["protocol"]["features"]["name"] in features
        assert report["protocol"]["reference"]["pictures"] == count
        assert report["name"] in (run / "README.md").read_text()


def test_statistics_of_the_same_reference_are_computed_once_for_all_models(run, net, tmp_path, capsys):
    """Where they are damaged, they are computed again."""
    options = {"features": net, "num_images": 56, **OPTIONS}

    def evaluated(name):
        folder = evaluate(str(run), "avatars", output_dir=str(tmp_path / name), **options)
        found = re.search("statistics of an earlier evaluation, from (.*)", capsys.readouterr().out)
        return report_of(folder), found and Path(found[1])

    first, from_cache = evaluated("first")
    assert from_cache is None
    second, from_cache = evaluated("second")
    assert from_cache
    assert second == first
    file = from_cache / "statistics.safetensors"
    data = bytearray(file.read_bytes())
    file.unlink()  # a copy, not the evaluation's own file
    data[-5] ^= 1
    file.write_bytes(data)
    assert evaluated("third") == (first, None)
    assert evaluated("fourth") == (first, from_cache)


def test_a_resumed_run_is_evaluated_anew(config, net):
    options = {"features": net, **OPTIONS}
    report = evaluate(str(train(config)), **options) / "evaluation.json"
    before = json.loads(report.read_text())
    config.train.max_train_steps, config.train.resume_from_checkpoint = 12, "latest"
    run = train(config)
    assert "not measured" in (run / "README.md").read_text()
    (reference_of_run,) = report.parent.glob("reference-*")
    with pytest.raises(FileExistsError, match="holds the evaluation of another model"):
        evaluate(str(run / "checkpoint-12"), str(reference_of_run), output_dir=report.parent, **options)
    evaluate(str(run), **options)
    after = json.loads(report.read_text())
    assert after["figures"]["frechet_distance"] != before["figures"]["frechet_distance"]
    assert after["protocol"]["reference"] == before["protocol"]["reference"]


def test_attributes_of_other_rows_are_other_samples(run, net, latents, tmp_path):
    """Even if both references are parts of one source."""
    options = {"features": net, "output_dir": str(tmp_path / "out"), **OPTIONS}
    sources = [reference(str(latents), str(tmp_path / str(n)), net, num_images=n) for n in (40, 50)]
    one, other = (report_of(evaluate(str(run), str(source), **options)) for source in sources)
    assert one["protocol"]["reference"]["pictures"] == 40
    assert other["protocol"]["reference"]["pictures"] == 50
    assert len(list((tmp_path / "out" / "features" / "guidance-2-steps-2").iterdir())) == 2


def test_a_run_is_evaluated_without_options(config, net, capsys):
    """Against its training avatars, with the floor of its VAE; image grid, plots, table, and the card."""
    run = train(config)
    evaluate(str(run), features=net, **{**OPTIONS, "guidance_scale": [1.0, 3.0], "save_images": True})
    folder = run / "evaluation"
    report = report_of(folder)
    assert report["protocol"]["reference"]["source"] == "avatars"
    assert report["protocol"]["reference"]["pictures"] == 200
    assert report["floor"]["vae"]["frechet_distance"] > report["floor"]["real"]["frechet_distance"]
    assert [row["guidance_scale"] for row in report["settings"]] == [1.0, 3.0]
    for name in ("evaluation.png", "settings.png", "neighbours.png"):
        Image.open(folder / name).verify()
    assert len(list((folder / "images" / "guidance-1-steps-2").glob("*/*.png"))) == 40

    card = ModelCard.load(run / "README.md")
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results[report["name"]] == pytest.approx(report["figures"]["frechet_distance"], rel=1e-5)
    assert f"| {report['name']} | {results[report['name']]} |" in card.text
    assert "Protocol: reference avatars" in card.text
    assert f"floor (vae) {report['floor']['vae']['frechet_distance']:.4g}" in card.text

    # What is compared and the time come first; the figure and its floor last; the protocol is in the file alone.
    table, protocol = (folder / "evaluation.md").read_text().split("\n\n## Protocol")
    lines = (printed := capsys.readouterr().out).splitlines()
    first = lines.index("samples    40 with guidance 1 and 2 steps, guidance 3 and 2 steps")
    assert lines[first + 1] == "reference  200 images (avatars)"
    assert re.fullmatch(
        r"time       about [\d:]+ \(reference [\d:]+, samples [\d:]+, reconstructions [\d:]+\)", lines[first + 2]
    )
    assert table in printed
    assert f"| {report['name']} | {report['figures']['frechet_distance']:.4g} ±" in table
    assert "sha256" in protocol
    assert "sha256" not in printed
    figures, floor = report["figures"]["frechet_distance"], report["floor"]["vae"]["frechet_distance"]
    assert lines[-1].startswith(f"FD-dino-40 {figures:.4g} ± ")
    assert f", floor {floor:.4g} (the VAE's reconstructions), " in lines[-1]
    assert lines[-1].endswith(f"the protocol is in {folder / 'evaluation.md'}")


def test_few_samples_are_compared_with_a_part_of_the_training_images(config, net, capsys):
    run = train(config)
    options = {"features": net, "num_samples": 16, "batch_size": 8, "num_inference_steps": 2}
    evaluate(str(run), **options)
    reference = report_of(run / "evaluation")["protocol"]["reference"]
    assert (reference["pictures"], reference["spread_over"]) == (160, 200)
    assert "reference  160 of 200 images (avatars), evenly spread: 10 per sample" in capsys.readouterr().out
    evaluate(str(run), **options)
    assert "time       short: earlier calls have computed all features" in capsys.readouterr().out
    evaluate(str(run), **options, num_images=200)
    assert "spread_over" not in report_of(run / "evaluation")["protocol"]["reference"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": "efficientnet-lite0"}, "name dino, now efficientnet-lite0"),
        ({"num_samples": 4}, "num_samples=4 must be at least"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_inference_steps": [2, 0]}, "num_inference_steps=0 must be a whole number between 1"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1 must be at least 0"),
        ({"features": "inception", "feature_weights": "nowhere"}, "not measured"),
        ({"reference": "few"}, "expected at least 32 reference images, got 20"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"reference": None}, "give --reference"),
        ({"reference": "nowhere"}, "no such folder"),
        ({"output_dir": None, "model": "pipeline"}, "--output_dir"),
        ({"output_dir": "taken"}, "holds something else (no evaluation.json); name a new folder"),
    ],
)
def test_invalid_options_are_one_line(run, statistics, net, tmp_path, capsys, change, message):
    options = {"model": str(run), "reference": str(statistics), "output_dir": str(tmp_path / "out"), **OPTIONS}
    options |= {"features": net}
    options |= change
    if options["reference"] == "few":
        options["reference"] = str(reference("avatars", str(tmp_path / "few"), net, resolution="16", num_images=20))
    if options["output_dir"] == "taken":
        options["output_dir"] = str(tmp_path)
        (tmp_path / "one.jpg").touch()
    if options["model"] == "pipeline":
        options["model"] = str(run / "pipeline")
    flags = [f"--{k}={v}" for k, v in options.items() if v is not None and k != "model"]
    assert main(["evaluate", options["model"], *flags]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_statistics_of_another_size_are_refused(run, net, tmp_path):
    other = reference("avatars", str(tmp_path / "other"), net, resolution="32", num_images=20)
    with pytest.raises(ValueError, match="images of 32x32 px, now 16x16"):
        evaluate(str(run), str(other), features=net, output_dir=str(tmp_path / "out"), **OPTIONS)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_or_on_two_ranks_gives_the_same_report(run, net, statistics, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    flags = [str(run), "--reference", str(statistics), "--features", net]
    flags += ["--num_samples", "40", "--batch_size", "2", "--num_inference_steps", "10"]
    one = [sys.executable, "-m", "dit_hf", "evaluate", *flags]
    script = str(os.path.join(os.path.dirname(__file__), "..", "..", "scripts", "evaluate.py"))
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *flags]
    whole, killed, ranks = (tmp_path / name for name in ("whole", "killed", "ranks"))
    subprocess.run([*one, "--output_dir", str(whole)], check=True, env=environment)
    subprocess.run([*two, "--output_dir", str(ranks)], check=True, env=environment)
    process = subprocess.Popen([*one, "--output_dir", str(killed)], env=environment)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not list(killed.rglob("from-*.safetensors")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < len(list(killed.rglob("from-*.safetensors"))) < 20
    assert not (killed / "evaluation.json").exists()
    subprocess.run([*one, "--output_dir", str(killed)], check=True, env=environment)
    expected = report_of(whole)
    assert report_of(killed) == expected
    on_two_ranks = report_of(ranks)
    assert (expected["protocol"].pop("ranks"), on_two_ranks["protocol"].pop("ranks")) == (1, 2)
    assert on_two_ranks == expected
