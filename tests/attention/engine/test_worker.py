"""The worker process and the process that started it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.patience import patient

PARENT = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-m", "attention.engine.worker"], stdin=subprocess.PIPE)
print(worker.pid, flush=True)
time.sleep(600)
"""
OF_OTHERS = 1000
"""The score of a worker for the out-of-memory killer, which it sets as the last before it waits for an assignment."""


def comes_to_hold(holds, seconds=30):
    end = time.monotonic() + patient(seconds)
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.01)
    return held


def has_ended(process):
    """Return whether a process has ended, which it may do between two questions."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="on Linux alone a stopped process ends with its parent")
def test_a_stopped_worker_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        score = Path(f"/proc/{worker.pid}/oom_score_adj")
        assert comes_to_hold(lambda: int(score.read_text()) == OF_OTHERS)
        worker.send_signal(signal.SIGSTOP)
        assert comes_to_hold(lambda: worker.status() == psutil.STATUS_STOPPED)
        os.kill(parent.pid, signal.SIGKILL)
    try:
        assert comes_to_hold(lambda: has_ended(worker))
    finally:
        with suppress(psutil.NoSuchProcess):
            worker.kill()
