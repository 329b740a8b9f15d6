"""Measure a stream of tokens through a bounded cache: is its millionth token as fast as its ten-thousandth?

    python -m benchmarks.streaming --tokens 1000000                    # on this machine's default device
    python -m benchmarks.streaming --heads 32 --kv-heads 8 --head-dim 128 --window 4096 --dtype bfloat16
    python -m benchmarks.streaming --batch 16 --ahead 6 --heads 32 --kv-heads 8 --head-dim 128 --window 4096 \\
        --dtype bfloat16 --tokens 1000000
    python -m benchmarks.streaming queued --window 32768 --format none --format int4

`run` evaluates every token. Blocks of tokens alternate with blocks of a bare loop: on a CPU a plain loop that reads as
many bytes on all threads, elsewhere an addition that reads and writes as many together. Its time is what a step is
compared with, and its histogram what the system does to any loop. With `--ahead N` a step and a pass of the bare loop
wait for the one N before instead of for themselves, and a time is the mean of N, so that on a GPU with enough work
(`--batch`) the host's share of a step is hidden behind the GPU's. `queued` evaluates 64 tokens at a time, for
throughput.
"""

import argparse
import collections
import gc
import itertools
import time
from collections.abc import Callable
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from attention import Rope, StreamingKV
from attention.core.kv_format import DENSE
from attention.engine.stream import resident_bytes
from attention.kernels.cpu import library

Times = NDArray[np.float64]
Step = Callable[[int], object]
"""What returns the next output, for its number."""
BLOCK, BARE_BLOCK, QUEUED = 1000, 100, 64
POOL: Final = 32
"""Different tokens, given in turn."""
EDGES: Final = (1.1, 1.25, 1.5, 2, 3, 5, 10, 100)
"""Of the histograms, in medians."""
MIB: Final = 2**20


class Stream:
    """A state with its ring full, and tokens to come.

    Attributes:
        state: the state.
    """

    def __init__(self, options: argparse.Namespace, kv_format: str) -> None:
        rope = Rope(options.head_dim) if options.rope else None
        self.state = StreamingKV(options.first, options.window, kv_format, rope=rope)
        dtype = getattr(mx, options.dtype)
        shapes = [(options.batch, h, 1, options.head_dim) for h in (options.heads, options.kv_heads, options.kv_heads)]
        self._tokens = [[mx.random.normal(shape, dtype=dtype) for shape in shapes] for _ in range(POOL)]
        mx.eval(self._tokens)
        width = (options.batch, options.kv_heads, options.first + options.window + 7, options.head_dim)
        self.state.append(*(mx.random.normal(width, dtype=dtype) for _ in range(2)))
        self.state.evaluated()

    def step(self, i: int) -> mx.array:
        """Return the output of the next token, unevaluated where MLX is lazy."""
        return self.state.attend(*self._tokens[i % POOL])


