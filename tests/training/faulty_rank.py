"""`torchrun faulty_rank.py [sharded] FAULT RANK ...` is `scripts/train.py` (under FSDP2) with a fault on one rank."""

import os
import sys

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from dit_hf.training import trainer
from dit_hf.training.step import TrainingStep
from dit_hf_cli import main

WEIGHT = "transformer_blocks.1.ff.net.2.weight"


def break_weight(step: TrainingStep) -> None:
    """Make one value of one weight, or of this rank's shard of it, not a number."""
    weight = dict(step.transformer.named_parameters())[WEIGHT]
    with torch.no_grad():
        (weight.to_local() if isinstance(weight, DTensor) else weight).view(-1)[0] = float("nan")


def fail(*_args, **_options) -> None:
    raise OSError(28, "No space left on device")


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        import fsdp2_on_cpu

        Accelerator.__init__ = fsdp2_on_cpu.sharding
        del sys.argv[1]
    fault, rank = sys.argv[1:3]
    if os.environ["RANK"] == rank:
        if fault == "nan":
            original = TrainingStep.__call__

            def call(self: TrainingStep, step: int) -> torch.Tensor:
                if step == 2:
                    break_weight(self)
                return original(self, step)

            TrainingStep.__call__ = call
        else:
            setattr(trainer, fault, fail)
    sys.exit(main(["train", *sys.argv[3:]]))
