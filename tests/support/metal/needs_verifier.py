"""The verifier for the kernels' tests; importing this skips a test if nothing can be compiled."""

import pytest

from tests.support.metal.verifier import Finding, address_spaces, building, verify

__all__ = ["Finding", "address_spaces", "verify"]

pytest.importorskip("clang.cindex", reason="the libclang wheel is not installed")
if building.missing() is not None:
    pytest.skip(f"the verifier cannot be used: {building.missing()}", allow_module_level=True)
