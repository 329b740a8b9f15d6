"""The ONNX Attention operator's own cases, opset 23, straight through the CPU kernel.

By way of `poc` they are in every run (tests/attention/test_onnx_attention.py); here they run under the sanitizers.
"""

import mlx.core as mx
import numpy as np
import pytest
from onnx_cases import cases, run

from attention.kernels import cpu

pytestmark = [pytest.mark.usefixtures("kernel"), pytest.mark.slow]
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


def test_all_69_cases_agree():
    assert len(cases()) == 69
    for case in cases():
        got = np.array(run(case, cpu.flash_attention).astype(mx.float32))
        tolerance = TOLERANCE[case.expected.dtype.name]
        np.testing.assert_allclose(
            got, np.asarray(case.expected, np.float32), rtol=1e-3, atol=tolerance, err_msg=case.name
        )
