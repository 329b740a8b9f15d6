import pytest

from attention.masks import block_list


@pytest.fixture(autouse=True)
def by_numpy(monkeypatch):
    """Make lists by NumPy, whatever the kernels of other tests have loaded."""
    monkeypatch.setattr(block_list, "_builder", None)
