"""Every user action, defined once; bindings, key bar, palette, help and config keys are made from it."""

from typing import Final

from msgspec import Struct
from textual.binding import Binding


class Action(Struct, frozen=True):
    """One user action."""

    name: str
    """Identifies the action in the config file's [keys]."""
    key: str
    label: str
    """A word or two, for the key bar."""
    words: str
    """A sentence, for the palette and the help."""
    does: str
    """The Textual action."""


PANE_TITLES: Final = ("Implementations", "Workload", "Live", "Comparison", "Log", "Row")
"""The panes of the main screen, by the number that goes to each."""
OPTION_LETTERS: Final = (
    *("inverted_exclamation_mark", "trade_mark_sign", "pound_sign", "cent_sign", "infinity", "section_sign"),
)
"""What alt with 1 to 6 is in tmux, screen and xterm, which send escape and the digit, and option on a US keyboard."""
EXPORT: Final = "Write the run as md, csv, json, html, svg and its log"
MAIN: Final = (
    Action("run", "r", "Run", "Run what is set up", "app.start_run"),
    Action("run_again", "R", "Run again", "Run again what is shown, or the last run on this machine", "app.run_again"),
    Action("stop", "x", "Stop", "Stop the run and keep what was measured", "app.stop_run"),
    Action("sweep", "s", "Sweep", "Start or end a sweep over several values", "app.sweep"),
    Action("presets", "p", "Presets", "Open, preview, rename and delete presets", "app.open('presets')"),
    Action("save_as", "w", "Save as", "Save what is set up as a preset", "app.save_as"),
    Action("own_file", "I", "Own file", "Add an implementation of your own, from a Python file", "app.own_file"),
    Action("export", "e", "Export", EXPORT, "app.export"),
    Action("copy", "c", "Copy", "Copy the table to the clipboard", "app.copy_table"),
    Action(
        "longer", "plus", "Longer", "Measure ten seconds more a case, together with what was measured", "app.run_longer"
    ),
    Action("copy_verdict", "y", "Copy verdict", "Copy the verdict as Markdown", "app.copy_verdict"),
    Action("copy_command", "Y", "Copy command", "Copy the command that reproduces the run", "app.copy_command"),
    Action(
        "explain_trust",
        "d",
        "Trust",
        "What the figures depend on: noise, other load, BLAS, the clock",
        "app.explain_trust",
    ),
    Action("history", "h", "History", "Open, compare and delete past runs", "app.open('history')"),
    Action("scaling", "g", "Scaling", "Heat map and line chart of a sweep", "app.open('scaling')"),
    Action("chips", "C", "Chips", "The case on chips that are not here: roofs and predictions", "app.open('chips')"),
    Action("models", "m", "Models", "Measure whole models with each implementation", "app.open('models')"),
    Action("finetuning", "f", "Fine-tune", "Fine-tune a model with each implementation", "app.open('finetuning')"),
    Action("streaming", "a", "Streaming", "Follow a stream of tokens through a bounded cache", "app.open('streaming')"),
    Action("doctor", "D", "Doctor", "What is installed, and what is missing", "app.open('doctor')"),
    Action("sort", "o", "Sort", "Choose the order of the table", "screen.sort"),
    Action("reverse", "O", "Reverse", "Reverse the order of the table", "screen.reverse"),
    Action("reference", "b", "Reference", "Speedups over the row under the cursor, or as before", "screen.reference"),
    Action(
        "find",
        "slash",
        "Find",
        "Filter the focused table, else search the log",
        "screen.find",
    ),
    Action("pause", "l", "Pause log", "Pause or resume the log; nothing is lost", "screen.pause"),
    Action("unfold", "u", "Unfold", "Show or hide controls at their defaults, where room is short", "screen.unfold"),
    Action("live_view", "v", "View", "Live: a common scale, own scales, or ratios by round", "screen.live_view"),
    Action("live_tab", "i", "Roofline", "Live: the roofline, what limits the case; or trends", "screen.live_tab"),
    Action("next_pane", "right_square_bracket", "Next pane", "Go to the next pane", "screen.pane(1)"),
    Action("previous_pane", "left_square_bracket", "Previous pane", "Go to the previous pane", "screen.pane(-1)"),
    Action("maximise", "z", "Maximise", "Let the focused pane fill the screen, or show all again", "screen.maximise"),
    Action("put_away", "Z", "Hide", "Hide the focused pane, or show all again", "screen.put_away"),
    *(
        Action(
            f"pane_{number}",
            f"{number},alt+{number},{letter}",
            title,
            f"Go to {title}; with alt on a slider",
            f"screen.go_to_pane({number})",
        )
        for number, (title, letter) in enumerate(zip(PANE_TITLES, OPTION_LETTERS, strict=True), 1)
    ),
)
HELP: Final = "app.explain_keys"
"""The action whose key is at the right end of every key bar."""
ANYWHERE: Final = (
    Action("theme", "t", "Theme, colours", "Choose a theme", "app.change_theme"),
    Action("jump", "semicolon", "Jump", "Label all that can be reached; the letter goes there", "app.jump"),
    Action("help", "question_mark,f1", "Help", "The keys of this screen", HELP),
    Action("quit", "q", "Quit", "Quit; asks first while a run is active", "app.leave"),
)


