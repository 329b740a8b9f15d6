"""Faults planted in a correct kernel: the verifier must find each, and name its kind."""

import re
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from tests.support.metal import (
    needs_verifier,  # noqa: F401  skips where nothing can be compiled
    verifier_example,
)
from tests.support.metal.verifier import Finding
from tests.support.metal.verifier.building import CompileError


class Mutant(NamedTuple):
    """A text to replace, its replacement, and the kind of the expected finding."""

    name: str
    old: str
    new: str
    kind: str
    dtype: mx.Dtype = mx.float32


BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);   // "
RUN = (
    Mutant("no barrier after V", f"{BARRIER}B1", "// B1", "race"),
    Mutant("no barrier after K is loaded", f"{BARRIER}B2", "// B2", "race"),
    Mutant("no barrier before V is loaded", f"{BARRIER}B3", "// B3", "race"),
    Mutant("no barrier after V is loaded", f"{BARRIER}B4", "// B4", "race"),
    Mutant(
        "a simdgroup's barrier in place of the group's",
        f"{BARRIER}B2",
        "simdgroup_barrier(mem_flags::mem_threadgroup); // B2",
        "race",
    ),
    Mutant("a barrier of no memory", f"{BARRIER}B2", "threadgroup_barrier(mem_flags::mem_none); // B2", "race"),
    Mutant("rows beyond the end are loaded", "(i / D) < valid ? src[i] : T(0)", "src[i]", "out-of-bounds"),
    Mutant("rows beyond the end are written", "if (row < Lq)", "if (true)", "out-of-bounds"),
    Mutant(
        "a tile eight rows off", "KVs + j * 8 * D + d * 8, D);", "KVs + (j + 1) * 8 * D + d * 8, D);", "out-of-bounds"
    ),
    Mutant("a tile that is not filled", "i < ROWS * D", "i < ROWS * D - 64", "uninitialised read"),
    Mutant("a row that is never written", "if (fn == 0) lse", "if (fn == 0 && row != 5) lse", "uninitialised read"),
    Mutant("a barrier that one simdgroup passes by", f"{BARRIER}B3", f"if (sg != 1) {BARRIER}B3", "divergence"),
    Mutant(
        "a simdgroup operation of half the lanes", "mx = row_max(mx);", "if (lane < 16) mx = row_max(mx);", "divergence"
    ),
    Mutant(
        "lanes that return early",
        "float m = -INFINITY;",
        "if (q0 + int(sg) * 8 + fm >= Lq) return; float m = -INFINITY;",
        "divergence",
    ),
    Mutant("36 KB of threadgroup memory", "threadgroup T Qs[BQ * D];", "threadgroup T Qs[BQ * D * 4];", "limit"),
    Mutant("one output of several threads", "if (fn == 0) lse[", "if (fn < 4) lse[", "race"),
    Mutant("a write to an input", "if (row < Lq) {", "if (row < Lq) { ((device T*)kp)[0] = T(0);", "wild"),
    Mutant("a key before the first", "kp + k0 * D, KVs", "kp + k0 * D - 16 * D, KVs", "out-of-bounds"),
    Mutant(
        "a scale that is an array",
        "S[j].thread_elements()[e] * scale;",
        "S[j].thread_elements()[e] * (&scale)[1];",
        "out-of-bounds",
    ),
    Mutant(
        "Q read before it is there",
        "simdgroup_matrix<float, 8, 8> O[TD];",
        "float early = float(Qs[(tid + 64) % (BQ * D)]); simdgroup_matrix<float, 8, 8> O[TD]; "
        "O[0].thread_elements()[0] = early;",
        "race",
    ),
)
COMPILED = (
    Mutant(
        "P in another type than V",
        "simdgroup_matrix<T, 8, 8> P[TK];",
        "simdgroup_matrix<float, 8, 8> P[TK];",
        "only T,T->float and T,T->T",
        mx.float16,
    ),
    Mutant(
        "a tile loaded into a matrix of another type",
        "simdgroup_matrix<T, 8, 8> a, b;",
        "simdgroup_matrix<float, 8, 8> a, b;",
        "no matching function for call to .simdgroup_load",
        mx.float16,
    ),
    Mutant(
        "bfloat narrowed silently",
        "op[d * 8] = T(O[d].thread_elements()[0] * inv);",
        "op[d * 8] = O[d].thread_elements()[0] * inv;",
        "no match for .operator=. .operand types are .bfloat. and .float.",
        mx.bfloat16,
    ),
)
WRONG = (
    Mutant(
        "rows in another lane lay-out",
        "const short fm = ((lane / 4) & 4) + ((lane / 2) % 4);",
        "const short fm = (((lane / 4) & 4) + ((lane / 2) % 4)) ^ 1;",
        "",
    ),
    Mutant("an accumulator that is not cleared", "O[d] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);", ";", ""),
    Mutant("no correction of what was summed", "l = l * alpha + row_sum(sum);", "l = l + row_sum(sum);", ""),
    Mutant("causal one key too far", "col > row + Lk - Lq", "col > row + Lk - Lq + 1", ""),
)


ALWAYS = ("rows beyond the end are written", "a tile that is not filled", "a barrier that one simdgroup passes by")
"""One fault of each kind for every test run; a race is tested below."""


def planted(mutant: Mutant) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert mutant.old in text, mutant.old
        return text.replace(mutant.old, mutant.new, 1)

    return edit


def named(mutant: Mutant) -> str:
    return mutant.name


@pytest.mark.parametrize(
    "mutant", [each if each.name in ALWAYS else pytest.param(each, marks=pytest.mark.slow) for each in RUN], ids=named
)
def test_a_fault_is_found_with_its_kind(mutant: Mutant) -> None:
    with pytest.raises(Finding) as found:
        verifier_example.run(verifier_example.inputs(dtype=mutant.dtype), True, edit=planted(mutant))
    assert any(item.startswith(mutant.kind) for item in found.value.items), found.value.items


@pytest.mark.slow
@pytest.mark.parametrize("mutant", COMPILED, ids=named)
def test_a_mistake_of_types_does_not_compile(mutant: Mutant) -> None:
    with pytest.raises(CompileError, match=mutant.kind):
        verifier_example.run(verifier_example.inputs(dtype=mutant.dtype), True, edit=planted(mutant))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", WRONG, ids=named)
def test_a_fault_that_breaks_no_rule_shows_in_the_numbers(mutant: Mutant) -> None:
    arrays = verifier_example.inputs()
    output = np.array(verifier_example.run(arrays, True, edit=planted(mutant))[0])
    assert not np.abs(output - verifier_example.reference(arrays, True)).max() < 0.02


def test_a_missing_barrier_is_named_with_the_kernel_s_own_line() -> None:
    with pytest.raises(Finding) as found:
        verifier_example.run(verifier_example.inputs((1, 1, 40, 64)), True, edit=planted(RUN[1]))
    own = "simdgroup_load(b, KVs + j * 8 * D + d * 8, D, ulong2(0, 0), true);"
    assert re.search(rf"^race: KVs.* at line \d+: `{re.escape(own)}`", "\n".join(found.value.items), re.MULTILINE)


def test_too_many_threads_are_found() -> None:
    with pytest.raises(Finding, match="2048 threads"):
        verifier_example.run(verifier_example.inputs((1, 1, 40, 64)), True, threadgroup=(2048, 1, 1))
