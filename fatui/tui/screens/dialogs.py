"""The dialogs: questions, texts, menus, and what is asked for before saving and exporting."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, TypeVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static

from attention.core.errors import UsageError
from attention.core.files import expand_home
from attention.core.plan import Plan
from attention.core.results import AnyCase, Report, Row
from fatui import formatting
from fatui.report.comparison import RowChange
from fatui.storage import own_presets, presets
from fatui.storage.presets import Preset
from fatui.trust import trust
from fatui.tui.screens.base import AppScreen, Options
from fatui.tui.terminal import literal
from fatui.tui.view_models.row_details import figure_lines, hanging, sample_lines, sentences
from fatui.tui.widgets.choice import Choice
from fatui.verdict import confidence_text, headline, verdicts

ANSWERS = "[@click=screen.answer(True)][b]y[/b] {yes}[/]     [@click=screen.answer(False)][b]n, enter[/b] {no}[/]"


R = TypeVar("R")


class Dialog(AppScreen, ModalScreen[R]):
    """A dialog over the screen, which it dims."""

    CSS_PATH: ClassVar = ["dialog.tcss"]


class Question(Dialog[bool]):
    """Yes-or-no dialog: y or the key that opened it is yes; enter, escape or n is no, which changes nothing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,ctrl+c,ctrl+q", "answer(True)", "Yes"),
        Binding("q", "answer(True)", "Yes", id="quit"),
        Binding("n,enter", "answer(False)", "No"),
        Binding("escape", "answer(False)", "No", id="back"),
    ]

    def __init__(self, text: str, *, yes: str, no: str) -> None:
        super().__init__()
        self._text, self._yes, self._no = text, yes, no

    def compose(self) -> ComposeResult:
        """Yield the question and its two answers."""
        with Vertical(classes="dialog"):
            yield Static(self._text, markup=False)
            yield Static(ANSWERS.format(yes=self._yes, no=self._no), classes="answers")

    def action_answer(self, yes: bool) -> None:
        """Close with the answer."""
        self.dismiss(yes)


CLOSES: Final = "[@click=screen.close]escape closes[/]"
"""The lower edge of a dialog; a click does what its words say."""
ABOUT = "Letter keys work outside inputs; tab moves to the next control. [keys] in {config} remaps them."


class Closable(Dialog[None]):
    """Dialog of text only, closed by escape, enter or the key that quits."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="back"),
        Binding("q", "close", "Close", id="quit"),
        Binding("enter", "close", "Close"),
    ]

    def action_close(self) -> None:
        """Close the dialog."""
        self.dismiss()


class Help(Closable):
    """List of keys, each with a sentence."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark,f1", "close", "Close", id="help")]

    def __init__(self, groups: list[tuple[str, list[tuple[str, str]]]], config: str) -> None:
        super().__init__()
        self._groups, self._config = groups, config

    def compose(self) -> ComposeResult:
        """Yield a block per part of the screen."""
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "Keys"
            dialog.border_subtitle = CLOSES
            for title, keys in self._groups:
                yield Static(f"[b]{title}[/b]")
                yield Static("\n".join(hanging(f"  {key}", words, 16) for key, words in keys) + "\n", markup=False)
            yield Static(ABOUT.format(config=self._config), markup=False, classes="hint")


class RowDetails(Closable):
    """Dialog with the details of a row."""

    def __init__(self, case: AnyCase, row: Row, command: str) -> None:
        """Create the dialog for a row, its case, and the command that measures it again."""
        super().__init__()
        self._case, self._row, self._command = case, row, command

    def compose(self) -> ComposeResult:
        """Yield the figures in two columns, the samples, and the notes."""
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = literal(f"{self._row.implementation} on {self._case.workload.label}")
            dialog.border_subtitle = CLOSES
            yield Static("\n".join(figure_lines(self._row, self._case)), markup=False)
            if self._row.samples:
                yield Static("\n".join(sample_lines(self._row)), markup=False, classes="answers")
            yield Static("\n".join(sentences(self._row, self._case, self._command)), markup=False, classes="answers")


SEVERITY_WORDS: Final = {"note": " ", "warning": "!", "serious": "!!"}


