"""Cache folders with compiled objects, where a test links a library of its own."""

import shutil

import pytest

from attention.kernels import cpu
from attention.kernels.cpu import build, library


@pytest.fixture
def fresh(monkeypatch):
    """Simulate a process that has not loaded the kernel yet."""
    monkeypatch.setattr(library, "_loaded", None)
    monkeypatch.setattr(library, "_parts", frozenset())
    monkeypatch.setattr(cpu, "_module", None)


@pytest.fixture(scope="session")
def objects(compiled_kernel):
    """The compiled objects, made once where the cache folder has only the library."""
    tools = build.find()
    return [build._compile(command, text, tools) for command, text in build._jobs(tools)]


@pytest.fixture
def own_folder(fresh, objects, tmp_path, monkeypatch):
    """A cache folder with compiled objects and nothing linked, so that a test links quickly."""
    (tmp_path / "kernels").mkdir(mode=0o700)
    for path in objects:
        shutil.copy2(path, tmp_path / "kernels")
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"
