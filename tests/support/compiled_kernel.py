"""One compiled kernel for the whole session, in a separate cache folder (or in $FATUI_CACHE_DIR, if set)."""

import os
from collections.abc import Iterator

import mlx.core as mx
import pytest

from attention.kernels import cpu


@pytest.fixture(scope="session")
def compiled_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if "FATUI_CACHE_DIR" not in os.environ:
            patch.setenv("FATUI_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        usable, reason = cpu.availability()
        if not usable:
            pytest.skip(reason)
        cpu.load()
        yield


@pytest.fixture
def kernel(compiled_kernel: None) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)
