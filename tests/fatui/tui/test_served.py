"""The app in a browser, served by textual-serve."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from fatui.cli.main import app_request
from fatui.rank_launch import free_ports
from fatui.storage.history import RunHistory
from tests.support import sshd
from tests.support.patience import patient

ROOT = sshd.ROOT
SERVE = """
import sys
from textual_serve.server import Server
Server(sys.argv[1], host="127.0.0.1", port=int(sys.argv[2])).serve()
"""
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
MISSING = [name for name in ("textual_serve", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if BROWSER else ["chromium"]


def test_a_served_app_needs_no_terminal(monkeypatch):
    monkeypatch.setenv("TEXTUAL_DRIVER", "textual.drivers.web_driver:WebDriver")
    assert app_request(["quick", "--run"]).run


@pytest.fixture
def served(tmp_path):
    """Serve the app, and yield the address."""
    (port,) = free_ports(1)
    command = [sys.executable, "-c", SERVE, f"{sys.executable} -m fatui quick", str(port)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}/"
    try:
        _until(lambda: _answers(address))
        yield address
    finally:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            each.kill()
        process.wait()


def _answers(address):
    try:
        return urllib.request.urlopen(address, timeout=1).status == 200
    except OSError:
        return False


def _until(holds, seconds=90):
    end = time.monotonic() + patient(seconds)
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_a_run_in_chromium_is_kept_and_a_closed_tab_ends_one(served):
    from playwright.sync_api import sync_playwright

    seen = []

    def shown(text):
        return any(text.encode() in frame for frame in seen)

    def workers():
        mine = psutil.Process().children(recursive=True)
        return [each for each in mine if "attention.engine.worker" in _command(each)]

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1300, "height": 800})
        page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: seen.append(_bytes(frame))))
        page.goto(served)

        def until(holds):
            end = time.monotonic() + patient(90)
            while not holds():
                assert time.monotonic() < end
                page.wait_for_timeout(100)

        until(lambda: shown("Implementations") and shown("manual"))
        page.mouse.click(900, 650)
        page.keyboard.press("r")
        until(lambda: shown("done, "))
        assert len(RunHistory().runs()) == 1
        page.keyboard.press("r")
        until(workers)
        page.close()
        _until(lambda: not workers())
        browser.close()


def _bytes(frame):
    return frame if isinstance(frame, bytes) else frame.encode()


def _command(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
