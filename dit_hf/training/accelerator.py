"""How a run uses its machine: accelerate's ranks and precision, compiled blocks, deterministic kernels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast, get_args

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from ..config import Precision, TrainConfig
from ..devices import compiler_problem
from ..storage import first_line


def use_deterministic_kernels() -> None:
    """Make every kernel give the same bits each time; call it before the first CUDA call of the process."""
    # cuBLAS reads its workspace setting once, when it is initialized.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Inductor would otherwise choose kernels by timing them, and each process could choose differently. The option is
    # not documented; read in torch 2.13.
    torch._inductor.config.deterministic = True


def build_accelerator(train: TrainConfig, tracker: str | None, cpu: bool, log: Callable[[str], None]) -> Accelerator:
    """Build the Accelerator of a run.

    Args:
        train: The recipe's section.
        tracker: The tracker to log with (see `choose_tracker`); None is none.
        cpu: Whether the machine has no accelerator.
        log: Receives a line if the requested precision is not available.

    Raises:
        ValueError: for a setting of accelerate's that this trainer does not support.
    """
    _refuse_unsupported(os.environ)

    # The recipe decides the precision, then `accelerate launch`, and without either fp16 on a GPU.
    precision = train.mixed_precision
    if precision is None and "ACCELERATE_MIXED_PRECISION" not in os.environ and torch.cuda.is_available():
        precision = "fp16"

    # torch 2.13 calls `broadcast_buffers` by another name, which accelerate does not know yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=precision,
        log_with=tracker,
        project_config=ProjectConfiguration(logging_dir=train.output_dir),
        step_scheduler_with_optimizer=False,
        # The model's buffers never change, and gradients need not be copied out of DDP's buckets.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )

    if accelerator.device.type == "xla":
        raise ValueError("XLA is not supported: launch on CUDA, MPS, XPU or CPU devices")

    # Dynamo's DDP optimizer would split every compiled block at DDP's buckets. And every kind of model, batch and
    # precision that a process trains or samples with compiles the blocks' code once more: with `fullgraph`, the ninth
    # would be an error by default. Both options belong to a module with a leading underscore; read in torch 2.13.
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 64

    # accelerate accepts fp16 on a CPU and computes in float32 without a warning.
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        log("no GPU: training in float32 instead of fp16")
    return accelerator


# Of a collective operation, in which the others wait while the first rank writes grids, an evaluation or the export.
# torch's own limit of ten minutes is too little for large models.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


def start_ranks(cpu: bool) -> None:
    """Start accelerate's state of this process, which connects the ranks.

    Raises:
        OSError: if the port is taken.
    """
    try:
        PartialState(cpu=cpu, timeout=COLLECTIVE_TIMEOUT, **_rendezvous())
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(
            f"the ranks cannot meet at {address} (MASTER_ADDR:MASTER_PORT): {first_line(error)}; if another job uses "
            "this port, set another MASTER_PORT"
        ) from error


def _rendezvous() -> dict[str, Any]:
    """Return options of `init_process_group` with which ranks that torchrun has restarted meet.

    torchrun keeps one store over all attempts, without a prefix for each (read in torch 2.13): a restarted rank may
    read the address of a dead one there, and wait for it.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks, False)
    prefixed = torch.distributed.PrefixStore(f"dit_hf/attempt-{attempt}", store)
    return {"store": prefixed, "rank": rank, "world_size": ranks}


def _refuse_unsupported(environment: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` was configured to do and this trainer would do wrong or not at all.

    The variables are those that accelerate 1.15 sets for its processes.
    """
    chosen = {name for name, value in environment.items() if value.lower() == "true"}
    if "ACCELERATE_USE_DEEPSPEED" in chosen or "ACCELERATE_USE_MEGATRON_LM" in chosen:
        name = "DeepSpeed" if "ACCELERATE_USE_DEEPSPEED" in chosen else "Megatron-LM"
        raise ValueError(f"{name} is not supported; recipes/accelerate/ has configurations for DDP and FSDP2")
    if "ACCELERATE_USE_FSDP" in chosen and environment.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP1 is not supported; set fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "")
    if precision and precision not in get_args(Precision):
        raise ValueError(f"ACCELERATE_MIXED_PRECISION={precision} is not supported; expected no, fp16 or bf16")
    # accelerate would scale gradients before they are clipped, or compile the whole model.
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "") not in ("", "1"):
        raise ValueError(
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is not read; set train.gradient_accumulation_steps instead"
        )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "").lower() not in ("", "no"):
        raise ValueError("ACCELERATE_DYNAMO_BACKEND is not read; set train.torch_compile instead")
    if "ACCELERATE_USE_PARALLELISM_CONFIG" in chosen:
        raise ValueError("accelerate's parallelism_config is not supported; recipes/accelerate/ has DDP and FSDP2")


def effective_precision(mixed_precision: str, device: torch.device) -> Precision:
    """Return the precision that accelerate computes in for `mixed_precision`: fp16 on a CPU is float32."""
    return "no" if mixed_precision == "fp16" and device.type == "cpu" else cast(Precision, mixed_precision)


def should_compile(
    train: TrainConfig, state: dict[str, Any] | None, accelerator: Accelerator, log: Callable[[str], None]
) -> bool:
    """Decide whether to compile the blocks: by the recipe, else as the run started, else on CUDA where it works.

    Args:
        train: The recipe's section.
        state: State of the checkpoint to resume from; None for a new run.
        accelerator: Of the run.
        log: Receives a line if compilation would be used but fails here.

    Raises:
        ValueError: if the recipe asks for it, and it does not work here.
    """
    if train.torch_compile:
        problem = compiler_problem(accelerator.device)
        if problem:
            raise ValueError(f"train.torch_compile true: {problem}; install a compiler, or give false")
    if train.torch_compile is not None:
        return train.torch_compile
    # Compiled code rounds differently: a resumed run keeps what it started with, so that its bits stay the same.
    if state is not None:
        return state.get("torch_compile", False)
    if accelerator.device.type != "cuda" or accelerator.is_fsdp2:
        return False
    problem = compiler_problem(accelerator.device)
    if problem:
        log(f"training without torch.compile, which would be faster but fails here: {problem}")
    return problem is None
