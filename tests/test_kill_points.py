"""A sample of the points at which `benchmarks/kill_points.py` kills commands."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill_points.py"


@pytest.mark.slow
def test_commands_killed_before_a_change_of_a_file_end_with_the_same_bytes(tmp_path):
    command = [sys.executable, SCRIPT, "--every", "25", "--json", tmp_path / "points.json"]
    subprocess.run(command, check=True)
    results = json.loads((tmp_path / "points.json").read_text())
    assert {*results} >= {"prepare-latents", "train", "sample", "evaluate", "push", "push-hub"}
    for verb, result in results.items():
        assert result["tried"] >= 1, verb
        assert result["different"] == [], verb
