"""The history of runs: one SQLite file, safe for several writing processes; runs by name, also of files and folders."""

import contextlib
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import msgspec
from msgspec import Struct, structs

from attention.core.errors import UsageError, suggestion
from attention.core.files import expand_home, make_folder
from attention.core.results import Report, in_order, sealed
from fatui import storage
from fatui.storage import result_files
from fatui.storage.result_files import read
from fatui.untrusted_text import escape_all, one_line
from fatui.verdict import finding

T = TypeVar("T")

VERSION: Final = 1
AUXILIARY_BYTES: Final = 2**16
"""SQLite's index of its log has 32 KiB at least."""
PATIENCE_S: Final = 10.0
"""Seconds to wait for another process that is writing."""
MAX_QUERY_S: Final = 60.0
MAX_LINE_BYTES: Final = 100_000
MAX_RUNS: Final = 100_000
NO_ROOM: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
"""What SQLite says where its files cannot grow or be made."""
FILE: Final = "history.sqlite"
LAST: Final = "last"
TABLE: Final = """
    CREATE TABLE IF NOT EXISTS runs (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        line BLOB NOT NULL,
        report BLOB NOT NULL
    )
"""
MAX_RUNS_OF_FOLDER: Final = 1000
"""Maximum runs of a folder."""


class HistoryError(RuntimeError):
    """The history cannot be read or written; the message is one line."""


class UnknownRun(HistoryError):
    """The history has no such run, or several; a usage error."""


class RunSummary(Struct, frozen=True, kw_only=True):
    """The summary of a run, for lists."""

    id: str
    started: str
    seconds: float
    preset: str | None
    interrupted: bool
    device: str | None
    backend: str | None
    cases: int
    implementations: tuple[str, ...]
    finding: str
    shape: str = ""
    """Its case, of several their number and the first; empty of runs that were kept before this was."""


def summary_of(report: Report) -> RunSummary:
    """Summarise a report for lists."""
    names = dict.fromkeys(row.implementation for case in report.all_cases for row in case.rows)
    return RunSummary(
        id=report.run.id,
        started=report.run.started,
        seconds=report.run.seconds,
        preset=report.run.preset,
        interrupted=report.run.interrupted,
        device=report.environment.machine,
        backend=report.environment.backend,
        cases=len(report.all_cases),
        implementations=tuple(names),
        finding=finding(report),
        shape=_shape(report),
    )


def _shape(report: Report) -> str:
    cases = report.all_cases
    count = f"{len(cases)} cases, " if len(cases) > 1 else ""
    return f"{count}{cases[0].workload.label}" if cases else ""


