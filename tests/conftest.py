"""One cache folder for the whole session, so that the kernel is compiled once and the user's files are untouched."""

import os
import shutil
import tempfile

import pytest

FOLDER = "FATUI_CACHE_DIR"
_made = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Create the folder, unless one is given; workers inherit it through the environment."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = config.stash[_made] = tempfile.mkdtemp(prefix="fatui-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the folder that this process created."""
    if _made in config.stash:
        shutil.rmtree(config.stash[_made], ignore_errors=True)
        del os.environ[FOLDER]
