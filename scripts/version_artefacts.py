"""Make a cache and a pipeline, or open them with the libraries of this environment; see `test_versions.py`."""

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

CALL = {"num_inference_steps": 25, "output_type": "np"}
ATTRIBUTES = {"Smiling": True, "class": "cat"}
# From this version on a pipeline loads by its own code; older ones get one line.
OLDEST_DIFFUSERS = (0, 35)
# From this one on it is a modular pipeline, too.
OLDEST_MODULAR = (0, 41)


def make(folder: Path) -> None:
    """Write `cache`, `pipeline`, and beside them what every reader has to get."""
    import numpy
    import torch

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from conftest import tiny_pipeline

    from dit_hf import prepare_latents

    pipeline = tiny_pipeline(latents_mean=[1.0, 2.0, 3.0, 4.0])
    pipeline.save_pretrained(folder / "pipeline")
    numpy.save(folder / "pixels.npy", pipeline(ATTRIBUTES, generator=torch.Generator().manual_seed(0), **CALL).images)
    prepare_latents("avatars", str(folder / "cache"), str(folder / "pipeline" / "vae"), "16", flip=True, num_images=40)
    (folder / "values.txt").write_text(values(folder / "cache"))


def values(cache: Path) -> str:
    """Return a hash of all rows of a cache."""
    import numpy
    from datasets import load_from_disk

    digest = hashlib.sha256()
    for row in load_from_disk(str(cache)):
        for name in sorted(row):
            value = row[name]
            content = numpy.array(value, "float16").tobytes() if isinstance(value, list) else repr(value).encode()
            digest.update(name.encode() + content)
    return digest.hexdigest()


def open_cache(folder: Path) -> str:
    """Open the cache and compare its rows."""
    import datasets

    assert values(folder / "cache") == (folder / "values.txt").read_text(), "other values"
    return f"{datasets.__version__} reads the same values"


def open_pipeline(folder: Path) -> str:
    """Load the pipeline by its own code, compare its pixels, save it, and load what was saved; or be refused."""
    import diffusers
    import numpy
    import torch

    def load(place: str) -> Any:
        options = {"custom_pipeline": "pipeline", "trust_remote_code": True}
        return diffusers.DiffusionPipeline.from_pretrained(place, **options)

    version = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    pixels = numpy.load(folder / "pixels.npy")
    if version < OLDEST_DIFFUSERS:
        try:
            load(str(folder / "pipeline"))
        except ImportError as error:
            line = str(error)
        expected = f"needs diffusers 0.35.0 or newer, and {diffusers.__version__} is installed"
        assert expected in line, line
        return line
    with tempfile.TemporaryDirectory() as saved:
        for place in (str(folder / "pipeline"), saved):
            pipeline = load(place)
            pipeline.set_progress_bar_config(disable=True)
            images = pipeline(ATTRIBUTES, generator=torch.Generator().manual_seed(0), **CALL).images
            assert numpy.array_equal(images, pixels), "other pixels"
            pipeline.save_pretrained(saved)
    if version < OLDEST_MODULAR:
        return "the same pixels, and saved"
    modular = diffusers.ModularPipeline.from_pretrained(str(folder / "pipeline"), trust_remote_code=True)
    modular.load_components()
    images = modular(attributes=ATTRIBUTES, generator=torch.Generator().manual_seed(0), **CALL, output="images")
    assert numpy.array_equal(images, pixels), "other pixels of the modular pipeline"
    return "the same pixels, and saved; the same as a modular pipeline"


if __name__ == "__main__":
    task, folder = sys.argv[1], Path(sys.argv[2])
    if task == "make":
        make(folder)
    else:
        print({"datasets": open_cache, "diffusers": open_pipeline}[task](folder))
