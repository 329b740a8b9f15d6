"""Stored choices survive damage, newer versions, read-only folders, other processes and clocks set back."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from attention.core import events as on
from attention.implementations.autotune import store
from attention.implementations.autotune.store import Store
from tests.support.patience import patient
from tests.support.tuning_examples import A_CLASS, an_entry, class_number

ROOT = Path(__file__).parents[4]
NOBODY = 65534


@pytest.fixture
def reported() -> Iterator[list[str]]:
    lines: list[str] = []
    with on.listening_to_tuning(lambda event: lines.append(on.tuning_log_line(event))):
        yield lines


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tuning.toml"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter and read, so that a test can drop its privileges."""
    folder = Path(tempfile.mkdtemp(prefix="fatui-open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights(folder: Path) -> Iterator[None]:
    """Remove the permission to write in a folder, also for root."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_an_entry_comes_back_in_another_process_as_it_was(path: Path) -> None:
    Store(path).put(an_entry())
    assert Store(path).get(A_CLASS) == an_entry()


def test_the_file_is_readable_toml_with_its_schema(path: Path) -> None:
    Store(path).put(an_entry())
    document = tomllib.loads(path.read_text())
    assert document["schema"] == 3
    assert document["class"][0]["winner"] == "poc"
    assert document["class"][0]["workload"]["pass"] == "forward"
    assert "fatui tune --show" in path.read_text().splitlines()[0]


@pytest.mark.parametrize(
    "text", ["schema = = 1", "schema = 1\nclass = 3\n", "winner = 1\n", "\udcff", "schema = 1\n[[class]]\n"]
)
def test_a_damaged_file_is_set_aside_whole_and_a_new_one_begun(path: Path, text: str, reported: list[str]) -> None:
    path.parent.mkdir()
    damaged = text.encode(errors="surrogateescape")
    path.write_bytes(damaged)
    kept = Store(path)
    assert kept.get(A_CLASS) is None
    kept.put(an_entry())
    assert [aside.read_bytes() for aside in path.parent.glob("*.damaged-*")] == [damaged]
    assert Store(path).get(A_CLASS) == an_entry()
    assert len(reported) == 1
    assert "damaged; it is kept as tuning.damaged-" in reported[0]


@pytest.mark.parametrize(
    ("found", "edited"),
    [
        ("poc = 0.0001", "poc = 0.0"),
        ("poc = 0.0001", "poc = nan"),
        ('winner = "poc"', 'winner = "mlx"'),
        ("[class.alone_s]\n", "[class.alone_s]\nmlx = 0.0001\n"),
        ("[class.alone_s]\n", "[class.alone_s]\npoc = -1.0\n"),
        ("poc = 0.0001", "poc = inf"),
        ("ratio = 2.0", "ratio = nan"),
        ("ratio = 2.0", "ratio = -2.0"),
        ("ratio = 2.0", "ratio = 2.0\nhigh = inf"),
        ("ratio = 2.0", "ratio = 2.0\nmax_error = -inf"),
        ("03:04:05+00:00", "03:04:05"),
        ("head_dim = 64", "head_dim = -64"),
        ("streams = 8", "streams = 0"),
        ("kv_seq = 512", "kv_seq = 9000000000000000000"),
    ],
)
def test_figures_that_no_trial_finds_are_damage(path: Path, found: str, edited: str, reported: list[str]) -> None:
    Store(path).put(an_entry())
    text = path.read_text()
    assert found in text
    path.write_text(text.replace(found, edited))
    assert Store(path).get(A_CLASS) is None
    assert [aside.read_text() for aside in path.parent.glob("*.damaged-*")] == [text.replace(found, edited)]
    assert "damaged; it is kept as tuning.damaged-" in reported[0]
    assert len(reported) == 1 and "\n" not in reported[0]


@pytest.mark.thorough
def test_a_large_store_is_parsed_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {class_number(number): an_entry(class_number(number)) for number in range(1, 301)}
    path.parent.mkdir()
    path.write_text(store._as_text(entries))
    parsed = []
    parse = store.parse_toml
    monkeypatch.setattr(store, "parse_toml", lambda text: parsed.append(len(text)) or parse(text))
    kept = Store(path)
    for number in range(1, 6):
        assert kept.get(class_number(number)) == entries[class_number(number)]
        kept.put(an_entry(class_number(number), winner="mlx"))
    assert len(parsed) == 1
    assert [entry.winner for entry in Store(path).entries()] == ["mlx"] * 5 + ["poc"] * 295


def test_two_damaged_files_in_one_second_are_both_kept(path: Path, reported: list[str]) -> None:
    path.parent.mkdir()
    for text in ("one", "two"):
        path.write_text(text)
        Store(path, lambda: datetime(2026, 1, 1, tzinfo=UTC)).entries()
    assert {aside.read_text() for aside in path.parent.glob("*.damaged-*")} == {"one", "two"}
    assert len(reported) == 2


def test_a_file_of_a_newer_version_is_left_alone(path: Path, reported: list[str]) -> None:
    path.parent.mkdir()
    newer = 'schema = 4\n[shape-of-things]\nto = "come"\n'
    path.write_text(newer)
    kept = Store(path)
    kept.put(an_entry())
    kept.forget([A_CLASS])
    kept.put(an_entry())
    assert path.read_text() == newer
    assert kept.get(A_CLASS) == an_entry()
    assert [line for line in reported if "written by a newer fatui (schema 4); it is left alone" in line] == reported
    assert len(reported) == 1


def test_a_file_of_an_older_version_is_read_and_upgraded(path: Path, reported: list[str]) -> None:
    Store(path).put(an_entry())
    of_today = path.read_text()
    older = of_today.replace("schema = 3", "schema = 1").replace('made_with = ""\n', "")
    older = older.replace("[class.alone_s]\n", "")
    assert "alone_s" not in older
    path.write_text(older)
    kept = Store(path)
    assert kept.get(A_CLASS) == an_entry()
    kept.put(an_entry(class_number(7)))
    assert Store(path).entries() == [an_entry(), an_entry(class_number(7))]
    assert "schema = 3" in path.read_text()
    assert reported == []


def test_in_a_read_only_folder_it_works_on_and_says_so_once(open_folder: Path, reported: list[str]) -> None:
    path = open_folder / "tuning.toml"
    Store(path).put(an_entry())
    path.chmod(0o644)
    with without_rights(open_folder):
        kept = Store(path)
        kept.put(an_entry(class_number(32)))
        kept.put(an_entry(class_number(33)))
        assert kept.get(A_CLASS) == an_entry()
        assert kept.get(class_number(32)) == an_entry(class_number(32))
        assert [entry.workload for entry in Store(path).entries()] == [A_CLASS]
    assert len(reported) == 1
    assert "cannot be written (Permission denied); choices are kept in this process only" in reported[0]


def test_a_damaged_file_in_a_read_only_folder_stays_where_it_is(open_folder: Path, reported: list[str]) -> None:
    path = open_folder / "tuning.toml"
    path.write_text("nonsense")
    path.chmod(0o644)
    with without_rights(open_folder):
        Store(path).put(an_entry())
    assert path.read_text() == "nonsense"
    assert "cannot be written" in reported[0]


def test_a_file_that_may_not_be_read_is_not_replaced(open_folder: Path, reported: list[str]) -> None:
    path = open_folder / "tuning.toml"
    path.write_text("secret")
    path.chmod(0o600)
    with without_rights(open_folder) if os.geteuid() == 0 else contextlib.nullcontext():
        if os.access(path, os.R_OK, effective_ids=True):
            path.chmod(0o000)
        kept = Store(path)
        kept.put(an_entry())
        assert kept.get(A_CLASS) == an_entry()
    path.chmod(0o600)
    assert path.read_text() == "secret"
    assert "choices are kept in this process only" in reported[0]


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(
    path: Path, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(path).put(an_entry())

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attention.core.files.os.fsync", full)
    Store(path).put(an_entry(class_number(32)))
    assert [entry.workload for entry in Store(path).entries()] == [A_CLASS]
    assert {each.name for each in path.parent.iterdir()} == {"tuning.toml", "tuning.lock"}
    assert "No space left on device" in reported[0]


@pytest.mark.thorough
def test_processes_that_write_at_once_lose_nothing(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.support.tuning_examples import *\n"
        "from attention.implementations.autotune.store import Store\n"
        "from attention.implementations.autotune import store\n"
        "store.LOCK_WAIT_S = 3600  # the other may be stopped, or its disk busy\n"
        "kept = Store(Path(sys.argv[1]))\n"
        "for n in range(15): kept.put(an_entry(class_number(100 * int(sys.argv[2]) + n + 1)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(path)]
    running = [subprocess.Popen([*command, str(n)], env=environment) for n in range(2)]
    assert [process.wait(patient(120)) for process in running] == [0, 0]
    assert len(Store(path).entries()) == 30


def test_what_another_process_found_is_known_at_once(path: Path) -> None:
    first, second = Store(path), Store(path)
    first.put(an_entry())
    second.put(an_entry(class_number(32)))
    assert first.get(class_number(32)) == an_entry(class_number(32))
    assert second.get(A_CLASS) == an_entry()


def test_a_process_that_never_lets_go_does_not_stop_others(
    path: Path, reported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "LOCK_WAIT_S", 0.05)
    path.parent.mkdir()
    with path.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        kept = Store(path)
        kept.put(an_entry())
        assert kept.get(A_CLASS) == an_entry()
    assert reported == [f"{path}: another process holds it; choices are kept in this process only"]


def test_a_clock_that_is_set_back_changes_nothing(path: Path) -> None:
    later = datetime(2030, 1, 1, tzinfo=UTC)
    earlier = later - timedelta(days=3650)
    for number, when in enumerate([later, earlier, later], 1):
        entry = an_entry(class_number(number))
        Store(path, lambda when=when: when).put(entry)  # type: ignore[misc]
        os.utime(path, (when.timestamp(), when.timestamp()))
    kept = Store(path)
    kept.put(an_entry(class_number(1), winner="mlx"))  # what is found last counts, whatever the time on it
    assert [entry.winner for entry in Store(path).entries()] == ["mlx", "poc", "poc"]


def test_what_is_forgotten_is_gone_for_others_too(path: Path) -> None:
    Store(path).put(an_entry())
    Store(path).put(an_entry(class_number(32)))
    assert Store(path).forget([A_CLASS])
    assert [entry.workload for entry in Store(path).entries()] == [class_number(32)]


def test_without_a_listener_the_log_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    on.emit_tuning(on.Message(level="warning", text="the file is damaged"))
    assert caplog.messages == ["the file is damaged"]
