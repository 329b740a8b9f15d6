"""One compiled kernel for the whole session, in its cache folder."""

from collections.abc import Iterator

import mlx.core as mx
import pytest

from attention.kernels import cpu


@pytest.fixture(scope="session")
def compiled_kernel() -> None:
    usable, reason = cpu.availability()
    if not usable:
        pytest.skip(reason)
    cpu.load()


@pytest.fixture
def kernel(compiled_kernel: None) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
