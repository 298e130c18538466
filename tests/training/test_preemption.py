import os
import signal
import subprocess
import sys
import time

from dit_hf.training import preemption
from dit_hf.training.preemption import StopSignal

# Prints when it listens; the step under way never ends.
STUCK = """
import runpy, sys, time
stop = runpy.run_path(sys.argv[1])["StopSignal"]()  # importing the package would take seconds
with stop.listening():
    print("listening", flush=True)
    while True:
        time.sleep(0.05)
        if stop.is_set():
            print("noticed", flush=True)
            while True:
                time.sleep(0.05)
"""


def test_a_second_signal_ends_the_process_at_once_and_an_echo_of_the_first_does_not():
    command = [sys.executable, "-c", STUCK, preemption.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "noticed\n"
        process.send_signal(signal.SIGTERM)  # a launcher and its group often both send it
        time.sleep(1.5)
        assert process.poll() is None
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=30) == 128 + signal.SIGHUP


def test_schedulers_and_closed_terminals_stop_it_and_an_ignored_signal_does_not():
    """By the starter: nohup ignores SIGHUP, a script's & SIGINT."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for number, stops in [(signal.SIGHUP, False), (signal.SIGUSR1, True), (signal.SIGINT, True)]:
            stop = StopSignal()
            with stop.listening():
                os.kill(os.getpid(), number)
                assert stop.is_set() == stops
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
