"""The verifier as the kernels' tests need it; importing this skips a test where nothing can be compiled."""

import pytest
from verifier import Finding, address_spaces, building, verify

__all__ = ["Finding", "address_spaces", "verify"]

pytest.importorskip("clang.cindex", reason="the libclang wheel is not installed")
if building.missing() is not None:
    pytest.skip(f"the verifier cannot be used: {building.missing()}", allow_module_level=True)
