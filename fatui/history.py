"""Every finished run, kept in one SQLite file that several processes may write at once."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from attention.errors import suggestion
from attention.report import Report
from fatui import figures, paths

VERSION: Final = 1
PATIENCE_S: Final = 10.0
"""How long to wait for another process that writes."""
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


class HistoryError(RuntimeError):
    """The history cannot be read or written, or has no such run; one line says which."""


class RunLine(Struct, frozen=True, kw_only=True):
    """A run as a list shows it."""

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


def line_of(report: Report) -> RunLine:
    """The line that a list shows for a report."""
    names = dict.fromkeys(row.implementation for case in report.all_cases for row in case.rows)
    return RunLine(
        id=report.run.id,
        started=report.run.started,
        seconds=report.run.seconds,
        preset=report.run.preset,
        interrupted=report.run.interrupted,
        device=report.environment.device,
        backend=report.environment.backend,
        cases=len(report.all_cases),
        implementations=tuple(names),
        finding=figures.finding(report),
    )


class History:
    """The runs of this user; a damaged file is set aside under another name, never lost.

    Attributes:
        path: the file.
        notice: what had to be told when the file was opened, or None.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or paths.data_dir() / FILE
        self.notice: str | None = None

    def add(self, report: Report) -> None:
        """Keeps a report.

        Raises:
            HistoryError: the file cannot be written, or is of a newer fatui.
        """
        line, content = msgspec.json.encode(line_of(report)), msgspec.json.encode(report)
        with self._open() as database:
            database.execute("INSERT INTO runs (id, line, report) VALUES (?, ?, ?)", (report.run.id, line, content))

    def runs(self) -> list[RunLine]:
        """All runs, the latest first; a line that cannot be read is left out.

        Raises:
            HistoryError: the file cannot be read, or is of a newer fatui.
        """
        if not self.path.exists():
            return []
        with self._open() as database:
            found = database.execute("SELECT line FROM runs ORDER BY number DESC").fetchall()
        lines = []
        for (content,) in found:
            with contextlib.suppress(msgspec.DecodeError):
                lines.append(msgspec.json.decode(content, type=RunLine))
        return lines

    def get(self, name: str) -> Report:
        """Returns the run with an id, the only one whose id begins so, "last", or "last~1" for the one before.

        Raises:
            HistoryError: there is none or more than one, or the file cannot be read.
        """
        with self._open_existing(name) as database:
            (content,) = database.execute("SELECT report FROM runs WHERE id = ?", (_find(database, name),)).fetchone()
        try:
            return msgspec.json.decode(content, type=Report)
        except msgspec.DecodeError as error:
            raise HistoryError(f"history: run '{name}' cannot be read: {error}") from error

    def remove(self, name: str) -> Report:
        """Takes a run out, named as for get(), and returns it, so that add() can bring it back.

        Raises:
            HistoryError: there is none or more than one, or the file cannot be written.
        """
        report = self.get(name)
        with self._open() as database:
            database.execute("DELETE FROM runs WHERE id = ?", (report.run.id,))
        return report

    @contextlib.contextmanager
    def _open_existing(self, name: str) -> Iterator[sqlite3.Connection]:
        if not self.path.exists():
            raise HistoryError(f"history: there is no run '{name}'; the history is empty")
        with self._open() as database:
            yield database

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Opens the file for one transaction, making it where it is missing, setting it aside where it is damaged."""
        try:
            with contextlib.closing(self._connected()) as database, database:
                yield database
        except sqlite3.Error as error:
            raise HistoryError(f"history: {self.path} cannot be used: {error}") from error
        except OSError as error:
            raise HistoryError(f"history: {self.path} cannot be used: {error.strerror or error}") from error

    def _connected(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before = _identity(self.path)
        try:
            return _connect(self.path)
        except sqlite3.OperationalError:
            raise  # locked, read-only, full: the file itself is whole
        except sqlite3.DatabaseError as error:
            if _identity(self.path) == before:  # or else another process has set it aside already
                aside = self._set_aside()
                self.notice = (
                    f"history: {self.path} is damaged ({error}); it is kept as {aside}, and a new one is begun"
                )
            return _connect(self.path)

    def _set_aside(self) -> Path:
        aside = self.path.with_name(f"{self.path.name}.damaged-{time.time_ns()}")
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                self.path.with_name(self.path.name + ending).rename(aside.with_name(aside.name + ending))
        return aside


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=PATIENCE_S)
    try:
        _prepare(database, path)
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, path: Path) -> None:
    """Makes the table where it is missing, and reads from it once, so that damage shows now."""
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
    """Executes what SQLite does not wait for by itself: a change of the journal's mode."""
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
    ids = [found for (found,) in database.execute("SELECT id FROM runs ORDER BY number DESC")]
    if name == LAST or name.startswith(LAST + "~"):
        back = name.removeprefix(LAST).removeprefix("~") or "0"
        if back.isascii() and back.isdigit() and len(back) < 9 and int(back) < len(ids):
            return str(ids[int(back)])
        raise HistoryError(f"history: there is no run '{name}'; it has {len(ids)}")
    matching = [found for found in ids if name and found.startswith(name)]
    if name in matching or len(matching) == 1:
        return name if name in matching else str(matching[0])
    if matching:
        raise HistoryError(f"history: '{name}' could be {', '.join(matching[:8])}; give more of the id")
    raise HistoryError(f"history: there is no run '{name}'{suggestion(name, ids)}; `fatui history` lists them")
