"""Our Inception-v3 with its TensorFlow 1 resize against torch-fidelity's own network, with the same random weights.

Only torch-fidelity's network is imported, not its package, which needs torchvision:

    pip install --no-deps torch-fidelity
    python benchmarks/inception.py --json benchmarks/results/inception.json
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from machine import machine

from dit_hf.evaluation.features import load_features
from dit_hf.evaluation.inception import FIDInception

SIZES = ((64, 64), (256, 256), (299, 299), (218, 178))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "random.pth"
        torch.save(random_weights(), weights)
        theirs = torch_fidelity().FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
        )
        ours = load_features("inception", str(weights), "cpu")
        rows = {f"{height}x{width}": differences(theirs, ours, height, width) for height, width in SIZES}
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "torch_fidelity": version("torch-fidelity"),
        "largest_difference_over_largest_feature": rows,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def torch_fidelity() -> types.ModuleType:
    """Import the module of torch-fidelity's network without its package, whose `__init__` imports torchvision."""
    spec = importlib.util.find_spec("torch_fidelity")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def random_weights() -> dict[str, torch.Tensor]:
    """Return weights that keep the scale of every layer, with batch statistics that differ from 0 and 1."""
    torch.manual_seed(0)
    network = FIDInception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return {**network.state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def differences(theirs, ours, height: int, width: int) -> float:
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    with torch.no_grad():
        (expected,) = theirs(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    return float(np.abs(ours(pixels) - expected.numpy()).max() / expected.abs().max())


if __name__ == "__main__":
    main()
