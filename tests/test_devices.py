"""Device, compiler and cores of this machine."""

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import PartialState
from conftest import tiny_pipeline
from safetensors import SafetensorError
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from dit_hf import devices
from dit_hf.devices import available_cpus, compiler_problem, free_memory, group_memory, memory_errors, on_first_rank
from dit_hf.runs import load_pipeline


def test_torch_may_be_built_for_a_missing_gpu(tmp_path, monkeypatch):
    """PyPI's torch for Linux names CUDA as its accelerator, unless it is made to check."""

    def accelerator(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    assert load_pipeline(str(tmp_path / "pipeline")).device.type == "cpu"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of its own code
def test_a_missing_compiler_is_one_line():
    torch.compiler.reset()  # or a kernel that was compiled before is used again
    with fresh_cache(), config.patch({"cpp.cxx": ("no-such-compiler",)}):
        problem = compiler_problem(torch.device("cpu"))
    assert "no-such-compiler" in problem
    assert "\n" not in problem


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to cores")
def test_cores_are_those_that_the_process_may_use():
    cores = os.sched_getaffinity(0)
    assert available_cpus() == len(cores)
    os.sched_setaffinity(0, {min(cores)})  # as SLURM and containers bind a process
    try:
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, cores)


def test_a_full_memory_of_a_cpu_is_one_line():
    with (
        pytest.raises(OSError, match=r"^the memory is full; less helps \(.*allocate") as error,
        memory_errors("less helps"),
    ):
        torch.empty(2**55)
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="size of tensor"), memory_errors("less helps"):
        torch.empty(2) + torch.empty(3)


def test_free_memory_is_below_the_machines():
    place, free = free_memory(torch.device("cpu"))
    assert place == "memory"
    assert 0 < free < psutil.virtual_memory().total


def test_the_limits_of_control_groups_count(tmp_path):
    """Of both versions, of groups further up, and without the files that the kernel keeps in free memory."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("4:cpu,cpuacct:/\n3:memory:/jobs/7\n0::/user/me\n")
    for group, limit, used, in_use, cached in (
        ("memory/jobs", "limit_in_bytes", "usage_in_bytes", 500, 100),
        ("user/me", "max", "current", 700, 0),
    ):
        folder = tmp_path / "sys" / "fs" / "cgroup" / group
        folder.mkdir(parents=True)
        (folder / f"memory.{limit}").write_text("1000\n")
        (folder / f"memory.{used}").write_text(f"{in_use}\n")
        (folder / "memory.stat").write_text(f"anon 1\nactive_file {cached}\ninactive_file {cached}\n")
    (tmp_path / "sys" / "fs" / "cgroup" / "memory.max").write_text("max\n")
    assert sorted(group_memory(tmp_path)) == [(1000, 300), (1000, 700)]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills what takes too much memory")
def test_a_full_memory_is_an_error_before_linux_kills_the_process():
    """Of many small allocations too, each of which would fit; the limit ends with the block."""
    code = """
import sys, torch, types
sys.modules["dit_hf"] = package = types.ModuleType("dit_hf")  # importing the package would take seconds
package.__path__ = sys.argv[1:]
from dit_hf import devices
devices.free_memory = lambda device: ("memory", 200 * 2**20)
torch.zeros(2**26)  # before: as much again is fine
kept = []
try:
    with devices.memory_errors("less helps"):
        while len(kept) < 100:
            kept.append(torch.zeros(2**22))  # 16 MiB
except OSError as error:
    print(len(kept), error)
torch.zeros(2**28)
"""
    command = [sys.executable, "-c", code, os.path.dirname(devices.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, message = done.stdout.split(" ", 1)
    assert 5 < int(count) < 13
    assert message.startswith("the memory is full; less helps (")


class OddError(ValueError):
    """An error that cannot be pickled and restored, as some libraries have."""

    def __init__(self, code: int, path: str):
        super().__init__(f"{path}: code {code}")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (IsADirectoryError(21, "Is a directory", "training_log.csv"), IsADirectoryError),
        (SafetensorError("No space left on device (os error 28)"), SafetensorError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
        (json.JSONDecodeError("Expecting value", "[", 1), json.JSONDecodeError),
        (OddError(3, "a.json"), ValueError),
    ],
)
def test_an_error_of_the_first_rank_reaches_the_others_as_what_it_is(monkeypatch, error, kind):
    """Otherwise it would not be the one line that it is on one rank."""

    def journey(objects: list) -> list:
        return pickle.loads(pickle.dumps(objects))

    def fail() -> None:
        raise error

    monkeypatch.setattr(devices, "broadcast_object_list", journey)
    monkeypatch.setattr(devices, "PartialState", lambda: SimpleNamespace(is_main_process=True, num_processes=2))
    with pytest.raises(kind) as caught:
        on_first_rank(fail)
    assert type(caught.value) is kind
    assert str(caught.value) == str(error)


def test_the_first_rank_gets_the_result():
    PartialState(cpu=True)
    assert on_first_rank(lambda: 5) == 5