class RunHistory:
    """The user's runs; a damaged file is moved aside, never deleted.

    Attributes:
        path: the file.
        notice: a warning from opening the file, or None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or storage.data_dir() / FILE
        self.notice: str | None = None
        self._seen: tuple[int, int] | None = None

    def add(self, report: Report) -> None:
        """Store a report.

        Raises:
            HistoryError: the file cannot be written, already has a run of this id, or belongs to a newer fatui.
        """
        line, content = msgspec.json.encode(summary_of(report)), sealed(report)

        def insert(database: sqlite3.Connection) -> None:
            database.execute("INSERT INTO runs (id, line, report) VALUES (?, ?, ?)", (report.run.id, line, content))

        try:
            self._use(insert)
        except sqlite3.IntegrityError:
            raise HistoryError(f"history: there is a run '{one_line(report.run.id)}' already") from None

    def runs(self) -> list[RunSummary]:
        """Return all runs, latest first; `notice` gives the number of unreadable ones, which are left out.

        Raises:
            HistoryError: the file cannot be read, or belongs to a newer fatui.
        """
        if not self._exists():
            return []
        query = "SELECT id, CAST(line AS BLOB) FROM runs WHERE length(line) < ? ORDER BY number DESC LIMIT ?"
        found = self._use(lambda database: database.execute(query, (MAX_LINE_BYTES, MAX_RUNS)).fetchall(), reading=True)
        lines = [line for identity, content in found if (line := _line(identity, content))]
        if len(lines) < len(found):
            self.notice = f"history: {len(found) - len(lines)} runs of {self.path} cannot be read and are left out"
        return lines

    def get(self, name: str) -> Report:
        """Return the run with an id or a unique prefix of it, "last", or "last~1" for the one before.

        Raises:
            UnknownRun: there is no such run, or more than one.
            HistoryError: the file or the run cannot be read.
        """
        identity = self.find(name)
        query = "SELECT CAST(report AS BLOB) FROM runs WHERE id = ? AND length(report) < ?"
        arguments = identity, result_files.MAX_FILE_BYTES
        row = self._use(lambda database: database.execute(query, arguments).fetchone(), reading=True)
        try:
            return result_files.decode(row[0] if row else b"")
        except ValueError as error:
            raise HistoryError(f"history: run '{one_line(identity, 80)}' cannot be read: {error}") from error

    def find(self, name: str) -> str:
        """Return the id of the run with a name as accepted by get().

        Raises:
            UnknownRun: there is no such run, or more than one.
            HistoryError: the file cannot be read.
        """
        if not self._exists():
            raise UnknownRun(f"history: there is no run '{one_line(name, 80)}'; the history is empty")
        return self._use(lambda database: _find(database, name), reading=True)

    def remove(self, name: str) -> Report | None:
        """Remove a run, named as for get(), and return it, so that add() can restore it; None if it is unreadable.

        Raises:
            UnknownRun: there is no such run, or more than one.
            HistoryError: the file cannot be written.
        """
        identity, report = self.find(name), None
        with contextlib.suppress(HistoryError):
            report = self.get(identity)
        self._use(lambda database: database.execute("DELETE FROM runs WHERE id = ?", (identity,)))
        return report

    def _exists(self) -> bool:
        try:
            self.path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise HistoryError(f"history: {self.path} cannot be used: {error.strerror or error}") from error
        return True

    def _use(self, work: Callable[[sqlite3.Connection], T], *, reading: bool = False) -> T:
        """Run `work` in one transaction; create the file if it is missing, and replace it if it is damaged.

        Raises:
            HistoryError: the file cannot be used.
            sqlite3.IntegrityError: the work violates a constraint.
        """
        try:
            try:
                return self._transaction(work, reading)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                if not _is_damage(error):
                    raise
                self._recover(error)
                return self._transaction(work, reading)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            full = _code(error) in NO_ROOM and _is_full(self.path)
            why = f"the disk is full ({error})" if full else error
            raise HistoryError(f"history: {self.path} cannot be used: {why}") from error
        except OSError as error:
            raise HistoryError(f"history: {self.path} cannot be used: {error.strerror or error}") from error

    def _transaction(self, work: Callable[[sqlite3.Connection], T], reading: bool) -> T:
        make_folder(self.path.parent)
        self._seen = _identity(self.path)
        with contextlib.closing(_connect(self.path, reading)) as database, database:
            return work(database)

    def _recover(self, error: Exception) -> None:
        """Move the damaged file aside, unless another process has done so, and copy the readable runs to a new one."""
        if _identity(self.path) != self._seen:
            return
        aside = self._set_aside()
        kept = 0
        for order in ("ASC", "DESC"):  # from both ends, up to the damage
            rows: list[tuple[object, ...]] = []
            with (
                contextlib.suppress(sqlite3.Error, UnicodeDecodeError),
                contextlib.closing(sqlite3.connect(aside)) as old,
            ):
                _limit_time(old)
                rows.extend(old.execute(f"SELECT number, id, line, report FROM runs ORDER BY number {order}"))
            kept += self._transaction(partial(_restore_rows, rows=rows), reading=False)
        self.notice = (
            f"history: {self.path} is damaged ({error}); it is kept as {aside}, "
            f"and a new one was started with the {kept} runs that could be read"
        )

    def _set_aside(self) -> Path:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + ending).rename(aside.with_name(aside.name + ending))
        return aside


def _restore_rows(database: sqlite3.Connection, rows: Sequence[tuple[object, ...]]) -> int:
    before = database.total_changes
    for row in rows:
        with contextlib.suppress(sqlite3.IntegrityError):
            database.execute("INSERT INTO runs (number, id, line, report) VALUES (?, ?, ?, ?)", row)
    return database.total_changes - before


def _is_damage(error: Exception) -> bool:
    """Whether the file itself is broken, rather than locked, read-only or on a full disk.

    SQLite's message may quote a damaged schema, which Python then cannot decode.
    """
    if isinstance(error, UnicodeDecodeError):
        return True
    return _code(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _code(error: Exception) -> int:
    """Return SQLite's primary result code of an error; 0 if Python raised it by itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _line(identity: object, content: object) -> RunSummary | None:
    """Decode a run's summary; return None if it cannot be read."""
    if not isinstance(content, bytes):
        return None
    try:
        line = msgspec.json.decode(content, type=RunSummary)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    in_bounds = 0 <= line.seconds <= result_files.MAX_SECONDS and 0 <= line.cases < 10**9
    return escape_all(structs.replace(line, id=str(identity))) if in_bounds else None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connect(path: Path, reading: bool) -> sqlite3.Connection:
    try:
        return _prepared(sqlite3.connect(path, timeout=PATIENCE_S), path)
    except sqlite3.OperationalError:
        if not reading or (os.access(path.parent, os.W_OK) and (not _is_full(path) or _has_log(path))):
            raise
    # In a read-only folder and on a full disk SQLite cannot make its auxiliary files; an immutable database needs none.
    address = f"file:{quote(str(path))}?mode=ro&immutable=1"
    return _prepared(sqlite3.connect(address, timeout=PATIENCE_S, uri=True), path)


