"""The dialog that saves the setup as a preset; the name is checked while it is typed."""

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Static

from attention.errors import UsageError
from attention.plan import Plan
from fatui import presets
from fatui.paths import own_presets
from fatui.preset_format import Preset


class SaveAs(ModalScreen[Preset]):
    """Dialog for a name, a title and a summary; the result is the saved preset."""

    CSS_PATH: ClassVar = ["dialog.tcss"]
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Do not save", id="back")]

    def __init__(self, plan: Plan, origin: Preset | None) -> None:
        super().__init__()
        self._plan, self._origin = plan, origin
        self._taken = {listed.name: listed.bundled for listed in presets.list_presets()}

    def compose(self) -> ComposeResult:
        """Yield the fields, and a line with the outcome or the problem."""
        origin = self._origin
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Save as a preset"
            dialog.border_subtitle = "enter saves · escape does not"
            yield Static("Name")
            yield Input(origin.name if origin and not origin.bundled else "", placeholder="my-model", id="name")
            yield Static("Title (optional)")
            yield Input(origin.title if origin else "", id="title")
            yield Static("Summary (optional)")
            yield Input(origin.summary if origin else "", id="summary")
            yield Static(id="verdict", markup=False)

    def on_mount(self) -> None:
        """Check the initial name."""
        self._judge()

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
    def _judge(self) -> None:
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
    def _save(self) -> None:
        if self.problem:
            self.app.bell()
            return
        name, title, summary = (
            self.query_one(f"#{field}", Input).value.strip() for field in ("name", "title", "summary")
        )
        plan = self._plan
        made = Preset(
            name=name,
            title=title,
            summary=summary,
            cases=plan.cases,
            implementations=plan.implementations,
            seconds=plan.seconds,
            precision=plan.precision,
            memory_limit_bytes=plan.memory_limit_bytes,
            seed=plan.seed,
        )
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
