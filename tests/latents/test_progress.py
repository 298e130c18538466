import re
import time
from types import SimpleNamespace

from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.progress import Progress


def test_time_memory_and_disk_are_estimated_in_one_line(tmp_path, vae_folder, capsys):
    prepare_latents("avatars", str(tmp_path / "out"), str(vae_folder), "16", num_images=40, batch_size=5)
    lines = [line for line in capsys.readouterr().err.splitlines() if "images left at" in line]
    assert len(lines) == 1
    assert re.search(
        r"25 images left at [\d,.]+ images/s: about \d+:\d\d:\d\d, [\d.]+ GB of memory, 0\.00 GB on", lines[0]
    )


def test_speed_of_processes_counts_the_time_before_their_first_reports(capsys):
    """Two processes report a shard each within a moment of each other, after a while of work."""
    job = SimpleNamespace(rows_of=lambda shard: range(512), bytes_per_row=1000)
    with Progress(job, [0, 1, 2, 3], num_proc=2, shown=True) as progress:
        time.sleep(0.2)
        progress.update(512)
        progress.update(512)
    speed = re.search(r"1,024 images left at ([\d,.]+) images/s", capsys.readouterr().err)
    assert float(speed[1].replace(",", "")) < 1024 / 0.2
