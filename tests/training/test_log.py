import pytest
from PIL import Image
from training_runs import changed, rows

from dit_hf.runs import read_log
from dit_hf.training.log import COLUMNS, append_log, plot_loss_curve, start_log
from dit_hf.training.trainer import Trainer, train


def row(step):
    return {**dict.fromkeys(COLUMNS), "step": step, "loss": 1 / step}


def test_log_is_cut_back_to_where_the_run_resumes(tmp_path):
    start_log(tmp_path, 0)
    for step in (10, 20, 30):
        append_log(tmp_path / "training_log.csv", row(step))
    with open(tmp_path / "training_log.csv", "a") as file:
        file.write("40,1.0,3")  # cut short by a kill
    assert [r["step"] for r in read_log(tmp_path)] == ["10", "20", "30"]
    start_log(tmp_path, 20)
    append_log(tmp_path / "training_log.csv", row(21))
    assert [r["step"] for r in read_log(tmp_path)] == ["10", "20", "21"]
    plot_loss_curve(tmp_path)
    Image.open(tmp_path / "loss_curve.png").verify()


def test_a_log_keeps_columns_that_are_no_longer_measured(tmp_path):
    start_log(tmp_path, 0, [*COLUMNS, "FD-a-2k"])
    append_log(tmp_path / "training_log.csv", row(10) | {"FD-a-2k": 5.0})
    start_log(tmp_path, 10, [*COLUMNS, "FD-b-1k"])
    append_log(tmp_path / "training_log.csv", row(20) | {"FD-b-1k": 7.0})
    assert [(r["FD-a-2k"], r["FD-b-1k"]) for r in read_log(tmp_path)] == [("5.0", ""), ("", "7.0")]


def test_loss_by_noise_level_adds_up_to_the_loss(config):
    run = train(changed(config, train={"logging_steps": 1}))
    trainer = Trainer(changed(config, train={"output_dir": str(run.parent / "again")}))
    for step, row in enumerate(rows(run)):
        trainer.step(step)
        total, count = trainer.step.window
        trainer.step.begin_window()
        assert count.sum() == 8
        logged = [row[f"loss_level_{level}"] for level in range(10)]
        for text, value, number in zip(logged, total.tolist(), count.tolist(), strict=True):
            assert text == (repr(value / number) if number else "")
        assert float(row["loss"]) == pytest.approx((total.sum() / 8).item(), rel=1e-6)
