"""Graphs of long contexts: bounded in their depth, their nodes and the time that transforms take on them."""

import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

from attention import attention
from attention.core.workload import Workload
from attention.implementations.bounded.blocks import MIB, visible_tiles
from attention.implementations.bounded.implementation import Practical
from attention.implementations.bounded.policy import problem_size
from attention.measure.device import probe
from tests.support.stacks import SMALL_STACK, on_a_stack

LONG = 262_144
USUAL_STACK = 8 * 1024 * 1024
"""MLX frees a compiled graph recursively, which takes about half a KiB for each tile."""
Arrays = mx.array | tuple[mx.array, ...]


def seconds_to_trace(seq: int, practical: Practical, mode: str) -> float:
    """Processor time to trace a causal call of one head, and what `mode` says; nothing is evaluated."""

    def attend(*x: mx.array) -> mx.array:
        return attention(*x, mask="causal", implementation=practical)

    def trace() -> float:
        gradient = mx.grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))
        function: Callable[..., Arrays] = gradient if "gradient" in mode else attend
        if "compile" in mode:
            function = mx.compile(function)  # freed in this thread: MLX's cache of a thread outlives its join
        q, k, v = (mx.zeros((1, 1, seq, 8)) for _ in range(3))
        started = time.thread_time()
        function(q, k, v)
        return time.thread_time() - started

    return on_a_stack(USUAL_STACK if "compile" in mode else SMALL_STACK, trace)


def tiles(seq: int, practical: Practical, **size: int) -> dict[str, int]:
    """How many tiles a causal call takes in each pass."""
    forward, training = (
        Workload(**{"heads": 1, "head_dim": 8, **size}, seq=seq, dtype="float32", mask="causal", pass_=pass_)  # type: ignore[arg-type]
        for pass_ in ("forward", "training")
    )
    made = practical.strategy(forward, probe())
    return {
        "forward": visible_tiles(problem_size(forward, "cpu"), made.blocks),
        "gradient": visible_tiles(problem_size(training, "cpu"), made.backward_blocks),
    }


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("budget", [1 << 12, 1 << 16, 1 << 20, 16 * MIB, 256 * MIB])
def test_a_graph_has_few_thousand_tiles_whatever_the_budget(budget: int) -> None:
    assert max(tiles(32_768, Practical(budget), heads=8, head_dim=128).values()) <= 6000
    assert max(tiles(LONG, Practical(budget), head_dim=128).values()) <= 8192


@pytest.mark.slow
def test_a_quarter_of_a_million_tokens_can_be_traced() -> None:
    assert seconds_to_trace(LONG, Practical(256 * MIB), "forward") < 60  # of processor time; it takes a few


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["gradient", "compile", "compile gradient"])
def test_a_quarter_of_a_million_tokens_can_be_transformed(mode: str) -> None:
    assert seconds_to_trace(LONG, Practical(256 * MIB), mode) < 120  # of processor time; a minute would be long


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["forward", "gradient"])
def test_no_array_is_read_by_as_many_nodes_as_there_are_tiles(mode: str, tmp_path: Path) -> None:
    # mx.compile compares the readers of an array with each other, and moves them in lists: quadratic in their number
    practical = Practical(2 * MIB)
    assert tiles(2048, practical)[mode] > 90

    def attend(*x: mx.array) -> mx.array:
        return attention(*x, mask="causal", softcap=5.0, implementation=practical).sum()

    x = tuple(mx.zeros((1, 1, 2048, 8)) for _ in range(3))
    out = attend(*x) if mode == "forward" else mx.grad(attend, argnums=(0, 1, 2))(*x)
    mx.export_to_dot(str(graph := tmp_path / "graph.dot"), out)
    readers = Counter(re.findall(r"^\"(\w+)\" -> ", graph.read_text(), re.MULTILINE))
    assert len(readers) > 5000
    assert max(readers.values()) < 64
