"""The cache folder of compiled kernels: private to the user, written atomically, verified by hashes.

Each key has its compiled code and `<key>.json`, its record: the code's SHA-256 and the results of its self-checks.
Entries unused for long are removed when something new is recorded.

Files and folders that belong to another user or are writable by others are never read: their code would run with the
user's rights, and the record is as easily forged as the code. A symbolic link counts as missing. File names are
derived from keys; a record contains no file name.
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
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Final, TypedDict

import msgspec

from attention.core.errors import KernelUnavailable
from attention.core.files import cache_folder, make_folder, replace_file

DAY_S: Final = 86400.0
UNUSED_S: Final = 90 * DAY_S
"""Entries unused for this long are removed: kernels of other versions, of other MLX versions, of former machines."""
RETRY_S: Final = 600.0
"""Seconds for which a process remembers a failure that could not be recorded, e.g. on a full disk."""
MAX_RECORD_BYTES: Final = 1 << 20
MAX_REASON_LENGTH: Final = 300
OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

_unrecorded: dict[Path, tuple[float, str]] = {}
"""Failures that could not be recorded, by path of the record: time and reason."""


class KernelRecord(TypedDict, total=False):
    """The record of a key; a record with other types in these fields counts as damaged and is treated as empty."""

    sha256: str
    """Hash of the code."""
    failure: str
    """Reason why there is no code."""
    time: float
    """Time of the failure, in seconds since 1970."""
    name: str
    """Name of the kernel for reports."""
    checked: dict[str, str]
    """Results of the kernel's self-checks, by machine."""
    variant: str
    """Instruction set that a library for a CPU is compiled for."""
    parts: list[str]
    """Parts of the latest library, where a record stands for what calls have needed so far."""


def folder() -> Path:
    """Return the kernels' folder in the cache folder."""
    return _kernels_folder(cache_folder())


@cache
def _kernels_folder(folder: Path) -> Path:
    return folder / "kernels"


