"""The kernels of all backends take the same keywords, with the same defaults."""

import inspect

import pytest

from attention.kernels import cpu, cuda, metal
from attention.kernels.common import FlashAttention


@pytest.mark.parametrize("backend", [cpu, cuda, metal], ids=lambda module: module.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", ["flash_attention", "flash_attention_with_logsumexp"])
def test_every_kernel_takes_the_common_keywords(backend, name) -> None:
    _, *common = inspect.signature(FlashAttention.__call__).parameters.values()
    own = inspect.signature(getattr(backend, name)).parameters
    for parameter in common:
        assert (own[parameter.name].kind, own[parameter.name].default) == (parameter.kind, parameter.default)
