"""`dit-hf train` on two ranks with a fault on one of them: what each rank prints, and that it ends."""

import multiprocessing
import os
import re
import socket
import sys

import torch
from accelerate import Accelerator
from fsdp2_on_cpu import sharding
from torch.distributed.tensor import DTensor

from dit_hf.training import background_save, trainer
from dit_hf.training.step import TrainingStep
from dit_hf_cli import main

WEIGHT = "transformer_blocks.1.ff.net.2.weight"
# Ranks are forked from one process that has imported everything, which takes ten times as long as these runs.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["dit_hf.training.trainer", "dit_hf.cli"])


def errors_of_ranks(folder, arguments, fault=None, faulty="0", sharded=False):
    """Train on two ranks, without a launcher that would stop one when the other ends; return each one's only error.

    Args:
        folder: Folder for what the ranks print.
        arguments: Of `dit-hf train`, for each rank.
        fault: "nan", a weight that is not a number in step 3; or the name of a function of the trainer, or of its
            thread, that finds the disk full.
        faulty: Rank that has the fault.
        sharded: Under FSDP2 instead of DDP.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks, errors = [], []
    for rank, each in zip("01", arguments, strict=True):
        environment = address | {"RANK": rank, "LOCAL_RANK": rank}
        options = (folder / f"printed-{rank}", environment, fault if rank == faulty else None, sharded, each)
        ranks.append(RANKS.Process(target=run_rank, args=options))
        ranks[-1].start()
    for rank, process in enumerate(ranks):
        process.join(timeout=120)
        printed = (folder / f"printed-{rank}").read_text()
        assert process.exitcode == 1, printed
        (error,) = re.findall(r"dit-hf train(?: \(rank 1\))?: error: (.*)", printed)
        errors.append(error)
    return errors


def run_rank(printed, environment, fault, sharded, arguments):
    """Run `dit-hf train` in this process, which is a rank of its own."""
    os.environ.update(environment)
    with open(printed, "w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    if sharded:
        Accelerator.__init__ = sharding
    if fault == "nan":
        original = TrainingStep.__call__

        def call(self: TrainingStep, step: int) -> torch.Tensor:
            if step == 2:
                break_weight(self)
            return original(self, step)

        TrainingStep.__call__ = call
    elif fault:
        setattr(background_save if hasattr(background_save, fault) else trainer, fault, fail)
    sys.exit(main(["train", *arguments]))


def break_weight(step: TrainingStep) -> None:
    """Make one value of one weight, or of this rank's shard of it, not a number."""
    weight = dict(step.transformer.named_parameters())[WEIGHT]
    with torch.no_grad():
        (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[0] = float("nan")


def fail(*_args, **_options) -> None:
    raise OSError(28, "No space left on device")
