"""Builds of a cache that are killed, or shared by several ranks."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dit_hf import open_images
from dit_hf.latents.prepare import prepare_latents
from dit_hf.latents.reader import LatentReader
from dit_hf.storage import sha256

pytestmark = pytest.mark.slow
OPTIONS = ["--source", "avatars", "--num_images", "1600", "--vae", "avatar", "--resolution", "64"]


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "dit_hf", "prepare-latents", *OPTIONS, "--output_dir", str(folder)]


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, float]:
    """Build a cache without interruption; return its folder and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole") / "latents"
    open_images("avatars", 64, num_images=1600)  # rendered, and kept for all builds
    started = time.monotonic()
    subprocess.run(command(folder), check=True)
    return folder, time.monotonic() - started


def test_killed_builds_give_the_same_bytes_and_encode_no_shard_twice(tmp_path, whole, request):
    unbroken, seconds = whole
    rng, kills, partial = random.Random(0), request.config.getoption("--kills"), tmp_path / ".latents.partial"
    finished: dict[str, tuple[int, int]] = {}
    done, finished_counts = 0, []
    while done < kills:
        process = subprocess.Popen(command(tmp_path / "latents"), start_new_session=True)
        time.sleep(rng.uniform(0.3, 1.0) * seconds * 0.8)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            done += 1
        process.wait()
        folder = partial if partial.exists() else tmp_path / "latents"
        now = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("data-*.arrow")}
        assert finished.items() <= now.items()
        notes = {f"{int(path.stem):05}" for path in partial.glob("building/*.json") if path.stem.isdigit()}
        finished = {name: value for name, value in now.items() if name.split("-")[1] in notes}
        finished_counts.append(len(finished))
        if (tmp_path / "latents").exists():  # it ended before the kill: begin another
            assert hashes(tmp_path / "latents") == hashes(unbroken)
            (tmp_path / "latents").rename(tmp_path / f"done-{done}-{len(finished_counts)}")
            finished = {}
    subprocess.run(command(tmp_path / "latents"), check=True)
    print(f"{kills} kills; finished shards after each: {finished_counts}")
    assert hashes(tmp_path / "latents") == hashes(unbroken)


def test_killed_additions_give_the_same_bytes_and_two_ranks_the_same_rows(tmp_path, vae_folder, request):
    base = prepare_latents("avatars", str(tmp_path / "base"), str(vae_folder), "16", num_images=600)
    options = [
        "avatars",
        "--vae",
        str(vae_folder),
        "--resolution",
        "16",
        "--num_images",
        "1700",
        "--add_to",
        str(base),
    ]
    add = [sys.executable, "-m", "dit_hf", "prepare-latents", *options, "--output_dir"]
    unbroken, killed, ranks = tmp_path / "unbroken", tmp_path / "killed", tmp_path / "ranks"
    open_images("avatars", 16, num_images=1700)  # rendered, and kept for all builds
    before, started = hashes(base), time.monotonic()
    subprocess.run([*add, str(unbroken)], check=True)
    seconds, rng = time.monotonic() - started, random.Random(1)
    for _ in range(request.config.getoption("--kills")):
        process = subprocess.Popen([*add, str(killed)], start_new_session=True)
        time.sleep(rng.uniform(0.5, 1.0) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*add, str(killed)], check=True)
    assert hashes(killed) == hashes(unbroken)
    assert hashes(base) == before

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, *add[1:], str(ranks)], check=True)
    one, two = (
        {name: sha256(folder / name) for name in ("state.json", "data-00004-of-00005.arrow")}
        for folder in (unbroken, ranks)
    )
    assert one == two


def test_two_ranks_build_the_same_cache_and_read_its_batches_in_slices(tmp_path, whole):
    unbroken, _ = whole
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*torchrun, *command(tmp_path / "latents")[1:]], check=True)
    one, two = hashes(unbroken), hashes(tmp_path / "latents")
    # A rank has fewer threads, which can change the last bit of the decoded images in the grid.
    one_info, two_info = (
        json.loads((folder / "latents.json").read_text()) for folder in (unbroken, tmp_path / "latents")
    )
    for files, info in ((one, one_info), (two, two_info)):
        del (
            files["reconstructions.png"],
            files["latents.json"],
            info["files"]["reconstructions.png"],
            info["json_sha256"],
        )
    assert one == two
    assert one_info == two_info
    reader = LatentReader(tmp_path / "latents")
    batch = reader.batch(0, 40, 8)
    slices = [LatentReader(tmp_path / "latents").batch(0, 40 + 4 * rank, 4) for rank in range(2)]
    for name, values in batch.items():
        assert np.array_equal(np.concatenate([part[name] for part in slices]), values)
    assert not set(reader.rows(0, 40, 4)) & set(reader.rows(0, 44, 4))
