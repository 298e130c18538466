import re

from dit_hf.latents.prepare import prepare_latents


def test_time_memory_and_disk_are_estimated_in_one_line(tmp_path, vae_folder, capsys):
    prepare_latents("avatars", str(tmp_path / "out"), str(vae_folder), "16", num_images=40, batch_size=5)
    lines = [line for line in capsys.readouterr().out.splitlines() if "images left at" in line]
    assert len(lines) == 1
    assert re.search(
        r"25 images left at [\d,.]+ images/s: about \d+:\d\d:\d\d, [\d.]+ GB of memory, 0\.00 GB on", lines[0]
    )
