"""Foreign text has no effect: in every command and export, in every field of a run and a preset."""

import csv
import io

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from msgspec import structs

from fatui import storage
from fatui.cli.main import main
from fatui.report.compose import compose
from fatui.report.document import to_html
from fatui.report.export import to_csv
from fatui.storage.history import RunHistory
from fatui.untrusted_text import escape_all, escape_controls, markdown_block, markdown_code, one_line, spreadsheet
from tests.support import hostile

KINDS = ("shapes", "model", "finetune")


@given(st.text(st.characters(exclude_categories=[]), max_size=60))
def test_clean_text_holds_no_control_character_and_encodes(text):
    made = escape_controls(text)
    assert not hostile.unsafe_in(made)
    made.encode()
    assert escape_controls(made) == made


def test_ordinary_text_stays_as_it_is():
    for text in ("poc ±0.4x ≈ 1 µs ★", "naïve café 日本語 🙂", "two\nlines", "[b]", ""):
        assert escape_controls(text) == text
    report = hostile.report("shapes", "a")
    assert escape_all(escape_all(report)) == escape_all(report)
    assert escape_all(ordinary := report.cases[0].workload) is ordinary


def test_a_control_character_is_shown_as_its_escape():
    assert escape_controls("a\x1b[2J\u202eb") == "a\\x1b[2J\\u202eb"
    assert one_line("a\tb\nc") == "a b c"
    assert escape_controls("x" * 10, 4) == "xxxx… (10 characters)"


def test_code_in_markdown_cannot_be_left():
    assert markdown_code("a``b") == "``` a``b ```"
    assert markdown_block("a\n```\nb", "sh") == "````sh\na\n```\nb\n````"


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_a_cell_that_a_spreadsheet_would_run_is_quoted(text):
    assert spreadsheet(text).startswith("'")


@pytest.fixture
def kept(tmp_path):
    """A history of six hostile runs, two of each kind, imported from files."""
    for kind in KINDS:
        for number in (1, 2):
            path = tmp_path / f"{kind}{number}.json"
            path.write_bytes(msgspec.json.encode(hostile.report(kind, f"{kind}{number}")))
            assert main(["history", "add", str(path)]) == 0


def as_html(text):
    """Render Markdown as a page that allows inline HTML."""
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(text)


def harmless(captured):
    for text in (captured.out, captured.err):
        assert not hostile.unsafe_in(text)
    assert "Traceback" not in captured.err
    return captured.out


def test_a_hostile_run_is_listed_with_its_text_in_sight(kept, capsys):
    assert main(["history"]) == 0
    out = "".join(harmless(capsys.readouterr()).split())
    assert out.count("shapes") == 2
    assert "[/x][b]\\x1b[2J" in out


def test_a_long_name_hides_no_id_in_the_list(tmp_path, capsys):
    report = hostile.report("shapes", "another")
    path = tmp_path / "long.json"
    path.write_bytes(msgspec.json.encode(structs.replace(report, run=structs.replace(report.run, preset="p" * 300))))
    assert main(["history", "add", str(path)]) == 0
    capsys.readouterr()
    assert main(["history"]) == 0
    assert "another" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_prints_a_hostile_run(kind, kept, capsys):
    for arguments in (["history", "show", f"{kind}1"], ["compare", f"{kind}1", f"{kind}2"]):
        assert main(arguments) == 0
        assert "[/x]" in harmless(capsys.readouterr())
    assert main(["report", f"{kind}1", f"{kind}2"]) == 0
    assert "<script" not in as_html(harmless(capsys.readouterr()))
    for name in ("json", "csv", "jsonl", "sql", "markdown"):
        assert main(["history", "show", f"{kind}1", f"--{name}", "-"]) == 0
        out = harmless(capsys.readouterr())
    assert "<script" not in as_html(out)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_a_hostile_run_has_no_element_of_it(kind):
    page = to_html(compose([hostile.report(kind, "a")]))
    assert not hostile.unsafe_in(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("kind", KINDS)
def test_no_cell_of_a_hostile_run_is_a_formula(kind):
    for line in csv.DictReader(io.StringIO(to_csv(hostile.report(kind, "a")))):
        assert not [cell for cell in line.values() if cell.startswith(("=", "+", "@"))]


@pytest.fixture
def presets_of_others():
    folder = storage.own_presets()
    folder.mkdir(parents=True)
    (folder / "hostile.toml").write_text(hostile.PRESET)
    (folder / "broken.toml").write_text(hostile.BROKEN_PRESET)
    (folder / "\x1b[2J\u202ename.toml").write_text(hostile.PRESET)
    return folder


def test_hostile_presets_are_listed(presets_of_others, capsys):
    assert main(["presets"]) == 0
    out = "".join(harmless(capsys.readouterr()).split())
    assert "[/x][b]\\x1b[2J" in out
    assert "`fatuipresetscheckbroken`tellsall" in out


@pytest.mark.parametrize("command", [["presets", "check"], ["bench"], ["explain"], []])
def test_a_broken_hostile_preset_is_reported_in_lines(command, presets_of_others, capsys):
    assert main([*command, str(presets_of_others / "broken.toml")]) == 2
    captured = capsys.readouterr()
    harmless(captured)
    lines = captured.err.splitlines()
    assert len(lines) >= 5
    assert all("broken.toml: " in line for line in lines)


def test_a_hostile_preset_runs_and_is_shown_as_it_is_in_a_file(presets_of_others, capsys):
    path = str(presets_of_others / "hostile.toml")
    assert main(["presets", "check", path]) == 0
    assert main(["explain", path]) == 0
    harmless(capsys.readouterr())
    assert main(["presets", "show", path]) == 0
    assert capsys.readouterr().out == hostile.PRESET  # no terminal: the file itself


def test_an_unknown_name_is_echoed_without_its_escape_codes(capsys):
    RunHistory()
    for arguments in (
        ["bench", "\x1b[2J"],
        ["history", "show", "\x1b[2J"],
        ["history", "\x1b[2J"],
        ["presets", "show", "\x1b[2J"],
        ["report", "\x1b[2J"],
        ["bench", "--impl", "\x1b[2J.py:X"],
        ["bench", "--seq", "\x1b[2J"],
        ["--\x1b[2J"],
        ["model", "\x1b[2J"],
    ):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        harmless(captured)
        assert "\\x1b" in captured.err
