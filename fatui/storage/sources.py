"""Runs by name: ids of the history, result files, and folders of them."""

from pathlib import Path
from typing import Final

from attention.core.errors import UsageError
from attention.core.files import expand_home
from attention.core.results import Report
from fatui.storage.history import RunHistory
from fatui.storage.result_files import read
from fatui.untrusted_text import one_line

MAX_RUNS: Final = 1000
"""Maximum runs of a folder."""


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
        return sorted((read(file) for file in files_of(path)), key=lambda report: report.run.started)
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
    if len(found) > MAX_RUNS:
        raise UsageError(f"{shown}: {len(found):,} files; at most {MAX_RUNS:,} are read")
    return found


def is_folder(path: Path) -> bool:
    """Return whether a path is a folder; one that cannot be looked up is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False
