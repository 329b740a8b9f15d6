"""The ONNX Attention operator's own cases, opset 23, through the CUDA kernels in their types; needs a GPU."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("onnx")

from attention.kernels import cuda
from tests.support import onnx_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 3e-3), ("bfloat16", 2e-2)])
def test_all_69_cases_agree(dtype, tolerance):
    """The cases are mostly in float32, so that the error from rounding their inputs must be accepted."""
    assert len(onnx_cases.cases()) == 69
    for case in onnx_cases.cases():
        got = onnx_cases.run(case, onnx_cases.with_scale(cuda.flash_attention), getattr(mx, dtype))["Y"]
        expected = np.asarray(case.expected["Y"], np.float32)
        np.testing.assert_allclose(
            np.array(got.astype(mx.float32)), expected, rtol=2 * tolerance, atol=tolerance, err_msg=case.name
        )
