"""The Fréchet distance in the log is that of the EMA weights' samples, and measuring it changes nothing."""

import numpy as np
import pytest
import torch
from training_runs import assert_same_bits, changed, comparable, rows

from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.latents.reader import LatentReader
from dit_hf.latents.vae import decode
from dit_hf.runs import load_pipeline
from dit_hf.sampling.generate import generate_images
from dit_hf.training.trainer import train

NAME = "FD-efficientnet-lite0-40"


def test_a_run_logs_the_distance_of_its_ema_weights_samples(config, tmp_path):
    evaluated = changed(
        config, train={"output_dir": str(tmp_path / "evaluated"), "evaluation_steps": 4, "evaluation_samples": 40}
    )
    run, without = train(evaluated), train(config)
    logged = {int(row["step"]): float(row[NAME]) for row in rows(run) if row[NAME]}
    assert set(logged) == {4, 8}

    # Computed again, from the exported pipeline.
    net, reader = load_features("efficientnet-lite0"), LatentReader(config.data.latents)
    pipeline = load_pipeline(str(run))
    stored = torch.from_numpy(reader.read("latent_mean", reader.indices[:40]))
    real = net(decode(pipeline.vae, stored).cpu().numpy())
    options = {"num_inference_steps": 2}
    generated = [
        generate_images(pipeline, range(start, start + 20), reader.attributes(40), 0, **options) for start in (0, 20)
    ]
    expected = frechet_distance(np.concatenate([net(part) for part in generated]), real)
    assert logged[8] == pytest.approx(expected, rel=1e-3)

    # The run itself is the same as without.
    assert_same_bits(run / "checkpoint-8", without / "checkpoint-8")
    assert [{k: v for k, v in row.items() if k != NAME} for row in comparable(run)] == comparable(without)
