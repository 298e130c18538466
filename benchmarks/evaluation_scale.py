"""Time and memory of precision and recall, of a model and its two floors, by number of reference images.

python benchmarks/evaluation_scale.py --earlier CHECKOUT [--reference 10000 30000 100000]

Features are random, of EfficientNet-Lite0's 320 dimensions, and there are 10,000 samples. A new process measures them
once with this version and once with an earlier checkout of the package.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from machine import machine

SAMPLES = 10_000
CODE = """
import json, resource, sys, time
import numpy as np
from dit_hf.evaluation import metrics

count, samples = int(sys.argv[1]), int(sys.argv[2])
rng = np.random.default_rng(0)
real, generated = (rng.normal(size=(n, 320)).astype(np.float32) for n in (count, samples))
held = min(samples, count // 2)
comparisons = [(generated, real), (real[:held], real[held:]), (generated[:held], real[held:])]
before, started = time.process_time(), time.perf_counter()
if hasattr(metrics, "Manifold"):
    whole, rest = metrics.Manifold.of(real), metrics.Manifold.of(real[held:])
    comparisons = [(some, manifold) for (some, _), manifold in zip(comparisons, (whole, rest, rest))]
for some, reference in comparisons:
    metrics.precision_and_recall(some, reference)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"CPU s": time.process_time() - before, "s": time.perf_counter() - started, "peak GB": peak}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--earlier", type=Path, required=True, help="A checkout of an earlier version.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/evaluation_scale.json"))
    options = parser.parse_args()
    ways = {"now": Path(__file__).resolve().parents[1], "earlier": options.earlier}
    result: dict = {"machine": machine(), "samples": SAMPLES}
    for count in options.reference:
        for name, package in ways.items():
            environment = {**os.environ, "PYTHONPATH": str(package.resolve())}
            command = [sys.executable, "-c", CODE, str(count), str(SAMPLES)]
            done = subprocess.run(command, env=environment, cwd=package, check=True, capture_output=True, text=True)
            measured = json.loads(done.stdout.splitlines()[-1])
            result.setdefault(f"{count:,} reference images", {})[name] = {k: round(v, 2) for k, v in measured.items()}
            print(f"{count:,} {name}: {measured}", flush=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
