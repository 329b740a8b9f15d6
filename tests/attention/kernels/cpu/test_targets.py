"""The kernel's core built for other processors and by another compiler, and run natively or in an emulator.

One source serves all targets; each has its own vectors, registers and conversions. The matrix unit (AMX), which no
available emulator has, is emulated in software.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels.cpu import build
from attention.quantized_kv import QuantizedArray
from tests.support import kernel_oracle, quantized_values
from tests.support.patience import patient

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[3] / "support"
DRIVER = HERE / "cpu_core.cpp"
ELEMENTS = {"float32": 0, "float16": 1, "bfloat16": 2, "bool": 3}


@dataclass(frozen=True)
class Target:
    compiler: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()  # of this processor
    emulator: tuple[str, ...] = ()


AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
WIDE = ("-mprefer-vector-width=512",)
BF16 = ("-march=cooperlake", *WIDE)
NEON = ("qemu-aarch64",)
TARGETS = {
    "plain": Target("g++", ("-march=x86-64",), frozenset({"sse2"})),
    "avx2": Target("g++", ("-march=haswell",), AVX2),
    "avx512": Target("g++", ("-march=skylake-avx512", *WIDE), AVX512),
    "avx512_bf16": Target("g++", BF16, AVX512 | {"avx512_bf16"}),
    "amx": Target("g++", (*BF16, "-include", str(HERE / "cpu_matrix_unit.hpp")), AVX512 | {"avx512_bf16"}),
    "neon": Target("aarch64-linux-gnu-g++", ("-static",), emulator=NEON),
    "clang-avx2": Target("clang++", ("-march=haswell",), AVX2),
    "clang-avx512_bf16": Target("clang++", BF16, AVX512 | {"avx512_bf16"}),
}

CASES = {
    "full": ((1, 2, 2, 64, 64, 32, 32), {}),
    "odd-causal": ((2, 4, 2, 70, 130, 17, 33), {"causal": True}),
    "window": ((1, 2, 1, 150, 300, 64, 64), {"causal": True, "window": 33}),
    "softcap": ((1, 2, 2, 33, 65, 48, 32), {"softcap": 3.0}),
    "decode": ((1, 8, 2, 1, 1300, 64, 64), {"causal": True}),
    "decode-masked": ((1, 5, 1, 1, 700, 32, 96), {"mask": np.random.default_rng(0).random((1, 700)) < 0.7}),
    "masked": ((1, 2, 2, 40, 50, 32, 32), {"mask": np.random.default_rng(1).random((40, 50)) < 0.5}),
    "added": (
        (1, 2, 2, 40, 50, 32, 32),
        {"mask": np.random.default_rng(2).standard_normal((40, 1)).astype(np.float32)},
    ),
    "panels": ((1, 64, 8, 256, 270, 16, 16), {"causal": True}),
    "one": ((1, 1, 1, 1, 1, 1, 1), {}),
}


def compile_core(target: Target, folder: Path) -> Path:
    command = [target.compiler, "-std=c++20", "-pthread", *build.kernel_flags(), *target.flags, f"-I{build.SOURCES}"]
    texts = [DRIVER, *(build.SOURCES / f"{name}.cpp" for name in build.KERNEL)]
    objects = [folder / f"{text.stem}.o" for text in texts]

    def compile_text(pair: tuple[Path, Path]) -> None:
        subprocess.run([*command, "-w", "-c", str(pair[0]), "-o", str(pair[1])], check=True, timeout=patient(600))

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        list(threads.map(compile_text, zip(texts, objects, strict=True)))
    program = folder / "core"
    subprocess.run([*command, *map(str, objects), "-o", str(program)], check=True, timeout=patient(60))
    return program


@pytest.fixture(scope="module", params=TARGETS)
def core(request, tmp_path_factory) -> list[str]:
    """Return the command that runs the core of one target."""
    target = TARGETS[request.param]
    for tool in (target.compiler, *target.emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    if not target.needs <= build.cpu_features():
        pytest.skip(f"this processor has no {', '.join(sorted(target.needs - build.cpu_features()))}")
    return [*target.emulator, str(compile_core(target, tmp_path_factory.mktemp(request.param)))]


def raw(x: mx.array, rows_first: bool = False) -> bytes:
    x = mx.contiguous(x.transpose(0, 2, 1, 3) if rows_first else x)
    return np.array(x.view(mx.uint16) if x.dtype in (mx.float16, mx.bfloat16) else x).tobytes()


def run(core, folder, arrays, options, dtype_name, rows_first, formats=()):
    q, k, v, *_ = arrays
    mask = (
        None
        if options.mask is None
        else np.broadcast_to(options.mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    )
    strides = [0] * 4 if mask is None else [s // mask.itemsize for s in mask.strides]
    mask_element = -1 if options.mask is None else ELEMENTS[options.mask.dtype.name]
    numbers = [q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3], ELEMENTS[dtype_name]]
    numbers += [options.causal, options.window or 0, mask_element, *strides, rows_first]
    modes = ("none", "affine", "mxfp8", "mxfp4", "nvfp4")
    packings = [n for form in formats for n in (modes.index(form.mode), form.bits, form.group_size)]
    numbers += packings or [0] * 6
    case = np.array(numbers, np.int64).tobytes() + np.array([options.scale, options.softcap or 0.0]).tobytes()
    parts = [part for x in arrays for part in (x.arrays if isinstance(x, QuantizedArray) else [x])]
    case += b"".join(raw(x, rows_first) for x in parts) + (b"" if options.mask is None else options.mask.tobytes())
    (folder / "case").write_bytes(case)
    subprocess.run([*core, str(folder / "case"), str(folder / "result")], check=True, timeout=patient(300))
    return (folder / "result").read_bytes()


def split(result, shapes, dtypes):
    arrays = []
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = int(np.prod(shape)) * dtype.size
        if dtype == mx.float32:
            arrays.append(mx.array(np.frombuffer(result[:size], np.float32).reshape(shape)))
        else:
            arrays.append(mx.array(np.frombuffer(result[:size], np.uint16).reshape(shape)).view(dtype))
        result = result[size:]
    assert not result
    return arrays


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype_name", kernel_oracle.DTYPES)
def test_results_meet_flash_attention_3s_error_bound(core, case, dtype_name, tmp_path):
    (b, h, hkv, lq, lk, d, dv), keywords = CASES[case]
    dtype, options = kernel_oracle.DTYPES[dtype_name], kernel_oracle.Options(scale=d**-0.5, **keywords)
    random = np.random.default_rng(lq + lk + d)
    shapes = [(b, h, lq, d), (b, hkv, lk, d), (b, hkv, lk, dv), (b, h, lq, dv)]
    arrays = [mx.array(random.standard_normal(s).astype(np.float32)).astype(dtype) for s in shapes]
    result = run(core, tmp_path, arrays, options, dtype_name, rows_first=case in ("odd-causal", "decode"))
    outputs = [(b, h, lq, dv), (b, h, lq), *shapes[:3]]
    o, logsumexp, *gradients = split(result, outputs, [dtype, mx.float32, dtype, dtype, dtype])

    q, k, v, do = (kernel_oracle.numbers(x) for x in arrays)
    exact, exact_logsumexp, _ = kernel_oracle.attention(q, k, v, options)
    # Where few numbers are compared, plain attention may happen to be exact: one rounding of the scores is allowed.
    floor = 2**-21 * float(np.abs(v).max())
    kernel_oracle.assert_near(
        o, exact, kernel_oracle.plain_attention(q, k, v, options, dtype), dtype, 2, "output", floor
    )
    seen = np.isfinite(exact_logsumexp)
    tolerance = 3e-4 if dtype == mx.bfloat16 else 2e-5
    np.testing.assert_allclose(np.array(logsumexp)[seen], exact_logsumexp[seen], atol=tolerance, rtol=1e-5)
    exacts, plains = (
        kernel_oracle.gradients(q, k, v, do, options),
        kernel_oracle.plain_gradients(q, k, v, do, options, dtype),
    )
    for name, got, one, other in zip(("dq", "dk", "dv"), gradients, exacts, plains, strict=True):
        kernel_oracle.assert_near(got, one, other, dtype, 3, name, floor)


QUANTIZED = {
    "decode": ((1, 8, 2, 1, 1300, 128, 128), {"causal": True}, ("int8", "int4")),
    "decode-4": ((1, 3, 1, 1, 700, 128, 64), {}, ("int4:32", "int8:32")),
    "decode-small-floats": ((1, 4, 2, 2, 300, 64, 96), {"softcap": 3.0}, ("mxfp4", "mxfp8")),
    "decode-odd": ((1, 5, 1, 1, 200, 128, 48), {"window": 90}, ("int3", "nvfp4")),
    "tiles": ((1, 2, 1, 150, 300, 64, 128), {"causal": True, "window": 33}, ("int6", "int5:32")),
    "more-tiles": ((1, 4, 2, 70, 130, 64, 32), {"causal": True}, ("int2", "mxfp4")),
}


@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.parametrize("dtype_name", kernel_oracle.DTYPES)
def test_quantized_keys_and_values_meet_the_bound(core, case, dtype_name, tmp_path):
    (b, h, hkv, lq, lk, d, dv), keywords, texts = QUANTIZED[case]
    dtype, options = kernel_oracle.DTYPES[dtype_name], kernel_oracle.Options(scale=d**-0.5, **keywords)
    q = mx.array(np.random.default_rng(1).standard_normal((b, h, lq, d)).astype(np.float32)).astype(dtype)
    k, v = (
        quantized_values.normal(i, (b, hkv, lk, width), mx.float32, text)
        for i, (width, text) in enumerate(zip((d, dv), texts, strict=True))
    )
    rows_first = case in ("decode-4", "tiles")
    result = run(core, tmp_path, [q, k, v], options, dtype_name, rows_first, (k.format, v.format))
    o, _ = split(result, [(b, h, lq, dv), (b, h, lq)], [dtype, mx.float32])
    arrays = [kernel_oracle.numbers(q), quantized_values.exact(k), quantized_values.exact(v)]
    exact, plain = kernel_oracle.attention(*arrays, options)[0], kernel_oracle.plain_attention(*arrays, options, dtype)
    kernel_oracle.assert_near(o, exact, plain, dtype, 2, "output", 2**-21 * float(np.abs(arrays[2]).max()))


def test_clang_builds_the_library_and_its_self_check_passes(tmp_path):
    if shutil.which("clang++") is None:
        pytest.skip("no clang++")
    code = "from attention.kernels import cpu; cpu.load(); print(cpu.is_compiled())"
    environment = {**os.environ, "CXX": "clang++", "FATUI_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=patient(600)
    )
    assert done.stdout.strip() == "True"
