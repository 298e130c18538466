import json

import pytest
import torch
from torch import nn

from dit_hf.config import Config, OptimConfig
from dit_hf.runs import RunFolder, migrate_recipe, read_state
from dit_hf.training.checkpoint import (
    TrainingTensors,
    check_disk_space,
    check_same_recipe,
    find_checkpoint,
    remove_partial_checkpoints,
    save_checkpoint,
)
from dit_hf.training.ema import EMA
from dit_hf.training.optimizer import build_optimizer


def parts(seed):
    """Train a tiny model for three steps; returns it with its EMA and optimizer."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    optimizer, _ = build_optimizer(model, OptimConfig(learning_rate=0.1), torch.device("cpu"))
    for step in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        ema.update(step, torch.zeros(()))
    return TrainingTensors(model, {"ema": ema}, optimizer)


def save(run, step, seed=0, limit=2, best=0, validation_loss=None, **further):
    levels = None if validation_loss is None else [validation_loss] * 10
    state = {"step": step, "validation_loss": validation_loss, "validation_loss_by_noise_level": levels}
    state |= further
    return save_checkpoint(run, state, parts(seed).gather(), limit, best)


def test_everything_comes_back_bit_for_bit(tmp_path):
    tensors = parts(1)
    folder = save_checkpoint(tmp_path, {"step": 3}, tensors.gather(), 2, 0)
    other = parts(2)
    other.load(folder)
    assert torch.equal(other.model.weight, tensors.model.weight)
    assert torch.equal(other.ema_weights("ema")["weight"], tensors.ema_weights("ema")["weight"])
    for saved, loaded in zip(tensors.optimizer.state.values(), other.optimizer.state.values(), strict=True):
        assert {*saved} == {*loaded} == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_the_best_stay_beside_the_newest(tmp_path):
    for step, loss in ((10, 0.5), (20, 0.3), (30, 0.4), (40, 0.6), (50, None)):
        save(tmp_path, step, best=2, limit=1, validation_loss=loss)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == [f"checkpoint-{step}" for step in (20, 30, 50)]
    best = json.loads((tmp_path / "best.json").read_text())
    assert [(entry["checkpoint"], entry["validation_loss"]) for entry in best["checkpoints"]] == [
        ("checkpoint-20", 0.3),
        ("checkpoint-30", 0.4),
    ]
    assert best["checkpoints"][0]["validation_loss_by_noise_level"] == [0.3] * 10
    save(tmp_path, 25, best=2, limit=1, validation_loss=0.2)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-20", "checkpoint-25"]


def test_only_losses_of_the_same_number_of_images_are_compared(tmp_path):
    for step, loss, images in ((10, 0.1, 1), (20, 0.4, 8), (30, 0.3, 8)):
        save(tmp_path, step, best=2, limit=1, validation_loss=loss, validation_images=images)
    best = json.loads((tmp_path / "best.json").read_text())
    assert [entry["step"] for entry in best["checkpoints"]] == [30, 20]


def test_the_oldest_are_removed_and_the_order_is_that_of_the_numbers(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9").name == "checkpoint-9"
    assert find_checkpoint(tmp_path / "nothing", "latest") is None


def test_resuming_from_an_earlier_checkpoint_removes_later_ones(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, limit=3)
    save(tmp_path, 15, limit=2)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-10", "checkpoint-15"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-15"


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, capsys):
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "ema.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    assert "checkpoint-2 is damaged: ema.safetensors" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"ema\.safetensors"):
        find_checkpoint(tmp_path, "checkpoint-2")
    (tmp_path / "checkpoint-1" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no usable checkpoint"):
        find_checkpoint(tmp_path, "latest")


def test_a_checkpoint_of_another_run_is_refused_and_a_name_that_is_none_lists_those_there(tmp_path):
    other = save(tmp_path / "other", 2)
    for step in (1, 2):
        save(tmp_path / "run", step)
    with pytest.raises(
        ValueError, match=r"checkpoint-2 is not in train\.output_dir .*; --model\.init_from .* starts a new"
    ):
        find_checkpoint(tmp_path / "run", str(other))
    with pytest.raises(ValueError, match=r"last: expected latest or .* \(there: checkpoint-1, checkpoint-2\)"):
        find_checkpoint(tmp_path / "run", "last")
    own = tmp_path / "run" / "checkpoint-1"
    assert find_checkpoint(tmp_path / "run", str(own)) == own


@pytest.mark.parametrize(("key", "value"), [("step", "20"), ("recipe", []), ("transformer", 3)])
def test_a_state_of_other_types_is_named(tmp_path, key, value):
    """As in a checkpoint of somebody else, whose hashes fit."""
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, key: value}))
    with pytest.raises(ValueError, match=rf"state\.json is damaged \({key} is no"):
        read_state(folder)


def test_what_is_left_of_a_save_is_removed_and_of_a_link_the_link_alone(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / ".checkpoint-1.partial").mkdir()
    (tmp_path / ".checkpoint-2.partial").write_text("x")
    (tmp_path / ".checkpoint-3.replaced").symlink_to(tmp_path / "kept")
    remove_partial_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_save_cut_short_is_not_seen(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dit_hf.training.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint-1"]
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    assert not list(tmp_path.glob(".*"))


def test_an_option_that_is_newer_than_the_checkpoint_was_at_its_default(tmp_path):
    now, before = Config().resume_keys(), Config().resume_keys()
    del before["objective"]["timestep_sampling"]
    check_same_recipe(before, now, tmp_path)
    now["objective"]["timestep_sampling"] = "logit_normal"
    with pytest.raises(ValueError, match=r"objective\.timestep_sampling was 'uniform', now 'logit_normal'"):
        check_same_recipe(before, now, tmp_path)


@pytest.mark.parametrize(
    ("built", "requested"), [("apex FusedAdam", "adamw"), ("Muon and torch AdamW (fused)", "muon")]
)
def test_an_early_recipe_with_resolved_values_among_the_requested_ones_is_read(tmp_path, built, requested):
    resolved = {"pictures": 8, "vae_sha256": "ab", "latent_shape": [4, 2, 2], "condition_values": {"Male": 2}}
    now, before = Config().resume_keys(), Config().resume_keys()
    now["optim"]["optimizer"], before["optim"]["optimizer"] = requested, built
    before["data"] |= resolved
    before = migrate_recipe(before)
    check_same_recipe(before, now | {"found": resolved | {"optimizer": built}}, tmp_path)
    other = "muon" if requested == "adamw" else "adamw"
    with pytest.raises(ValueError, match=rf"optim\.optimizer was '{requested}', now '{other}'"):
        check_same_recipe(before, now | {"optim": now["optim"] | {"optimizer": other}}, tmp_path)
    with pytest.raises(ValueError, match=r"found\.pictures was 8, now 9"):
        check_same_recipe(
            migrate_recipe(before), now | {"found": resolved | {"optimizer": built, "pictures": 9}}, tmp_path
        )


def test_a_disk_too_small_for_a_checkpoint_is_refused_before_any_work(tmp_path):
    with pytest.raises(OSError, match=r"a checkpoint needs 1,000,000,000,000.0 MB, and"):
        check_disk_space(tmp_path, 10**18)
