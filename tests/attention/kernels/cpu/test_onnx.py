"""The ONNX Attention operator's own cases, opset 23, directly through the CPU kernel.

Every run includes them through `poc` (test_onnx_attention.py); here they run under the sanitizers.
"""

import mlx.core as mx
import numpy as np
import pytest

from attention.kernels import cpu
from tests.support.onnx_cases import TOLERANCE, cases, run, with_scale

pytestmark = [pytest.mark.usefixtures("kernel"), pytest.mark.slow]


def test_all_69_cases_agree():
    assert len(cases()) == 69
    for case in cases():
        got, expected = np.array(run(case, with_scale(cpu.flash_attention))["Y"].astype(mx.float32)), case.expected["Y"]
        tolerance = TOLERANCE[expected.dtype.name]
        np.testing.assert_allclose(
            got, np.asarray(expected, np.float32), rtol=case.rtol, atol=tolerance, err_msg=case.name
        )
