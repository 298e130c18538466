"""Being told to stop: the step is finished, the run saved, and the process exits with a code that says so."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import torch
from accelerate import PartialState

# sysexits.h's EX_TEMPFAIL: try again later.
EXIT_CODE = 75
# One stop often reaches a process twice at once, by its group and by its launcher.
ECHO_SECONDS = 1.0


class Preempted(SystemExit):
    """The run was told to stop and has been saved; the exit code is 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopSignal:
    """Notices SIGTERM and SIGINT; a second one, a second or more later, ends the process at once."""

    def __init__(self) -> None:
        self._noticed: float | None = None
        state = PartialState()
        self._ranks = state.num_processes
        # Ranks agree through host memory, so that the GPU is not waited for.
        self._group = torch.distributed.new_group(backend="gloo") if self._ranks > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Notice signals while the block runs; in the main thread only, others are sent none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._notice) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_set(self) -> bool:
        """Whether any rank was told to stop; to be called by all of them, after each step."""
        if self._ranks == 1:
            return self._noticed is not None
        flag = torch.tensor(int(self._noticed is not None))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _notice(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noticed is None:
            self._noticed = now
        elif now - self._noticed > ECHO_SECONDS:
            os._exit(128 + number)
