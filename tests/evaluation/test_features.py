"""Feature networks: their preprocessing against independent versions, and that they distinguish images."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTImageProcessor, ViTModel

from dit_hf import open_images
from dit_hf.evaluation import features
from dit_hf.evaluation.features import load_features, resize_clean, resize_tf1
from dit_hf.evaluation.inception import FIDInception
from dit_hf.evaluation.metrics import frechet_distance
from dit_hf.storage import sha256


def noise(size=(2, 24, 40, 3), seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Random weights in the layout of pytorch-fid's file, with the classifier that features do not need."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({**FIDInception().state_dict(), "fc.weight": torch.zeros(1008, 2048)}, path)
    return path


def avatars(count=8):
    return np.stack([np.asarray(image) for image in open_images("avatars", 64, num_images=count)["image"]])


@pytest.mark.parametrize("size", [(299, 299), (12, 16)], ids=["larger", "smaller"])
def test_clean_resize_is_pils_in_floating_point(size):
    pixels = noise()
    resized_batch = resize_clean(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), size)
    for image, resized in zip(pixels, resized_batch, strict=True):
        for channel in range(3):
            plane = Image.fromarray(image[:, :, channel].astype(np.float32))
            expected = np.asarray(plane.resize(size[::-1], Image.Resampling.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(resized[channel].numpy(), expected, atol=1e-2)


@pytest.mark.parametrize("size", [(299, 299), (11, 16)], ids=["larger", "smaller"])
def test_tf1_resize_is_its_definition(size):
    pixels = noise((1, 13, 17, 3))[0].astype(np.float64)
    expected = np.zeros((*size, 3))
    for row in range(size[0]):
        for column in range(size[1]):
            y, x = row * 13 / size[0], column * 17 / size[1]
            top, left = int(y), int(x)
            below, right = min(top + 1, 12), min(left + 1, 16)
            upper = pixels[top, left] * (1 - x + left) + pixels[top, right] * (x - left)
            lower = pixels[below, left] * (1 - x + left) + pixels[below, right] * (x - left)
            expected[row, column] = upper * (1 - y + top) + lower * (y - top)
    resized = resize_tf1(torch.tensor(pixels).permute(2, 0, 1)[None].float(), size)[0].permute(1, 2, 0)
    np.testing.assert_allclose(resized.numpy(), expected, atol=2e-2)


def test_the_further_from_faces_the_higher_the_distance():
    net, faces = load_features("efficientnet-lite0"), avatars(80)
    grey = faces.mean(3, keepdims=True).repeat(3, 3).astype(np.uint8)
    noisy = (faces + np.random.default_rng(0).normal(0, 40, faces.shape)).clip(0, 255).astype(np.uint8)
    reference = net(faces[:40])
    others, greyscale, noise_ = (frechet_distance(net(p[40:]), reference) for p in (faces, grey, noisy))
    assert others < greyscale < noise_


@pytest.mark.parametrize(("name", "dim"), [("inception", 2048), ("inception-clean", 2048), ("legacy64", 64)])
def test_inception_takes_a_file_of_weights(inception_file, name, dim):
    net = load_features(name, str(inception_file))
    features = net(noise())
    assert features.shape == (2, dim)
    assert net.label == {"inception": "FID", "inception-clean": "clean-FID", "legacy64": "legacy64 (not an FID)"}[name]


def test_inceptions_two_resizes_and_the_wrong_scaling_follow_their_definitions(inception_file):
    network = FIDInception().eval()
    network.load_state_dict(torch.load(inception_file, weights_only=True), strict=False)
    pixels = noise()
    for name, resize in (("inception", resize_tf1), ("inception-clean", resize_clean)):
        prepared = (resize(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (299, 299)) - 128) / 128
        with torch.no_grad():
            expected = network(prepared).numpy()
        np.testing.assert_allclose(load_features(name, str(inception_file))(pixels), expected, rtol=1e-4, atol=1e-5)
    # 255 times an image in [-1, 1], cast to bytes.
    wrong = ((torch.from_numpy(pixels).float() / 127.5 - 1) * 255).byte().permute(0, 3, 1, 2).float()
    beginning = FIDInception(64).eval()
    beginning.load_state_dict({k: v for k, v in network.state_dict().items() if k in beginning.state_dict()})
    with torch.no_grad():
        expected = beginning((resize_tf1(wrong, (299, 299)) - 128) / 128).numpy()
    np.testing.assert_allclose(load_features("legacy64", str(inception_file))(pixels), expected, rtol=1e-4, atol=1e-5)


class MeanOfPositions(torch.nn.Module):
    def forward(self, hidden):
        return hidden.mean(2)


def test_inception_takes_nvidias_torchscript_whose_layers_are_the_network(tmp_path, monkeypatch):
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 2048, 7, 73), torch.nn.Flatten(2), MeanOfPositions())

        def forward(self, pixels):
            return self.layers(pixels.float())

    whole = Whole().eval()
    torch.jit.script(whole).save(str(tmp_path / "inception.pt"))
    monkeypatch.setattr(features, "NVIDIA_SHA256", sha256(tmp_path / "inception.pt"))
    net = load_features("inception-clean", str(tmp_path / "inception.pt"))
    pixels = torch.from_numpy(noise()).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = whole.layers((resize_clean(pixels, (299, 299)) - 128) / 128).numpy()
    np.testing.assert_allclose(net(noise()), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["inception", "legacy64"])
@pytest.mark.parametrize("file", ["evil.pt", "evil.pth", "evil.safetensors"])
def test_another_torchscript_is_refused_without_running_it(tmp_path, name, file):
    written = tmp_path / "written"

    class Forward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Flatten()
            self.path = str(written)

        def forward(self, pixels):
            torch.from_file(self.path, True, 12, dtype=torch.uint8)
            return self.layers(pixels)

    torch.jit.script(Forward()).save(str(tmp_path / file))
    with pytest.raises(ValueError, match=f"{file}: a TorchScript is a program"):
        load_features(name, str(tmp_path / file))
    assert not written.exists()


def test_inception_takes_safetensors(inception_file, tmp_path):
    save_file(torch.load(inception_file, weights_only=True), tmp_path / "inception.safetensors")
    expected = load_features("inception", str(inception_file))(noise())
    np.testing.assert_array_equal(
        load_features("inception", str(tmp_path / "inception.safetensors"))(noise()), expected
    )


def test_a_vision_model_of_transformers_by_path(tmp_path):
    """Its class token, for images resized and normalized as by the model's own processor."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path / "dino")
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    ViTImageProcessor(size={"height": 28, "width": 28}, image_mean=mean, image_std=std).save_pretrained(
        tmp_path / "dino"
    )
    net = load_features(str(tmp_path / "dino"))
    assert (net.name, net.dim) == ("dino", 16)
    pixels = resize_clean(torch.from_numpy(noise()).permute(0, 3, 1, 2).float(), (28, 28)) / 255
    normalised = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        expected = model(normalised).last_hidden_state[:, 0].numpy()
    features = net(noise())
    np.testing.assert_allclose(features, expected, atol=1e-4)
    assert features.flags["C_CONTIGUOUS"]  # or safetensors would write other numbers


def test_a_pooler_that_is_missing_in_the_checkpoint_is_not_used(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "vit")
    net = load_features(str(tmp_path / "vit"))
    pixels = resize_clean(torch.from_numpy(noise()).permute(0, 3, 1, 2).float(), (32, 32)) / 127.5 - 1
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(net(noise()), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("inceptoin", None, "features inceptoin: expected inception, "),
        ("inception", "nowhere.pth", "not measured"),
        ("inception", __file__, "not the weights of FID's Inception"),
        ("efficientnet-lite0", "some.pth", "only Inception takes a file"),
    ],
)
def test_a_missing_network_is_one_line(name, weights, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_features(name, weights)
    assert "\n" not in str(raised.value)