def _of_table(screen: str, *, reference: bool = True) -> tuple[Action, ...]:
    """Return the actions of the table of a screen."""
    base = Action(f"{screen}_reference", "b", "Reference", "Compare with the row under the cursor", "screen.reference")
    return (
        Action(f"{screen}_sort", "o", "Sort", "Choose the order of the table", "screen.sort"),
        Action(f"{screen}_find", "slash", "Filter", "Show only rows with a text", "screen.find"),
        *((base,) if reference else ()),
    )


def _reverse(screen: str) -> Action:
    return Action(f"{screen}_reverse", "O", "Reverse", "Reverse the order of the table", "screen.reverse")


BACK: Final = Action("back", "escape", "Back", "Go back", "screen.back")
PRESETS: Final = (
    Action("presets_rename", "n", "Rename", "Rename one of your own", "screen.rename"),
    BACK,
    Action("presets_delete", "d,delete", "Delete", "Delete one of your own; can be undone", "screen.delete"),
    Action("presets_undo", "u", "Undo", "Restore what was deleted last", "screen.undo"),
    *_of_table("presets", reference=False),
    _reverse("presets"),
)
HISTORY: Final = (
    Action("history_mark", "space", "Mark", "Mark the run for a comparison, two at most", "screen.mark"),
    Action("history_compare", "c", "Compare", "Compare the marked runs, or the marked one and this", "screen.compare"),
    Action("history_file", "f", "File", "Compare the run under the cursor with a result file", "screen.file"),
    BACK,
    Action("history_delete", "d,delete", "Delete", "Delete the run; can be undone", "screen.delete"),
    Action("history_undo", "u", "Undo", "Restore what was deleted last", "screen.undo"),
    *_of_table("history", reference=False),
    _reverse("history"),
)
COMPARE: Final = (*_of_table("compare"), BACK, _reverse("compare"))
SCALING: Final = (
    Action(
        "scaling_figure", "tab", "Figure", "tokens/s, latency, FLOP/s with the roof, or memory", "screen.turn('figure')"
    ),
    Action("scaling_axis", "a", "Axis", "Draw over the next axis", "screen.turn('axis')"),
    Action("scaling_name", "i", "Map", "Map of the winners, or of one implementation", "screen.turn('name')"),
    Action(
        "scaling_part", "v", "Other values", "The next values of the axes that are not drawn", "screen.turn('part')"
    ),
    Action("scaling_logarithmic", "l", "Log scale", "Logarithmic or zero-based scale", "screen.logarithmic"),
    BACK,
)


