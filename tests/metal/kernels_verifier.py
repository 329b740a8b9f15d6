"""The verifier as the kernels' tests need it: one launch run and counted, and the check of address spaces."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass
class Counts:
    """What one launch did: elements by array, products of two 8 x 8 matrices, bytes of threadgroup memory."""

    reads: dict[str, int]
    writes: dict[str, int]
    products: int
    threadgroup_bytes: int


def run(
    kernel: Any,
    names: tuple[Sequence[str], Sequence[str]],
    inputs: list[mx.array],
    keywords: dict[str, Any],
    *,
    reversed_schedule: bool,
    misaligned: bool,
    edit: Callable[[str], str],
) -> tuple[list[mx.array], str, Counts]:
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
    outputs, seen = verifier.verify(
        kernel,
        names[0],
        inputs,
        output_names=names[1],
        order=int(reversed_schedule),
        misalign=misaligned,
        edit=edit,
        **keywords,
    )
    return outputs, seen["text"], Counts(seen["reads"], seen["writes"], seen["products"], seen["tg"])


def address_space_errors(text: str) -> list[str]:
    """What clang's front end for C++ for OpenCL has against a kernel's address spaces."""
    return verifier.address_spaces(text)
