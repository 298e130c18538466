"""Speed of the latent cache: building it against the bare VAE, reading it against other ways to store latents.

python benchmarks/latents.py [--json FILE]    (about ten minutes on 2 cores, 10 GB of disk below --scratch)
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Array3D, Dataset, Features, List, Value
from diffusers import AutoencoderKL
from machine import machine
from vaes import sd_shaped_vae

from dit_hf.data.avatars import choose_face, render_face
from dit_hf.data.sources import open_source
from dit_hf.data.transforms import Geometry
from dit_hf.latents.cache import FORMAT_VERSION
from dit_hf.latents.encode import ShardEncoder
from dit_hf.latents.reader import LatentReader
from dit_hf.latents.shards import Job, cache_features
from dit_hf.latents.vae import encode, latent_shape, load_vae
from dit_hf.storage import write_manifest

SHAPE = (4, 32, 32)
BATCH = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/latents.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch)
        result = {
            "machine": machine(),
            "torch": torch.__version__,
            "build": {
                "stable-diffusion-shaped VAE, 256 px": time_build(folder, sd_shaped_vae(), 256, 32, 8, 2),
                "bundled VAE, 64 px": time_build(folder, load_vae("avatar"), 64, 2048, 64, 5),
            },
            "read": time_reads(folder),
            "scale": measure_scale(folder),
        }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def time_build(folder: Path, vae: AutoencoderKL, size: int, count: int, batch: int, rounds: int) -> dict:
    """Measure images/s of building shards from jpgs, and of the VAE alone on the same batches."""
    images = folder / f"jpgs-{size}"
    images.mkdir()
    for i in range(count):
        render_face(choose_face(0, i), size).save(images / f"{i:05}.jpg", quality=95)
    rows = open_source(str(images)).rows
    geometry, shape = Geometry((size, size), "center"), latent_shape(vae, (size, size))
    features = cache_features(rows, vae, shape, flip=False)
    vae = vae.to(memory_format=torch.channels_last)
    built, bare = [], []
    faces = [np.asarray(render_face(choose_face(0, i), size)) for i in range(count)]
    pixels = torch.from_numpy(np.stack(faces))
    for turn in range(rounds):
        target = folder / f"built-{size}-{turn}"
        (target / "building").mkdir(parents=True)
        job = Job(
            folder=target,
            geometry=geometry,
            latent_shape=shape,
            flip=False,
            hold_out=True,
            features=features,
            num_rows=count,
            batch_size=batch,
            shard_size=max(batch, count // 4),
            sha256="0" * 64,
            total=-(-count // max(batch, count // 4)),
        )
        started = time.perf_counter()
        list(ShardEncoder(job, rows, vae).encode_shards(job.unfinished()))
        built.append(count / (time.perf_counter() - started))
        started = time.perf_counter()
        for start in range(0, count, batch):
            encode(vae, pixels[start : start + batch])
        bare.append(count / (time.perf_counter() - started))
        shutil.rmtree(target)
    share = statistics.median(a / b for a, b in zip(built, bare, strict=True))
    rates = {"built": statistics.median(built), "bare VAE": statistics.median(bare)}
    return {
        "pictures/s": {k: round(v, 3) for k, v in rates.items()},
        "built / bare": round(share, 3),
        "rounds": rounds,
    }


def random_latents(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, int(np.prod(SHAPE))), np.float32).astype(np.float16)


def write_cache(folder: Path, rows: int) -> Path:
    """Write a cache of random numbers in shards of 1,000 rows."""
    latent = List(Value("float16"), length=int(np.prod(SHAPE)))
    features = {"id": Value("string"), "split": Value("string"), "latent_mean": latent, "latent_std": latent}

    def generate(shards: list[int]):
        for shard in shards:
            for i, latents in enumerate(random_latents(1000, shard)):
                split = "validation" if i % 50 == 0 else "train"
                yield {"id": f"{shard}-{i}", "split": split, "latent_mean": latents, "latent_std": latents}

    made = Dataset.from_generator(
        generate, Features(features), cache_dir=str(folder / "cache"), gen_kwargs={"shards": list(range(rows // 1000))}
    )
    target = folder / f"latents-{rows}"
    made.save_to_disk(str(target), num_shards=max(1, rows // 1000))
    shutil.rmtree(folder / "cache")
    metadata = {"identity": {"format": FORMAT_VERSION}, "latent_shape": SHAPE, "conditions": {}}
    write_manifest(target, "latents.json", **metadata)
    return target


def time_reads(folder: Path, rows: int = 10_000, rounds: int = 7) -> dict:
    """Measure latents/s of random batches of 200 as contiguous fp16 arrays, all ways in turn, with a warm cache."""
    latents = np.concatenate([random_latents(1000, shard) for shard in range(rows // 1000)])
    reader = LatentReader(write_cache(folder, rows))
    ours = reader.read
    torch_list = Dataset.load_from_disk(reader.folder).select_columns("latent_mean").with_format("torch")
    arrays = Features({"latent": Array3D(SHAPE, "float16")})
    in_memory = Dataset.from_dict({"latent": list(latents.reshape(-1, *SHAPE))}, arrays)
    in_memory.save_to_disk(str(folder / "arrays"))
    torch_array = Dataset.load_from_disk(str(folder / "arrays")).with_format("torch")
    (folder / "npy").mkdir()
    for i, latent in enumerate(latents):
        np.save(folder / "npy" / f"{i}.npy", latent.reshape(SHAPE))
    latents.tofile(folder / "latents.bin")
    memmap = np.memmap(folder / "latents.bin", np.float16, "r", shape=(rows, latents.shape[1]))
    ways = {
        "dit_hf": lambda rows_read: ours("latent_mean", rows_read),
        "datasets, torch format, Array3D": lambda rows_read: torch_array[rows_read]["latent"].half(),
        "datasets, torch format, the cache's own List": lambda rows_read: torch_list[rows_read]["latent_mean"].half(),
        "one .npy an image": lambda rows_read: np.stack([np.load(folder / "npy" / f"{i}.npy") for i in rows_read]),
        "one np.memmap": lambda rows_read: np.ascontiguousarray(memmap[rows_read]),
    }
    rng, rates = np.random.default_rng(0), {name: [] for name in ways}
    for turn in range(rounds + 1):
        selections = [rng.permutation(rows)[:BATCH] for _ in range(20)]
        for name, read in ways.items():
            started = time.perf_counter()
            for batch in selections:
                got = read(batch)
            if turn:  # the first round warms the page cache
                rates[name].append(BATCH * len(selections) / (time.perf_counter() - started))
            assert np.array_equal(np.asarray(got).reshape(BATCH, -1), latents[selections[-1]]), name
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "latents/s": {name: round(rate) for name, rate in medians.items()},
        "dit_hf / other": {name: round(medians["dit_hf"] / rate, 2) for name, rate in medians.items()},
        "rounds": rounds,
    }


MEASURE = """
import sys, time
import numpy as np
from dit_hf.latents.reader import LatentReader

def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(lines["RssAnon"].split()[0]) / 1024

before, started = anonymous(), time.perf_counter()
reader = LatentReader(sys.argv[1])
opened = time.perf_counter() - started
for step in range(200):
    reader.batch(0, step * 200, 200)
print(len(reader), opened, before, anonymous())
"""


def measure_scale(folder: Path, rows: int = 200_000) -> dict:
    """Measure seconds to open a cache of 200,000 rows and memory after 200 batches, in a new process."""
    cache = write_cache(folder, rows)
    command = [sys.executable, "-c", MEASURE, str(cache)]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    count, opened, before, after = (float(word) for word in line.split())
    size = sum(path.stat().st_size for path in cache.glob("*.arrow"))
    memory = {"RssAnon before, MiB": round(before), "RssAnon after 200 batches, MiB": round(after)}
    return {
        "rows": rows,
        "training rows": count,
        "GB": round(size / 1e9, 2),
        "seconds to open": round(opened, 3),
        **memory,
    }


if __name__ == "__main__":
    main()
