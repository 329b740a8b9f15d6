import pytest


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    """Isolate every test from the user's own files."""
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
