"""FID's Inception-v3 against its layers written out one by one, with batch normalization and pooling by hand."""

import pytest
import torch
from torch.nn import functional

from dit_hf.evaluation.inception import FIDInception

# Branches of each kind of block, in the order of their channels, as layers one after the other; `/2` is their stride.
BLOCKS = {
    "A": ["branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "mean branch_pool"],
    "B": ["branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2"],
    "C": [
        "branch1x1",
        "branch7x7_1 branch7x7_2 branch7x7_3",
        "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5",
        "mean branch_pool",
    ],
    "D": ["branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max/2"],
    "E": [
        "branch1x1",
        "branch3x3_1 branch3x3_2a",
        "branch3x3_1 branch3x3_2b",
        "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a",
        "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
        "mean branch_pool",
    ],
}
MIXED = {"5b": "A", "5c": "A", "5d": "A", "6a": "B", "6b": "C", "6c": "C", "6d": "C", "6e": "C", "7a": "D", "7b": "E"}


def layer(weights, name, x, stride=1, same=True):
    """A convolution (with `same`, at stride 1 the size stays), batch normalization and ReLU."""
    kernel = weights[f"{name}.conv.weight"]
    padding = [side // 2 if same and stride == 1 else 0 for side in kernel.shape[2:]]
    x = functional.conv2d(x, kernel, stride=stride, padding=padding)
    mean, variance, gain, bias = (
        weights[f"{name}.bn.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((x - mean) / (variance + 1e-3).sqrt() * gain + bias).relu()


def pool(kind, x, stride):
    if kind == "max":
        return functional.max_pool2d(x, 3, stride, padding=0 if stride == 2 else 1)
    # The mean of those of the nine places that are in the image.
    return functional.avg_pool2d(x, 3, 1, 1) / functional.avg_pool2d(torch.ones_like(x), 3, 1, 1)


def block(weights, number, branches, x):
    outputs = []
    for branch in branches:
        hidden = x
        for step in branch.split():
            name, _, stride = step.partition("/")
            stride = int(stride or 1)
            pooling = name in ("mean", "max")
            hidden = (
                pool(name, hidden, stride) if pooling else layer(weights, f"Mixed_{number}.{name}", hidden, stride)
            )
        outputs.append(hidden)
    return torch.cat(outputs, 1)


def by_hand(weights, x, features):
    x = layer(weights, "Conv2d_1a_3x3", x, stride=2)
    x = layer(weights, "Conv2d_2a_3x3", x, same=False)
    x = pool("max", layer(weights, "Conv2d_2b_3x3", x), 2)
    if features == 64:
        return x.mean((2, 3))
    x = layer(weights, "Conv2d_4a_3x3", layer(weights, "Conv2d_3b_1x1", x), same=False)
    x = pool("max", x, 2)
    for number, kind in MIXED.items():
        x = block(weights, number, BLOCKS[kind], x)
    # The last block pools by the maximum: a mistake of the original, on which the FID is defined.
    return block(weights, "7c", [branch.replace("mean", "max") for branch in BLOCKS["E"]], x).mean((2, 3))


@pytest.mark.parametrize("features", [2048, 64])
@torch.no_grad()
def test_features_are_those_of_the_layers_one_by_one(features):
    torch.manual_seed(0)
    network = FIDInception(features).eval()
    for name, tensor in network.state_dict().items():
        if ".bn." in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)  # statistics of a trained network are neither 0 nor 1
    pixels = 2 * torch.rand(2, 3, 139, 139) - 1
    result = network(pixels)
    assert result.shape == (2, features)
    assert result.std() > 0
    torch.testing.assert_close(result, by_hand(network.state_dict(), pixels, features), rtol=1e-4, atol=1e-5)
