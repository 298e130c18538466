"""The machine: accelerator and its memory, compiler, CPU cores, and what its first rank does for all."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .storage import first_line

T = TypeVar("T")

# Share of the free memory that may be allocated before it counts as full.
FREE_SHARE = 0.95


def default_device() -> torch.device:
    """Return the accelerator of this machine (CUDA, MPS, XPU, ...), or the CPU where there is none."""
    # check_available, because a torch built for CUDA names CUDA on a machine without a GPU too.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Turn the error for a full memory, a GPU's or a CPU's, into one line that gives `advice`: what needs less of it.

    Raises:
        OSError: if the memory is full.
    """
    try:
        with _refused_when_full():
            yield
    except torch.OutOfMemoryError as error:
        raise OSError(f"the GPU's memory is full; {advice} ({first_line(error)})") from error
    except MemoryError as error:
        raise OSError(f"the memory is full; {advice}") from error
    except RuntimeError as error:
        # torch has no class for it on a CPU.
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise OSError(f"the memory is full; {advice} ({first_line(error)})") from error


@contextlib.contextmanager
def _refused_when_full() -> Iterator[None]:
    """Let Linux refuse a CPU's full memory, which is an error here, instead of killing the process without a word."""
    device = default_device()
    if sys.platform != "linux" or device.type != "cpu":
        yield
        return
    import resource

    _, free = free_memory(device)
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = psutil.Process().memory_info().data + int(FREE_SHARE * (free or 0))
    if before == resource.RLIM_INFINITY or limit < before:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


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


def free_memory(device: torch.device) -> tuple[str, int | None]:
    """Return the name of the memory that a training on `device` uses, and its free bytes; None if they are unknown."""
    if device.type == "cuda":
        # What this process has cached counts as free.
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return "GPU memory", free - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return "memory", None
    free = psutil.virtual_memory().available
    # The limits of containers and job schedulers, and one of the process (ulimit -v).
    for limit, used in group_memory():
        free = min(free, max(0, limit - used))
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
        if address_space != resource.RLIM_INFINITY:
            free = min(free, address_space - psutil.Process().memory_info().vms)
    return "memory", free


def group_memory(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes of the control groups around this process, of version 1 and 2, below `root`."""
    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        limit, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        # A container may see only its own group, as the top one.
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            texts = [_read(folder / f"memory.{name}") for name in (limit, used)]
            if folder.is_relative_to(top) and all(text.isdigit() for text in texts):
                # Files in memory make way for allocations.
                cached = re.findall(r"^(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                yield int(texts[0]), int(texts[1]) - sum(map(int, cached))


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""


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


def on_first_rank(work: Callable[[], T]) -> T | None:
    """Call `work` on the first rank while the others wait; if it fails, all ranks raise its error.

    Otherwise the others would wait for the first one in their next collective operation. Call it on all ranks.

    Returns:
        What `work` returned, on the first rank; None on the others.
    """
    result: T | None = None
    failed: list[Exception | None] = [None]
    if PartialState().is_main_process:
        try:
            result = work()
        except Exception as error:
            if PartialState().num_processes == 1:
                raise
            failed = [_picklable(error)]
    (cause,) = broadcast_object_list(failed)
    if cause is not None:
        raise cause
    return result


def _picklable(error: Exception) -> Exception:
    """Return an error that other ranks receive as it is, or else one of its nearest kind with the same text."""
    with contextlib.suppress(Exception):  # classes of other libraries fail in ways of their own
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is type(error) and str(copy) == str(error):
            return error
    for kind in (ValueError, OSError):
        if isinstance(error, kind):
            return kind(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
