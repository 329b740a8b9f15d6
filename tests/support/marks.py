"""Marks of single parameters."""

from functools import partial

import pytest

thorough = partial(pytest.param, marks=pytest.mark.thorough)
"""A parameter whose test runs in `.ci/run`, not by default."""
slow = partial(pytest.param, marks=pytest.mark.slow)
"""A parameter whose test is slow: of `parametrize("size", [10, slow(1000)])` one runs by default."""
