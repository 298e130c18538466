"""The validation loss, computed again by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file
from training_runs import changed, rows

from dit_hf.latents.reader import LatentReader
from dit_hf.training.trainer import Trainer, train
from dit_hf.training.validation import Validation


def test_validation_is_the_loss_of_the_ema_at_each_level_and_the_best_is_kept(config):
    run = train(changed(config, train={"max_train_steps": 12, "checkpoints_total_limit": 1}))
    validated = {row["step"]: float(row["validation_loss"]) for row in rows(run) if row["validation_loss"]}
    assert [*validated] == ["4", "8", "12"]
    best = json.loads((run / "best.json").read_text())["checkpoints"]
    assert {best[0]["checkpoint"], "checkpoint-12"} == {path.name for path in run.glob("checkpoint-*")}
    assert best[0]["validation_loss"] == min(validated.values())
    # By hand: the last EMA on the held-out image, in the middle of each tenth of the schedule.
    trainer = Trainer(changed(config, train={"max_train_steps": 12, "resume_from_checkpoint": "latest"}))
    reader = LatentReader(config.data.latents, "validation")
    count = len(reader)
    assert count > 1
    latents = torch.from_numpy(reader.read("latent_mean", reader.indices)).float()
    noise = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(i)) for i in range(count)])
    ids = torch.from_numpy(reader.condition_ids(reader.indices))
    trainer.transformer.load_state_dict(load_file(run / "checkpoint-12" / "ema.safetensors"))
    timesteps = [torch.floor(50 * (level + (torch.arange(count) + 0.5) / count)) for level in range(10)]
    with torch.no_grad():
        expected = torch.stack([trainer.step.losses(latents, noise, t, ids).mean() for t in timesteps])
    logged = [float(rows(run)[-1][f"validation_loss_level_{level}"]) for level in range(10)]
    assert logged == pytest.approx(expected.tolist(), rel=1e-5)
    assert validated["12"] == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("num_ranks", "batch_size"), [(1, 7), (2, 4), (3, 16)])
def test_ranks_evaluate_every_image_once_in_each_tenth_of_the_schedule(training_latents, num_ranks, batch_size):
    reader = LatentReader(training_latents, "validation")
    validation = Validation(reader, 3, 500, batch_size, torch.device("cpu"))
    sizes = []

    def loss(latents, noise, timesteps, condition_ids):
        sizes.append(len(latents))
        return timesteps * latents.mean((1, 2, 3))

    total, count = sum(validation.losses(loss, rank, num_ranks) for rank in range(num_ranks))
    assert count.tolist() == [3] * 10
    assert set(sizes) == {batch_size}  # compiled models are compiled for one shape
    # Image i is at fraction (i + 1/2) / 3 of each tenth, of 50 timesteps.
    means = reader.read("latent_mean", reader.indices[:3]).astype("float32").mean((1, 2, 3))
    expected = [sum((50 * level + int(50 * (i + 0.5) / 3)) * means[i] for i in range(3)) for level in range(10)]
    assert total.tolist() == pytest.approx(expected, rel=1e-5)
