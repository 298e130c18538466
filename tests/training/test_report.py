import importlib.util

import pytest
from PIL import Image

from dit_hf.training.loop import train
from dit_hf.training.report import COLUMNS, append_log, choose_tracker, draw_loss_curve, read_log, start_log


def row(step):
    return {**dict.fromkeys(COLUMNS), "step": step, "loss": 1 / step}


def test_log_is_cut_back_to_where_the_run_goes_on(tmp_path):
    start_log(tmp_path, 0)
    for step in (10, 20, 30):
        append_log(tmp_path, row(step))
    with open(tmp_path / "training_log.csv", "a") as file:
        file.write("40,1.0,3")  # cut short by a kill
    assert [r["step"] for r in read_log(tmp_path)] == ["10", "20", "30"]
    start_log(tmp_path, 20)
    append_log(tmp_path, row(21))
    assert [r["step"] for r in read_log(tmp_path)] == ["10", "20", "21"]
    draw_loss_curve(tmp_path)
    Image.open(tmp_path / "loss_curve.png").verify()


def test_wandb_without_a_login_is_offline_and_never_asks(config, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config.train.report_to = "wandb"
    run = train(config)
    assert "no wandb login" in capsys.readouterr().out
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_tracker_that_is_not_installed_is_said_and_done_without():
    said = []
    assert choose_tracker("tensorboard", said.append) == (None, {})
    assert "not installed" in said[0]