def _of_models(screen: str) -> tuple[Action, ...]:
    """Return the actions of a models screen."""
    pane = "Go to the table, or from there to the setup"
    trust = "What the figures depend on: noise, other load, BLAS, the clock"
    return (
        Action(f"{screen}_run", "r", "Run", "Run what is set up here", "screen.run"),
        Action(f"{screen}_stop", "x", "Stop", "Stop the run and keep what was measured", "app.stop_run"),
        Action(f"{screen}_pane", "right_square_bracket,left_square_bracket", "Table", pane, "screen.other_pane"),
        BACK,
        *_of_table(screen),
        Action(f"{screen}_export", "e", "Export", EXPORT, "app.export"),
        Action(f"{screen}_copy", "c", "Copy", "Copy the table to the clipboard", "app.copy_table"),
        Action(f"{screen}_verdict", "y", "Copy verdict", "Copy the verdict as Markdown", "app.copy_verdict"),
        Action(
            f"{screen}_command", "Y", "Copy command", "Copy the command that reproduces the run", "app.copy_command"
        ),
        Action(f"{screen}_trust", "d", "Trust", trust, "app.explain_trust"),
        Action(f"{screen}_folder", "n", "Folder", "Use a model from an mlx-lm folder", "screen.folder"),
        _reverse(screen),
    )


MODELS: Final = _of_models("models")
FINETUNING: Final = _of_models("finetuning")
STREAMING: Final = _of_models("streaming")
CHIPS: Final = (
    Action("chips_reset", "n", "Reset", "Set the chip's figures back to those of its sources", "screen.reset"),
    BACK,
)
DOCTOR: Final = (Action("doctor_again", "r", "Look again", "Repeat the diagnosis", "screen.again"), BACK)
ACTIONS: Final = MAIN + ANYWHERE
FURTHER: Final = {
    "presets": PRESETS,
    "history": HISTORY,
    "compare": COMPARE,
    "scaling": SCALING,
    "models": MODELS,
    "finetuning": FINETUNING,
    "streaming": STREAMING,
    "chips": CHIPS,
    "doctor": DOCTOR,
}
ALL: Final = (*ACTIONS, *dict.fromkeys(action for group in FURTHER.values() for action in group))
SCOPES: Final[dict[str, str]] = {
    **{action.name: "main" for action in MAIN},
    **{action.name: scope for scope, group in FURTHER.items() for action in group},
    **{action.name: "" for action in (*ANYWHERE, BACK)},
}
"""The screen of each action; empty for actions available on all of them."""
SHOWN_KEYS: Final = {
    "question_mark": "?",
    "slash": "/",
    "plus": "+",
    "semicolon": ";",
    "right_square_bracket": "]",
    "left_square_bracket": "[",
}
IDLE_BAR: Final = ("run", "sweep", "presets", "history", "quit", "run_again", "save_as", "doctor", "maximise", "help")
RUNNING_BAR: Final = ("stop", "export", "copy", "sort", "pause", "quit", "maximise", "help")
DONE_BAR: Final = (
    "run",
    "longer",
    "export",
    "copy",
    "history",
    "scaling",
    "quit",
    "presets",
    "sort",
    "save_as",
    "maximise",
    "help",
)


def bindings(actions: tuple[Action, ...]) -> list[Binding]:
    """Return Textual bindings, each with its id."""
    return [
        Binding(action.key, action.does, action.label, show=False, id=action.name, tooltip=action.words)
        for action in actions
    ]


def closing(name: str, action: str = "back") -> Binding:
    """Bind the key that opened a screen to close it too, even when remapped."""
    key = next(each.key for each in ALL if each.name == name)
    return Binding(key, action, "Back", show=False, id=name, tooltip=BACK.words)


def bar(actions: tuple[Action, ...], keys: dict[str, str]) -> tuple[tuple[str, str, str], ...]:
    """Return the entries of a key bar for some actions, and for the help."""
    shown = *actions, next(action for action in ANYWHERE if action.does == HELP)
    return tuple((keys[action.name], action.label, action.does) for action in shown)


def shown(key: str) -> str:
    """Format a key for display."""
    return SHOWN_KEYS.get(key.strip(), key.strip())


def shown_key(action: Action, keys: dict[str, str]) -> str:
    """Return the key of an action as configured, for display."""
    return shown(keys.get(action.name, action.key).split(",")[0])


def shown_keys(keys: dict[str, str]) -> dict[str, str]:
    """Return the key of every action, for display."""
    return {action.name: shown_key(action, keys) for action in ALL}
