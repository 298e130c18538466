"""A call of the app as Python code that generates the same images."""

from __future__ import annotations

from PIL import Image

from .studio import PIPELINES, Call


def python_code(call: Call, model: str) -> str:
    """Return the code of a call of `model`; it reads images from files named like the arguments, e.g. `image.png`."""
    # 1. What is imported, and the pipeline of the mode.
    kind = PIPELINES[call.mode].__name__
    loaded = f"load_pipeline({model!r})"
    imports, pipeline = ["from dit_hf.runs import load_pipeline"], loaded
    if kind != "LatentDiTPipeline":
        imports, pipeline = [f"from dit_hf import {kind}", *imports], f"{kind}(**{loaded}.components)"

    # 2. The call, and its random numbers.
    options = {
        name: f"{name}.png" if isinstance(value, Image.Image) else value for name, value in call.options().items()
    }
    arguments = [f"{name}={value!r}" for name, value in options.items()]
    seed, images = call.settings.seed, ".images"
    if call.mode == "interpolate":
        function, images = "pipe.interpolate", ""
        arguments.append(f"latents=pipe.sample_noise(2, generators({seed}, range(2)))")
    else:
        function = "pipe"
        if call.mode != "edit":  # an edit samples no noise
            arguments.append(f"generator=generators({seed}, range({call.settings.num_images}))")
    if call.mode != "edit":
        imports.append("from dit_hf.sampling.generate import generators")
    lines = [
        *imports,
        "",
        f"pipe = {pipeline}",
        f"images = {function}(",
        *(f"    {a}," for a in arguments),
        f"){images}",
    ]
    return "\n".join(lines)
