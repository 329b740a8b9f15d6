import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fatui.storage import history as history_module
from fatui.storage.history import HistoryError, RunHistory
from tests.support.patience import patient
from tests.support.sample_runs import plan_of, report_of, run_of

ROOT = Path(__file__).parents[3]
WRITER = """
import sys
from pathlib import Path
from fatui.storage.history import RunHistory
from tests.support.sample_runs import report_of, run_of
for number in range(12):
    RunHistory(Path(sys.argv[1])).add(report_of(run=run_of(identity=f"{sys.argv[2]}{number:02}")))
"""


def history(tmp_path: Path) -> RunHistory:
    return RunHistory(tmp_path / "h.sqlite")


def test_a_report_comes_back_as_it_was(tmp_path):
    report = report_of(run=run_of(preset="quick"))
    kept = history(tmp_path)
    kept.add(report)
    assert kept.get("last") == kept.get("0a1b") == report
    (line,) = kept.runs()
    assert (line.preset, line.cases, line.implementations[0]) == ("quick", 1, "baseline")
    assert line.finding.startswith("Use poc · 50")


def test_a_run_is_found_by_what_tells_it_from_others(tmp_path):
    kept = history(tmp_path)
    for identity in ("aa01", "aa02", "bb01"):
        kept.add(report_of(run=run_of(identity=identity)))
    assert kept.get("b").run.id == kept.get("last").run.id == "bb01"
    assert kept.get("last~2").run.id == "aa01"
    for name, reported in (
        ("aa", "could be"),
        ("zz", "no run"),
        ("", "no run"),
        ("last~9", "it has 3"),
        ("last~x", "no run"),
    ):
        with pytest.raises(HistoryError, match=reported):
            kept.get(name)


def test_a_removed_run_can_be_brought_back(tmp_path):
    kept = history(tmp_path)
    kept.add(report_of())
    report = kept.remove("last")
    assert kept.runs() == []
    kept.add(report)
    assert kept.get("last") == report


def test_nothing_is_made_by_looking(tmp_path):
    assert history(tmp_path).runs() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_two_processes_at_once_lose_nothing(tmp_path):
    path = tmp_path / "h.sqlite"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER, str(path)]
    processes = [subprocess.Popen([*command, letter], env=environment) for letter in "abc"]
    assert [process.wait(timeout=patient(30)) for process in processes] == [0, 0, 0]
    assert len(RunHistory(path).runs()) == 36


@pytest.mark.parametrize("content", [b"not a database at all, " * 100, None])
def test_a_damaged_file_is_kept_aside_and_a_new_one_begun(tmp_path, content):
    kept = history(tmp_path)
    if content is None:  # a true database with a hole in it
        kept.add(report_of())
        whole = kept.path.read_bytes()
        content = whole[:100] + b"\xa5" * 3000 + whole[3100:]
    kept.path.write_bytes(content)
    kept.add(report_of(run=run_of(identity="new")))
    assert kept.notice and "is damaged" in kept.notice
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes()[:100] == content[:100]
    assert RunHistory(kept.path).get("last").run.id == "new"


def test_a_newer_history_is_left_alone(tmp_path):
    kept = history(tmp_path)
    kept.add(report_of())
    with sqlite3.connect(kept.path) as database:
        database.execute(f"PRAGMA user_version = {history_module.VERSION + 1}")
    for use in (kept.runs, lambda: kept.add(report_of()), lambda: kept.get("last")):
        with pytest.raises(HistoryError, match="newer fatui"):
            use()
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError) as caught:
        RunHistory(tmp_path / "file" / "h.sqlite").add(report_of())
    assert "\n" not in str(caught.value)


def test_a_read_only_file_is_reported_in_one_line(tmp_path, monkeypatch):
    kept = history(tmp_path)
    kept.add(report_of())
    connect = sqlite3.connect
    monkeypatch.setattr(
        history_module.sqlite3,
        "connect",
        lambda path, timeout: connect(f"file:{path}?mode=ro", timeout=timeout, uri=True),
    )
    with pytest.raises(HistoryError, match="readonly"):
        kept.add(report_of(run=run_of(identity="other")))
    assert len(kept.runs()) == 1


def test_many_cases_make_one_line(tmp_path):
    from attention.core.workload import Workload

    kept = history(tmp_path)
    kept.add(report_of(plan_of([Workload(seq=64), Workload(seq=128)])))
    assert kept.runs()[0].cases == 2


def sqlite_error(words, code):
    error = sqlite3.OperationalError(words)
    error.sqlite_errorcode = code
    return error


def test_a_full_disk_is_not_blamed_for_what_else_fails(tmp_path, monkeypatch):
    def locked(address, **options):
        raise sqlite_error("database is locked", sqlite3.SQLITE_BUSY)

    kept = history(tmp_path)
    monkeypatch.setattr(history_module.sqlite3, "connect", locked)
    monkeypatch.setattr(history_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(HistoryError, match="cannot be used: database is locked"):
        kept.add(report_of())


def test_a_full_disk_leaves_the_history_to_be_read(tmp_path, monkeypatch):
    report, kept, connect = report_of(), history(tmp_path), sqlite3.connect
    kept.add(report)

    def without_room(address, **options):
        if not options.get("uri"):
            raise sqlite_error("disk I/O error", sqlite3.SQLITE_IOERR)
        return connect(address, **options)

    monkeypatch.setattr(history_module.sqlite3, "connect", without_room)
    with pytest.raises(HistoryError, match="disk I/O error"):
        kept.get("last")
    monkeypatch.setattr(history_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert kept.get("last") == report
    with pytest.raises(HistoryError, match=r"the disk is full \(disk I/O error\)"):
        kept.add(report_of(run=run_of(identity="another")))
    (tmp_path / "h.sqlite-wal").write_bytes(b"runs that are not in the file yet")
    with pytest.raises(HistoryError, match=r"the disk is full \(disk I/O error\)"):
        kept.get("last")
