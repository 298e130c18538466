"""What the machine at hand can do."""

from __future__ import annotations

import os

import torch


def compiler_problem(device: torch.device) -> str | None:
    """Say in a line why torch.compile does not work on `device`; None where it does. It is tried with one kernel."""
    # Which parts are missing (Triton, a C compiler, headers of Python) shows nowhere but in an attempt.
    try:
        torch.compile(_one_kernel, fullgraph=True)(torch.ones(8, device=device))
    except RuntimeError as error:  # of Inductor and of Dynamo alike
        return str(error).strip().splitlines()[0]
    return None


def _one_kernel(x: torch.Tensor) -> torch.Tensor:
    return 2 * x + 1


def available_cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
