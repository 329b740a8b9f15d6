"""One cache folder for the whole run, so that the kernel is compiled once and nothing of the user's is touched."""

import os
import shutil
import tempfile

import pytest

FOLDER = "FATUI_CACHE_DIR"
_made = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Makes the folder, unless one is given; workers find it in the environment that they inherit."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = config.stash[_made] = tempfile.mkdtemp(prefix="fatui-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Removes what this process made."""
    if _made in config.stash:
        shutil.rmtree(config.stash[_made], ignore_errors=True)
        del os.environ[FOLDER]
