"""Readings of the machine and of the engine's process."""

import os
import sys

import pytest

from fatui.telemetry import Telemetry


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse to read an ended process")
def test_an_ended_process_has_no_memory():
    child = os.posix_spawn(sys.executable, [sys.executable, "-S", "-c", ""], os.environ)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        assert Telemetry().read(child).process_bytes is None
    finally:
        os.waitpid(child, 0)
