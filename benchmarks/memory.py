"""Memory of training by model size: bytes for a parameter and for an image, and the largest batch that fits a GPU.

python benchmarks/memory.py [--json FILE]                     (a minute; nothing is allocated: tensors without content)

A calculation: 22 bytes for each parameter (weight, gradient, two moments, EMA in float32; a half-precision copy), and
the tensors that autograd saves of each image for the backward pass, counted while the model runs on fake tensors with
autocast to half precision. The backward pass of a block is assumed to need as much again as the block saves; with
gradient checkpointing also the block's own tensors. A tenth of the GPU's memory is left to context and allocator.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_hf import LatentDiTTransformer2DModel
from dit_hf.config import PRESETS

SIZES = ("reference", "B/2", "L/2", "XL/2")
GPUS = (24, 40, 80)
BYTES_A_PARAMETER = 20 + 2
SPARE = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent", type=int, default=32, help="Side of the latents.")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/memory.json"))
    options = parser.parse_args()
    rows = [entry for size in SIZES for entry in describe(size, options.latent)]
    result = {
        "by": "calculation",
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "latent": options.latent,
        "spare": SPARE,
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    for entry in rows:
        print(entry)


def describe(size: str, latent: int) -> list[dict[str, Any]]:
    """Return two rows of the table: without and with gradient checkpointing."""
    with FakeTensorMode():
        model = LatentDiTTransformer2DModel(sample_size=latent, **PRESETS[size])
        saved = bytes_per_image(model, latent)
        model.enable_gradient_checkpointing()
        checkpointed = bytes_per_image(model, latent)
    parameters = sum(p.numel() for p in model.parameters())
    fixed, block = BYTES_A_PARAMETER * parameters, saved / len(model.transformer_blocks)
    return [
        {
            "size": size,
            "gradient_checkpointing": name,
            "parameters": parameters,
            "fixed_gb": round(fixed / 1e9, 2),
            "mb_a_picture": round(image / 1e6, 1),
            "largest_batch": {f"{gpu} GB": max(0, int((gpu * 1e9 * (1 - SPARE) - fixed) / image)) for gpu in GPUS},
        }
        for name, image in ((False, saved + block), (True, checkpointed + 2 * block))
    ]


def bytes_per_image(model: torch.nn.Module, latent: int) -> float:
    # The difference of two batches leaves out what does not depend on the batch.
    return (saved_bytes(model, latent, 3) - saved_bytes(model, latent, 1)) / 2


def saved_bytes(model: torch.nn.Module, latent: int, batch: int) -> int:
    """Return the bytes that autograd saves in a forward pass, each storage once, without the weights.

    `_cdata` and `torch._subclasses` are private to torch (read in 2.13).
    """
    storages: dict[Any, int] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
            held.append(tensor)  # a freed storage's address could be given to another
        return tensor

    held: list[torch.Tensor] = []
    noisy, timesteps = torch.empty(batch, 4, latent, latent), torch.zeros(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.float16):
            prediction = model(noisy, timesteps, return_dict=False)[0]
        torch.nn.functional.l1_loss(prediction.float(), noisy)
    return sum(storages.values())


if __name__ == "__main__":
    main()
