"""What listing and reading a source cost: CPU seconds, memory, and disk beside the latents.

python benchmarks/sources.py [--rows 100000 ...] [--files 10000 ...] [--earlier CHECKOUT]    (some 20 minutes, 5 GB)

Every measurement is a process of its own with an empty HF_HOME, one for each of the two versions in turn; `--earlier`
is a checkout to compare with. Rows are those of parquet shards with an image of 100 bytes, a class and 40 attributes;
files are nearly empty and lie in folders that are classes. The source of 2 GB has images of 100 kB, and is encoded by
a tiny VAE.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from machine import machine
from PIL import Image as PILImage
from vaes import tiny_vae

MOST_EARLIER = 300_000  # rows or files: the earlier version took minutes for 100,000 rows
GIGABYTES, IMAGE_BYTES, SHARDS, ATTRIBUTES = 2, 100_000, 10, 40

OPEN = """
import json, resource, sys, time
from dit_hf.data.sources import open_source

def status(key):
    return next(int(line.split()[1]) / 1024**2 for line in open("/proc/self/status") if line.startswith(key))

before, started, wall = status("RssAnon"), time.process_time(), time.perf_counter()
source = open_source(sys.argv[1])
result = {"rows": len(source.rows), "CPU s": time.process_time() - started, "s": time.perf_counter() - wall}
print(json.dumps({**result, "GB": status("RssAnon") - before, "peak GB": status("VmHWM")}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000, 300_000])
    parser.add_argument("--earlier", type=Path)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/sources.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    versions = {"now": Path(__file__).parents[1].resolve()} | ({"earlier": options.earlier} if options.earlier else {})
    result: dict = {"machine": machine(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        for kind, write, counts in (("rows", write_rows, options.rows), ("files", write_files, options.files)):
            for count in counts:
                source = folder / kind / f"{count}"
                write(source, count)
                own = {name: v for name, v in versions.items() if name == "now" or count <= MOST_EARLIER}
                result[f"{count:,} {kind}"] = {name: listed(v, source) for name, v in own.items()}
                print(json.dumps(result[f"{count:,} {kind}"], indent=2), flush=True)
                shutil.rmtree(source)
        write_images(folder / "images")
        tiny_vae().save_pretrained(folder / "vae")
        result[f"{GIGABYTES} GB of images"] = {name: encoded(v, folder, name) for name, v in versions.items()}
        print(json.dumps(result[f"{GIGABYTES} GB of images"], indent=2), flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def write_rows(folder: Path, count: int) -> None:
    """Write parquet shards of rows with tiny images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        size = count // SHARDS
        columns = {f"attribute_{i}": rng.integers(0, 2, size).astype(bool) for i in range(ATTRIBUTES)}
        images = pa.array([b"\xff\xd8\xff" + bytes(97)] * size, pa.binary())
        table = pa.table({"image": images, "label": rng.integers(0, 1000, size), **columns})
        pq.write_table(table, folder / f"train-{shard}.parquet", row_group_size=1000)


def write_files(folder: Path, count: int) -> None:
    """Write files that are named like images, in 100 folders."""
    for number in range(100):
        (folder / f"class {number}").mkdir(parents=True)
    for number in range(count):
        (folder / f"class {number % 100}" / f"{number}.jpg").write_bytes(b"\xff\xd8\xff")


def write_images(folder: Path) -> None:
    """Write parquet shards of images that are large on the disk and quick to decode."""
    folder.mkdir()
    PILImage.new("RGB", (32, 32), "red").save(folder / "red.png")
    image = (folder / "red.png").read_bytes()
    (folder / "red.png").unlink()
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        count = GIGABYTES * 10**9 // IMAGE_BYTES // SHARDS
        images = pa.array([image + rng.bytes(IMAGE_BYTES - len(image)) for _ in range(count)], pa.binary())
        pq.write_table(pa.table({"image": images}), folder / f"train-{shard}.parquet", row_group_size=100)


def listed(version: Path, source: Path) -> dict:
    """Return what listing a source takes."""
    with tempfile.TemporaryDirectory(dir=source.parents[1]) as home:
        done = run([sys.executable, "-c", OPEN, str(source)], version, home)
        return {**json.loads(done.splitlines()[-1]), "HF_HOME, GB": size(Path(home)) / 1e9}


def encoded(version: Path, folder: Path, name: str) -> dict:
    """Return what encoding the source of images takes, and the largest sizes of HF_HOME and the cache meanwhile."""
    with tempfile.TemporaryDirectory(dir=folder) as home:
        output, largest, ended = folder / f"latents-{name}", {"HF_HOME, GB": 0.0, "cache, GB": 0.0}, threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                largest["HF_HOME, GB"] = max(largest["HF_HOME, GB"], size(Path(home)) / 1e9)
                latents = sum(size(path) for path in folder.glob(f"*latents-{name}*"))
                largest["cache, GB"] = max(largest["cache, GB"], latents / 1e9)

        thread = threading.Thread(target=watch)
        thread.start()
        options = ["--vae", str(folder / "vae"), "--resolution", "32", "--output_dir", str(output)]
        started, before = time.perf_counter(), os.times()
        run([sys.executable, "-m", "dit_hf", "prepare-latents", str(folder / "images"), *options], version, home)
        after = os.times()
        ended.set()
        thread.join()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return {"CPU s": cpu, "s": time.perf_counter() - started, **largest}


def run(command: list[str], version: Path, home: str) -> str:
    # In the checkout, because `-c` and `-m` import from the current folder first.
    environment = {**os.environ, "HF_HOME": home, "PYTHONPATH": str(version)}
    return subprocess.run(command, cwd=version, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def size(folder: Path) -> int:
    """Return the bytes that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


if __name__ == "__main__":
    main()
