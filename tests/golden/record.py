"""The golden record: hashes and losses of tiny runs, which a change that is not meant to change results must keep.

    python tests/golden/record.py | diff tests/golden/golden.json -

builds a latent cache, trains the two recipes of `recipes/`, generates, evaluates, and compares with what was recorded.
Bits are only comparable on the same kind of CPU (see `cpu_kind`); golden.json names the one that it was recorded on.

Everything here runs on one thread: on several, the VAE and the feature network split their sums by the number of
threads, and round them differently.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import csv
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

if "pytest" not in sys.modules:  # whose conftest.py sees to the same; to be set before anything reads it
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dit_hf-golden-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import numpy as np
import pyarrow as pa
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

# All that is used of dit_hf, beside the files that it writes: `CHECKPOINT` and `read_losses` say which.
from dit_hf import LatentDiTEditPipeline, LatentDiTImg2ImgPipeline, LatentDiTInpaintPipeline, LatentDiTPipeline
from dit_hf.latents.cache import open_latents
from dit_hf_cli import main as run_cli

GOLDEN = Path(__file__).parent
RECIPES = ("avatars", "celeba-l1")
CPU_LOSSES = GOLDEN / "cpu_losses.json"
# The weights of a checkpoint; further EMAs are in files `ema-*` beside them.
CHECKPOINT = {"transformer": "transformer.safetensors", "ema": "ema.safetensors", "optimizer": "optimizer.safetensors"}
# Of this seed's first 48 avatars five are held out for validation, three of them among the first 16.
AVATARS_SEED = 787
HAS, EDIT = {"Male": True, "Smiling": True}, {"Smiling": False, "Eyeglasses": True}


def run_verb(verb: str, *options: str | Path) -> None:
    """Run `dit-hf verb` in this process; what went wrong is on stderr."""
    if code := run_cli([verb, *map(str, options)]):
        raise RuntimeError(f"dit-hf {verb} failed with exit code {code}")


def cpu_kind() -> str:
    """The kind of CPU, as far as it decides how torch rounds: vendor, model, instruction set, and torch's version."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    known = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text.partition("\n\n")[0], re.MULTILINE))
    if "vendor_id" in known:
        model = f"{known['vendor_id']} family {known['cpu family']} model {known['model']}, {known['model name']}"
    else:
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that sums are rounded alike on any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiny_vae(channels: tuple[int, int] = (8, 16)) -> AutoencoderKL:
    """A random VAE that halves each side."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def build_cache(folder: Path, vae: AutoencoderKL | None = None, num_images: int = 48) -> Path:
    """A cache of avatars at 16 px as latents [4, 8, 8], mirrored too; returns `folder`."""
    with tempfile.TemporaryDirectory() as saved:
        (vae or tiny_vae()).save_pretrained(Path(saved) / "vae")
        options = {"vae": Path(saved) / "vae", "resolution": 16, "num_images": num_images, "seed": AVATARS_SEED}
        flat = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        run_verb("prepare-latents", "--source", "avatars", "--output_dir", folder, "--flip", *flat)
    return folder


def train_recipe(recipe: str, cache: Path, run: Path, *options: str) -> Path:
    """Train a recipe of `recipes/`; returns the run's folder."""
    config = GOLDEN / "recipes" / f"{recipe}.yaml"
    run_verb("train", "--config", config, "--data.latents", cache, "--train.output_dir", run, *options)
    return run


def read_losses(run: Path, column: str = "loss") -> dict[str, str]:
    """A column of a run's log by step, in full precision (`float.hex`)."""
    with open(run / "training_log.csv", encoding="utf-8", newline="") as file:
        return {row["step"]: float(row[column]).hex() for row in csv.DictReader(file) if row[column]}


def hash_array(array: np.ndarray) -> str:
    """SHA-256 of dtype, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of what can be JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of tensors and their names, whatever file they came from."""
    return hash_json({name: hash_array(tensor.numpy()) for name, tensor in tensors.items()})


def hash_checkpoint(folder: Path) -> dict[str, Any]:
    """Hashes of the weights, of each EMA, and of the optimizer's state by the name of the moment."""
    files = CHECKPOINT | {path.stem: path.name for path in sorted(folder.glob("ema-*.safetensors"))}
    tensors = {name: load_file(folder / file) for name, file in files.items()}
    state = tensors.pop("optimizer")
    moments = {key.rpartition("/")[2] for key in state}
    by_moment = {name: {key: x for key, x in state.items() if key.endswith(f"/{name}")} for name in moments}
    hashes: dict[str, Any] = {name: hash_tensors(values) for name, values in tensors.items()}
    return {**hashes, "optimizer": {name: hash_tensors(values) for name, values in by_moment.items()}}


def hash_cache(folder: Path) -> dict[str, Any]:
    """Hashes of each column of a latent cache, and of each fact about it but sizes and hashes of its files."""
    dataset, facts = open_latents(folder)
    table = dataset.data.table
    columns = {name: _hash_column(table.column(name)) for name in table.column_names}
    return {"columns": columns, "facts": {name: hash_json(facts[name]) for name in sorted(facts) if name != "files"}}


def _hash_column(column: pa.ChunkedArray) -> str:
    values = column.combine_chunks()
    if pa.types.is_string(column.type):
        return hash_json(values.to_pylist())
    while pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    return hash_array(values.to_numpy(zero_copy_only=False).reshape(len(column), -1))


def example_images() -> tuple[Image.Image, Image.Image]:
    """A colourful image that is not square, and a mask of its right half."""
    rows, columns = np.mgrid[0:18, 0:22]
    colors = np.stack([rows * 14, columns * 11, (rows * columns) % 256], -1)
    mask = np.where(columns < 11, 0, 255)
    return Image.fromarray(colors.astype(np.uint8)), Image.fromarray(mask.astype(np.uint8))


