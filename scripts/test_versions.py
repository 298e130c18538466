"""Test with other versions of our libraries: `make test-versions`, or some of `lowest`, `newest` and `readers`.

`lowest` and `newest` run the fast tests, with the lowest versions that pyproject.toml allows and with the newest that
there are. `readers` opens a cache and a pipeline of this version with libraries from 2023 on, each in an environment
without dit_hf. torch is always that of constraints.txt. Environments are made once, in `.versions`.
"""

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".versions"
TESTS = (
    "models",
    "schedulers",
    "pipelines",
    "hub",
    "app",
    "latents",
    "training",
    "test_versions.py",
    "test_upload.py",
)
# Each release of datasets with an Arrow of its time.
DATASETS = {
    "2.14.7": ["pyarrow==14.0.2", "numpy<2"],
    "2.19.2": ["pyarrow==16.1.0", "numpy<2"],
    "2.21.0": ["pyarrow==17.0.0", "numpy<2"],
    "3.0.2": ["pyarrow==17.0.0", "numpy<2"],
    "3.6.0": ["pyarrow==20.0.0"],
    "4.0.0": ["pyarrow==21.0.0"],
}
# Each with the other libraries of its time. Those before 0.35 are refused by one line.
OLD_DIFFUSERS = ("0.30.3", "0.32.2", "0.33.1", "0.34.0", "0.35.0", "0.35.2", "0.36.0", "0.37.1", "0.38.0", "0.39.0")
NEW_DIFFUSERS = ("0.40.0", "0.41.0", "0.42.0", "0.42.1")
HTTPX = "httpx"  # which diffusers 0.36 to 0.40 import
OF_2025 = [
    "transformers==4.57.6",
    "huggingface_hub==0.36.0",
    "accelerate==1.11.0",
    "numpy<2.4",
    "pillow",
    "requests",
    HTTPX,
]
OF_2026 = ["transformers", "accelerate", "diffusers", HTTPX]


def main(names: list[str]) -> int:
    """Run what is named, all of it by default, and return the number of failures."""
    runs = {"lowest": lambda: test("lowest"), "newest": lambda: test("newest"), "readers": read}
    failures = {}
    for name in names or runs:
        began = time.monotonic()
        failures[name] = runs[name]()
        print(f"{name}: {failures[name]} failed, {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
    return min(1, sum(failures.values()))


def test(name: str) -> int:
    """Run the fast tests in the environment `name`; warnings of other versions are not failures."""
    constraints = ROOT / ".versions" / f"{name}.txt"
    FOLDER.mkdir(exist_ok=True)
    constraints.write_text("\n".join([torch_version(), *(lowest_versions() if name == "lowest" else [])]) + "\n")
    python = environment(name, ["-c", str(constraints), "-e", f"{ROOT}[dev]"])
    libraries = ("diffusers", "transformers", "accelerate", "datasets", "huggingface_hub", "gradio", "peft", "numpy")
    show = "import sys, importlib.metadata as m; print(*(f'{name} {m.version(name)}' for name in sys.argv[1:]))"
    subprocess.run([python, "-c", show, *libraries], check=True)
    paths = [str(ROOT / "tests" / path) for path in TESTS]
    command = [python, "-m", "pytest", "-n", "2", "-m", "not slow", "-W", "default", "--disable-warnings", *paths]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
    return int(code != 0)


def lowest_versions() -> list[str]:
    """Return the lower bounds of all requirements that users install, as exact versions; torch is left as it is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name in extras if name != "dev" for line in extras[name]]
    lines += [line for line in extras["dev"] if line.startswith("peft")]
    requirements = [Requirement(line) for line in lines]
    bounds = {r.name: part.version for r in requirements for part in r.specifier if part.operator in (">=", "==")}
    return [f"{name}=={version}" for name, version in bounds.items() if name != "torch"]


def torch_version() -> str:
    """Return the line of constraints.txt that names torch."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def environment(name: str, packages: list[str], torch: bool = True) -> Path:
    """Return the Python of an environment with `packages`, which is made where they have changed."""
    folder = FOLDER / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    bounds = (ROOT / "pyproject.toml").read_text(encoding="utf-8") if name in ("lowest", "newest") else ""
    wanted = "\n".join([*packages, bounds])
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        if torch:  # first and alone, so that its version stands before anything else asks for one
            subprocess.run([*pip(python), torch_version()], check=True)
        subprocess.run([*pip(python), *packages], check=True)
        done.write_text(wanted, encoding="utf-8")
    return python


def pip(python: Path) -> list[str | Path]:
    """Return the command that installs into the environment of `python`."""
    return [python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]


def read() -> int:
    """Open a cache and a pipeline of this version by all readers; return how many do not give what they should."""
    made = FOLDER / "made"
    subprocess.run([sys.executable, ROOT / "scripts" / "version_artefacts.py", "make", made], check=True)
    readers: list[tuple[str, Path, str]] = []
    for version, packages in DATASETS.items():
        python = environment(f"datasets-{version}", [f"datasets=={version}", *packages], torch=False)
        readers.append((f"datasets {version}", python, ""))
    readers.append(("datasets (newest)", environment("datasets-newest", ["datasets"], torch=False), ""))
    for version in (*OLD_DIFFUSERS, *NEW_DIFFUSERS):
        python = environment(*(("of-2025", OF_2025) if version in OLD_DIFFUSERS else ("of-2026", OF_2026)))
        target = FOLDER / f"diffusers-{version}"
        if not target.is_dir():
            subprocess.run([*pip(python), "--no-deps", "--target", target, f"diffusers=={version}"], check=True)
        readers.append((f"diffusers {version}", python, str(target)))
    failed = 0
    for name, python, path in readers:
        command = [python, ROOT / "scripts" / "version_artefacts.py", name.split()[0], made]
        settings = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=settings, capture_output=True, text=True, check=False)
        failed += done.returncode != 0
        print(f"{name}: {(done.stdout if not done.returncode else done.stderr).strip().splitlines()[-1]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
