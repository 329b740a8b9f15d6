"""The ONNX Attention operator's own cases, opset 23, through `attention()` with each implementation.

A case passes on its numbers alone.
"""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from attention import UnsupportedError, attention
from tests.support.attention_examples import INSTALLED
from tests.support.marks import slow, thorough
from tests.support.onnx_cases import MATRIX, TOLERANCE, cases, run

NO_SOFTCAP = ("mlx", "torch")
"""Implementations whose library has no softcap."""


def test_there_are_69_cases() -> None:
    assert len(cases()) == 69


def test_only_the_score_matrix_output_cannot_be_expressed() -> None:
    asking = [case.name for case in cases() if MATRIX in case.expected]
    assert len(asking) == 15
    assert all("qk_matmul" in name for name in asking)


@pytest.mark.parametrize(
    "implementation", [slow("demo") if n == "demo" else thorough(n) if n == "torch" else n for n in INSTALLED]
)  # demo has a trial for each kind of case, and takes one of the others
def test_all_cases_agree_in_every_output_that_attention_has(implementation: str) -> None:
    attend, refused = partial(attention, implementation=implementation), []
    for case in cases():
        try:
            found = run(case, attend, causal_word="causal")
        except UnsupportedError as error:
            assert "softcap" in str(error)
            refused.append(case.name)
            continue
        for output, expected in case.expected.items():
            if output == MATRIX:
                continue
            got, tolerance = np.array(found[output].astype(mx.float32)), TOLERANCE[expected.dtype.name]
            np.testing.assert_allclose(
                got, np.asarray(expected, np.float32), rtol=case.rtol, atol=tolerance, err_msg=case.name
            )
    asking = [case.name for case in cases() if "softcap" in case.options]
    assert refused == (asking if implementation in NO_SOFTCAP else [])
