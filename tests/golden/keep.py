"""Writes what this version of dit_hf leaves on disk into `kept-<version>/`, for later versions to open.

    python tests/golden/keep.py

`latents/` is a latent cache, `run/` a run of the avatars recipe that was stopped gracefully after step 6 of 12, and
`pipeline/` what the same run exported when nothing stopped it: a resumed `run/` must end with its weights. The model
is of width 32 with one block, and the VAE a tenth of the size of the tests' tiny one.

`run/config.yaml` names cache and run by relative paths, so a copy of the folder is resumed from inside it:

    cp -r tests/golden/kept-0.1.0 kept && cd kept
    dit-hf train --config run/config.yaml --train.resume_from_checkpoint latest
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import GOLDEN, build_cache, one_thread, tiny_vae, train_recipe
from torch.optim.optimizer import register_optimizer_step_post_hook

from dit_hf import __version__

STEPS, STOPPED = 12, 6
OPTIONS = {
    "model.num_layers": 1,
    "model.mlp_ratio": 2.0,
    "optim.lr_warmup_steps": 3,
    "train.max_train_steps": STEPS,
    "train.checkpointing_steps": STOPPED,
    "train.checkpoints_total_limit": 1,
}


def keep(folder: Path) -> None:
    """Write cache, run and pipeline into `folder`, a new one."""
    folder.mkdir()
    options = [str(part) for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    with contextlib.chdir(folder), one_thread():
        cache = build_cache(Path("latents"), tiny_vae((4, 4)), num_images=16)
        with tempfile.TemporaryDirectory() as whole:
            run = train_recipe("avatars", cache, Path(whole) / "run", *options)
            shutil.copytree(run / "pipeline", "pipeline")
        with stopped_after(STOPPED):
            train_recipe("avatars", cache, Path("run"), *options)
        drop_sheet(cache)


@contextlib.contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Send this process SIGTERM in optimizer step `steps` of the run in the block, which must stop and save itself."""
    count = itertools.count(1)

    def stop(*_: Any) -> None:
        if next(count) == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_post_hook(stop)
    try:
        yield
    except SystemExit:  # the exit code of a graceful shutdown
        return
    finally:
        hook.remove()
    raise RuntimeError("the run was not stopped")


def drop_sheet(cache: Path) -> None:
    """Remove the grid of reconstructions, two thirds of the cache's bytes, and its entry in the list of files."""
    (cache / "reconstructions.png").unlink()
    facts = json.loads((cache / "latents.json").read_text(encoding="utf-8"))
    del facts["files"]["reconstructions.png"]
    (cache / "latents.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep(GOLDEN / f"kept-{__version__}")
