"""The cache folder of compiled kernels: the user's alone, written atomically, trusted only while the hashes match.

For each key there are the compiled code and `<key>.json`, its record: the code's SHA-256, and what checking it came to.
What nobody has used for long is removed when something new is recorded.

Nothing is read from a folder that belongs to another user or that others may write, nor a file of which that is true:
code from it would run with the user's rights, and its record is as easily forged as the code. A symbolic link counts
as no file. All names are made from keys; a record names no file.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Final, TypedDict

import msgspec

from attention.errors import KernelUnavailable
from attention.files import expanded, home, make_folder

DAY_S: Final = 86400.0
UNUSED_S: Final = 90 * DAY_S
"""What was not used for so long is removed: kernels of another version, of another MLX, of a machine that is gone."""
RETRY_S: Final = 600.0
"""How long a process remembers a failure that could not be recorded: no room on the disk, say."""
MAX_RECORD_BYTES: Final = 1 << 20
MAX_REASON_LENGTH: Final = 300
OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_unrecorded: dict[Path, tuple[float, str]] = {}
"""Failures that could not be recorded, by the path of the record: when, and why."""


class Record(TypedDict, total=False):
    """What is known of a key; a record with any other type in these places counts as damaged, and as empty."""

    sha256: str
    """Of the code."""
    failure: str
    """Why there is no code."""
    time: float
    """Of the failure, in seconds since 1970."""
    name: str
    """What a report calls the kernel."""
    checked: dict[str, str]
    """What checking the kernel came to, by machine."""


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
        KernelUnavailable: if it cannot be made or written, belongs to another user, or can be written by others.
    """
    path = folder()
    try:
        make_folder(path, mode=0o700)
        state = path.stat()
        problem = _distrust(state)
        if problem:
            raise KernelUnavailable(f"the cache folder {path} {problem}")
        if stat.S_IMODE(state.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise KernelUnavailable(f"the cache folder {path} cannot be used: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise KernelUnavailable(f"the cache folder {path} cannot be written")
    return path


def _distrust(state: os.stat_result) -> str | None:
    """Why a file or folder cannot be trusted, or None."""
    if state.st_uid != os.getuid():
        return "belongs to another user"
    if state.st_mode & OTHERS_WRITE:
        return f"can be written by other users (mode {stat.S_IMODE(state.st_mode):04o}): remove it, or chmod -R go-w"
    return None


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a file of the folder to be read.

    Raises:
        OSError: it is not there, or it, or its folder, cannot be trusted.
    """
    problem = _distrust(path.parent.stat())
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        state = os.fstat(file.fileno())
        problem = problem or _distrust(state)
        if problem or not stat.S_ISREG(state.st_mode):
            raise PermissionError(errno.EACCES, problem or "is no regular file", str(path))
        yield file


def read_record(key: str) -> Record:
    """What is known of a key; empty if nothing is, or if the record is damaged or cannot be trusted."""
    path = folder() / f"{key}.json"
    record = _read_record(path)
    if record:
        mark_used(path)
    return record


def _read_record(path: Path) -> Record:
    try:
        with _opened(path) as file:
            text = file.read(MAX_RECORD_BYTES + 1)
        if len(text) > MAX_RECORD_BYTES:
            return {}
        return msgspec.json.decode(text, type=Record)
    except (OSError, ValueError, RecursionError):
        return {}


def records(prefix: str) -> Iterator[Record]:
    """What is known of every key that begins so, for a report."""
    for path in sorted(folder().glob(f"{prefix}*.json")):
        record = _read_record(path)
        if record:
            yield record


def write_record(key: str, record: Record) -> None:
    """Remembers what is known of a key.

    Raises:
        KernelUnavailable: the folder cannot be used.
        OSError: the record cannot be written.
    """
    path = ready_folder() / f"{key}.json"
    _write(path, msgspec.json.encode(record))
    _unrecorded.pop(path, None)
    _remove_unused()


def write_failure(key: str, reason: str) -> None:
    """Remembers why something could not be had: for a day, or in this process alone if that cannot be recorded."""
    try:
        write_record(key, {"failure": reason, "time": time.time()})
    except (OSError, KernelUnavailable):
        _unrecorded[folder() / f"{key}.json"] = time.time(), reason


def failure(key: str) -> str | None:
    """Why something could not be had, in one line, if that is known.

    It is known for a day: a full disk, or a compiler that was killed, may be so no longer.
    """
    when, reason = _unrecorded.get(folder() / f"{key}.json", (0.0, ""))
    if reason and 0 <= time.time() - when < RETRY_S:
        return _one_line(reason)
    record = read_record(key)
    lasts = 0 <= time.time() - record.get("time", 0.0) < DAY_S
    return _one_line(record["failure"]) if "failure" in record and lasts else None


def _one_line(text: str) -> str:
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    return shown if len(shown) <= MAX_REASON_LENGTH else f"{shown[: MAX_REASON_LENGTH - 1]}…"


def mark_used(path: Path) -> None:
    """Says that a file is still wanted: its time becomes now, to a day."""
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > DAY_S:
            os.utime(path, follow_symlinks=False)


def _remove_unused() -> None:
    """Removes files unused for long, and what a killed process left behind."""
    for path in folder().iterdir():
        unfinished = path.name.startswith(".")
        with contextlib.suppress(OSError):  # another process may be quicker
            state = path.lstat()
            if time.time() - state.st_mtime > (DAY_S if unfinished else UNUSED_S):
                shutil.rmtree(path) if stat.S_ISDIR(state.st_mode) else path.unlink()


def digest(path: Path) -> str:
    """The SHA-256 of a file of the folder, in hexadecimal.

    Raises:
        OSError: it is not there, or cannot be trusted.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_path(key: str) -> Path:
    """Where the compiled library of a key lies."""
    return folder() / f"{key}.so"


def library(key: str) -> Path | None:
    """The compiled library of a key, if it is still what was recorded and can be trusted."""
    path = library_path(key)
    mark_used(path)
    try:
        return path if digest(path) == read_record(key).get("sha256") else None
    except OSError:
        return None


def read_code(key: str) -> bytes | None:
    """The machine code of a key, if it is still what was recorded and can be trusted."""
    path = folder() / f"{key}.cubin"
    try:
        with _opened(path) as file:
            code = file.read()
    except OSError:
        return None
    mark_used(path)
    return code if hashlib.sha256(code).hexdigest() == read_record(key).get("sha256") else None


def write_code(key: str, code: bytes) -> None:
    """Keeps machine code and its hash, if there is room; what was known of older code under this key is forgotten."""
    with contextlib.suppress(OSError):  # it is used all the same, by this process
        _write(ready_folder() / f"{key}.cubin", code)
        write_record(key, {"sha256": hashlib.sha256(code).hexdigest()})


def require_room(size: int) -> None:
    """See to it that so many bytes can be written into the folder now.

    Raises:
        OSError: they cannot.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with tempfile.TemporaryFile(dir=ready_folder(), prefix=".room-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that cannot tell
                raise


@contextlib.contextmanager
def lock(key: str) -> Iterator[None]:
    """One process at a time works on a key; the others wait here and then find its work done.

    The file's time becomes now, so that nobody removes it as unused while it is held.

    Raises:
        KernelUnavailable: the folder cannot be used.
    """
    with _lock_file(key) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(key: str) -> bool:
    """Whether a process works on a key now."""
    with _lock_file(key) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _lock_file(key: str) -> Iterator[int]:
    path = ready_folder() / f"{key}.lock"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KernelUnavailable(f"{path} cannot be opened: {error.strerror}") from error
    try:
        with contextlib.suppress(OSError):
            os.utime(handle)
        yield handle
    finally:
        os.close(handle)


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
