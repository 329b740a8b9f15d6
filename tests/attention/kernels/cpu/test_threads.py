"""The CPU kernel's threads: identical bits for any number of them, correct after a fork, little memory."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels import cpu
from attention.kernels.cpu import library
from attention.measure.device import cpu_quota
from tests.support.marks import slow
from tests.support.patience import patient

TASKS = Path("/proc/self/task")
"""One entry per thread of this process, whatever created it."""

pytestmark = pytest.mark.usefixtures("kernel")


def call(dtype, shape):
    b, h, hkv, lq, lk, d = shape
    random = np.random.default_rng(3)
    shapes = [(b, h, lq, d), (b, hkv, lk, d), (b, hkv, lk, d)]
    q, k, v = (mx.array(random.standard_normal(s).astype(np.float32)).astype(dtype) for s in shapes)

    def loss(q, k, v):
        return (cpu.flash_attention(q, k, v, scale=0.1, causal=True) ** 2).sum()

    out = cpu.flash_attention(q, k, v, scale=0.1, causal=True)
    results = [out, *mx.grad(loss, (0, 1, 2))(q, k, v)]
    return [np.array(x.astype(mx.float32)) for x in results]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("dtype", [mx.float32, slow(mx.float16), mx.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 2, 300, 300, 64), (1, 8, 2, 1, 4000, 64), (1, 3, 1, 130, 700, 32)], ids=str)
def test_the_bits_do_not_depend_on_the_number_of_threads(dtype, shape, monkeypatch):
    monkeypatch.setenv("FATUI_THREADS", "1")
    alone = call(dtype, shape)
    for threads in (2, 7):
        monkeypatch.setenv("FATUI_THREADS", str(threads))
        for _ in range(2):
            for one, other in zip(alone, call(dtype, shape), strict=True):
                assert np.array_equal(one, other)


def test_streams_of_several_threads_are_independent(monkeypatch):
    monkeypatch.setenv("FATUI_THREADS", "3")
    shape = (1, 4, 2, 200, 200, 32)
    expected = call(mx.float32, shape)

    def in_a_thread(_):
        with mx.stream(mx.cpu):
            return call(mx.float32, shape)

    with ThreadPoolExecutor(3) as threads:
        for results in threads.map(in_a_thread, range(6)):
            assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("length", [1024, 16384, 262144])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_extra_memory_is_under_4_mib_a_thread_at_any_length(length, head_dim, dtype, monkeypatch):
    for threads in (1, 2, 16):
        monkeypatch.setenv("FATUI_THREADS", str(threads))
        for heads, queries in ((1, length), (8, length), (32, 1), (1, 64), (2, 64), (17, 64), (31, 64)):
            q, k = (1, heads, queries, head_dim), (1, max(1, heads // 4) if heads % 4 == 0 else heads, length, head_dim)
            for training in (False, True):
                assert cpu.workspace_bytes(q, k, k, dtype=dtype, training=training) < threads * (4 << 20)


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": "nothing\n"}, None),
        ({}, None),
    ],
)
def test_a_control_groups_quota_of_cpu_time_is_read(files, processors, tmp_path):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == processors


@pytest.mark.skipif(sys.platform != "linux", reason="counts processors in Linux's way")
def test_a_limit_of_threads_holds_until_it_is_lifted(monkeypatch):
    monkeypatch.delenv("FATUI_THREADS", raising=False)
    shape, module = (1, 8, 512, 64), library.load()

    def workspace(most):
        module.limit_threads(most)
        return cpu.workspace_bytes(shape, shape, shape, dtype=mx.float32)

    try:
        alone = workspace(1)
        assert workspace(0) == workspace(1000) == alone * len(os.sched_getaffinity(0))
    finally:
        module.limit_threads(cpu_quota() or 0)


READS = Path("/proc/self/io")


@pytest.mark.skipif(not READS.exists(), reason="counts reads of files in Linux's way")
def test_calls_read_no_files(monkeypatch):
    monkeypatch.delenv("FATUI_THREADS", raising=False)
    q = mx.zeros((1, 8, 64, 32))

    def reads(calls):
        before = READS.read_text()
        for _ in range(calls):
            mx.eval(cpu.flash_attention(q, q, q, scale=0.2))
        counts = (int(text.split("syscr: ")[1].split()[0]) for text in (before, READS.read_text()))
        return -next(counts) + next(counts)

    reads(2)
    assert min(reads(50) for _ in range(5)) < 25  # with the number of all CPUs each call read one; other threads may


AFTER_A_FORK = """
import os, numpy as np, mlx.core as mx
from attention.kernels.cpu import library
module = library.load()
module.fma_peak()
child = os.fork()
if child == 0:
    ok = module.fma_peak() > 0
    os._exit(0 if ok else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert module.fma_peak() > 0
"""


@pytest.mark.thorough
def test_the_pool_is_rebuilt_after_a_fork():
    environment = {**os.environ, "FATUI_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", AFTER_A_FORK], check=False, env=environment, timeout=patient(120))
    assert done.returncode == 0


IN_A_CHILD = """
import os, signal, mlx.core as mx
mx.set_default_device(mx.cpu)
from attention import ForkedError, attention
from attention.kernels import cpu
q = mx.ones((1, 1, 4, 8))
def attend():
    mx.eval({call})
if {before}:
    attend()
child = os.fork()
if child == 0:
    signal.alarm({alarm_s})
    try:
        attend()
    except ForkedError as error:
        print(error, flush=True)
    else:
        print("fine", flush=True)
    os._exit(0)
os.waitpid(child, 0)
attend()
"""
CALLS = ["attention(q, q, q)", "attention(q, q, q, implementation='poc')", "cpu.flash_attention(q, q, q, scale=1.0)"]


def printed_in_a_child(call, before):
    """Return what is printed for a call in a forked child, after one in its parent or not; a child that hangs ends."""
    alarm_s = int(patient(60))
    command = [sys.executable, "-c", IN_A_CHILD.format(call=call, before=before, alarm_s=alarm_s)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=3 * alarm_s).stdout


@pytest.mark.parametrize("call", [CALLS[0], *map(slow, CALLS[1:])])
def test_a_process_forked_after_the_first_use_says_so(call):
    stdout = printed_in_a_child(call, before=True)
    assert stdout.startswith("attention was computed before this process was forked, and MLX would hang here")
    assert len(stdout.splitlines()) == 1


@pytest.mark.thorough
def test_a_process_forked_before_the_first_use_computes():
    assert printed_in_a_child(CALLS[1], before=False) == "fine\n"


FEWER = """
import os, resource, mlx.core as mx
mx.set_default_device(mx.cpu)
from attention.kernels import cpu
q = mx.random.normal((1, 8, 512, 64))
expected = mx.fast.scaled_dot_product_attention(q, q, q, scale=0.1)
mx.eval(expected)
cpu.load()
user = 10_000 + os.getpid() % 50_000  # nobody else's, whose processes would count
os.setgid(user), os.setuid(user)
threads = lambda: len(os.listdir("/proc/self/task"))
limit = threads() + 2
resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit + 8))
for _ in range(3):
    assert mx.allclose(cpu.flash_attention(q, q, q, scale=0.1), expected, atol=1e-4)
