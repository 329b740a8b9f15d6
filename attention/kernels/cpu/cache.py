"""The cache folder of compiled kernels: the user's alone, written atomically, trusted only while its hashes match."""

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attention.kernels.cpu.unavailable import KernelUnavailable


def folder() -> Path:
    """Where compiled kernels live: `$FATUI_CACHE_DIR`, `$XDG_CACHE_HOME/fatui` or `~/.cache/fatui`, then `kernels`."""
    own = os.environ.get("FATUI_CACHE_DIR")
    if own:
        return Path(own) / "kernels"
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg) if xdg else Path.home() / ".cache") / "fatui" / "kernels"


def ready_folder() -> Path:
    """The folder, made if need be, open to its owner alone (0700).

    Raises:
        KernelUnavailable: if it cannot be made or written, or belongs to someone else.
    """
    path = folder()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_record(key: str) -> dict[str, Any] | None:
    """What is known of a key: `{"library": name, "sha256": ...}` or `{"failure": reason}`; None if nothing."""
    try:
        record = json.loads((folder() / f"{key}.json").read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def write_record(key: str, record: dict[str, Any]) -> None:
    """Remember a library and its hash, or a failure."""
    write_atomically(folder() / f"{key}.json", json.dumps(record).encode())


def forget(key: str) -> None:
    """Remove what is known of a key, so that the next load compiles again."""
    (folder() / f"{key}.json").unlink(missing_ok=True)


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """One process compiles at a time; the others wait here and then find its work done."""
    with (folder() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
