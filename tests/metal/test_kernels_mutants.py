"""Every fault that is planted in a kernel is found: by the verifier, or by FlashAttention 3's rule."""

import pytest
from kernels_case import problems
from kernels_device import Device, needs_verifier, on_a_mac
from kernels_mutants import MUTANTS

pytestmark = needs_verifier
QUICK = MUTANTS[::9]
"""The few that every run tries."""


def is_found(mutant):
    from kernels_verifier import Finding

    with on_a_mac(Device(edit=mutant.edit)) as device:
        try:
            found = problems(mutant.shape, mutant.call, backward=mutant.kernel.startswith("backward"))
        except Finding:
            return True
        assert device.launches, "nothing was run"
        return bool(found)


@pytest.mark.parametrize("mutant", QUICK, ids=lambda mutant: mutant.name)
def test_a_planted_fault_is_found(mutant):
    assert is_found(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", [one for one in MUTANTS if one not in QUICK], ids=lambda mutant: mutant.name)
def test_every_planted_fault_is_found(mutant):
    assert is_found(mutant)


@pytest.mark.parametrize("shape", dict.fromkeys(mutant.shape for mutant in MUTANTS), ids=str)
def test_the_texts_as_they_are_pass_where_mutants_are_tried(shape):
    kinds = {mutant.kind: mutant.call for mutant in MUTANTS if mutant.shape == shape}
    with on_a_mac(Device()):
        assert [problems(shape, call) for call in kinds.values()] == [[]] * len(kinds)
