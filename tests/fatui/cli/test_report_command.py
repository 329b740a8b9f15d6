import msgspec
import pytest

from attention.core.workload import Workload
from fatui.cli.main import main
from fatui.storage.history import RunHistory
from tests.support.sample_runs import plan_of, report_of, run_of


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))


def kept(identity, seq=128):
    report = report_of(plan_of([Workload(seq=seq)]), run_of(identity=identity))
    RunHistory().add(report)
    return report


def test_without_a_run_it_names_the_command_that_makes_one(capsys):
    assert main(["report"]) == 1
    assert "fatui bench seed-table" in capsys.readouterr().err


def test_the_last_runs_of_this_machine_come_as_markdown(capsys):
    kept("aaaa1111")
    kept("bbbb2222", 256)
    assert main(["report"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# Attention implementations, measured\n")
    assert "aaaa1111" in out
    assert "bbbb2222" in out


def test_one_run_alone_is_reported_when_it_is_named(capsys):
    kept("aaaa1111")
    kept("bbbb2222", 256)
    assert main(["report", "aaaa"]) == 0
    assert "bbbb2222" not in capsys.readouterr().out


def test_a_page_is_written_from_a_json_file(tmp_path):
    source, page = tmp_path / "run.json", tmp_path / "report.html"
    source.write_bytes(msgspec.json.encode(report_of()))
    assert main(["report", str(source), "--html", str(page)]) == 0
    assert page.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (["no-such-run"], "the history is empty"),
        (["--html", "missing/report.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_read_or_written_is_reported_in_one_line(arguments, reported, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) in (1, 2)
    err = capsys.readouterr().err
    assert reported in err
    assert err.count("\n") == 1


def test_a_file_that_is_no_run_is_wrong_usage(tmp_path, capsys):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"rows": []}')
    assert main(["report", str(wrong)]) == 2
    assert "is not a run" in capsys.readouterr().err
