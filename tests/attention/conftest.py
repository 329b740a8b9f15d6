"""Settings for all tests of the engine."""

import os

import mlx.core as mx
import pytest

from attention.kernels import cpu


@pytest.fixture(scope="session", autouse=True)
def _one_kernel_for_all_workers() -> None:
    """Compile the whole kernel before a worker's first test: another's first call would compile a part of it again."""
    if "PYTEST_XDIST_WORKER" in os.environ and not mx.cuda.is_available() and cpu.availability()[0]:
        cpu.load()
