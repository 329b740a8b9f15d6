"""numpy's OpenBLAS for MLX's matrix products in float32: a library of three functions, compiled on first use.

MLX's CPU wheels for Linux call the reference BLAS. numpy's have an OpenBLAS, with names of its own; the compiled
library forwards MLX's calls to it. It must be loaded before MLX, so that the dynamic linker finds it first.
"""

import ctypes
import hashlib
import os
import sys
from pathlib import Path
from typing import Final

from attention.core.errors import KernelUnavailable
from attention.kernels.common import cache
from attention.kernels.cpu import build
from attention.measure.device import NUMPY_BLAS, blas, usable_cores

SOURCE: Final = Path(__file__).parent / "forward.cpp"
FLAGS: Final = ("-O1", "-fPIC", "-shared")
SIZES: Final = ((1, 1, 1), (1, 65, 33), (37, 19, 64), (130, 257, 70))
TOLERANCE: Final = 1e-5
"""Largest error of the self-check's products, relative to the product of the absolute values."""


def openblas() -> Path:
    """Return numpy's OpenBLAS.

    Raises:
        KernelUnavailable: this numpy has none that can be called, or MLX does not call the reference BLAS.
    """
    if sys.platform != "linux":
        raise KernelUnavailable(f"MLX has a fast BLAS of its own on {sys.platform}")
    packages = [build.package_folder(name) for name in ("mlx", "numpy")]
    if None in packages:
        raise KernelUnavailable("MLX or numpy is not installed")
    mlx, numpy = (folder.parent for folder in packages if folder)
    if not next(mlx.glob("mlx_cpu.libs/libblas-*.so*"), None):
        raise KernelUnavailable("this MLX does not have the reference BLAS, which it would replace")
    found = next(numpy.glob("numpy.libs/libscipy_openblas64_*.so*"), None)
    if found is None:
        raise KernelUnavailable("this numpy has no OpenBLAS of its own")
    return found


def load(threads: int | None = None) -> None:
    """Load numpy's OpenBLAS for MLX's products; compile the library if there is none. Call it before MLX is imported.

    Args:
        threads: number of its threads; by default as many as the attention kernel's.

    Raises:
        KernelUnavailable: the reason, in one line; MLX then uses its own BLAS.
    """
    if "mlx.core" in sys.modules:
        raise KernelUnavailable("MLX is imported already")
    if (given := blas()) is not None:
        raise KernelUnavailable(f"{given} is loaded already")
    library = openblas()
    count = str(threads or os.environ.get("FATUI_THREADS") or usable_cores())
    os.environ.setdefault("OPENBLAS_NUM_THREADS", count)
    try:
        path = _compiled(library)
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise KernelUnavailable(f"it cannot be loaded: {error}") from error


def _compiled(library: Path) -> Path:
    command = (*build.compiler(), *FLAGS, str(SOURCE), str(library), f"-Wl,-rpath,{library.parent}")
    sha = hashlib.sha256("\0".join((*command, build.file_state(library))).encode())
    sha.update(SOURCE.read_bytes() + Path(__file__).read_bytes())
    key = f"{NUMPY_BLAS}-{sha.hexdigest()[:24]}"
    cache.ensure_folder()
    with cache.lock(key):
        path = cache.library(key)
        if path is not None:
            return path
        if (failure := cache.failure(key)) is not None:
            raise KernelUnavailable(failure)
        try:
            path = build.link(command, key)
            check(ctypes.CDLL(str(path)))
            cache.write_record(key, {"sha256": cache.digest(path)})
        except KernelUnavailable as error:
            cache.write_failure(key, str(error))
            raise
        return path


def check(library: ctypes.CDLL) -> None:
    """Compare `cblas_sgemm` of a library with float64: both orders, transposed, with padding, alpha and beta.

    Raises:
        KernelUnavailable: a product is wrong by more than rounding.
    """
    import numpy as np

    random = np.random.default_rng(3)
    real, whole, floats = ctypes.c_float, ctypes.c_int, ctypes.POINTER(ctypes.c_float)
    product = library.cblas_sgemm
    product.argtypes = [*[whole] * 6, real, floats, whole, floats, whole, real, floats, whole]
    product.restype = None
    for m, n, k in SIZES:
        for order, trans_a, trans_b in ((o, a, b) for o in (101, 102) for a in (111, 112) for b in (111, 112)):
            shapes = [(k, m) if trans_a == 112 else (m, k), (n, k) if trans_b == 112 else (k, n), (m, n)]
            # Rows of a row-major matrix, columns of a column-major one, padded by three values that must not be read.
            stored = [
                np.full((rows, columns + 3) if order == 101 else (columns, rows + 3), np.nan, np.float32)
                for rows, columns in shapes
            ]
            a, b, c = (
                each[:, :columns] if order == 101 else each[:, :rows].T
                for each, (rows, columns) in zip(stored, shapes, strict=True)
            )
            for each in (a, b, c):
                each[...] = random.standard_normal(each.shape)
            left, right = (a.T if trans_a == 112 else a), (b.T if trans_b == 112 else b)
            expected = 0.5 * left.astype(np.float64) @ right + 2.0 * c.astype(np.float64)
            scale = np.abs(left).astype(np.float64) @ np.abs(right) + np.abs(c)
            leading = [each.shape[1] for each in stored]
            at = [each.ctypes.data_as(floats) for each in stored]
            product(order, trans_a, trans_b, m, n, k, 0.5, at[0], leading[0], at[1], leading[1], 2.0, at[2], leading[2])
            padding = stored[2][:, c.shape[1] if order == 101 else c.shape[0] :]
            if not np.all(np.abs(c - expected) <= TOLERANCE * scale) or not np.all(np.isnan(padding)):
                raise KernelUnavailable("its products differ from float64 by more than rounding")
