"""Files of the user, read within bounds: whatever a path names, and whatever a TOML file nests."""

import errno
import os
import re
import stat
import tomllib
from pathlib import Path
from typing import Any, Final

NOWHERE: Final = Path("/nonexistent")
"""The home of an account that has none, as Debian names it."""
MAX_KEY_PARTS: Final = 100
"""Of a dotted TOML key: the time that tomllib takes grows with the square of them."""
QUOTED: Final = re.compile(r"""\"(?:[^"\\]|\\.)*"|'[^']*'""")


def home() -> Path:
    """The user's home folder; one that does not exist where the account has none, or $HOME is relative."""
    try:
        found = Path.home()
    except RuntimeError:
        return NOWHERE
    return found if found.is_absolute() else NOWHERE


def expanded(path: str | Path) -> Path:
    """Replace a leading "~" or "~name"; where there is no such user the path stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Make a folder and its parents where they are missing, but never the home folder itself.

    Raises:
        OSError: it cannot be made, or there is no home folder to make it in.
    """
    root = home()
    if root in folder.parents and not root.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no home folder {root}", os.fspath(folder))
    folder.mkdir(mode=mode, parents=True, exist_ok=True)


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file; a pipe or a device is refused without waiting for it.

    Raises:
        OSError: it cannot be read, is no regular file, or holds more than `limit` bytes.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb", closefd=True) as file:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not a file")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes")
    return content


def parse_toml(text: str) -> dict[str, Any]:
    """Read a TOML document in a time that grows with its size alone.

    Raises:
        ValueError: it is no TOML, or is nested beyond what can be read; the message says which in one line.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MAX_KEY_PARTS and QUOTED.sub("", line).count(".") > MAX_KEY_PARTS:
            raise ValueError(f"line {number} has a key of more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        problem = f"not TOML: {error}"
    except RecursionError:
        problem = "its values are nested too deeply"
    except ValueError:
        problem = "it has a number with too many digits"
    raise ValueError(problem)
