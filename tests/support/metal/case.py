"""One call of the kernels on random inputs, forward and backward, and its problems."""

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, cast

import mlx.core as mx
import numpy as np

from attention.kernels.common.selfcheck import exact, logsumexp_gap
from attention.kernels.metal import gradients, launch, selfcheck
from attention.kernels.metal.call import CallParams, CallShape, MaskKind
from attention.kernels.metal.lists import list_arrays
from attention.kernels.metal.tiles import LIST_KEYS, LIST_QUERIES
from tests.support.block_lists import lists_of, random_pairs
from tests.support.metal import judge
from tests.support.metal.blas import one_thread
from tests.support.metal.device import Device, on_a_mac

MAX_LENGTH: Final = 200
"""Maximum queries and keys of a random shape."""


@dataclass(frozen=True)
class Kind:
    """The features of a call; its mask is additive, in the type of the queries."""

    causal: bool = False
    window: int | None = None
    softcap: float | None = None
    mask: str = "none"
    sinks: bool = False
    logsumexp: bool = False
    """Whether the logsumexp has a cotangent."""
    alibi: bool = False
    lists: tuple[bool, bool] | None = None
    """Whether the block lists, if there are any, differ between batches and between heads."""

    def call(self, head_dim: int, dtype: str) -> CallParams:
        mask = cast("MaskKind", dtype if self.mask == "own" else self.mask)
        lists = self.lists is not None
        return CallParams(head_dim**-0.5, self.causal, self.window, self.softcap, mask, self.sinks, lists, self.alibi)


KINDS: Final = {
    "full": Kind(),
    "causal": Kind(causal=True),
    "window": Kind(causal=True, window=13),
    "softcap": Kind(softcap=2.0),
    "bool mask": Kind(mask="bool"),
    "additive mask": Kind(mask="float32", causal=True),
    "sinks": Kind(causal=True, sinks=True),
    "all at once": Kind(causal=True, window=29, softcap=3.0, mask="own", sinks=True, logsumexp=True),
}
LISTED: Final = {
    "lists": Kind(lists=(False, False), logsumexp=True),
    "lists of heads": Kind(lists=(False, True), alibi=True),
    "lists of batches": Kind(lists=(True, False), softcap=2.0, mask="bool"),
    "lists and all": Kind(
        lists=(True, True), causal=True, window=150, softcap=3.0, mask="own", sinks=True, alibi=True, logsumexp=True
    ),
}
"""Calls with block lists."""


class Run(NamedTuple):
    """The order in which threads run, and the alignment of the arrays."""

    is_reversed: bool
    is_misaligned: bool


RUNS: Final = [Run(is_reversed, is_misaligned) for is_reversed in (False, True) for is_misaligned in (False, True)]


def problems(shape: CallShape, kind: Kind, backward: bool = True, seed: int = 3) -> list[str]:
    """Return the problems of output, logsumexp and gradients; findings of the verifier are raised."""
    call = kind.call(shape.head_dim, shape.dtype)
    given = selfcheck.inputs(shape, replace(call, lists=False), seed, logsumexp=kind.logsumexp)
    if kind.lists is not None:
        planes = (shape.batch if kind.lists[0] else 1, shape.heads if kind.lists[1] else 1)
        given = with_lists(given, random_pairs((*planes, shape.queries, shape.keys), seed=seed))
    return problems_of(given, shape, call, backward)


def with_lists(given: selfcheck.Inputs, seen: selfcheck.Bools) -> selfcheck.Inputs:
    """Return the inputs with block lists of the visible pairs (1 or B, 1 or H, Lq, Lk)."""
    group = given.q.shape[1] // given.k.shape[1]
    return replace(given, lists=list_arrays(lists_of(seen, LIST_QUERIES, LIST_KEYS), group), seen=seen)


def problems_of(given: selfcheck.Inputs, shape: CallShape, call: CallParams, backward: bool = True) -> list[str]:
    """Return the problems of a call with given inputs."""
    arrays = given.arrays(shape)
    outputs = launch.forward(arrays, shape, call)
    found = [outputs[0]]
    if backward:
        by_sum = given.logsumexp_cotangent
        *made, delta = launch.backward(arrays, outputs, given.cotangent, by_sum, shape, call)
        found += [*made, *([gradients.of_sinks(arrays.sinks, outputs, delta)] if call.sinks else [])]
    with one_thread():
        return [*_wrong_logsumexp(given, call, outputs[1]), *judge.wrong(given, call, found)]


def _wrong_logsumexp(given: selfcheck.Inputs, call: CallParams, logsumexp: mx.array) -> list[str]:
    expected, found = selfcheck.reference(given, call)[1], exact(logsumexp)
    blind = np.isneginf(expected)
    gap = logsumexp_gap(found, expected)
    return [] if gap < 1e-4 and (np.isneginf(found) == blind).all() else [f"logsumexp: {gap:.2g} off"]


def random_lengths(name: str) -> Iterator[tuple[int, int]]:
    """Queries and keys, the same in every run of the tests."""
    draw = random.Random(zlib.crc32(name.encode()))
    while True:
        yield draw.randint(1, MAX_LENGTH), draw.randint(1, MAX_LENGTH)


def problems_in_all_runs(head_dim: int, dtype: str, kind: str) -> dict[str, list[str]]:
    """Return the problems of a specialisation in each schedule and alignment, each time with another random shape."""
    wrong = {}
    for run, (queries, keys) in zip(RUNS, random_lengths(f"{head_dim} {dtype} {kind}"), strict=False):
        heads = 2 if run.is_reversed == run.is_misaligned else 1  # of one key head
        with on_a_mac(Device(run.is_reversed, run.is_misaligned)):
            found = problems(CallShape(1, heads, 1, queries, keys, head_dim, dtype), KINDS[kind])
        if found:
            wrong[f"{queries} x {keys}, {run}"] = found
    return wrong


def problems_of_lists_in_all_runs(head_dim: int, dtype: str, kind: str) -> dict[str, list[str]]:
    """Return the problems of a call with block lists in each schedule and alignment, each time with another shape."""
    wrong = {}
    sizes = ((1, 4, 2), (2, 2, 1), (2, 1, 1), (1, 2, 2))
    lengths = random_lengths(f"{head_dim} {dtype} {kind}")
    for run, size, (queries, keys) in zip(RUNS, sizes, lengths, strict=False):
        with on_a_mac(Device(run.is_reversed, run.is_misaligned)):
            found = problems(CallShape(*size, queries, keys, head_dim, dtype), LISTED[kind])
        if found:
            wrong[f"{size} {queries} x {keys}, {run}"] = found
    return wrong


def problems_of_few_in_all_runs(head_dim: int, dtype: str, rows: int, kind: str) -> dict[str, list[str]]:
    """Return the forward problems for so few queries that one tile holds them; every other run splits the keys."""
    wrong = {}
    draw = random.Random(zlib.crc32(f"{head_dim} {dtype} {rows} {kind}".encode()))
    for number, run in enumerate(RUNS):
        keys = draw.randint(512, 700) if number % 2 else draw.randint(1, MAX_LENGTH)
        shape = CallShape(1, 4, 2, draw.randint(rows // 4 + 1, rows // 2), keys, head_dim, dtype)
        with on_a_mac(Device(run.is_reversed, run.is_misaligned)) as device:
            found = problems(shape, KINDS[kind], backward=False)
        assert [one.kernel for one in device.launches] == ["forward", "join"][: 1 + number % 2]
        if found:
            wrong[f"{shape}, {run}"] = found
    return wrong
