import pytest
import torch
from torch import nn

from dit_hf.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint


def parts(seed):
    torch.manual_seed(seed)
    model, ema = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return model, ema, optimizer


def save(run, step, seed=0, limit=2):
    return save_checkpoint(run, {"step": step}, *parts(seed), limit)


def test_everything_comes_back_bit_for_bit(tmp_path):
    model, ema, optimizer = parts(1)
    folder = save_checkpoint(tmp_path, {"step": 3}, model, ema, optimizer, 2)
    other, other_ema, other_optimizer = parts(2)
    load_checkpoint(folder, other, other_ema, other_optimizer)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(other_ema.weight, ema.weight)
    for saved, loaded in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_the_oldest_go_and_the_order_is_of_numbers(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, "checkpoint-9").name == "checkpoint-9"
    assert find_checkpoint(tmp_path / "nothing", "latest") is None


def test_going_back_to_an_earlier_one_drops_what_came_after(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, limit=3)
    save(tmp_path, 15, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15"]
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


def test_a_save_cut_short_is_not_seen(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    assert not list(tmp_path.glob(".*"))
