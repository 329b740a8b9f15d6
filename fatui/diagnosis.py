"""What this machine has for fatui, what is missing, and how to fix it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from msgspec import Struct

from attention import implementations
from attention.core.errors import KernelUnavailable, NoBackendError
from attention.core.files import home
from attention.core.workload import Workload
from attention.engine.peaks import measure_peaks
from attention.measure.device import Device, blas, installed_version, probe
from attention.measure.energy import POWERCAP, energy_counter
from fatui import REINSTALL_ENGINE, __version__, formatting, storage
from fatui.report.document import counted
from fatui.storage import presets, settings
from fatui.storage.history import HistoryError, RunHistory
from fatui.trust import PRELOAD

BACKENDS: Final = ("mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
COMPILERS: Final = {
    "c++": "the CPU kernel",
    "nvcc": "your own CUDA programs; the CUDA kernels compile with NVRTC, without it",
    "xcrun": "Apple's tools; the Metal kernel compiles without them",
}
TYPICAL: Final = Workload(seq=1024, mask="causal")
"""The shape whose route decides whether an implementation is available."""
MATMUL_SIZE: Final = 768


class DiagnosisItem(Struct, frozen=True, kw_only=True):
    """One result of the diagnosis."""

    topic: str
    text: str
    advice: str | None = None
    """What to do, if something should be done."""


def diagnose(measure: bool = True) -> Iterator[DiagnosisItem]:
    """Yield the findings, the slow ones last.

    Args:
        measure: whether to take half a second to measure the machine's peaks.
    """
    try:
        device = probe()
    except NoBackendError as error:
        device = None
        yield DiagnosisItem(topic="backend", text="none", advice=formatting.problem_text(error))
    yield from _packages()
    if device:
        yield from _machine(device)
        yield from _implementations(device)
        if device.backend == "metal":
            yield _metal_kernels()
    yield from _compilers()
    yield from _folders()
    if device and measure:
        yield from _speed(device)


def _packages() -> Iterator[DiagnosisItem]:
    builds = [name for name in (*BACKENDS, "mlx-metal") if installed_version(name)]
    core = installed_version("mlx")
    text = f"{core or 'not installed'}, " + (
        " and ".join(f"{name} {installed_version(name)}" for name in builds) or "no backend"
    )
    both = [name for name in builds if name in BACKENDS]
    advice = None
    if len(both) > 1:
        removal = f"pip uninstall {' '.join((*both, 'mlx'))}"
        advice = f"two backends overwrite each other's library: {removal}, then install one extra"
    elif not core:
        advice = formatting.INSTALL_BACKEND
    yield DiagnosisItem(topic="MLX", text=text, advice=advice)
    if foreign := installed_version("attention"):
        yield DiagnosisItem(
            topic="attention",
            text=f"another project's distribution of this name is installed, {foreign}",
            advice=f"its files and fatui's share a folder: {REINSTALL_ENGINE}",
        )


def _machine(device: Device) -> Iterator[DiagnosisItem]:
    yield DiagnosisItem(topic="backend", text=device.backend)
    cores = f", {counted(device.cores, 'core')}" if device.backend == "cpu" else ""
    yield DiagnosisItem(
        topic="device", text=f"{device.name}{cores}" + (f", {device.architecture}" if device.architecture else "")
    )
    free = formatting.size(device.available_bytes)
    yield DiagnosisItem(topic="memory", text=f"{formatting.size(device.memory_bytes)}, of which {free} free")
    yield _energy(device)


def _energy(device: Device) -> DiagnosisItem:
    """Report whether rows have the energy of a token."""
    if energy_counter(device) is not None:
        return DiagnosisItem(topic="energy", text="counted by the device: rows have the energy of a token")
    where, advice = "", None
    if sys.platform == "darwin":
        advice = "pip install 'fatui[energy]'"
    elif device.backend == "cuda":
        advice = "pip install nvidia-ml-py"
    else:
        where = f"; {POWERCAP} is missing, or for root alone"
    return DiagnosisItem(topic="energy", text=f"no counter can be read{where}: rows have no energy", advice=advice)


def _implementations(device: Device) -> Iterator[DiagnosisItem]:
    for name in implementations.NAMES:
        text, advice = _availability(name, device)
        yield DiagnosisItem(topic=name, text=text, advice=advice)


def _availability(name: str, device: Device) -> tuple[str, str | None]:
    if name == "torch" and importlib.util.find_spec("torch") is None:
        return "not available: torch is not installed", "pip install 'fatui[peers]'"
    try:
        route = implementations.load_implementation(name).route(TYPICAL, device)
    except Exception as error:
        return f"not available: {type(error).__name__}: {error}", None
    return f"{route.path if route.supported else 'not available'}: {route.reason}", None


def _metal_kernels() -> DiagnosisItem:
    """Summarise the first-use checks of the Metal kernels, and what is unverified."""
    from attention.kernels.metal import path as metal_path

    text, wrong = metal_path.summary()
    advice = f"{wrong}; calls of this kind fall back; `fatui doctor --report` writes a file to send" if wrong else None
    return DiagnosisItem(topic="Metal", text=text, advice=advice)


def _compilers() -> Iterator[DiagnosisItem]:
    found = [(name, where) for name in COMPILERS if (where := shutil.which(name))]
    for name, where in found:
        yield DiagnosisItem(topic="compiler", text=f"{name}: {_first_line(where)}, for {COMPILERS[name]}")
    if "c++" not in dict(found):
        advice = "install one (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
        yield DiagnosisItem(topic="compiler", text=f"no C++ compiler, which {COMPILERS['c++']} needs", advice=advice)


def _first_line(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return "does not respond"
    return next((line.strip() for line in done.stdout.splitlines() if line.strip()), "no version reported")


def _folders() -> Iterator[DiagnosisItem]:
    for topic, folder in (
        ("config", storage.config_dir()),
        ("data", storage.data_dir()),
        ("cache", storage.cache_dir()),
    ):
        yield _folder(topic, folder)
    yield from _settings()
    yield from _presets()
    yield from _history()


def _folder(topic: str, folder: Path) -> DiagnosisItem:
    """Report a folder and its size, or what to do if it cannot be used or created."""
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    if not there.is_dir():
        return DiagnosisItem(
            topic=topic, text=f"{there} is not a folder", advice="move it away; nothing can be stored there"
        )
    if there != folder:
        advice = None if home().is_dir() else f"set HOME to a folder that exists; there is no {home()}"
        return DiagnosisItem(topic=topic, text=f"{folder} (not created yet)", advice=advice)
    try:
        size = formatting.size(sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))
    except OSError as error:
        size = error.strerror or str(error)
    advice = None if os.access(folder, os.W_OK | os.X_OK) else "it is not writable: nothing new is stored there"
    return DiagnosisItem(topic=topic, text=f"{folder} ({size})", advice=advice)


def _settings() -> Iterator[DiagnosisItem]:
    """Report what is wrong with the config file; key names and themes are checked by the app."""
    content, problem = settings.read_config()
    unknown = [f"{settings.config_path()}: {settings.unknown(key)}" for key in content if key not in settings.KEYS]
    for text in [problem] if problem else unknown:
        yield DiagnosisItem(topic="config", text=text, advice="fix the file, or move it away")


def _presets() -> Iterator[DiagnosisItem]:
    for listed in presets.list_presets():
        for problem in listed.problems:
            yield DiagnosisItem(topic="presets", text=problem, advice=f"fix it: fatui presets check {listed.source}")


def _history() -> Iterator[DiagnosisItem]:
    history = RunHistory()
    try:
        count = len(history.runs())
    except HistoryError as error:
        yield DiagnosisItem(topic="history", text=str(error), advice="until it can be used, runs are not stored")
        return
    yield DiagnosisItem(topic="history", text=f"{count} run{'s' * (count != 1)}", advice=history.notice)


def _speed(device: Device) -> Iterator[DiagnosisItem]:
    peaks = measure_peaks(device)
    copy = formatting.bytes_per_second(peaks.copy_bytes_per_s)
    launch = formatting.seconds(peaks.queued_launch_s)
    rates = f"best matmul {formatting.flops(peaks.matmul_flops_per_s)}/s, best copy {copy}"
    text = f"{rates}, a launch in {launch}, measured now"
    yield DiagnosisItem(topic="peaks", text=text)
    if device.backend == "cpu":
        yield _blas()


def _blas() -> DiagnosisItem:
    """Compare MLX's BLAS with numpy's on the same product, which shows the cost of a slow one."""
    import mlx.core as mx
    import numpy as np

    name = blas() or "unknown"
    a = np.random.default_rng(0).standard_normal((MATMUL_SIZE, MATMUL_SIZE)).astype(np.float32)
    b = mx.array(a)
    ours, theirs = _rate(lambda: mx.eval(b @ b)), _rate(lambda: a @ a)
    text = (
        f"{name}; float32 matmul {formatting.flops(ours)}/s in MLX, {formatting.flops(theirs)}/s in numpy on the "
        "same cores"
    )
    slow = sys.platform != "darwin" and theirs > 2 * ours
    advice = (
        f"MLX's matrix products run at 1/{theirs / ours:.0f} of what these cores reach; {PRELOAD}" if slow else None
    )
    return DiagnosisItem(topic="BLAS", text=text, advice=advice)


def _rate(product: Callable[[], object]) -> float:
    """Return FLOP/s of the faster of two products, after an untimed one."""
    product()
    times = []
    for _ in range(2):
        started = time.perf_counter()
        product()
        times.append(time.perf_counter() - started)
    return 2 * MATMUL_SIZE**3 / min(times)


PERSONAL: Final = ("config", "data", "cache", "presets", "history")
"""Topics whose text is a path."""


def make(tell: Callable[[str], None], measure: bool) -> str:
    """Return the report as Markdown.

    Args:
        tell: called with one line before each slow step.
        measure: whether to measure peaks, and on a Mac to check kernels that were never used.
    """
    found = [finding for finding in diagnose(measure=measure) if finding.topic not in PERSONAL]
    lines = [f"# fatui {__version__}: report of a machine", "", *_of_findings(found), "", "## Metal kernels", ""]
    return without_home("\n".join([*lines, *_of_metal(tell, measure), ""]))


def without_home(text: str) -> str:
    """Replace the home folder, which usually contains the user's name, with "~"."""
    folder = str(home())
    return text.replace(folder, "~") if len(folder) > 1 else text


def _of_findings(found: list[DiagnosisItem]) -> Iterator[str]:
    for finding in found:
        yield f"- {finding.topic}: {finding.text}" + (f" ({finding.advice})" if finding.advice else "")


def _of_metal(tell: Callable[[str], None], measure: bool) -> Iterator[str]:
    from attention.kernels.metal import path as metal_path

    try:
        for name in metal_path.check_all() if measure else ():
            tell(f"checking {name}")
    except KernelUnavailable as unavailable:
        yield f"Not checked: {unavailable}."
    known = metal_path.known_results()
    yield f"{sum(verdict.passed for verdict in known)} of {len(known)} checks passed. {metal_path.UNMEASURED}"
    for verdict in known:
        yield f"- {verdict.name} ({verdict.machine}): {'passed' if verdict.passed else 'FAILED'}"
        if not verdict.passed:
            yield from ("", "```", *verdict.text.splitlines(), "```", "")
