from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import tiny_transformer

from dit_hf import LatentDiTTransformer2DModel
from dit_hf.config import TrainConfig
from dit_hf.training.accelerator import build_accelerator, effective_precision


@pytest.fixture(autouse=True)
def _own_accelerator_state():
    """accelerate keeps the first Accelerator's precision for the process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process_may_train_and_sample_with_many_kinds_of_compiled_models(tmp_path):
    build_accelerator(TrainConfig(output_dir=str(tmp_path)), None, cpu=True, log=print)
    images = torch.randn(2, 4, 8, 8)
    for layers, heads, dtype in [(1, 1, torch.float32), (1, 2, torch.float32), (2, 1, torch.float64)]:
        model = tiny_transformer(num_layers=layers, num_attention_heads=heads).to(dtype)
        expected = model(images.to(dtype), 5).sample
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        for train in (False, True):
            for grad in (False, True):
                model.train(train)
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(model(images.to(dtype), 5).sample, expected)


def test_half_precision_on_a_cpu_is_float32_and_says_so(tmp_path):
    lines = []
    train = TrainConfig(output_dir=str(tmp_path), mixed_precision="fp16")
    built = build_accelerator(train, None, cpu=True, log=lines.append)
    assert lines == ["no GPU: training in float32 instead of fp16"]
    assert effective_precision(built.mixed_precision, built.device) == "no"
    assert effective_precision("fp16", torch.device("cuda")) == "fp16"
    assert effective_precision("bf16", torch.device("cpu")) == "bf16"


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["ddp", "ddp-machines", "fsdp2", "fsdp2-machines"])
def test_shipped_accelerate_recipes_are_read_by_accelerate(name):
    """By its launcher's own code, which turns them into the environment of the ranks."""
    path = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    args = launch_command_parser().parse_args(["--config_file", str(path), "train.py"])
    args, defaults, _ = _validate_launch_command(args)
    assert defaults.num_machines == args.num_machines == (2 if "machines" in name else 1)
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == ("bf16" if "fsdp2" in name else "fp16")
    if "fsdp2" in name:
        assert environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] in LatentDiTTransformer2DModel._no_split_modules


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported; recipes/accelerate/ has"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1 is not supported; set fsdp_version: 2"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "fp8 is not supported; expected no, fp16 or bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "float16"}, "ACCELERATE_MIXED_PRECISION=float16 is not supported"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set train.gradient_accumulation_steps instead"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "set train.torch_compile instead"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config is not supported"),
    ],
)
def test_settings_of_accelerate_that_are_not_supported_are_refused(tmp_path, monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        build_accelerator(TrainConfig(output_dir=str(tmp_path)), None, cpu=True, log=print)
