import pytest

from tests.support.stage import on_stage


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    """Isolate every test from the user's own files."""
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name.lower()))
    for name in ("NO_COLOR", "TMUX", "DISPLAY", "WAYLAND_DISPLAY", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def stage(private_folders):
    """Start the app at its usual size; it ends with the test."""
    async with on_stage() as stage:
        yield stage
