"""Start-up, memory and cold reads of latent caches by number of rows, in formats 2 and 3.

python benchmarks/rows.py [--rows 100000 1000000 10000000] [--earlier CHECKOUT]   (5 GB of disk)

Caches of random latents are written straight to Arrow files, as each format has them: record batches of 64 rows (the
VAE's batch in version 0.1.0) or of 4,096. A new process then does what a rank does before its first step: it opens the
training and the validation split with 40 conditions, and reads the first batch of 128. Cold reads are counted by the
system (`/proc/self/io`) after the files have been dropped from the page cache. `--earlier` is a checkout of version
0.1.0, whose reader is measured on format 2 too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from machine import machine

from dit_hf.latents.shards import IMAGE_SHA256, latent_array, plan_sizes, spell_features
from dit_hf.storage import write_manifest

CONDITIONS = [f"attribute_{i}" for i in range(40)]
RECORD_BATCHES = {2: 64, 3: 4096}

START = """
import json, os, sys, time

def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

from dit_hf.latents.reader import LatentReader

before, started, wall = status("RssAnon"), time.process_time(), time.perf_counter()
training = LatentReader(sys.argv[1])
if hasattr(training, "of_split"):
    validation = training.of_split("validation")
else:
    validation = LatentReader(sys.argv[1], "validation", list(training.conditions))
training.batch(0, 0, 128)
result = {"CPU s": time.process_time() - started, "s": time.perf_counter() - wall}
for step in range(1, 100):
    training.batch(0, step * 128, 128)
print(json.dumps({**result, "GB": (status("RssAnon") - before) / 1024, "peak GB": status("VmHWM") / 1024}))
"""

COLD = """
import json, os, sys
from pathlib import Path

def read_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))

def drop():
    for path in Path(sys.argv[1]).glob("data-*.arrow"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

from dit_hf.latents.reader import LatentReader

drop()
before = read_bytes()
reader = LatentReader(sys.argv[1])
opened = read_bytes() - before
batches = []
for step in range(5):
    before = read_bytes()
    reader.batch(0, step * 128, 128)
    batches.append(read_bytes() - before)
print(json.dumps({"opening, MB": opened / 1e6, "batch of 128, MB": sorted(batches)[2] / 1e6}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--cold-rows", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--earlier", type=Path, help="A checkout of version 0.1.0.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/rows.json"))
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    ways = {"format 3": (3, here), "format 2": (2, here)}
    if options.earlier:
        ways["format 2, version 0.1.0"] = (2, options.earlier)

    result: dict = {"machine": machine(), "rounds": options.rounds, "start": {}, "cold": {}}
    for rows in options.rows:
        result["start"][f"{rows:,} rows"] = measure(options, rows, (4, 2, 2), START, ways)
        print(json.dumps(result["start"], indent=2), flush=True)
    result["cold"][f"{options.cold_rows:,} rows"] = measure(options, options.cold_rows, (4, 32, 32), COLD, ways)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(options: argparse.Namespace, rows: int, shape: tuple[int, int, int], code: str, ways: dict) -> dict:
    """Run `code` on a cache of each format, all ways in turn; return the medians by way."""
    found: dict[str, list[dict]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        caches = {version: write_cache(Path(scratch) / str(version), rows, shape, version) for version in (2, 3)}
        for _ in range(options.rounds):
            for name, (version, package) in ways.items():
                environment = {**os.environ, "PYTHONPATH": str(package)}
                command = [sys.executable, "-c", code, str(caches[version])]
                done = subprocess.run(
                    command, env=environment, cwd=scratch, check=True, capture_output=True, text=True
                )
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        for name, runs in found.items()
    }


def write_cache(folder: Path, rows: int, shape: tuple[int, int, int], version: int) -> Path:
    """Write a cache of random latents and 40 attributes, 2 % of it for validation."""
    # The index of an empty dataset, with the shards named, as `prepare-latents` writes it.
    latent = List(Value("float16"), length=int(np.prod(shape)))
    columns = {"id": Value("string"), "split": Value("string")}
    columns |= {IMAGE_SHA256: Value("string")} if version == 3 else {}
    columns |= {"latent_mean": latent, "latent_std": latent, **dict.fromkeys(CONDITIONS, Value("int8"))}
    features = Features(columns)
    Dataset.from_dict({name: [] for name in features}, features).save_to_disk(str(folder))
    for path in folder.glob("*.arrow"):
        path.unlink()
    shard_size = plan_sizes(rows, (256, 256))[1]
    starts = range(0, rows, shard_size)
    names = [f"data-{shard:05}-of-{len(starts):05}.arrow" for shard in range(len(starts))]
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name} for name in names]}))

    # The shards, in record batches of the format.
    spelled = spell_features(features) if version == 3 else features.to_dict()
    schema = features.arrow_schema.with_metadata({"huggingface": json.dumps({"info": {"features": spelled}})})
    rng = np.random.default_rng(0)
    for name, start in zip(names, starts, strict=True):
        table = random_rows(rng, start, min(shard_size, rows - start), shape, schema)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            stream.write_table(table, max_chunksize=RECORD_BATCHES[version])
    os.sync()
    info = {"identity": {"format": version}, "latent_shape": shape, "conditions": dict.fromkeys(CONDITIONS, 2)}
    write_manifest(folder, "latents.json", **info, condition_labels={})
    return folder


def random_rows(rng: np.random.Generator, start: int, count: int, shape: tuple[int, int, int], schema: pa.Schema):
    """Return rows `start` ... `start + count - 1` of a cache."""
    latents = rng.integers(0, 2**14, (count, int(np.prod(shape))), np.uint16).view(np.float16)
    columns = {
        "id": pa.array([f"{i:08}.jpg" for i in range(start, start + count)]),
        "split": pa.array(["validation" if i % 50 == 0 else "train" for i in range(count)]),
        IMAGE_SHA256: pa.array([f"{i:064x}" for i in range(start, start + count)]),
        "latent_mean": latent_array(latents),
        "latent_std": latent_array(latents),
        **{name: pa.array(rng.integers(0, 2, count, np.int8)) for name in CONDITIONS},
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


if __name__ == "__main__":
    main()