class TrustDetails(Closable):
    """Dialog with what the figures of a run depend on, and what to do about it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("d", "close", "Close", id="explain_trust")]

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def compose(self) -> ComposeResult:
        """Yield the verdicts with their confidence, and a paragraph for each finding."""
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "What the figures depend on"
            dialog.border_subtitle = CLOSES
            for verdict in verdicts(self._report):
                yield Static(f"{headline(verdict)}\n{confidence_text(verdict)}\n", markup=False, classes="hint")
            for found in trust(self._report):
                with Horizontal(classes=f"trust -{found.severity}"):
                    yield Static(SEVERITY_WORDS[found.severity], markup=False, classes="mark")
                    yield Static(f"{found.text}\n{found.detail}\n", markup=False)


class FullText(Closable):
    """Dialog with a text that is too long for its place."""

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        """Yield the text."""
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = literal(self._title)
            dialog.border_subtitle = CLOSES
            yield Static(self._text, markup=False)


class ChangeDetails(Closable):
    """Dialog with both rows of a comparison of two runs."""

    def __init__(self, change: RowChange) -> None:
        super().__init__()
        self._change = change

    def compose(self) -> ComposeResult:
        """Yield a line for each figure, before and after."""
        change = self._change
        both = change.before, change.after
        rows: list[tuple[str, list[str]]] = [
            ("path", [row.path or formatting.UNKNOWN for row in both]),
            ("status", [row.status for row in both]),
            ("tokens/s", [formatting.tokens_per_second(row.tokens_per_second) for row in both]),
            ("per call", [formatting.interval_text(row.call_s) for row in both]),
            ("first call", [formatting.seconds(row.first_call_s) for row in both]),
            ("speedup", [formatting.speedup_text(row.speedup) for row in both]),
            ("memory", [formatting.size(row.peak_bytes) for row in both]),
            ("error", [formatting.row_error(row) for row in both]),
            ("samples", [str(len(row.samples)) for row in both]),
        ]
        lines = [f"{'':<12}{'before':<26}after", *(f"{name:<12}{first:<26}{last}" for name, (first, last) in rows)]
        lines += ["", *_change_lines(change)]
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = literal(f"{change.implementation} on {change.workload.label}")
            dialog.border_subtitle = CLOSES
            yield Static("\n".join(lines), markup=False)


def _change_lines(change: RowChange) -> list[str]:
    """Say how much faster a row is after, and what the machine's own drift has to do with it."""
    times = f"after / before     {formatting.speedup_text(change.times)}"
    if change.in_turns:
        return [times, "", "Both were measured in turns, round by round: the machine's drift is in neither."]
    if change.drift is None:
        none = (
            "the runs have no common reference" if change.reference is None else f"too few rounds of {change.reference}"
        )
        return [times, f"drift              not known: {none}"]
    lines = [times, f"drift              {formatting.speedup_text(change.drift)} of {change.reference}"]
    return lines if change.is_reference else [*lines, f"beyond the drift   {formatting.speedup_text(change.ratio)}"]


class SortMenu(Dialog[str]):
    """Menu of the columns of a table; the result is the one to sort by, empty for the order of the measurement."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "close", "Close", id="back"),
        Binding("q", "close", "Close", id="quit"),
    ]

    def __init__(self, choices: Sequence[tuple[str, str]], by: str, descending: bool) -> None:
        super().__init__()
        self._choices, self._by, self._descending = choices, by, descending

    def compose(self) -> ComposeResult:
        """Yield the columns, the present one marked with its direction."""
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Sort by"
            dialog.border_subtitle = "enter sorts, again reverses · [@click=screen.close]escape cancels[/]"
            arrow = "▼" if self._descending else "▲"
            yield Options(
                *(literal(f"{title} {arrow if name and name == self._by else ''}") for name, title in self._choices)
            )

    def on_mount(self) -> None:
        """Begin at the present column."""
        names = [name for name, _ in self._choices]
        self.query_one(OptionList).highlighted = names.index(self._by) if self._by in names else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Close with the column."""
        self.dismiss(self._choices[event.option_index][0])

    def action_close(self) -> None:
        """Close the menu without a change."""
        self.dismiss()


OWN_FILE: Final = (
    "A class or function of yours, as FILE.py:NAME. A function takes q, k and v, and mask and scale if it has them, "
    "and returns the output; a class has a name, a route and a __call__."
)


