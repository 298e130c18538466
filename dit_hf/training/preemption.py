"""Graceful shutdown on SIGTERM, SIGINT, SIGHUP and SIGUSR1: the step is finished, the run saved, the exit code 75."""

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

# EX_TEMPFAIL of sysexits.h, "try again later": a job script can tell a preempted run from a failed one.
EXIT_CODE = 75
# One shutdown often sends two signals at once, to the process group and through the launcher. A second signal within
# this time is taken for that and ignored.
ECHO_SECONDS = 1.0
# Of launchers and Ctrl-C, of a terminal that closes, and of schedulers that warn.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Preempted(SystemExit):
    """Exit after a graceful shutdown, when the run is saved; the exit code is 75."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class StopSignal:
    """Remembers a signal to stop; a second signal, more than a second later, ends the process at once.

    To be created on all ranks.
    """

    def __init__(self) -> None:
        self._received_at: float | None = None  # on time.monotonic's clock
        self._ranks = PartialState().num_processes
        # Ranks agree by gloo, through host memory: NCCL would wait for the GPU after every step.
        self._group = torch.distributed.new_group(backend="gloo") if self._ranks > 1 else None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Remember signals while the block runs, instead of the handlers that were there before."""
        # Python allows handlers in the main thread only, and runs them there.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # One that the starter had ignored (by `nohup`, or a script's `&`) stays so: it is meant for others.
        numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def is_set(self) -> bool:
        """Check whether any rank has received a signal; call it on all ranks, after each step."""
        if self._ranks == 1:
            return self._received_at is not None
        # A signal may reach one rank only, or two ranks at different steps, but all must stop after the same step.
        flag = torch.tensor(int(self._received_at is not None))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
        elif now - self._received_at > ECHO_SECONDS:
            # Not sys.exit: the main thread may be stuck in a call that never returns to raise it.
            os._exit(128 + number)
