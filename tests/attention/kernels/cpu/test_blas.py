"""numpy's OpenBLAS in place of MLX's: products in a process of its own, since a library is loaded once."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from attention.core.errors import KernelUnavailable
from attention.engine import worker
from attention.kernels.cpu import blas, build
from attention.measure import device

try:
    blas.openblas()
except KernelUnavailable as unavailable:
    pytest.skip(str(unavailable), allow_module_level=True)

PRODUCTS = """
import ctypes, os, sys
from attention.kernels.cpu.blas import load
load(threads=2)
threads = ctypes.CDLL(sys.argv[1]).scipy_openblas_get_num_threads64_
most = min(2, len(os.sched_getaffinity(0)))  # OpenBLAS takes no more than there are cores
import mlx.core as mx, numpy as np
from attention.measure import device
assert device.blas() == "numpy's OpenBLAS", device.blas()
mx.set_default_device(mx.cpu)
random = np.random.default_rng(0)
def values(*shape):
    return random.standard_normal(shape).astype(np.float32)
def compare(name, ours, a, b, c=0.0):
    exact = a.astype(np.float64) @ b + c
    scale = np.abs(a).astype(np.float64) @ np.abs(b) + np.abs(c)
    assert np.all(np.abs(np.array(ours) - exact) <= 1e-5 * scale), name
for m, n, k in ((1, 1, 1), (1, 129, 64), (65, 1, 33), (70, 130, 257)):
    a, b, at, bt, c = values(m, k), values(k, n), values(k, m), values(n, k), values(m, n)
    x, y, xt, yt, z = map(mx.array, (a, b, at, bt, c))
    compare("plain", x @ y, a, b)
    compare("transposed", xt.T @ yt.T, at.T, bt.T)
    compare("one transposed", x @ yt.T, a, bt.T)
    compare("beta", mx.addmm(z, x, y), a, b, c)
    wide = mx.array(values(m, k + 5))
    compare("padded rows", wide[:, 2 : k + 2] @ y, np.array(wide)[:, 2 : k + 2], b)
    strided = mx.array(values(2 * m, k))
    compare("every other row", strided[::2] @ y, np.array(strided)[::2], b)
p, q = values(3, 4, 20, 32), values(3, 1, 32, 24)
compare("batched, broadcast", mx.array(p) @ mx.array(q), p, q)
compare("batched, transposed", mx.array(p) @ mx.array(p).swapaxes(-1, -2), p, p.swapaxes(-1, -2))
assert np.array(mx.zeros((2, 0)) @ mx.zeros((0, 3))).tolist() == [[0.0] * 3] * 2
complex_ = mx.array(p[0, 0] + 1j * p[0, 1])
assert np.allclose(np.array(complex_ @ complex_.T), np.array(complex_) @ np.array(complex_).T, atol=1e-4)
big = values(300, 300)
compare("on all threads", mx.array(big) @ mx.array(big), big, big)
assert threads() == most, threads()
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
assert threads() == 1, threads()
print("equal")
"""

PRIVATE = """
from attention.kernels.common import cache
from attention.kernels.cpu import blas
path = blas._compiled(blas.openblas())
assert path.stat().st_mode & 0o777 == 0o600
made = path.stat().st_mtime_ns
assert blas._compiled(blas.openblas()).stat().st_mtime_ns == made
path.unlink()  # this process has mapped it
path.write_bytes(b"not what was compiled")
assert cache.library(path.stem) is None
assert blas._compiled(blas.openblas()).read_bytes().startswith(b"\\x7fELF")
"""

REMOVED = """
import shutil
from attention.kernels.common import cache
from attention.kernels.cpu.blas import _compiled, load, openblas
{}
import mlx.core
shutil.rmtree(cache.folder())
from attention.measure import device
print(device.blas())
"""


def in_process(code, *arguments, **variables):
    environment = {**os.environ, **variables}
    environment.pop("OPENBLAS_NUM_THREADS", None)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, env=environment
    )


def test_mlx_products_equal_numpys():
    done = in_process(PRODUCTS, str(blas.openblas()))
    assert done.stdout == "equal\n", done.stderr


def test_mlx_is_left_as_shipped_without_it():
    done = in_process("import mlx.core; from attention.measure import device; print(device.blas())")
    assert done.stdout == "reference BLAS\n", done.stderr


def test_it_must_be_loaded_before_mlx():
    with pytest.raises(KernelUnavailable, match="imported already"):
        blas.load()


def test_a_wrong_product_is_found():
    library = ctypes.CDLL(str(blas._compiled(blas.openblas())))
    blas.check(library)

    def in_one_order(_, *rest):
        return library.cblas_sgemm(101, *rest)

    with pytest.raises(KernelUnavailable, match="more than rounding"):
        blas.check(SimpleNamespace(cblas_sgemm=in_one_order))


@pytest.mark.thorough
def test_the_library_is_private_and_verified(tmp_path):
    done = in_process(PRIVATE, FATUI_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("loaded", "shown"), [("load()", "numpy's OpenBLAS"), ("_compiled(openblas())", "reference BLAS")]
)
def test_a_loaded_library_may_be_removed(loaded, shown, tmp_path):
    done = in_process(REMOVED.format(loaded), FATUI_CACHE_DIR=str(tmp_path))
    assert done.stdout == f"{shown}\n", done.stderr


def reported(monkeypatch, name="numpy"):
    events = []
    monkeypatch.setattr(blas, "load", lambda threads: (_ for _ in ()).throw(KernelUnavailable("no C++ compiler found")))
    worker._load_blas(name, events.append)
    return [event.text for event in events]


def test_a_fallback_says_why_once(monkeypatch):
    assert reported(monkeypatch) == ["matrix products are MLX's own, not numpy's: no C++ compiler found"]
    assert reported(monkeypatch, "mlx") == []


def test_reasons_are_clear(monkeypatch):
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    with pytest.raises(KernelUnavailable, match="fast BLAS of its own on darwin"):
        blas.openblas()
    monkeypatch.undo()
    found = build.package_folder
    monkeypatch.setattr(build, "package_folder", lambda name: None if name == "numpy" else found(name))
    with pytest.raises(KernelUnavailable, match="not installed"):
        blas.openblas()


def test_a_gpu_build_of_mlx_is_no_cpu(monkeypatch):
    assert device.computes_on_cpu()
    monkeypatch.setattr(device, "version", lambda name: "0.32")
    assert not device.computes_on_cpu()
