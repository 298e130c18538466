"""Memory that training takes, by size: what is kept for a parameter and for an image, and what batch fits a GPU.

python benchmarks/memory.py [--json FILE]                     (a minute; nothing is allocated: tensors without content)

By calculation: 22 bytes a parameter (weight, gradient, two moments, average in float32; a half-precision copy), and
the tensors that autograd keeps of an image for the backward pass, counted as the model runs on fake tensors in half
precision by autocast. The backward pass of a block is taken to need as much again as the block keeps; with gradient
checkpointing that block's own tensors too. A tenth of the GPU's memory is left to context and allocator.
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
    """Two rows of the table: without and with gradient checkpointing."""
    with FakeTensorMode():
        model = LatentDiTTransformer2DModel(sample_size=latent, **PRESETS[size])
        kept = bytes_a_picture(model, latent)
        model.enable_gradient_checkpointing()
        checkpointed = bytes_a_picture(model, latent)
    parameters = sum(p.numel() for p in model.parameters())
    fixed, block = BYTES_A_PARAMETER * parameters, kept / len(model.transformer_blocks)
    return [
        {
            "size": size,
            "gradient_checkpointing": name,
            "parameters": parameters,
            "fixed_gb": round(fixed / 1e9, 2),
            "mb_a_picture": round(picture / 1e6, 1),
            "largest_batch": {f"{gpu} GB": max(0, int((gpu * 1e9 * (1 - SPARE) - fixed) / picture)) for gpu in GPUS},
        }
        for name, picture in ((False, kept + block), (True, checkpointed + 2 * block))
    ]


def bytes_a_picture(model: torch.nn.Module, latent: int) -> float:
    return (kept_bytes(model, latent, 3) - kept_bytes(model, latent, 1)) / 2


def kept_bytes(model: torch.nn.Module, latent: int, batch: int) -> int:
    """Bytes of the tensors that autograd keeps after a forward pass, each storage once, without the weights."""
    storages: dict[Any, int] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
            held.append(tensor)  # so that no storage is freed and its number given to another
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
