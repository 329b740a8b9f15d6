"""No test reaches the user's own folders, in its process or in one that it starts."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from attention.core.files import cache_folder
from fatui import storage

ROOT = Path(__file__).parents[1]
FOLDERS = "from fatui import storage; print(storage.config_dir(), storage.data_dir(), storage.own_presets(), sep='\\n')"


def is_the_users(folder: Path) -> bool:
    home = Path(pwd.getpwuid(os.getuid()).pw_dir).resolve()
    session = Path(os.environ["FATUI_TESTS_HOME"]).resolve()
    return folder.resolve().is_relative_to(home) and not folder.resolve().is_relative_to(session)


@pytest.mark.parametrize("folder", [storage.config_dir, storage.data_dir, storage.own_presets, Path.home])
def test_a_test_sees_no_folder_of_the_user(folder):
    assert not is_the_users(folder())


def test_without_xdg_variables_folders_are_the_sessions(monkeypatch):
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.delenv(f"XDG_{name}_HOME")
    assert not is_the_users(storage.config_dir())
    assert not is_the_users(storage.data_dir())


def test_kernels_are_cached_outside_of_the_users_folder(monkeypatch):
    monkeypatch.delenv("FATUI_CACHE_DIR")
    assert not is_the_users(cache_folder())


def test_a_process_that_a_test_starts_sees_none_either():
    printed = subprocess.check_output([sys.executable, "-c", FOLDERS], cwd=ROOT, text=True)
    assert len(printed.splitlines()) == 3
    assert not any(map(is_the_users, map(Path, printed.splitlines())))
