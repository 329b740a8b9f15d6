"""The cache folder of compiled kernels: the user's alone, written atomically, trusted only while the hashes match.

For each key there are the compiled code and `<key>.json`, its record: the code's SHA-256, and what checking it came to.
What nobody has used for long is removed when something new is recorded.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from attention.errors import KernelUnavailable
from attention.files import expanded, home, make_folder

DAY_S: Final = 86400.0
UNUSED_S: Final = 90 * DAY_S
"""What was not used for so long is removed: kernels of another version, of another MLX, of a machine that is gone."""


def folder() -> Path:
    """Where compiled kernels live: `$FATUI_CACHE_DIR`, `$XDG_CACHE_HOME/fatui` or `~/.cache/fatui`, then `kernels`."""
    own = os.environ.get("FATUI_CACHE_DIR")
    if own:
        return expanded(own) / "kernels"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else home() / ".cache") / "fatui" / "kernels"


def ready_folder() -> Path:
    """The folder, made if need be, open to its owner alone (0700).

    Raises:
        KernelUnavailable: if it cannot be made or written, or belongs to someone else.
    """
    path = folder()
    try:
        make_folder(path, mode=0o700)
        state = path.stat()
        if state.st_uid != os.getuid():
            raise KernelUnavailable(f"the cache folder {path} belongs to another user")
        if stat.S_IMODE(state.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise KernelUnavailable(f"the cache folder {path} cannot be used: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise KernelUnavailable(f"the cache folder {path} cannot be written")
    return path


def read_record(key: str) -> dict[str, Any]:
    """What is known of a key; empty if nothing is."""
    path = folder() / f"{key}.json"
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    mark_used(path)
    return record if isinstance(record, dict) else {}


def write_record(key: str, record: dict[str, Any]) -> None:
    """Remembers what is known of a key."""
    _write(ready_folder() / f"{key}.json", json.dumps(record).encode())
    _remove_unused()


def write_failure(key: str, reason: str) -> None:
    """Remembers why something could not be had."""
    write_record(key, {"failure": reason, "time": time.time()})


def failure(record: dict[str, Any]) -> str | None:
    """Why something could not be had, for a day: a full disk, or a compiler that was killed, may be so no longer."""
    lasts = time.time() - float(record.get("time", 0)) < DAY_S
    return str(record["failure"]) if "failure" in record and lasts else None


def mark_used(path: Path) -> None:
    """Says that a file is still wanted: its time becomes now, to a day."""
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > DAY_S:
            os.utime(path)


def _remove_unused() -> None:
    """Removes files unused for long, and what a killed process left behind."""
    for path in folder().iterdir():
        unfinished = path.name.startswith(".")
        with contextlib.suppress(OSError):  # another process may be quicker
            if time.time() - path.stat().st_mtime > (DAY_S if unfinished else UNUSED_S):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_code(key: str) -> bytes | None:
    """The machine code of a key, if it is still what was recorded."""
    path = folder() / f"{key}.cubin"
    try:
        code = path.read_bytes()
    except OSError:
        return None
    mark_used(path)
    return code if hashlib.sha256(code).hexdigest() == read_record(key).get("sha256") else None


def write_code(key: str, code: bytes) -> None:
    """Keeps machine code and its hash; what was known of older code under this key is forgotten."""
    _write(ready_folder() / f"{key}.cubin", code)
    write_record(key, {"sha256": hashlib.sha256(code).hexdigest()})


@contextlib.contextmanager
def lock(key: str) -> Iterator[None]:
    """One process at a time works on a key; the others wait here and then find its work done.

    Opening the file to write makes its time now, so that nobody removes it as unused while it is held.
    """
    with (ready_folder() / f"{key}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(key: str) -> bool:
    """Whether a process works on a key now."""
    with (ready_folder() / f"{key}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _write(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
