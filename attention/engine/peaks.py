"""Measured peak rates of a machine: matrix products, multiply-adds and copies."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from attention.core.errors import KernelUnavailable
from attention.core.results import Peaks
from attention.core.workload import DTYPES
from attention.kernels import cpu
from attention.measure.device import Device

if TYPE_CHECKING:
    import mlx.core as mx

MATMUL_SIZES: Final = {"cpu": (128, 256, 512, 1024, 2048), "metal": (1024, 2048, 4096), "cuda": (2048, 4096, 8192)}
COPY_BYTES: Final = {"cpu": 2**26, "metal": 2**28, "cuda": 2**30}
NUMPY_SIZE: Final = 768
NUMPY_REPEATS: Final = 20
REPEATS: Final = 3
LAUNCHES: Final = 50
QUEUED: Final = 200
"""Operations that are launched one after the other, and evaluated together."""


def measure_peaks(device: Device, seconds: float = 0.6) -> Peaks:
    """Measure the best matrix product over several sizes and dtypes, and the best copy.

    Args:
        device: the device that MLX runs on.
        seconds: approximate time limit; sizes that would take longer are skipped.

    Returns:
        FLOP/s of the fastest square matmul of any library (on the CPU numpy's too), and the bytes read plus written
        per second of the fastest copy.
    """
    matmul = _best_matmul(device, seconds * 0.8)
    if device.backend == "cpu":
        matmul = max(matmul, _numpy_matmul())  # MLX's BLAS may be far from what these cores can do
    return Peaks(
        matmul_flops_per_s=matmul,
        fma_flops_per_s=_fma(device),
        copy_bytes_per_s=_best_copy(device),
        launch_s=_launch_s(),
        queued_launch_s=_queued_launch_s(),
    )


def _best_matmul(device: Device, seconds: float) -> float:
    import mlx.core as mx

    best = 0.0
    for name in DTYPES:
        started = time.perf_counter()
        for size in MATMUL_SIZES[device.backend]:
            flops = 2 * size**3
            if best and flops * (REPEATS + 1) / best > seconds / len(DTYPES):
                break
            a, b = (mx.random.normal((size, size)).astype(getattr(mx, name)) for _ in range(2))
            mx.eval(a, b)
            best = max(best, flops / _fastest_s(partial(_evaluate_product, a, b)))
            if time.perf_counter() - started > seconds / len(DTYPES):
                break
    return best


def _fma(device: Device) -> float | None:
    """Return FLOP/s of multiply-adds in registers, if the CPU kernel that measures them is compiled."""
    if device.backend != "cpu" or not (cpu.availability()[0] and cpu.is_compiled()):
        return None
    try:
        return cpu.fma_peak()
    except KernelUnavailable:
        return None


def _numpy_matmul() -> float:
    """Return FLOP/s of numpy's float32 matrix product on all cores."""
    a, b = np.random.default_rng(0).standard_normal((2, NUMPY_SIZE, NUMPY_SIZE)).astype(np.float32)
    product = np.empty_like(a)
    return float(2 * NUMPY_SIZE**3 / _fastest_s(lambda: np.matmul(a, b, out=product), NUMPY_REPEATS))


def _evaluate_product(a: "mx.array", b: "mx.array") -> None:
    import mlx.core as mx

    mx.eval(a @ b)


def _best_copy(device: Device) -> float:
    """Return bytes per second of the faster of MLX's copy and, on the CPU, the C library's."""
    import mlx.core as mx

    size = COPY_BYTES[device.backend]
    shape = 2, size // 8
    # A GPU's copies may depend on the numbers, a CPU's do not: there it takes longer to draw them than to copy them.
    halves = mx.full(shape, 1.5) if device.backend == "cpu" else mx.random.normal(shape)
    mx.eval(halves)
    first, second = halves[0], halves[1]
    fastest = _fastest_s(lambda: mx.eval(mx.concatenate([first, second])))
    if device.backend == "cpu":
        source = np.array(halves)
        target = np.empty_like(source)
        fastest = min(fastest, _fastest_s(lambda: np.copyto(target, source)))
    return 2 * size / fastest


def _launch_s() -> float:
    """Return the seconds of the shortest call: an addition to one number, evaluated."""
    import mlx.core as mx

    one = mx.ones(1)
    return _fastest_s(lambda: mx.eval(one + one), LAUNCHES)


def _queued_launch_s() -> float:
    """Return the seconds a call of additions to one number that are evaluated together."""
    import mlx.core as mx

    one = mx.ones(1)
    return _fastest_s(lambda: mx.eval([one + one for _ in range(QUEUED)]), LAUNCHES) / QUEUED


def _fastest_s(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the seconds of the fastest of a few calls, after an untimed one."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)