def ensure_folder() -> Path:
    """Return the folder, created with mode 0700 if missing.

    Raises:
        KernelUnavailable: it cannot be created or written, belongs to another user, or is writable by others.
    """
    path = folder()
    try:
        make_folder(path, mode=0o700)
        state = path.stat()
        problem = _distrust_reason(state)
        if problem:
            raise KernelUnavailable(f"the cache folder {path} {problem}")
        if stat.S_IMODE(state.st_mode) != 0o700:
            path.chmod(0o700)
    except OSError as error:
        raise KernelUnavailable(f"the cache folder {path} cannot be used: {error.strerror or error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise KernelUnavailable(f"the cache folder {path} cannot be written")
    return path


def _distrust_reason(state: os.stat_result) -> str | None:
    """Return why a file or folder cannot be trusted, or None."""
    if state.st_uid != os.getuid():
        return "belongs to another user"
    if state.st_mode & OTHERS_WRITE:
        return f"can be written by other users (mode {stat.S_IMODE(state.st_mode):04o}): remove it, or chmod -R go-w"
    return None


@contextlib.contextmanager
def _open_trusted(path: Path) -> Iterator[BufferedReader]:
    """Open a file of the folder for reading.

    Raises:
        OSError: the file is missing, or it or its folder cannot be trusted.
    """
    problem = _distrust_reason(path.parent.stat())
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        state = os.fstat(file.fileno())
        problem = problem or _distrust_reason(state)
        if problem or not stat.S_ISREG(state.st_mode):
            raise PermissionError(errno.EACCES, problem or "is no regular file", str(path))
        yield file


def read_record(key: str) -> KernelRecord:
    """Return the record of a key, empty if it is missing, damaged or untrusted."""
    path = folder() / f"{key}.json"
    record = _read_record(path)
    if record:
        mark_used(path)
    return record


def _read_record(path: Path) -> KernelRecord:
    try:
        with _open_trusted(path) as file:
            text = file.read(MAX_RECORD_BYTES + 1)
        if len(text) > MAX_RECORD_BYTES:
            return {}
        return msgspec.json.decode(text, type=KernelRecord)
    except (OSError, ValueError, RecursionError):
        return {}


def records(prefix: str) -> Iterator[KernelRecord]:
    """Yield the records of all keys with a prefix, for a report."""
    for path in sorted(folder().glob(f"{prefix}*.json")):
        record = _read_record(path)
        if record:
            yield record


def write_record(key: str, record: KernelRecord) -> None:
    """Write the record of a key.

    Raises:
        KernelUnavailable: the folder cannot be used.
        OSError: the record cannot be written.
    """
    path = ensure_folder() / f"{key}.json"
    replace_file(path, msgspec.json.encode(record))
    _unrecorded.pop(path, None)
    _remove_unused()


def write_failure(key: str, reason: str) -> None:
    """Record a failure for a day, or only in this process if it cannot be written."""
    try:
        write_record(key, {"failure": reason, "time": time.time()})
    except (OSError, KernelUnavailable):
        _unrecorded[folder() / f"{key}.json"] = time.time(), reason


def failure(key: str) -> str | None:
    """Return the recorded failure of a key in one line, or None.

    A failure is remembered for a day: its cause, such as a full disk or a killed compiler, may be gone by then.
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
    """Mark a file as used: set its time to now, at most once a day."""
    with contextlib.suppress(OSError):
        if time.time() - path.lstat().st_mtime > DAY_S:
            os.utime(path, follow_symlinks=False)


def _remove_unused() -> None:
    """Remove files unused for long, and leftovers of killed processes."""
    for path in folder().iterdir():
        unfinished = path.name.startswith(".")
        with contextlib.suppress(OSError):  # another process may have removed it
            state = path.lstat()
            if time.time() - state.st_mtime > (DAY_S if unfinished else UNUSED_S):
                shutil.rmtree(path) if stat.S_ISDIR(state.st_mode) else path.unlink()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file of the folder, in hexadecimal.

    Raises:
        OSError: the file is missing or untrusted.
    """
    with _open_trusted(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def library_path(key: str) -> Path:
    """Return the path of a key's compiled library."""
    return folder() / f"{key}.so"


def library(key: str) -> Path | None:
    """Return the compiled library of a key, if it matches its record and can be trusted."""
    path = library_path(key)
    mark_used(path)
    try:
        return path if digest(path) == read_record(key).get("sha256") else None
    except OSError:
        return None


def read_code(key: str) -> bytes | None:
    """Return the machine code of a key, if it matches its record and can be trusted."""
    path = folder() / f"{key}.cubin"
    try:
        with _open_trusted(path) as file:
            code = file.read()
    except OSError:
        return None
    mark_used(path)
    return code if hashlib.sha256(code).hexdigest() == read_record(key).get("sha256") else None


def write_code(key: str, code: bytes) -> None:
    """Store machine code and its hash, if there is space; the record of older code under this key is replaced."""
    with contextlib.suppress(OSError):  # this process uses it anyway
        replace_file(ensure_folder() / f"{key}.cubin", code)
        write_record(key, {"sha256": hashlib.sha256(code).hexdigest()})


def require_room(size: int) -> None:
    """Check that `size` bytes can be written into the folder now.

    Raises:
        OSError: there is not enough space.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with tempfile.TemporaryFile(dir=ensure_folder(), prefix=".room-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system does not support preallocation
                raise


@contextlib.contextmanager
def lock(key: str) -> Iterator[None]:
    """Hold the lock of a key: one process at a time works on it, the others wait and then use the result.

    The lock file's time is set to now, so that it is not removed as unused while it is held.

    Raises:
        KernelUnavailable: the folder cannot be used.
    """
    with _lock_file(key) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_locked(key: str) -> bool:
    """Return whether a process holds the lock of a key."""
    with _lock_file(key) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@contextlib.contextmanager
def _lock_file(key: str) -> Iterator[int]:
    path = ensure_folder() / f"{key}.lock"
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


KINDS: Final = frozenset({".py", ".cpp", ".hpp", ".cu", ".cuh", ".metal"})


@cache
def code_fingerprint(*rooms: str) -> str:
    """Return a digest of the source files in these folders of `attention`; some milliseconds, cached."""
    root = Path(__file__).parents[2]
    sha = hashlib.sha256()
    for path in sorted(path for room in rooms for path in (root / room).rglob("*") if path.suffix in KINDS):
        sha.update(path.relative_to(root).as_posix().encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()[:12]