def _is_full(path: Path) -> bool:
    """Whether the disk has no room for the auxiliary files."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(path.parent).free < AUXILIARY_BYTES
    return False


def _has_log(path: Path) -> bool:
    """Whether the last runs are in SQLite's log only, which an immutable database leaves out."""
    with contextlib.suppress(OSError):
        return path.with_name(f"{path.name}-wal").stat().st_size > 0
    return False


def _prepared(database: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    try:
        database.text_factory = partial(str, encoding="utf-8", errors="replace")
        _limit_time(database)
        _prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _limit_time(database: sqlite3.Connection) -> None:
    """Interrupt queries that take too long, such as one over a maliciously made view."""
    end = time.monotonic() + MAX_QUERY_S
    database.set_progress_handler(lambda: time.monotonic() > end, 100_000)


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    """Create the table if it is missing, and read from it once, so that damage shows immediately."""
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found > VERSION:
        raise HistoryError(f"history: {path} was made by a newer fatui (version {found}, this one reads {VERSION})")
    if found < VERSION:
        _patiently(database, "PRAGMA journal_mode = WAL")
        with database:
            database.execute("BEGIN IMMEDIATE")
            database.execute(TABLE)
            database.execute(f"PRAGMA user_version = {VERSION}")
    database.execute("SELECT id FROM runs LIMIT 1").fetchone()


def _patiently(database: sqlite3.Connection, statement: str) -> None:
    """Execute a statement that SQLite does not retry by itself: a change of the journal mode."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            database.execute(statement)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.02)
        else:
            return


def _find(database: sqlite3.Connection, name: str) -> str:
    ids = [str(found) for (found,) in database.execute("SELECT id FROM runs ORDER BY number DESC LIMIT ?", (MAX_RUNS,))]
    shown = one_line(name, 80)
    if name == LAST or name.startswith(LAST + "~"):
        back = name.removeprefix(LAST).removeprefix("~") or "0"
        if back.isascii() and back.isdigit() and len(back) < 9 and int(back) < len(ids):
            return ids[int(back)]
        raise UnknownRun(f"history: there is no run '{shown}'; it has {len(ids)}")
    matching = [found for found in ids if name and found.startswith(name)]
    if name in matching or len(matching) == 1:
        return name if name in matching else matching[0]
    if matching:
        listed = one_line(", ".join(found[:80] for found in matching[:8]))
        raise UnknownRun(f"history: '{shown}' could be {listed}; give more of the id")
    hint = suggestion(shown, [one_line(found, 80) for found in ids[:1000]])
    raise UnknownRun(f"history: there is no run '{shown}'{hint}; `fatui history` lists them")


def read_run(name: str, history: RunHistory) -> Report:
    """Read a run from a file if there is one of that name, else from the history.

    Raises:
        UsageError: the file is not a run.
        HistoryError: the history is unusable, or has no such run.
    """
    path = expand_home(name)
    return read(path) if "/" in name or path.is_file() else history.get(name)


def read_runs(name: str, history: RunHistory) -> list[Report]:
    """Read the runs of a folder in the order in which they were started, those of names joined by commas, or one run.

    Raises:
        UsageError: a file is not a run, or the folder has none.
        HistoryError: the history is unusable, or has no such run.
    """
    path = expand_home(name)
    if is_folder(path):
        return in_order(map(read, files_of(path)))
    if "," in name and not path.is_file():
        return [read_run(part.strip(), history) for part in name.split(",")]
    return [read_run(name, history)]


def files_of(folder: Path) -> list[Path]:
    """Return the result files of a folder, by name.

    Raises:
        UsageError: there are none, too many, or the folder cannot be read.
    """
    try:
        found = sorted(folder.glob("*.json"))
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read: {error.strerror or error}") from error
    shown = one_line(str(folder), 200)
    if not found:
        raise UsageError(f"{shown}: there is no file *.json in this folder")
    if len(found) > MAX_RUNS_OF_FOLDER:
        raise UsageError(f"{shown}: {len(found):,} files; at most {MAX_RUNS_OF_FOLDER:,} are read")
    return found


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; one that cannot be looked up is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
