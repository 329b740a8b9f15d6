"""The screens and dialogs over the main screen and the actions on their results; each is imported on first use."""

import asyncio
import importlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from msgspec import structs

from attention.errors import UsageError
from attention.report import Report
from fatui import actions, settings

if TYPE_CHECKING:
    from textual.dom import DOMNode
    from textual.screen import Screen

    from fatui.app import FatuiApp
    from fatui.preset_format import Preset

NOT_OURS: Final = ("Page Left", "Page Right")
"""Textual's own bindings, which have no effect here."""
SCREENS: Final = {
    "presets": "Presets",
    "history": "History",
    "scaling": "Scaling",
    "models": "Models",
    "finetuning": "FineTunings",
    "doctor": "Doctor",
}


def open_screen(app: "FatuiApp", name: str) -> None:
    """Open one of the other screens, unless one is open."""
    if len(app.screen_stack) > 1:
        return
    made: Screen[Any] = getattr(importlib.import_module(f"fatui.screens.{name}"), SCREENS[name])()
    app.push_screen(made, partial(_take, app, name))


def _take(app: "FatuiApp", name: str, result: object) -> None:
    from fatui.running import load_preset

    if name == "presets" and isinstance(result, str) and load_preset(app, result):
        app.journal.write(f"preset {result} is loaded")
        app.main.open_tab("setup")
    elif isinstance(result, Report):
        app.runs.open_report(result)
        app.journal.write(f"run {result.run.id} is opened; it was made by: {result.run.command}")


def save_as(app: "FatuiApp") -> None:
    """Ask for a name, and save the draft as a preset."""
    from fatui.screens.save_as import SaveAs

    try:
        plan = app.draft.plan()
    except UsageError as error:
        app.tell(f"nothing to save: {'; '.join(error.problems)}", "warning")
        return
    app.push_screen(SaveAs(plan, app.preset), partial(_saved, app))


def _saved(app: "FatuiApp", preset: "Preset | None") -> None:
    if preset is not None:
        from fatui.running import load_preset

        load_preset(app, preset.name)
        app.tell(f"saved as {preset.source}")


def shown_report(app: "FatuiApp") -> Report | None:
    """Return the report of the current screen: a model's, or the one over attention shapes."""
    from fatui.screens.model_screen import ModelScreen

    screen: Screen[Any] = app.screen
    return screen.report if isinstance(screen, ModelScreen) else app.report


def export(app: "FatuiApp") -> None:
    """Ask for a path, and export the report of the current screen."""
    report = shown_report(app)
    if report is None:
        why = "the run has to end first" if app.runs.active else "nothing was run yet"
        app.tell(f"nothing to export: {why}", "warning")
        return
    from fatui.screens.export import Export

    folder = app.remembered.export_folder or str(Path.cwd())
    name = f"fatui-{report.run.preset or 'run'}-{report.run.id}"
    app.push_screen(Export(folder, name), partial(_exported, app, report))


def _exported(app: "FatuiApp", report: Report, asked: tuple[Path, tuple[str, ...]] | None) -> None:
    if asked is not None:
        # Written once the dialog has closed, so that it is not in the picture.
        app.call_after_refresh(_write, app, report, *asked)


async def _write(app: "FatuiApp", report: Report, stem: Path, endings: tuple[str, ...]) -> None:
    from fatui import export as formats
    from fatui.report.compose import compose
    from fatui.report.html import to_html
    from fatui.screens.export import write_all

    picture = app.export_screenshot(title="fatui") if "svg" in endings else ""
    writers = {
        "md": lambda: formats.to_markdown(report),
        "csv": lambda: formats.to_csv(report),
        "json": lambda: formats.to_json(report),
        "html": lambda: to_html(compose([report])),
        "svg": lambda: picture,
        "log": app.journal.text,
    }
    written, problems = await asyncio.to_thread(write_all, stem, {ending: writers[ending] for ending in endings})
    for problem in problems:
        app.tell(problem, "error")
    if written:
        app.remembered.export_folder = str(stem.parent)
        names = ", ".join(path.name for path in written)
        app.tell(f"wrote {names} to {stem.parent.resolve()}")


async def copy_table(app: "FatuiApp") -> None:
    """Copy the table as Markdown; report success only if a system program accepted it."""
    from fatui import clipboard
    from fatui import export as formats

    report = shown_report(app)
    if report is None:
        app.tell("nothing to copy: there is no table yet", "warning")
        return
    text = formats.to_markdown(report)
    program = await asyncio.to_thread(clipboard.copy, text)
    if program is not None:
        app.tell(f"the table is on the clipboard, as Markdown ({program})")
        return
    app.copy_to_clipboard(text)
    key = app.keys["export"]
    text = f"the table was sent to the terminal, which may or may not put it on the clipboard; {key} writes a file"
    app.tell(text, "warning")


def open_row(app: "FatuiApp", index: int, name: str) -> None:
    """Show the details of a row."""
    from fatui.running import command_of

    session, report = app.session, app.report
    if session is not None:
        case = session.case(index)
        command = command_of(structs.replace(session.plan, cases=(case.workload,)), None)
    elif report is not None and index < len(report.cases):
        case = report.cases[index]
        command = report.run.command  # its plan is not kept, so the command is the whole run's
    else:
        return
    row = next((row for row in case.rows if row.implementation == name), None)
    if row is None:
        app.tell(f"{name} has no figures yet")
        return
    from fatui.screens.row_details import RowDetails

    app.push_screen(RowDetails(case, row, command))


def explain_keys(app: "FatuiApp") -> None:
    """Show the keys of the current screen, as configured."""
    from fatui.screens.help import Help

    screen, groups = app.screen, []
    if screen is app.main:
        groups.append(("This screen", [(app.keys[action.name], action.words) for action in actions.MAIN]))
    else:
        groups.append(("This screen", _keys_of(app, screen)))
    here = _keys_of(app, screen.focused) if screen.focused is not None else []
    if screen.focused is not None and here:
        name = (screen.focused.id or type(screen.focused).__name__).replace("-", " ")
        name = name.removeprefix("axis ").removeprefix("choice ").rstrip("_")
        groups.append((f"Where you are: {name}", here))
    anywhere = [(app.keys[action.name], action.words) for action in actions.ANYWHERE]
    groups.append(("Anywhere", [*anywhere, ("ctrl+p", "Everything by name, in the palette")]))
    app.push_screen(Help(groups, str(settings.config_path())))


def _keys_of(app: "FatuiApp", node: "DOMNode") -> list[tuple[str, str]]:
    """Return the bindings of a screen or widget as configured, merging those with the same meaning."""
    merged: dict[str, dict[str, None]] = {}
    for _, binding in node._bindings:
        words = binding.tooltip or binding.description
        keys = app.settings.keys.get(binding.id or "", binding.key).split(",")
        merged.setdefault(words, {}).update(dict.fromkeys(map(actions.shown, keys)))
    return [(", ".join(keys), words) for words, keys in merged.items() if words and words not in NOT_OURS]
