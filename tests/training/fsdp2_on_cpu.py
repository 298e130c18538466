"""`torchrun fsdp2_on_cpu.py ...` is `scripts/train.py` under FSDP2 on CPU ranks.

accelerate shards on accelerators only: on a CPU it ignores its FSDP settings. Here it is made to shard there too, with
the settings of `recipes/accelerate/fsdp2.yaml`. It then does the same as on GPUs, but in float32 and by gloo.
"""

import os
import sys
from pathlib import Path

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from dit_hf_cli import main

SETTINGS = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml").read_text())


def plugin() -> FullyShardedDataParallelPlugin:
    """Build accelerate's plugin from the environment that `accelerate launch` would make of the settings."""
    for name, value in SETTINGS["fsdp_config"].items():
        name = name.upper().replace("TRANSFORMER_LAYER_CLS", "TRANSFORMER_CLS")
        os.environ[name] = str(value).lower() if isinstance(value, bool) else str(value)
    return FullyShardedDataParallelPlugin()


original = Accelerator.__init__


def sharding(self: Accelerator, *args, **kwargs) -> None:
    original(self, *args, **kwargs)
    self.state.distributed_type, self.state.fsdp_plugin = DistributedType.FSDP, plugin()


if __name__ == "__main__":
    Accelerator.__init__ = sharding
    sys.exit(main(["train", *sys.argv[1:]]))