def bare_loop(state: StreamingKV) -> Step:
    """Return what reads as many bytes as a step does; unevaluated where MLX is lazy."""
    if mx.default_device() == mx.Device(mx.cpu):
        module = library.load()
        words = [mx.random.normal((max(1, state.nbytes // 8),)) for _ in range(2)]
        mx.eval(words)
        return lambda _: module.read_bandwidth(*words)
    some = mx.random.normal((max(1, state.nbytes // 8),))
    one = mx.array(1.0)
    mx.eval(some, one)
    return lambda _: some + one


def timed(call: Step, times: Times, ahead: int = 0) -> None:
    """Fill an array with the seconds of calls, each of which waits until all but `ahead` of them are evaluated.

    With `ahead` a call may end at once and the next one wait for two, so that a time is the mean of the last `ahead`;
    as many calls begin before those that are timed.
    """
    begun = collections.deque[object]()
    starts = collections.deque[float](maxlen=max(1, ahead))
    for i in range(-ahead, len(times)):
        starts.append(time.perf_counter())
        output = call(i)
        if ahead:
            mx.async_eval(output)  # type: ignore[no-untyped-call]
            begun.append(output)
            output = begun.popleft() if len(begun) > ahead else None
        mx.eval(output)
        if i >= 0:
            times[i] = (time.perf_counter() - starts[0]) / len(starts)
    mx.eval(list(begun))


def histogram(times: Times) -> str:
    """Return the share of times by their ratio to the median."""
    ratios = times / np.median(times)
    edges = (0.0, *EDGES, np.inf)
    counts = [int(((ratios >= a) & (ratios < b)).sum()) for a, b in itertools.pairwise(edges)]
    names = [*(f"<{edge:g}" for edge in EDGES), f">={EDGES[-1]:g}"]
    return "  ".join(f"{name} {count:,}" for name, count in zip(names, counts, strict=True))


def run(options: argparse.Namespace, kv_format: str) -> None:
    """Print medians, memory and ratios of each tenth of a run, and the histograms."""
    stream = Stream(options, kv_format)
    bare = bare_loop(stream.state)
    warm = np.empty(BLOCK)
    for _ in range(10):
        timed(stream.step, warm, options.ahead)
        timed(bare, warm[:BARE_BLOCK], options.ahead)
    gc.collect()
    gc.disable()
    tenth = max(1, options.tokens // 10 // BLOCK)
    steps, others = np.zeros((10, tenth * BLOCK)), np.zeros((10, tenth * BARE_BLOCK))
    steps.fill(1e-9)  # so that its pages are there
    others.fill(1e-9)
    for times in (steps, others):  # the allocator keeps what the medians below take
        np.median(times[0])
    memory = [(resident_bytes(), mx.get_active_memory())]
    print(f"{'tenth':>6} {'median us':>10} {'over first':>10} {'bound us':>9} {'share':>6} {'RSS':>9} {'device':>9}")
    for part in range(10):
        for block in range(tenth):
            timed(stream.step, steps[part, block * BLOCK : (block + 1) * BLOCK], options.ahead)
            timed(bare, others[part, block * BARE_BLOCK : (block + 1) * BARE_BLOCK], options.ahead)
        memory.append((resident_bytes(), mx.get_active_memory()))
        median, bound = np.median(steps[part]), np.median(others[part])
        (rss, device), (rss0, device0) = memory[-1], memory[0]
        print(
            f"{part + 1:>6} {median * 1e6:>10.2f} {median / np.median(steps[0]) - 1:>+10.2%} {bound * 1e6:>9.2f} "
            f"{bound / median:>6.2f} {(rss - rss0) / MIB:>+8.3f}M {(device - device0) / MIB:>+8.3f}M",
            flush=True,
        )
    gc.enable()
    medians = np.median(steps, axis=1)
    print(f"tokens {steps.size:,}; bytes of the window {stream.state.nbytes:,}; position {stream.state.position:,}")
    grown = [(after - before) / MIB for before, after in zip(memory[2], memory[-1], strict=True)]
    print(f"memory since the second tenth: resident {grown[0]:+.3f} MiB, of MLX {grown[1]:+.3f} MiB")
    print(f"tenths differ from the first by at most {np.abs(medians / medians[0] - 1).max():.2%} (target 2 %)")
    by_block = [np.median(x.reshape(10, tenth, -1), axis=2) for x in (steps, others)]
    paired = np.median(by_block[0] / by_block[1], axis=1)
    print(f"the same of times over those of the bare loop beside them: {np.abs(paired / paired[0] - 1).max():.2%}")
    print(f"share of the bound, paired: {1 / np.median(by_block[0] / by_block[1]):.3f}")
    print(
        f"steps beyond 5 medians: {(steps > 5 * np.median(steps)).mean():.3e}, "
        f"of the bare loop {(others > 5 * np.median(others)).mean():.3e}"
    )
    print(f"steps, in medians: {histogram(steps.ravel())}")
    print(f"bare,  in medians: {histogram(others.ravel())}")


def queued(options: argparse.Namespace, kv_format: str) -> float:
    """Print and return the seconds of a token when many are queued."""
    stream = Stream(options, kv_format)
    bare = bare_loop(stream.state)

    def many(_: int) -> list[mx.array]:
        return [stream.step(i) for i in range(QUEUED)]

    times, others = np.empty(max(8, options.tokens // QUEUED)), np.empty(64)
    timed(many, times[:4])
    timed(many, times)
    timed(bare, others)
    token, bound = float(np.median(times)) / QUEUED, float(np.median(others))
    print(
        f"{kv_format:>6}: {token * 1e6:8.2f} us a token, {stream.state.nbytes / token / 1e9:7.0f} GB/s of "
        f"{stream.state.nbytes:,} bytes; bare loop {bound * 1e6:.2f} us",
        flush=True,
    )
    return token


def main() -> None:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", nargs="?", choices=("run", "queued"), default="run")
    for name, default in (("tokens", 100_000), ("batch", 1), ("heads", 8), ("kv-heads", 8), ("head-dim", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("first", 4), ("window", 1024), ("ahead", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--format", action="append", help="none, int8, int4, ...; may be given several times")
    parser.add_argument("--rope", action="store_true", help="with rotary positions")
    options = parser.parse_args()
    if options.ahead < 0 or (options.ahead and options.mode == "queued"):
        parser.error("--ahead takes 0 or more, and is for run")
    found = [(run if options.mode == "run" else queued)(options, one) for one in options.format or [DENSE]]
    seconds = [one for one in found if one is not None]
    if len(seconds) > 1:
        print("  ".join(f"{seconds[0] / one:.2f}x" for one in seconds))


if __name__ == "__main__":
    main()
