"""Settings of a session: no folder of the user's; one cache folder, so that the kernel is compiled once, from the start
of a run of all tests; little garbage collection; no compiler of graphs; samples of large products of parameters; a
summary of tests that take too long.

Compiled objects outlive the session, in pytest's own cache folder; their names are hashes of what they depend on.
"""

import contextlib
import gc
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.support.sampling import samples

gc.disable()  # until tests are collected: it would look at all that was imported again and again
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two workers' BLAS threads wait for each other, spinning

FOLDER = "FATUI_CACHE_DIR"
FLAGS = "FATUI_KERNEL_CXXFLAGS"
QUICK_FLAGS = "-Og"
"""Flags of the CPU kernel in the default run, which compile it faster."""
DEFAULT_RUN = "not slow"
"""The selection of the default run, in pyproject.toml."""
COMPILING = ("compiles", "slow", "gpu")
"""Markers of tests in which `mx.compile` compiles."""
USER_FOLDERS = {
    "HOME": "",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "XDG_CACHE_HOME": "cache",
    "XDG_STATE_HOME": "state",
}
"""Variables by which programs find the user's folders, and where they point in the session's own home."""
KEPT_FOLDERS = ("MPLCONFIGDIR",)
"""Variables of folders that outlive the session: without its list, matplotlib looks for fonts for a second."""
HOME_OF_SESSION = "FATUI_TESTS_HOME"
LEFT_OUT = re.compile(r"^pytestmark = \[?\s*pytest\.mark\.(slow|gpu)\b", re.MULTILINE)
"""How a module says that all its tests are slow, or need a GPU: its first mark."""
MAX_CPU_S = 3.0
"""Seconds of CPU time, child processes included, above which a test of the default run is named in the summary."""
CPU_S = "cpu_s"
TESTS = Path(__file__).parent
_made = pytest.StashKey[list[str]]()
_module = pytest.StashKey[Path]()
_compilation = pytest.StashKey[subprocess.Popen[bytes]]()


def _copy_objects(source: Path, to: Path) -> None:
    """Copy compiled objects that a folder does not have yet."""
    to.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in source.glob("*.o"):
        if not (to / path.name).exists():
            shutil.copy2(path, to / path.name)


