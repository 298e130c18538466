"""Name of the machine that a benchmark ran on."""

import platform
import re
from pathlib import Path

import torch

PROCESSORS = Path("/proc/cpuinfo")  # on Linux platform.processor() is often empty


def machine() -> str:
    """Return the GPU's name, or the processor's and the number of torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    named = re.search(r"model name\s*: (.+)", PROCESSORS.read_text()) if PROCESSORS.is_file() else None
    name = named[1] if named else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"
