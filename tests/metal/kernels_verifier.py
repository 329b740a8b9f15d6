"""The verifier as the kernels' tests need it: one launch run and counted, and the check of address spaces."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest
import verifier
from verifier import building

pytest.importorskip("clang.cindex", reason="the libclang wheel is not installed")
if building.missing() is not None:
    pytest.skip(f"the verifier cannot compile: {building.missing()}", allow_module_level=True)

Finding = verifier.Finding
"""What a launch raises in which something was found."""


def run(
    kernel: Any,
    names: tuple[Sequence[str], Sequence[str]],
    inputs: list[mx.array],
    keywords: dict[str, Any],
    *,
    reversed_schedule: bool,
    misaligned: bool,
    edit: Callable[[str], str],
) -> verifier.Launched:
    """Outputs, text and counts of one launch of what mx.fast.metal_kernel made.

    Args:
        kernel: what mx.fast.metal_kernel made.
        names: of inputs and outputs.
        inputs: of any strides.
        keywords: of the call.
        reversed_schedule: whether the threads are run in the other order.
        misaligned: whether arrays start one element off.
        edit: changes the text before it is run.
    """
    return verifier.verify(
        kernel,
        names[0],
        inputs,
        output_names=names[1],
        is_reversed=reversed_schedule,
        is_misaligned=misaligned,
        edit=edit,
        **keywords,
    )


def address_space_errors(text: str) -> list[str]:
    """What clang's front end for C++ for OpenCL has against a kernel's address spaces."""
    return verifier.address_spaces(text)