assert threads() == limit, threads()
assert cpu.fma_peak() > 0
resource.setrlimit(resource.RLIMIT_NPROC, (limit + 8, limit + 8))
import time
time.sleep(1.1)
assert mx.allclose(cpu.flash_attention(q, q, q, scale=0.1), expected, atol=1e-4)
assert threads() == limit + 3, threads()
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="limits the threads of a user of its own")
def test_threads_that_the_system_refuses_are_done_without():
    environment = {**os.environ, "FATUI_THREADS": "6"}
    done = subprocess.run([sys.executable, "-c", FEWER], check=False, env=environment, timeout=patient(120))
    assert done.returncode == 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in Linux's way")
def test_calls_from_many_threads_at_once_use_one_pool(monkeypatch):
    monkeypatch.setenv("FATUI_THREADS", "3")
    q = mx.random.normal((1, 8, 256, 32))
    mx.eval(q)
    all_there = threading.Barrier(4)

    def in_each(make):
        def work(_):
            all_there.wait(timeout=patient(60))
            with mx.stream(mx.cpu):
                mx.eval([make() for _ in range(20)])

        list(threads.map(work, range(4)))
        return len(list(TASKS.iterdir()))

    with ThreadPoolExecutor(4) as threads:
        before = in_each(lambda: q + q)  # their streams have threads too
        after = in_each(lambda: cpu.flash_attention(q, q, q, scale=0.2))
    assert after <= before + 2  # the helpers, unless an earlier test had them
