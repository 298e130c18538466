"""Worker processes end with the process that started them."""

import signal
import subprocess
import sys

import psutil

from dit_hf import processes

# A process whose two workers wait for work when it is killed.
PARENT = """
import multiprocessing, runpy, sys, time
from concurrent.futures import ProcessPoolExecutor

start_worker = runpy.run_path(sys.argv[1])["start_worker"]  # importing the package would take seconds
with ProcessPoolExecutor(2, multiprocessing.get_context("fork"), start_worker) as pool:
    list(pool.map(time.sleep, [0.2, 0.2]))
    print("ready", flush=True)
    time.sleep(60)
"""


def test_workers_end_when_their_parent_is_killed():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, processes.__file__], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.send_signal(signal.SIGKILL)
        assert not psutil.wait_procs(workers, timeout=20)[1]
