"""Every fault planted in a kernel is found in the expected way, and nothing is found without a fault."""

import re

import pytest

from tests.support.metal.case import KINDS as PLAIN_KINDS
from tests.support.metal.case import LISTED as LISTED_KINDS
from tests.support.metal.case import problems
from tests.support.metal.device import Device, needs_verifier, on_a_mac
from tests.support.metal.mutants import BARRIERS, FEW, LISTED, MANY, MUTANTS, QUANTIZED, Mutant, packed

pytestmark = needs_verifier
KINDS = {**PLAIN_KINDS, **LISTED_KINDS}
QUICK = (*MUTANTS[::15], *QUANTIZED[::15])
"""The few that every test run includes."""
QUICK_PLACES = (("causal", MANY), ("full", FEW), ("causal", packed("int4:32")))
"""Where every test run checks the sources without a fault."""


def found_in(mutant: Mutant) -> list[str]:
    """Return the findings, or if there are none, the wrong results."""
    from tests.support.metal.needs_verifier import Finding

    with on_a_mac(Device(edit=mutant.edit)) as device:
        try:
            found = problems(mutant.shape, KINDS[mutant.kind], mutant.kernel.startswith("backward"))
        except Finding as finding:
            return finding.items
    assert device.launches, "nothing was run"
    return found


def is_found(mutant: Mutant) -> bool:
    found = found_in(mutant)
    print(*found, sep="\n")
    return any(item.startswith(mutant.found_by) for item in found)


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_found_for_its_own_reason(mutant):
    assert is_found(mutant)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutant", [one for one in (*MUTANTS, *LISTED, *QUANTIZED) if one not in QUICK], ids=lambda mutant: mutant.name
)
def test_every_planted_fault_is_found_for_its_own_reason(mutant):
    assert is_found(mutant)


def test_there_are_more_than_forty_and_no_two_are_the_same():
    assert are_different(MUTANTS)
    assert len(MUTANTS) > 40
    assert {mutant.kernel for mutant in MUTANTS} == {"forward", "join", "backward_query", "backward_key"}


def test_there_are_67_of_block_lists():
    assert are_different(LISTED)
    assert len(LISTED) == 67
    assert {mutant.kernel for mutant in LISTED} == {"forward", "backward_query", "backward_key"}


def test_there_are_22_of_quantized_keys_and_values():
    assert are_different(QUANTIZED)
    assert len(QUANTIZED) == 22


def are_different(mutants):
    edits = {(mutant.kernel, mutant.old, mutant.new, mutant.shape, mutant.kind) for mutant in mutants}
    return len(edits) == len({mutant.name for mutant in mutants}) == len(mutants)


@pytest.mark.slow
def test_a_missing_barrier_is_reported_with_its_line():
    (mutant,) = (one for one in BARRIERS if one.name == "backward_key: no barrier B3")
    own = "const float2 passed = shared[j * 32];"
    (race,) = (item for item in found_in(mutant) if item.startswith("race: weights"))
    assert re.search(rf"read while thread \d+ wrote it, with no barrier between at line \d+: `{re.escape(own)}`", race)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        pytest.param(*where, marks=() if where in QUICK_PLACES else pytest.mark.slow)
        for where in dict.fromkeys((mutant.kind, mutant.shape) for mutant in (*MUTANTS, *LISTED, *QUANTIZED))
    ],
    ids=str,
)
def test_the_texts_as_they_are_pass_where_mutants_are_tried(kind, shape):
    with on_a_mac(Device()):
        assert problems(shape, KINDS[kind], backward=shape.kv_format is None) == []
