"""Images added to a cache, and parts of a cache that are joined: what they cost, and that rows and values stay.

python benchmarks/additions.py [--images 20000] [--json FILE]    (about five minutes on 2 cores)

Sources are random images of 32 px, encoded by a tiny VAE of random weights, so that everything beside the VAE shows.
Every command is a process of its own, whose CPU seconds (user and system) the system counts.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from machine import machine
from PIL import Image as PILImage
from vaes import tiny_vae

from dit_hf.latents.cache import open_latents
from dit_hf.latents.shards import open_shards, shard_files

ADDED, SHARDS, IMAGES_IN_SHARD, PARTS = 1000, 1000, 5, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/additions.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        tiny_vae().save_pretrained(folder / "vae")
        result: dict = {"machine": machine(), "torch": torch.__version__}
        result["addition"] = measure_addition(folder, options.images)
        print(json.dumps(result["addition"], indent=2), flush=True)
        result["parts"] = measure_parts(folder)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure_addition(folder: Path, images: int) -> dict:
    """Build a cache of `images`, add 1,000 that lie between them by name, then another one."""
    save_images(folder / "images", [i for i in range(images + ADDED) if i % (images // ADDED + 1)][:images])
    built = prepare(folder, "images", "latents")
    files = [path.read_bytes() for path in shard_files(folder / "latents")]
    save_images(folder / "images", range(images + ADDED))
    added = prepare(folder, "images", "grown", "--add_to", str(folder / "latents"))
    save_images(folder / "images", [images + ADDED])
    one = prepare(folder, "images", "more", "--add_to", str(folder / "grown"))
    old, new = shard_files(folder / "latents"), shard_files(folder / "grown")
    return {
        "images": images,
        "building": built,
        f"adding {ADDED:,}": added,
        "adding one more": one,
        "bytes of the old files unchanged": all(
            path.read_bytes() == data for path, data in zip(new, files, strict=False)
        ),
        "old files linked": sum(os.path.samefile(*pair) for pair in zip(old, new, strict=False)),
        "old files, MB": round(sum(map(len, files)) / 1e6, 1),
        "new files, MB": round(sum(path.stat().st_size for path in new[len(old) :]) / 1e6, 1),
        "rows": len(open_latents(folder / "grown", hashes=True)[0]),
    }


def measure_parts(folder: Path) -> dict:
    """Build a source of 1,000 parquet shards at once, and as 4 parts that are joined."""
    source = folder / "shards"
    source.mkdir()
    features = Features({"image": Image(), "smiling": Value("bool")})
    for shard in range(SHARDS):
        paths = save_images(folder / "files", range(shard * IMAGES_IN_SHARD, (shard + 1) * IMAGES_IN_SHARD))
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        rows = {"image": images, "smiling": [i % 2 == 0 for i in range(IMAGES_IN_SHARD)]}
        Dataset.from_dict(rows, features).to_parquet(source / f"{shard:04}.parquet")
    whole = prepare(folder, "shards", "whole")
    parts = [prepare(folder, "shards", f"part-{k}", "--part", f"{k}/{PARTS}") for k in range(1, PARTS + 1)]
    names = [str(folder / f"part-{k}") for k in range(1, PARTS + 1)]
    merged = run("merge-latents", *names, "--output_dir", str(folder / "merged"))
    tables = [open_shards(shard_files(folder / name)) for name in ("whole", "merged")]
    return {
        "shards": SHARDS,
        "images": len(tables[0]),
        "at once": whole,
        "parts": parts,
        "joining": merged,
        "same rows and values": tables[0].equals(tables[1]),
        "same files": same_files(folder / "whole", folder / "merged"),
        "same statistics": len({str(open_latents(folder / n)[1]["statistics"]) for n in ("whole", "merged")}) == 1,
    }


def save_images(folder: Path, numbers) -> list[Path]:
    """Save random images of 32 px, which depend on their numbers alone, unless they are there."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{i:06}.png" for i in numbers]
    for number, path in zip(numbers, paths, strict=True):
        if not path.exists():
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            PILImage.fromarray(pixels).save(path, compress_level=1)
    return paths


def prepare(folder: Path, source: str, name: str, *options: str) -> dict:
    """Run `dit-hf prepare-latents`."""
    settings = ["--vae", str(folder / "vae"), "--resolution", "32", "--output_dir", str(folder / name)]
    return run("prepare-latents", str(folder / source), *settings, *options)


def run(*args: str) -> dict:
    """Run a command; return its CPU seconds and wall time, and how many images it encoded."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dit_hf", *args], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    encoded = [line for line in done.stderr.splitlines() if line.startswith("encoding: ")]
    count = int(encoded[-1].split()[1].replace(",", "")) if encoded else 0
    return {"images encoded": count, "CPU s": round(cpu, 1), "s": round(time.perf_counter() - started, 1)}


def same_files(one: Path, other: Path) -> bool:
    """Check whether two caches have the same shards, byte for byte."""
    hashes = [
        [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in shard_files(folder)]
        for folder in (one, other)
    ]
    return hashes[0] == hashes[1]


if __name__ == "__main__":
    main()