class OwnFile(Dialog[str]):
    """Dialog for a Python file with an implementation; the result is its name, FILE.py:NAME."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Add nothing", id="back")]

    def compose(self) -> ComposeResult:
        """Yield the field, and a line with what is found there."""
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Your own implementation"
            dialog.border_subtitle = "[@click=screen.add]enter adds[/] · [@click=screen.cancel]escape cancels[/]"
            yield Static(OWN_FILE, markup=False)
            yield Input(placeholder="mykernel.py:Fast", id="name")
            yield Static(id="verdict", markup=False)

    @on(Input.Changed)
    def _show_verdict(self) -> None:
        line = self.query_one("#verdict", Static)
        found, problem = self._found()
        line.set_class(bool(problem), "problem")
        line.update(problem or f"adds {found}")

    def _found(self) -> tuple[str, str]:
        """Return the name that is typed, completed where a file has only one, and what is wrong with it."""
        typed = self.query_one("#name", Input).value.strip()
        file, _, name = typed.rpartition(":") if not typed.endswith(".py") else (typed, "", "")
        path = expand_home(file)
        if not file.endswith(".py"):
            return typed, "FILE.py:NAME is needed"
        try:
            names = defined_names(path.read_bytes())
        except (OSError, SyntaxError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return typed, f"cannot read {path.absolute()}: {reason}"
        if not names:
            return typed, f"{path.name} defines no class and no function"
        if not name and len(names) == 1:
            name = names[0]
        if name not in names:
            return typed, f"{path.name} defines {', '.join(names)}"
        return f"{path}:{name}", ""

    @on(Input.Submitted)
    def action_add(self) -> None:
        """Close with the name, unless it has a problem."""
        found, problem = self._found()
        if problem:
            self.app.bell()
            return
        self.dismiss(found)

    def action_cancel(self) -> None:
        """Close without adding anything."""
        self.dismiss()


def defined_names(source: bytes) -> list[str]:
    """Return the public classes and functions that a Python file defines.

    Raises:
        SyntaxError, ValueError: it is no Python.
    """
    import ast

    kinds = (ast.FunctionDef, ast.ClassDef)
    return [each.name for each in ast.parse(source).body if isinstance(each, kinds) and not each.name.startswith("_")]


class SaveAs(Dialog[Preset]):
    """Dialog for a name, a title and a summary; the result is the saved preset."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Do not save", id="back")]

    def __init__(self, plan: Plan, origin: Preset | None) -> None:
        super().__init__()
        self._plan, self._origin = plan, origin
        self._taken = {listed.name: listed.bundled for listed in presets.list_presets()}

    def compose(self) -> ComposeResult:
        """Yield the fields, and a line with the outcome or the problem."""
        origin = self._origin
        words = origin if origin and (not origin.bundled or origin.cases == self._plan.cases) else None
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Save as a preset"
            dialog.border_subtitle = "[@click=screen.save]enter saves[/] · [@click=screen.cancel]escape cancels[/]"
            yield Static("Name")
            yield Input(origin.name if origin and not origin.bundled else "", placeholder="my-model", id="name")
            yield Static("Title (optional)")
            yield Input(words.title if words else "", id="title")
            yield Static("Summary (optional)")
            yield Input(words.summary if words else "", id="summary")
            yield Static(id="verdict", markup=False)

    def on_mount(self) -> None:
        """Check the initial name."""
        self._show_verdict()

    @property
    def problem(self) -> str:
        """What is wrong with the name, or an empty string."""
        name = self.query_one("#name", Input).value.strip()
        if not name:
            return "a name is needed"
        if not presets.NAME.fullmatch(name) or name.endswith(".toml"):
            return "a name takes letters, digits, '.', '_' and '-', starts with a letter or digit, and has 64 at most"
        return ""

    @on(Input.Changed)
    def _show_verdict(self) -> None:
        line = self.query_one("#verdict", Static)
        line.set_class(bool(self.problem), "problem")
        line.update(self.problem or self._outcome())

    def _outcome(self) -> str:
        name = self.query_one("#name", Input).value.strip()
        count = len(self._plan.cases)
        text = f"writes {own_presets() / name}.toml: {count} case{'s' if count > 1 else ''}"
        if name in self._taken:
            text += "; hides the bundled one" if self._taken[name] else "; replaces yours, which is kept aside"
        return text

    @on(Input.Submitted)
    def action_save(self) -> None:
        """Save the preset, and close with it, unless the name has a problem."""
        if self.problem:
            self.app.bell()
            return
        name, title, summary = (
            self.query_one(f"#{field}", Input).value.strip() for field in ("name", "title", "summary")
        )
        made = Preset(name=name, title=title, summary=summary, cases=self._plan.cases, **self._plan.options())
        try:
            presets.save(made, name, overwrite=True)
            self.dismiss(presets.load(name))
        except (UsageError, OSError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            line = self.query_one("#verdict", Static)
            line.add_class("problem")
            line.update(f"not saved: {why}")

    def action_cancel(self) -> None:
        """Close without saving."""
        self.dismiss()


FORMATS: Final = ("md", "csv", "json", "html", "svg", "log")
"""`html` is the written report of the run; the others are its table, its rows (csv, json), its picture and its log."""
Writers = dict[str, Callable[[], str]]


class Formats(Choice):
    """Choice in a dialog that enter closes; in others it goes to the next option."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "screen.write", "Write", show=False)]


class Export(Dialog[tuple[Path, tuple[str, ...]]]):
    """Dialog for a folder and a name; the result is the path without suffix, and the chosen suffixes."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Do not export", id="back")]

    def __init__(self, folder: str, name: str, note: str = "") -> None:
        """Create the dialog; `note`: what the figures in the files are over."""
        super().__init__()
        self._folder, self._name, self._note = folder, name, note

    def compose(self) -> ComposeResult:
        """Yield the fields, and the list of files to be written."""
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Export the run"
            dialog.border_subtitle = "[@click=screen.write]enter writes[/] · [@click=screen.cancel]escape cancels[/]"
            yield Static("Folder")
            yield Input(self._folder, id="folder")
            yield Static("Name, without suffix")
            yield Input(self._name, id="name")
            yield Formats("write", ("all", *FORMATS), id="formats")
            yield Static(id="outcome", markup=False, classes="answers")
            yield Static(self._note, id="export-note", markup=False)

    def on_mount(self) -> None:
        """List the files, and focus the name."""
        self.query_one("#name", Input).focus()
        self.query_one("#export-note").display = bool(self._note)
        self._show()

    @property
    def endings(self) -> tuple[str, ...]:
        """The suffixes of the files to be written."""
        chosen = self.query_one(Choice).value
        return FORMATS if chosen == "all" else (chosen,)

    @property
    def stem(self) -> Path:
        """The path without suffix."""
        name = self.query_one("#name", Input).value.strip()
        return expand_home(self.query_one("#folder", Input).value.strip() or ".") / name

    @property
    def problem(self) -> str:
        """What is wrong with the input, or an empty string."""
        name = self.query_one("#name", Input).value.strip()
        if not name or "/" in name or name in (".", ".."):
            return "a name is needed, without '/'"
        return "" if self.stem.parent.is_dir() else f"there is no folder {self.stem.parent}"

    @on(Input.Changed)
    @on(Choice.Changed)
    def _show(self) -> None:
        line = self.query_one("#outcome", Static)
        line.set_class(bool(self.problem), "problem")
        if self.problem:
            line.update(self.problem)
            return
        there = [ending for ending in self.endings if self.stem.with_name(f"{self.stem.name}.{ending}").exists()]
        replaced = f"; replaces {', '.join(there)}" if there else ""
        endings = ",".join(self.endings)
        suffix = f"{{{endings}}}" if len(self.endings) > 1 else endings
        line.update(f"writes {self.stem}.{suffix}{replaced}")

    @on(Input.Submitted)
    def action_write(self) -> None:
        """Close with the path and the suffixes, unless the input has a problem."""
        if self.problem:
            self.app.bell()
        else:
            self.dismiss((self.stem, self.endings))

    def action_cancel(self) -> None:
        """Close without writing."""
        self.dismiss()


def write_all(stem: Path, writers: Writers) -> tuple[list[Path], list[str]]:
    """Write each text; return the files written and the error messages."""
    from fatui.storage import write_atomically

    written, problems = [], []
    for ending, make in writers.items():
        path = stem.with_name(f"{stem.name}.{ending}")
        try:
            write_atomically(path, make())
        except OSError as error:
            problems.append(f"{path} not written: {error.strerror or error}")
        else:
            written.append(path)
    return written, problems
