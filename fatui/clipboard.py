"""Copying of text to the system's clipboard."""

import os
import shutil
import subprocess
from typing import Final

PROGRAMS: Final = (
    ("pbcopy", (), ""),
    ("wl-copy", (), "WAYLAND_DISPLAY"),
    ("xclip", ("-selection", "clipboard"), "DISPLAY"),
    ("xsel", ("--clipboard", "--input"), "DISPLAY"),
    ("clip.exe", (), ""),
    ("tmux", ("load-buffer", "-w", "-"), "TMUX"),
)
PATIENCE_S: Final = 2.0


def copy(text: str) -> str | None:
    """Copy with the first program that is installed and works; return its name, or None if none did."""
    for program, arguments, needs in PROGRAMS:
        path = shutil.which(program)
        if path is None or (needs and not os.environ.get(needs)):
            continue
        try:
            subprocess.run(
                [path, *arguments],
                input=text.encode(),
                check=True,
                timeout=PATIENCE_S,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        return program
    return None