def generate(pipeline: LatentDiTPipeline, **options: Any) -> torch.Tensor:
    """Pixels, float32 [images, 3, height, width], of a call of any of the pipelines, with a fixed seed."""
    pipeline.set_progress_bar_config(disable=True)
    if not isinstance(pipeline, LatentDiTEditPipeline):  # which uses no noise
        options["generator"] = torch.Generator().manual_seed(7)
    (pixels,) = pipeline(num_inference_steps=3, output_type="pt", return_dict=False, **options)
    return pixels


def hash_pipelines(folder: Path) -> dict[str, str]:
    """Hashes of the weights of an exported pipeline, and of what each pipeline made of its parts generates."""
    pipeline = LatentDiTPipeline.from_pretrained(folder)
    parts, (image, mask) = pipeline.components, example_images()
    conditional = bool(pipeline.transformer.config.conditions)
    attributes = {"attributes": [HAS, {}]} if conditional else {}
    pixels = {
        "generate": generate(pipeline, **(attributes or {"batch_size": 2})),
        "generate, eta 1": generate(pipeline, **(attributes or {"batch_size": 2}), eta=1.0),
        "img2img": generate(LatentDiTImg2ImgPipeline(**parts), image=image, **attributes),
        "inpaint": generate(LatentDiTInpaintPipeline(**parts), image=image, mask_image=mask, **attributes),
    }
    if conditional:
        pixels["edit"] = generate(LatentDiTEditPipeline(**parts), image=image, edit=EDIT, **attributes)
    hashes = {name: hash_array(values.numpy()) for name, values in pixels.items()}
    return {"weights": hash_tensors(pipeline.transformer.state_dict()), **hashes}


def hash_samples(model: Path, folder: Path) -> dict[str, str]:
    """Hashes of what `dit-hf sample` makes of a conditional model, by its mode; written into `folder`."""
    folder.mkdir()
    for name, example in zip(("image", "mask_image"), example_images(), strict=True):
        example.save(folder / f"{name}.png")
    image = ["--image", str(folder / "image.png")]
    options = {
        "generate": ["--attributes", json.dumps(HAS)],
        "img2img": image,
        "inpaint": [*image, "--mask_image", str(folder / "mask_image.png")],
        "edit": [*image, "--edit", json.dumps(EDIT)],
    }
    shared = ("--num_images", "3", "--batch_size", "2", "--num_inference_steps", "3", "--output_format", "npz")
    for mode, own in options.items():
        run_verb("sample", model, "--mode", mode, "--output_dir", folder / mode, *shared, *own)
    return {mode: hash_array(np.load(folder / mode / "samples.npz")["arr_0"]) for mode in options}


def record_evaluation(run: Path) -> dict[str, Any]:
    """What the evaluation of a run says, without what tells of the machine."""
    run_verb("evaluate", run, "--num_samples", "16", "--num_inference_steps", "2")
    report = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    report.pop("json_sha256", None)
    for name in ("machine", "versions"):
        del report["protocol"][name]
    report["model"]["scheduler"] = hash_json(report["model"]["scheduler"])  # it lists 500 betas
    return report


def hash_kept(kept: Path) -> dict[str, Any]:
    """Hashes of the cache and of the pipeline that an earlier version wrote (see keep.py)."""
    return {"cache": hash_cache(kept / "latents"), "pipeline": hash_pipelines(kept / "pipeline")}


def record(folder: Path) -> dict[str, Any]:
    """The whole record; `folder` is filled."""
    cache = build_cache(folder / "latents")
    found: dict[str, Any] = {"cpu": cpu_kind(), "cache": hash_cache(cache)}
    for recipe in RECIPES:
        run = train_recipe(recipe, cache, folder / recipe)
        found[recipe] = {
            "losses": list(read_losses(run).values()),
            "validation losses": read_losses(run, "validation_loss"),
            **{path.name: hash_checkpoint(path) for path in sorted(run.glob("checkpoint-*"))},
            "pipeline": hash_pipelines(run / "pipeline"),
        }
    found["avatars"]["sample"] = hash_samples(folder / "avatars", folder / "samples")
    found["avatars"]["evaluation"] = record_evaluation(folder / "avatars")
    return found | {kept.name: hash_kept(kept) for kept in kept_folders()}


def kept_folders() -> list[Path]:
    """What earlier versions wrote, `kept-<version>`."""
    return sorted(GOLDEN.glob("kept-*"))


def add_cpu(found: dict[str, Any]) -> None:
    """Keep what the tests compare in `cpu_losses.json`, beside what is known of other kinds of CPU."""
    known = json.loads(CPU_LOSSES.read_text(encoding="utf-8")) if CPU_LOSSES.is_file() else {}
    losses = {recipe: found[recipe]["losses"] for recipe in RECIPES}
    pixels = {kept.name: found[kept.name]["pipeline"]["generate"] for kept in kept_folders()}
    known[found["cpu"]] = {"losses": losses, "pixels": pixels}
    CPU_LOSSES.write_text(_to_json(known), encoding="utf-8")


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden record as JSON.")
    parser.add_argument("--output", type=Path, help="the file; without it the record goes to stdout")
    parser.add_argument(
        "--add-cpu", action="store_true", help="add this kind of CPU to cpu_losses.json, at a commit known to be right"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, one_thread(), contextlib.redirect_stdout(sys.stderr):
        found = record(Path(folder))
    if options.add_cpu:
        add_cpu(found)
    if options.output:
        options.output.write_text(_to_json(found), encoding="utf-8")
    else:
        print(_to_json(found), end="")


if __name__ == "__main__":
    main()
