"""User files: base folders, atomic writing, and reading of any size, file type and depth of TOML nesting."""

import contextlib
import errno
import functools
import os
import re
import stat
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

from attention.core.errors import UsageError
from attention.core.numbers import shown_value

NEW_FILE_MODE: Final = 0o666
NO_HOME: Final = Path("/nonexistent")
"""Home folder of an account without one, as in Debian."""
BYTE_ORDER_MARK: Final = "\ufeff"
"""What some editors begin a text in UTF-8 with."""
MAX_KEY_PARTS: Final = 100
"""Maximum parts of a dotted TOML key: tomllib's time is quadratic in their number."""
QUOTED_KEY: Final = re.compile(r"""\"(?:[^"\\]|\\.)*"|'[^']*'""")


def home() -> Path:
    """Return the user's home folder; NO_HOME if the account has none or $HOME is relative."""
    try:
        found = Path.home()
    except RuntimeError:
        return NO_HOME
    return found if found.is_absolute() else NO_HOME


def checked_path(path: object) -> Path:
    """Return the path that a program passes as an argument.

    Raises:
        UsageError: it is none.
    """
    try:
        return Path(path)  # type: ignore[arg-type]  # which says what it does not take, bytes among them
    except TypeError as error:
        raise UsageError(f"path: got {shown_value(path)}; it takes a str or a pathlib.Path") from error


def expand_home(path: str | Path) -> Path:
    """Expand a leading "~" or "~name"; the path is unchanged if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def xdg(variable: str, fallback: str) -> Path:
    """Return a base folder of the XDG specification, or a folder in the home folder; relative paths are ignored."""
    given = Path(os.environ.get(variable, ""))
    return given if given.is_absolute() else home() / fallback


def cache_folder() -> Path:
    """Return $FATUI_CACHE_DIR, or a folder in $XDG_CACHE_HOME or ~/.cache; "~name" without such a user is ignored."""
    return _cache_folder(*map(os.environ.get, ("FATUI_CACHE_DIR", "XDG_CACHE_HOME", "HOME")))


@functools.lru_cache(maxsize=16)
def _cache_folder(*_environment: str | None) -> Path:
    """Return the folder for these variables; cached, because decoding on CUDA asks for it at each length."""
    given = expand_home(os.environ.get("FATUI_CACHE_DIR", ""))
    named = given.parts and not given.parts[0].startswith("~")
    return given if named else xdg("XDG_CACHE_HOME", ".cache") / "fatui"


def make_folder(folder: Path, mode: int = 0o777) -> None:
    """Create a folder and its missing parents, but never the home folder itself.

    Raises:
        OSError: the folder cannot be created, or there is no home folder.
    """
    root = home()
    if root in folder.parents and not root.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no home folder {root}", os.fspath(folder))
    folder.mkdir(mode=mode, parents=True, exist_ok=True)


def replace_file(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file atomically: a reader sees the old or the new contents, never a part.

    On any error the old file is unchanged, and no temporary file is left.

    Raises:
        OSError: it cannot be written.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, mode)
            file.write(data)
            file.flush()
            os.fsync(handle)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise


def is_replaced(path: Path) -> bool:
    """Whether a path is written by replacing its file; devices and pipes are written to in place."""
    return path.is_file() or not path.exists()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that a user named, by `replace_file`, with the mode of the old one; devices and pipes in place.

    Raises:
        OSError: it cannot be written.
    """
    if not is_replaced(path):
        path.write_bytes(data)
        return
    target = path.resolve()
    replace_file(target, data, _mode_for(target))


def _mode_for(target: Path) -> int:
    try:
        return target.stat().st_mode & 0o7777
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return NEW_FILE_MODE & ~mask


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a regular file; pipes and devices are refused without blocking.

    Raises:
        OSError: the file cannot be read, is not regular, or is larger than `limit` bytes.
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
    """Parse a TOML document in time linear in its size.

    Raises:
        ValueError: it is not TOML, or is nested too deeply; the message is one line.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.count(".") > MAX_KEY_PARTS and QUOTED_KEY.sub("", line).count(".") > MAX_KEY_PARTS:
            raise ValueError(f"line {number} has a key of more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text.removeprefix(BYTE_ORDER_MARK))
    except tomllib.TOMLDecodeError as error:
        problem = f"not TOML: {error}"
    except RecursionError:
        problem = "its values are nested too deeply"
    except ValueError:
        problem = "it has a number with too many digits"
    raise ValueError(problem)
