"""The real app with the real engine in a real terminal, tmux."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from fatui import storage
from fatui.report.export import to_json
from fatui.storage.history import RunHistory
from tests.support.patience import patient

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")]


class Terminal:
    def __init__(self, socket, *arguments, size=(120, 40)):
        self._socket = str(socket)
        environment = [f"{name}={os.environ[name]}" for name in os.environ if name.startswith("XDG_")]
        command = ["env", *environment, f"PYTHONPATH={ROOT}", sys.executable, "-m", "fatui", *arguments]
        self._tmux("new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), *command)
        self.process = psutil.Process(int(self._tmux("display", "-p", "#{pane_pid}")))

    def _tmux(self, *arguments):
        # Spelt out, because readline puts COLUMNS and LINES where os.environ does not show them.
        environment = {name: text for name, text in os.environ.items() if name not in ("COLUMNS", "LINES")}
        command = ["tmux", "-S", self._socket, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=patient(20), env=environment, check=False
        ).stdout

    def seen(self):
        return self._tmux("capture-pane", "-p")

    def press(self, *keys):
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(0.15)

    def type(self, text):
        self._tmux("send-keys", "-l", text)
        time.sleep(0.3)

    def wait_for(self, text, seconds=30):
        return self.until(lambda: text in self.seen(), seconds, f"'{text}' on the screen")

    def until(self, holds, seconds=30, what="it"):
        end = time.monotonic() + patient(seconds)
        while time.monotonic() < end:
            if holds():
                return
            time.sleep(0.1)
        raise AssertionError(f"no {what} in {seconds} s:\n{self.seen()}")

    def worker(self):
        """The engine's process, or None."""
        if not self.process.is_running():
            return None
        for child in self.process.children(recursive=True):
            if "attention.engine.worker" in " ".join(child.cmdline()):
                return child
        return None

    def close(self):
        self._tmux("kill-server")


@pytest.fixture
def open_terminal(tmp_path):
    opened = []

    def open_one(*arguments, **options):
        opened.append(Terminal(tmp_path / f"tmux{len(opened)}", *arguments, **options))
        return opened[-1]

    yield open_one
    for terminal in opened:
        terminal.close()


def test_a_person_runs_saves_loads_exports_and_quits(open_terminal, tmp_path):
    terminal = open_terminal("quick")
    terminal.wait_for("MLX 0")
    terminal.press("Tab", "Right")
    terminal.wait_for("quick, changed")
    terminal.press("Left", "r")
    terminal.wait_for("all cases complete", 60)
    terminal.wait_for("baseline", 5)
    terminal.until(lambda: len(RunHistory().runs()) == 1, 10, "run in the history")
    terminal.press("w")
    terminal.wait_for("Save as a preset")
    terminal.type("my-quick")
    terminal.press("Enter")
    terminal.wait_for("my-quick")
    terminal.press("p")
    terminal.wait_for("1 of your own")
    terminal.press("Enter")
    terminal.wait_for("Workload · my-quick")
    terminal.press("e")
    terminal.wait_for("Export the run")
    terminal.type("out")
    terminal.press("Enter")
    terminal.until((tmp_path / "out.log").exists, 10, "export")
    terminal.press("q")
    terminal.until(lambda: not terminal.process.is_running(), 10, "end")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["cases"][0]["rows"][0]["implementation"] == "baseline"
    assert report == json.loads(to_json(RunHistory().get("last")))
    assert "my-quick" in (tmp_path / "out.svg").read_text()
    assert "case 1 of 1 complete" in (tmp_path / "out.log").read_text()
    preset = tomllib.loads((storage.own_presets() / "my-quick.toml").read_text())
    assert preset["workload"]["seq"] == 128


def test_closing_the_terminal_ends_the_run_and_keeps_its_rows(open_terminal):
    terminal = open_terminal("seed-table", "--run")
    terminal.wait_for("noise floor", 60)
    app, worker = terminal.process, terminal.worker()
    terminal.close()
    psutil.wait_procs([app, worker], timeout=patient(5))
    assert not app.is_running() and not worker.is_running()
    assert RunHistory().runs()[0].interrupted


def test_a_killed_engine_costs_a_row_and_the_run_goes_on(open_terminal):
    terminal = open_terminal("seed-table", "--run")
    terminal.wait_for("noise floor", 60)
    terminal.worker().send_signal(signal.SIGKILL)
    terminal.wait_for("see the log", 20)
    terminal.wait_for("case 2 of 6 ·", 60)
    terminal.press("x")
    terminal.until(lambda: len(RunHistory().runs()) == 1, 10, "run in the history")
    statuses = [row.status for row in RunHistory().get("last").cases[0].rows]
    assert statuses.count("failed") == 1 and "ok" in statuses


def test_stop_ends_the_engine_within_a_second(open_terminal):
    terminal = open_terminal("seed-table", "--run")
    terminal.wait_for("noise floor", 60)
    worker = terminal.worker()
    began = time.monotonic()
    terminal.press("x")
    psutil.wait_procs([worker], timeout=patient(20))
    assert time.monotonic() - began < patient(1.2)  # with what tmux takes to pass the key on
    terminal.wait_for("stopped", 5)


def test_the_terminal_may_change_its_size_at_any_moment(open_terminal):
    terminal = open_terminal("seed-table", "--run")
    for width, height in ((80, 24), (40, 10), (200, 60), (61, 16), (120, 40)):
        terminal._tmux("resize-window", "-x", str(width), "-y", str(height))
        time.sleep(0.7)
        assert terminal.process.is_running()
        if width == 40:
            terminal.wait_for("fatui needs 60 x 16", 5)
    terminal.wait_for("case 2 of 6 ·", 60)