def _kept(config: pytest.Config, name: str) -> Path | None:
    cache = getattr(config, "cache", None)
    return cache.mkdir(name) if cache else None


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run asynchronous tests and fixtures with asyncio, which Textual needs."""
    return "asyncio"


def _starts_workers(config: pytest.Config) -> bool:
    return bool(getattr(config.option, "numprocesses", None)) and "PYTEST_XDIST_WORKER" not in os.environ


def _set_examples(default_run: bool) -> None:
    """Set Hypothesis's number of examples, the same ones each time.

    By default without the constants that it looks for in the sources of all imported modules: that takes each worker
    as long as many tests, and the examples would depend on what a worker has imported.
    """
    from hypothesis import settings

    settings.register_profile("fatui", deadline=None, max_examples=30 if default_run else 60, derandomize=True)
    settings.load_profile("fatui")
    if default_run:
        with contextlib.suppress(ImportError, AttributeError):  # not in every version
            from hypothesis.internal.conjecture import providers

            none = providers._local_constants
            providers._get_local_constants = lambda: none


def pytest_configure(config: pytest.Config) -> None:
    """Make the session's folders; workers, and processes that tests start, find them in their environment.

    A run of all tests compiles the CPU kernel while its workers collect, and run tests that do not need it.
    """
    default_run = config.option.markexpr == DEFAULT_RUN
    if default_run:
        os.environ.setdefault(FLAGS, QUICK_FLAGS)
    if not _starts_workers(config):
        _set_examples(default_run)
    made = config.stash.setdefault(_made, [])
    if HOME_OF_SESSION not in os.environ:
        home = os.environ[HOME_OF_SESSION] = tempfile.mkdtemp(prefix="fatui-tests-home-")
        made.append(HOME_OF_SESSION)
        for variable, folder in USER_FOLDERS.items():
            os.environ[variable] = str(Path(home, folder))
        if kept := _kept(config, "others"):
            for variable in KEPT_FOLDERS:
                os.environ.setdefault(variable, str(kept))
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="fatui-tests-")
        made.append(FOLDER)
        if kept := _kept(config, "kernels"):
            _copy_objects(kept, Path(os.environ[FOLDER]) / "kernels")
    option, source = config.option, config.args_source
    whole = source is pytest.Config.ArgsSource.TESTPATHS and not (option.collectonly or option.keyword)
    if _starts_workers(config) and whole:
        program = "from attention.kernels import cpu; cpu.availability()[0] and cpu.load()"
        config.stash[_compilation] = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=config.rootpath,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out of the default run the modules of which it takes no test, unless files are named.

    Importing them, rewriting their assertions and making their tests took each worker a tenth of its collection.
    """
    name = collection_path.name
    if config.option.markexpr != DEFAULT_RUN or not (name.startswith("test_") and name.endswith(".py")):
        return None
    if any(".py" in argument for argument in config.args):
        return None
    import mlx.core as mx

    found = LEFT_OUT.search(collection_path.read_text(encoding="utf-8"))
    return True if found and (found[1] == "slow" or not mx.cuda.is_available()) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Collect folders backwards in every other worker, so that no two rewrite the assertions of the same file."""
    report = yield
    if int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 2 and isinstance(collector, pytest.Dir):
        report.result.reverse()
    return report


def _mark_unsampled(items: list[pytest.Item]) -> None:
    """Mark as slow what is thorough, and what `sampled(share)` leaves out of a test's products of parameters."""
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.slow(compiles=False))
    sampled = {
        item.nodeid: (item, mark.args[0])
        for item in items
        if (mark := item.get_closest_marker("sampled")) and not item.get_closest_marker("slow")
    }
    chosen = samples((name, share, item.callspec.params) for name, (item, share) in sampled.items())
    for name, (item, _) in sampled.items():
        if name not in chosen:
            item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sample products, and leave out tests that need a CUDA device where there is none; skipping them takes seconds."""
    import mlx.core as mx

    # the same in all workers; what needs no compiled kernel first, and no long file last: one worker would wait for it
    first = {"fatui": 0, "fuzz": 1}
    items.sort(key=lambda item: (first.get(item.path.relative_to(TESTS).parts[0], 2), item.path))
    _mark_unsampled(items)
    if not mx.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)


def pytest_collection_finish() -> None:
    """Collect garbage rarely, and never what collection made: it took a fifth of the app's tests."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Collect garbage once; pytest does so five times, in case an object's end raises an error, which takes seconds."""
    gc.collect()
    gc.freeze()


def _compiles(item: pytest.Item) -> bool:
    """Return whether `mx.compile` compiles in a test: what is slow by being thorough alone runs as by default."""
    return any(mark.name in COMPILING and mark.kwargs.get("compiles", True) for mark in item.iter_markers())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let `mx.compile` compile only in tests marked for it: on a CPU each graph takes the C++ compiler half a second.

    Elsewhere compiled functions run uncompiled, also in processes that a test starts. What an earlier module left is
    kept from the garbage collector, which tests of memory call often.
    """
    import mlx.core as mx

    if item.config.stash.get(_module, None) != item.path:
        item.config.stash[_module] = item.path
        gc.collect()
        gc.freeze()
    if _compiles(item):
        mx.enable_compile()
        os.environ.pop("MLX_DISABLE_COMPILE", None)
    else:
        mx.disable_compile()
        os.environ["MLX_DISABLE_COMPILE"] = "1"


def _cpu_s() -> float:
    """Return the CPU time of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Keep the CPU time of a test, without that of its fixtures, for the summary."""
    began = _cpu_s()
    try:
        return (yield)
    finally:
        item.user_properties.append((CPU_S, _cpu_s() - began))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the tests that take too long for the default run."""
    long = [
        (dict(report.user_properties)[CPU_S], report.nodeid)
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if report.when == "call" and "slow" not in report.keywords and "gpu" not in report.keywords
        if dict(report.user_properties).get(CPU_S, 0.0) > MAX_CPU_S
    ]
    if long:
        terminalreporter.section(f"tests of more than {MAX_CPU_S:g} s of CPU time, to be shortened or marked slow")
    for seconds, name in sorted(long, reverse=True):
        terminalreporter.line(f"{seconds:5.1f} s  {name}")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Keep the objects for the next run, and remove the folders that this process made."""
    made = config.stash.get(_made, [])
    if compilation := config.stash.get(_compilation, None):
        compilation.kill()  # it has ended, unless the tests were interrupted
        compilation.wait()
    if FOLDER in made:
        kept, used = _kept(config, "kernels"), Path(os.environ[FOLDER]) / "kernels"
        if kept and used.is_dir():
            shutil.rmtree(kept)
            _copy_objects(used, kept)
    for variable in made:
        shutil.rmtree(os.environ.pop(variable), ignore_errors=True)
