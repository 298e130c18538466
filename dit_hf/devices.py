"""Capabilities of the machine: accelerator and its memory, compiler, CPU cores."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

from .storage import first_line


def default_device() -> torch.device:
    """Return the accelerator of this machine (CUDA, MPS, XPU, ...), or the CPU where there is none."""
    # check_available, because a torch built for CUDA names CUDA on a machine without a GPU too.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn torch's error for a full GPU memory into one line that gives `advice`: what needs less of it.

    Raises:
        OSError: if the memory is full.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OSError(f"the GPU's memory is full; {advice} ({first_line(error)})") from error


def compiler_problem(device: torch.device) -> str | None:
    """Return in one line why torch.compile does not work on `device`, or None if it does, by compiling one kernel."""
    # Only an attempt shows whether a part is missing (Triton, a C compiler, the headers of Python).
    try:
        torch.compile(_one_kernel, fullgraph=True)(torch.ones(8, device=device))
    except RuntimeError as error:  # the base class of the errors of Inductor and Dynamo
        # Dynamo's own message begins with the name of its backend; the cause is inside.
        return first_line(getattr(error, "inner_exception", error))
    return None


def _one_kernel(x: torch.Tensor) -> torch.Tensor:
    return 2 * x + 1


def available_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> str:
    """Return the most memory that this process and the largest process it started have taken, and the GPU's."""
    taken = []
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        unit = 1 if sys.platform == "darwin" else 1024
        taken.append(f"{max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit / 1e9:.1f} GB of memory")
    if torch.cuda.is_available():
        taken.append(f"{torch.cuda.max_memory_reserved() / 1e9:.1f} GB of GPU memory")
    return ", ".join(taken)
