"""What a benchmark ran on."""

import platform

import torch


def machine() -> str:
    """The GPU's name, or the processor's and how many threads torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
