"""Files of the user: run history, presets, settings and result files; here their folders, and atomic replacement."""

from pathlib import Path
from typing import Final

from attention.core.files import cache_folder, write_whole, xdg

NAME: Final = "fatui"


def config_dir() -> Path:
    """Return the folder of presets and settings: $XDG_CONFIG_HOME/fatui, or ~/.config/fatui."""
    return _xdg("XDG_CONFIG_HOME", ".config")


def data_dir() -> Path:
    """Return the folder of the history: $XDG_DATA_HOME/fatui, or ~/.local/share/fatui."""
    return _xdg("XDG_DATA_HOME", ".local/share")


def cache_dir() -> Path:
    """Return the folder of compiled kernels: $FATUI_CACHE_DIR, $XDG_CACHE_HOME/fatui, or ~/.cache/fatui."""
    return cache_folder()


def bundled_presets() -> Path:
    """Return the folder of the bundled presets, in a wheel or in a checkout."""
    here = Path(__file__).resolve().parents[1]
    packed = here / "_presets"
    return packed if packed.is_dir() else here.parent / "presets"


def own_presets() -> Path:
    """Return the folder of the user's own presets."""
    return config_dir() / "presets"


def _xdg(variable: str, fallback: str) -> Path:
    return xdg(variable, fallback) / NAME


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text as a whole; on any error the old file is unchanged, and no temporary file is left.

    Raises:
        OSError: the text could not be written.
    """
    write_whole(path, text.encode())
