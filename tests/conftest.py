"""Settings of a session: one cache folder, so that the kernel is compiled once; little garbage collection; no compiler.

Compiled objects outlive the session, in pytest's own cache folder; their names are hashes of what they depend on.
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two workers' BLAS threads wait for each other, spinning

FOLDER = "FATUI_CACHE_DIR"
COMPILING = ("compiles", "slow", "gpu")
"""Markers of tests in which `mx.compile` compiles."""
_made = pytest.StashKey[str]()


def _copy_objects(source: Path, to: Path) -> None:
    """Copy compiled objects that a folder does not have yet."""
    to.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in source.glob("*.o"):
        if not (to / path.name).exists():
            shutil.copy2(path, to / path.name)


def _kept(config: pytest.Config) -> Path | None:
    cache = getattr(config, "cache", None)
    return cache.mkdir("kernels") if cache else None


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests and fixtures with asyncio, which Textual needs."""
    return "asyncio"


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder, unless one is given; workers find it in the environment that they inherit."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = config.stash[_made] = tempfile.mkdtemp(prefix="fatui-tests-")
        kept = _kept(config)
        if kept:
            _copy_objects(kept, Path(config.stash[_made]) / "kernels")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that need a CUDA device where there is none; skipping a thousand takes seconds."""
    import mlx.core as mx

    if not mx.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)


def pytest_collection_finish() -> None:
    """Collect garbage rarely, and never what collection made: it took a fifth of the app's tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let `mx.compile` compile only in tests marked for it: on a CPU each graph takes the C++ compiler half a second.

    Elsewhere compiled functions run uncompiled, also in processes that a test starts.
    """
    import mlx.core as mx

    if any(map(item.get_closest_marker, COMPILING)):
        mx.enable_compile()
        os.environ.pop("MLX_DISABLE_COMPILE", None)
    else:
        mx.disable_compile()
        os.environ["MLX_DISABLE_COMPILE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    """Keep the objects for the next run, and remove the folder that this process made."""
    if _made in config.stash:
        kept, used = _kept(config), Path(config.stash[_made]) / "kernels"
        if kept and used.is_dir():
            shutil.rmtree(kept)
            _copy_objects(used, kept)
        shutil.rmtree(config.stash[_made], ignore_errors=True)
        del os.environ[FOLDER]
