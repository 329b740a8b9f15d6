"""Copying of text to the system's clipboard."""

import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from rich.segment import Segment
from textual.color import Color
from textual.content import Content
from textual.filter import LineFilter

from fatui.untrusted_text import is_safe, one_line

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


POLL_MS: Final = 500
GRACE_S: Final = 3.0
"""Seconds for an orderly end: the run is stopped and stored, the layout saved."""
HUNG_UP: Final = 128 + signal.SIGHUP
"""The exit code after a hang-up."""


def watch_terminal(hung_up: Callable[[], object], abandon: Callable[[], object]) -> None:
    """Start a thread that ends the process once the terminal on stdin or stderr has hung up.

    Textual's reader spins on a terminal at its end, and its writer dies of the first write that fails, after which
    the event loop may block forever on its output. Neither notifies the app, so a separate thread watches.

    Args:
        hung_up: called from that thread; requests an orderly end from the event loop.
        abandon: called if the process still runs after `GRACE_S`; kills the child processes that must not outlive it.
    """
    files = [stream.fileno() for stream in (sys.__stdin__, sys.__stderr__) if stream is not None and stream.isatty()]
    if not files or not hasattr(select, "poll"):
        return
    poll = select.poll()
    for file in files:
        poll.register(file, 0)  # only POLLHUP and POLLERR, which are always reported

    def watch() -> None:
        while True:
            states = [state for _, state in poll.poll(POLL_MS)]
            if any(state & (select.POLLHUP | select.POLLERR) for state in states):
                break
            if states:  # POLLNVAL: this system cannot poll a terminal, or the file was closed
                return
        hung_up()
        time.sleep(GRACE_S)
        abandon()
        os._exit(HUNG_UP)

    threading.Thread(target=watch, name="terminal-watch", daemon=True).start()


PAIRS: Final = {
    "▁▂▃▄▅▆▇█": "__.-=+*#",
    "░▒▓": ".:%",
    "─━═╌┄▔▀": "-------",
    "│┃║▏▎▍▌▋▊▉▕▐": "||||||||||||",
    "┌┐└┘╭╮╰╯├┤┬┴┼┏┓┗┛╺╸╶╴": "++++++++++++++++++++",
    "●◉◎○•·": "oOO*.-",
    "■▲◆✚✖□△◇╳": "#^&+x=v%X",
    "★✓✗▸‹›→←↑↓▼…": "*x!><>><^vv.",
    "±≈×µ°⏎≤": "~~xu'<<",
    "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏": "|/-\\|/-\\|/",
}


def _table() -> dict[int, str]:
    made: dict[int, str] = {}
    for glyphs, letters in PAIRS.items():
        for index, glyph in enumerate(glyphs):
            made[ord(glyph)] = letters[min(index, len(letters) - 1)]
    for bits in range(2**8):  # Braille: the more dots, the denser
        made[0x2800 + bits] = " ..::++##"[bits.bit_count()]
    return made


TABLE: Final = _table()


def plain(text: str) -> str:
    """Return the text with each non-ASCII character replaced by an ASCII one of the same width."""
    return text if text.isascii() else "".join(_letter(each) for each in text)


def _letter(glyph: str) -> str:
    if glyph.isascii():
        return glyph
    return TABLE.get(ord(glyph), "?")


def literal(text: str) -> Content:
    """Return a title as one line without markup."""
    return Content(one_line(text))


class ControlFilter(LineFilter):
    """Filter that removes control characters, so that no escape code in foreign text reaches the terminal.

    Only characters without width are left here: others are made visible before lines are laid out.
    """

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Filter one line."""
        if all(control or text.isprintable() for text, _, control in segments):
            return segments
        return [
            Segment(text if control else "".join(filter(is_safe, text)), style, control)
            for text, style, control in segments
        ]


class AsciiFilter(LineFilter):
    """Filter that replaces every character that is not ASCII."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """Filter one line."""
        return [Segment(plain(text), style, control) for text, style, control in segments]
