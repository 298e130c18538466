"""Kill commands before every change that they make to a file, call them again, and compare the ends.

python benchmarks/kill_points.py [--verbs train,push] [--every N] [--json FILE]     (all: about 40 minutes on 2 cores)

Each attempt is forked from one process that has everything imported. A change is a file that is opened for writing,
renamed or removed, or a folder that is made or removed, below the folder of the attempt (by Python's audit hooks;
files that Arrow and safetensors write are seen when they are renamed). After the kill the same command is given once
more; the folder must then hold the files of an undisturbed call, byte for byte, apart from what depends on the clock,
and nothing beside them. The exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # bits depend on the number of threads
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from local_hub import Hub, running_hub

from dit_hf_cli import main as run_cli

# Columns of the log, and keys of JSON files, that depend on the clock or on the folder's name.
VARYING = {"images_per_second", "mfu", "peak_memory_gib", "json_sha256", "pipeline_sha256"}
AVATAR = ["--vae", "avatar", "--resolution", "32", "--output_dir"]
COMMANDS: dict[str, list[str]] = {
    "prepare-latents": ["prepare-latents", "pictures", *AVATAR, "out"],
    "add-to": ["prepare-latents", "more", *AVATAR, "out", "--add_to", "latents", "--drop_gone"],
    "merge-latents": ["merge-latents", "part", "--output_dir", "out"],
    "train": ["train", "tiny.yaml", "--train.resume_from_checkpoint", "latest"],
    "sample": ["sample", "run", "--output_dir", "out", "--num_images", "6", "--batch_size", "2"],
    "sample-npz": [
        *("sample", "run", "--output_dir", "out", "--num_images", "6", "--batch_size", "2"),
        *("--output_format", "npz"),
    ],
    "evaluate": ["evaluate", "run", "--reference", "pictures", "--num_samples", "16", "--num_inference_steps", "2"],
    "push": ["push", "run", "--output_dir", "out"],
    "push-hub": ["push", "run", "you/run"],
}
RECIPE = """\
data: {latents: latents}
model: {preset: tiny, num_layers: 1, num_attention_heads: 2, attention_head_dim: 12}
train: {output_dir: run, max_train_steps: 6, global_batch_size: 4, checkpointing_steps: 2, checkpoints_total_limit: 2,
  logging_steps: 1, sampling_steps: 3, num_inference_steps: 2, validation_images: 4,
  report_to: none}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", default=",".join(COMMANDS))
    parser.add_argument("--every", type=int, default=1, help="Try every N-th point only.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, running_hub() as hub:
        # Before anything of the Hub's is imported.
        os.environ |= {**hub.environment(), "HF_HOME": f"{scratch}/hf", "TMPDIR": f"{scratch}/attempt/tmp"}
        base = prepare(Path(scratch) / "base")
        results = {}
        for verb in options.verbs.split(","):
            results[verb] = try_points(verb, base, hub, options.every)
            print(verb, results[verb], flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 1 if any(result["different"] for result in results.values()) else 0


def prepare(base: Path) -> Path:
    """Make what the commands start from: pictures, a latent cache, and a finished run; return its folder."""
    import dit_hf

    for name, numbers in (("pictures", range(40)), ("more", range(2, 50))):
        (base / name).mkdir(parents=True)
        for number, row in enumerate(dit_hf.open_images("avatars", resolution=32, num_images=50)):
            if number in numbers:
                row["image"].save(base / name / f"{number:02}.png")
    (base / "tiny.yaml").write_text(RECIPE)
    latents = ["prepare-latents", "pictures", *AVATAR]
    for command in ([*latents, "latents"], [*latents, "part", "--part", "1/1"], COMMANDS["train"]):
        code, _ = attempt(base, command)
        if code:
            raise SystemExit(f"{command[0]} ended with {code}")
    return base


def try_points(verb: str, base: Path, hub: Hub, every: int = 1) -> dict[str, Any]:
    """Kill a command before every change of a file, or every `every`-th, and call it again.

    Returns:
        The number of points and of those that were tried, the seconds, and a line for each whose end is different.
    """
    command, started = COMMANDS[verb], time.monotonic()
    folder = base.with_name("attempt")
    code, changes = attempt(start(verb, base, folder, hub), command)
    whole = contents(folder, hub)
    different = [] if not code else [f"undisturbed: exit code {code}"]
    # What has ended is refused by some verbs: of a call that is killed at its very end, too.
    again, _ = attempt(folder, command)
    points = range(1, len(changes) + 1)[::every]
    for point in points:
        attempt(start(verb, base, folder, hub), command, point)
        code, _ = attempt(folder, command)
        ended = contents(folder, hub)
        names = sorted(name for name in whole.keys() | ended.keys() if whole.get(name) != ended.get(name))
        if code not in (0, again) or names:
            different.append(
                f"{point}, {changes[point - 1]}: exit code {code}, {', '.join(names[:5]) or 'same files'}"
            )
    seconds = round(time.monotonic() - started)
    return {"points": len(changes), "tried": len(points), "seconds": seconds, "different": different}


def start(verb: str, base: Path, folder: Path, hub: Hub) -> Path:
    """Copy what a command starts from, and empty the Hub."""
    hub.repositories.clear()
    hub.stored.clear()
    shutil.rmtree(folder, ignore_errors=True)
    left_out = ["run"] if verb == "train" else []
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(*left_out))
    (folder / "tmp").mkdir()
    return folder


def attempt(folder: Path, command: list[str], point: int = 0) -> tuple[int, list[str]]:
    """Run a command in a fork, in `folder`, killed before its change number `point` (0 is none).

    Returns:
        Its exit code, negative if it was killed, and the changes that it made.
    """
    log = folder.with_name("changes.txt")
    log.write_text("")
    child = os.fork()
    if not child:
        # Whatever happens, the child ends here: it must never run the parent's code.
        code = 1
        try:
            os.chdir(folder)
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                watch(folder, log, point)
                code = run_cli(command)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text().splitlines()


def watch(folder: Path, log: Path, point: int) -> None:
    """Write the changes of files below `folder` to `log`, and kill this process before the one of number `point`."""
    owner, count, file = os.getpid(), 0, os.open(log, os.O_WRONLY | os.O_APPEND)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
        opened = event == "open" and isinstance(args[2], int) and args[2] & writes
        if not opened and event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink"):
            return
        path = os.path.abspath(os.fsdecode(args[0])) if isinstance(args[0], str | bytes | os.PathLike) else ""
        # Inside `rmtree` names are relative to an open folder: such events count wherever they are.
        relative = event != "open" and len(args) > 1 and isinstance(args[-1], int) and args[-1] > 0
        if os.getpid() != owner or not (relative or path.startswith(f"{folder}{os.sep}")):
            return
        count += 1
        if count == point:
            os.kill(owner, signal.SIGKILL)
        os.write(file, f"{event} {args[0] if relative else os.path.relpath(path, folder)}\n".encode())

    sys.addaudithook(hook)


def contents(folder: Path, hub: Hub) -> dict[str, str]:
    """Return the hash of every file below `folder` and on the Hub, without what depends on the clock."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    # What a killed process leaves in the temporary folder is the system's to delete.
    found = {name: path.read_bytes() for name, path in files.items() if not name.startswith("tmp/")}
    for repository, pushed in hub.repositories.items():
        found |= {f"{repository}:{name}": data for name, data in pushed.items()}
    return {name: hashlib.sha256(steady(Path(name).name, data)).hexdigest() for name, data in found.items()}


def steady(name: str, data: bytes) -> bytes:
    """Return the content of a file without what depends on the clock."""
    if name == "training_log.csv":
        rows = [
            {k: v for k, v in row.items() if k not in VARYING} for row in csv.DictReader(io.StringIO(data.decode()))
        ]
        return json.dumps(rows).encode()
    if name in ("source_files.npz", "source_files.json"):  # inodes and times
        return b""
    if name.endswith(".json"):
        return json.dumps(_without_varying(json.loads(data))).encode()
    return data


def _without_varying(value: Any) -> Any:
    """Return JSON without the keys in `VARYING`, and without the sizes and hashes of the log that manifests list."""
    if isinstance(value, dict):
        return {k: _without_varying(v) for k, v in value.items() if k not in VARYING | {"training_log.csv"}}
    return [_without_varying(item) for item in value] if isinstance(value, list) else value


if __name__ == "__main__":
    sys.exit(main())
