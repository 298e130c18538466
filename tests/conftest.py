"""Small real parts that the tests share; nothing here reaches a network or the user's caches."""

import contextlib
import gc
import os
import resource
import shutil
import signal
import tempfile

# ruff: noqa: E402
gc.disable()  # until all is imported: it would look through a million objects that stay, again and again
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="dit_hf-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants, hf_api
from local_hub import Hub, running_hub
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from dit_hf import CosineLatentScheduler, LatentDiTPipeline, LatentDiTTransformer2DModel, upload
from dit_hf.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, TrainConfig
from dit_hf.latents.prepare import prepare_latents


def pytest_configure(config: pytest.Config) -> None:
    """What the tests expect is computed on the CPU: CUDA is hidden, but from exactly `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # `nohup` and a script's `&` have these signals ignored, and so would the processes that tests send them to.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def tiny_transformer(seed: int = 0, **options) -> LatentDiTTransformer2DModel:
    """A transformer of 30 thousand parameters whose weights are all random, zero-initialised ones too."""
    torch.manual_seed(seed)
    sizes = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12}
    model = LatentDiTTransformer2DModel(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def tiny_vae() -> AutoencoderKL:
    """A random VAE that halves each side."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def tiny_pipeline(rotary: bool = True, **options) -> LatentDiTPipeline:
    """A pipeline of random parts with two conditions."""
    conditions = {"Smiling": 2, "class": 3}
    transformer = tiny_transformer(conditions=conditions, use_rotary_positional_embeddings=rotary)
    scheduler = CosineLatentScheduler(prediction_type="v_prediction")
    options = {"condition_labels": {"class": ["cat", "dog", "owl"]}, "guidance_scale": 2.0, **options}
    pipeline = LatentDiTPipeline(transformer, scheduler, tiny_vae(), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vae") / "vae"
    tiny_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A run's folder with a pipeline of random weights. Not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "faces"
    tiny_pipeline().save_pretrained(folder / "pipeline")
    return str(folder)


@pytest.fixture(scope="session")
def net(tmp_path_factory) -> str:
    """A vision model of random weights with 16 features, by its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net") / "dino"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def latents(tmp_path_factory, vae_folder) -> Path:
    """A cache of 60 avatars at 16 px as latents [4, 8, 8], mirrored too. Not to be written to."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    prepare_latents("avatars", str(folder), str(vae_folder), "16", flip=True, num_images=60)
    return folder


@pytest.fixture(scope="session")
def training_latents(tmp_path_factory, vae_folder) -> Path:
    """Likewise of 200 avatars, some of them held out for validation."""
    folder = tmp_path_factory.mktemp("training-cache") / "latents"
    prepare_latents("avatars", str(folder), str(vae_folder), "16", flip=True, num_images=200)
    return folder


@pytest.fixture
def cats_and_owls(tmp_path) -> Path:
    """A folder of two classes, of which a model of cats, dogs and owls numbers the second otherwise."""
    for name, color in (("cat", "red"), ("owl", "blue")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), color).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def short_run(latents: Path, folder: Path) -> Config:
    """The recipe of a run of 8 steps that takes a second."""
    return Config(
        data=DataConfig(latents=str(latents)),
        model=ModelConfig(preset="tiny", num_layers=2, num_attention_heads=2, attention_head_dim=12),
        objective=ObjectiveConfig(),
        optim=OptimConfig(learning_rate=1e-3, lr_warmup_steps=2, ema_decay=0.9),
        train=TrainConfig(
            output_dir=str(folder / "run"),
            max_train_steps=8,
            global_batch_size=8,
            checkpointing_steps=4,
            checkpoints_total_limit=3,
            logging_steps=3,
            sampling_steps=0,
            num_inference_steps=2,
            report_to="none",
        ),
    )


@pytest.fixture
def config(training_latents, tmp_path) -> Config:
    """The recipe of a short run that has not been trained."""
    return short_run(training_latents, tmp_path)


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A Hub that this process talks to."""
    with running_hub() as hub:
        for name, value in hub.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)  # of huggingface_hub's functions, read at import
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(upload, "RETRY_SECONDS", (0.0, 0.0))
        yield hub


@contextlib.contextmanager
def small_disk(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, which fails as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, default=3, help="How often the slow tests kill a build or a run.")
