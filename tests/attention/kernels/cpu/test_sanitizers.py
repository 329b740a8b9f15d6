"""The kernel's tests again, with the library built under the compiler's sanitizers; run with `pytest -m slow`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attention.kernels.cpu import build as cpu_build
from tests.support.patience import patient

TESTS = ["forward", "gradient", "lists", "quantized", "threads", "onnx", "variants"]


def runtime(name: str) -> str:
    command = [*cpu_build.find().compiler, f"-print-file-name=lib{name}.so"]
    path = Path(subprocess.check_output(command, text=True).strip())
    if not path.is_absolute():
        pytest.skip(f"the compiler has no lib{name}")
    return str(path.resolve())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the runtime is preloaded in Linux's way")
@pytest.mark.parametrize(
    ("flags", "library", "options"),
    [
        (
            "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1",
            "asan",
            {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
        ),
        (
            "-fsanitize=thread -g1 -O1",
            "tsan",
            {"TSAN_OPTIONS": "exitcode=66:die_after_fork=0:report_signal_unsafe=0:ignore_noninstrumented_modules=1"},
        ),
    ],
    ids=["address-undefined", "thread"],
)
def test_the_library_passes_under_sanitizers(flags, library, options, tmp_path):
    here = Path(__file__).parent
    environment = {
        **os.environ,
        **options,
        "FATUI_CACHE_DIR": str(tmp_path),
        "FATUI_KERNEL_CXXFLAGS": flags,
        "FATUI_THREADS": "3",
        "LD_PRELOAD": f"{runtime(library)} {runtime('stdc++')}",  # both: the first wraps what the second throws
        "OPENBLAS_NUM_THREADS": "1",
    }
    # The compiler itself must not run under the sanitizer: build first, in a process without it.
    build = "from attention.kernels.common import cache; from attention.kernels.cpu import build, build as t;"
    build += "cache.ensure_folder(); tools = t.find();"
    build += "key = build.key(tools); path = build.compile_library(tools, key);"
    build += "cache.write_record(key, {'sha256': cache.digest(path)})"
    subprocess.run(
        [sys.executable, "-c", build], check=True, env={**environment, "LD_PRELOAD": ""}, timeout=patient(600)
    )
    command = [sys.executable, "-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["-m", "slow or not slow"]
    command += [*(str(here / f"test_{name}.py") for name in TESTS), str(here.parent / "test_append.py")]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=patient(1200))
    report = done.stdout + done.stderr
    for word in ("ERROR: AddressSanitizer", "runtime error:", "WARNING: ThreadSanitizer"):
        assert word not in report, report[-6000:]
    assert done.returncode == 0, report[-6000:]
