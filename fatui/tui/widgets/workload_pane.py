"""The workload: sliders and choices, and below them the resulting cases, FLOPs, memory and time."""

from collections.abc import Sequence
from functools import partial
from typing import Final

from textual import on
from textual.app import ComposeResult
from textual.containers import Container, Vertical
from textual.markup import escape
from textual.message import Message
from textual.widgets import Static

from attention.core.errors import UsageError
from attention.core.plan import DEFAULTS
from attention.core.workload import DTYPES, MAX_SIZES, PASSES, Workload
from fatui import formatting
from fatui.draft import AXES, Draft
from fatui.quantities import SECONDS, STOPS, divisors, format_number, format_numbers, parse_number, parse_values
from fatui.tui.painting import set_subtitle, set_text, set_title
from fatui.tui.view_models import kv_format, mask_editor
from fatui.tui.widgets.choice import Choice
from fatui.tui.widgets.slider import Slider
from fatui.tui.widgets.text_panes import CostBlock

LABELS: Final = {
    "batch": "batch",
    "seq": "seq",
    "head_dim": "head dim",
    "heads": "heads",
    "kv_heads": "K/V heads",
    "ranks": "devices",
}
CHOICES: Final = {"dtype": "dtype", "mask": "mask", "pass_": "pass", "kv_format": "K/V"}
FOLDED: Final = {"axis-kv_heads": "K/V heads", "axis-ranks": "devices", "seconds": "seconds"}
"""The controls that are hidden where room is short while they are at their defaults, and their names."""
MAX_SECONDS: Final = 86_400
CANNOT: Final = "cannot run"
BUTTONS: Final = (
    "[@click=app.start_run]▸ Run[/]  [dim]{run}[/]    [@click=app.sweep]{sweep}[/]  [dim]{sweep_key}[/]"
    "    [@click=app.save_as]Save as[/]  [dim]{save_as}[/]"
)


class WorkloadPane(Vertical):
    """Editor of a draft; it posts each change, and draws the draft that is set.

    Attributes:
        draft: the draft drawn.
        devices: the stops of the slider of devices: those of this machine.
    """

    class Edited(Message):
        """Posted when the user changed the draft."""

        def __init__(self, draft: Draft) -> None:
            super().__init__()
            self.draft = draft

    def __init__(self, draft: Draft, *, id: str) -> None:
        super().__init__(id=id, classes="pane")
        self.draft = draft
        self.devices = 1
        self._parameters: list[tuple[mask_editor.Parameter, tuple[int, ...]]] = []
        self.border_title = "2 Workload"

    def compose(self) -> ComposeResult:
        """Yield the sliders, the choices, and the lines below them."""
        for name in AXES:
            stops = STOPS.get(name, (1,))
            yield Slider(LABELS[name], stops, parse=partial(self._parse, name), say=format_number, id=f"axis-{name}")
        yield Slider("seconds", SECONDS, parse=_parse_seconds, say=self._seconds_text, id="seconds")
        with Container(id="choices"):
            yield Choice("dtype", DTYPES, id="choice-dtype")
            yield Choice(
                "mask",
                mask_editor.options(()),
                id="choice-mask",
                typed_option=mask_editor.typed_window,
                say=mask_editor.say_mask,
            )
            yield Choice("pass", PASSES, id="choice-pass_")
            yield Choice(
                "K/V bits", kv_format.options(()), id="choice-kv_format", typing=kv_format, say=self._say_format
            )
        with Vertical(id="mask-editor"):
            for index in range(mask_editor.MAX_PARAMETERS):
                yield Slider("", (1,), parse=lambda text: (), id=f"mask-{index}")
            yield Static(id="mask-picture", markup=False)
        for name in ("folded", "cases", "counts"):
            yield Static(id=f"workload-{name}", markup=False)
        yield CostBlock()
        yield Static(id="workload-buttons")

    def on_mount(self) -> None:
        """Draw the initial draft."""
        self.show(self.draft)

    def _parse(self, name: str, text: str) -> tuple[int, ...]:
        largest = MAX_SIZES[name]
        if self.draft.sweeping:
            return parse_values(text, largest)
        if "," in text or ".." in text:
            raise ValueError(f"takes several values in a sweep only, not '{text.strip()}'; Sweep starts one")
        return (parse_number(text, largest),)

    def show(self, draft: Draft) -> None:
        """Draw a draft."""
        self.draft = draft
        for name in AXES:
            values = draft.kv_heads if name == "kv_heads" else draft.axes[name]
            slider = self.query_one(f"#axis-{name}", Slider)
            slider.show(values, stops=self._stops(name, draft), sweeping=draft.sweeping)
            if name == "ranks":  # of a single device there is nothing to choose
                slider.set_class(self.devices == 1 and values == (1,), "-absent")
        self.query_one("#seconds", Slider).show((_whole_seconds(draft.seconds),))
        self._fold(draft)
        for name in ("dtype", "pass_"):
            self.query_one(f"#choice-{name}", Choice).show(draft.choices(name), sweeping=draft.sweeping)
        widths = draft.axes["head_dim"] if draft.value_dim is None else (*draft.axes["head_dim"], draft.value_dim)
        self.query_one("#choice-kv_format", Choice).show(
            draft.choices("kv_format"), sweeping=draft.sweeping, options=kv_format.options(widths)
        )
        self._show_mask(draft)
        set_title(self, f"2 Workload · {draft.title()}")
        self.query_one("#choices").set_class(draft.sweeping, "-sweeping")
        cases = cases_text(draft)
        self._line("cases", cases)
        self.query_one("#workload-cases").set_class(cases.startswith(CANNOT), "-bad")
        self._line("counts", counts_text(draft))

    def _stops(self, name: str, draft: Draft) -> tuple[int, ...]:
        if name == "kv_heads":
            return divisors(max(draft.axes["heads"]))
        return tuple(range(1, self.devices + 1)) if name == "ranks" else STOPS[name]

    def _fold(self, draft: Draft) -> None:
        """Mark the controls that are at their defaults, which short terminals hide until they are unfolded."""
        at_default = {
            "axis-kv_heads": draft.kv_heads == draft.axes["heads"],
            "axis-ranks": draft.axes["ranks"] == (1,),
            "seconds": draft.seconds == DEFAULTS.seconds,
        }
        hidden = [name for name, default in at_default.items() if default and not draft.sweeping]
        for name in at_default:
            self.query_one(f"#{name}").set_class(name in hidden, "-default")
        line = self.query_one("#workload-folded", Static)
        set_text(line, f"at their defaults, u shows them: {', '.join(FOLDED[name] for name in hidden)}")
        line.set_class(not hidden, "-empty")

    def toggle_fold(self) -> None:
        """Show or hide the controls at their defaults."""
        self.toggle_class("-unfolded")

    def _say_format(self, text: str) -> str:
        return kv_format.say(text, self.draft.dtype)

    def _show_mask(self, draft: Draft) -> None:
        chosen = draft.choices("mask")
        options = mask_editor.options(chosen)
        self.query_one("#choice-mask", Choice).show(chosen, sweeping=draft.sweeping, options=options)
        self._parameters = mask_editor.sliders(chosen)
        for index, slider in enumerate(self.query("#mask-editor Slider").results(Slider)):
            slider.display = index < len(self._parameters)
            if slider.display:
                parameter, values = self._parameters[index]
                slider.change(parameter.label, parse=partial(self._parse_mask, parameter), say=parameter.say)
                slider.show(values, stops=parameter.stops, sweeping=draft.sweeping)
        workload = shown_workload(draft)
        lines = mask_editor.mask_lines(workload) if workload else []
        picture = self.query_one("#mask-picture", Static)
        picture.set_class(not lines, "-empty")
        set_text(picture, "\n".join(lines))
        self.query_one("#mask-editor").display = bool(lines or self._parameters)

    def _parse_mask(self, parameter: mask_editor.Parameter, text: str) -> tuple[int, ...]:
        texts = text.split(",") if self.draft.sweeping else [text]
        return tuple(sorted({parameter.parse(each.strip()) for each in texts}))

    def show_cost(self, lines: Sequence[str], keys: dict[str, str]) -> None:
        """Draw what a run would take, and the buttons."""
        self.query_one(CostBlock).show(lines)
        sweep = "End sweep" if self.draft.sweeping else "Sweep"
        run, sweep_key, save_as = (escape(keys.get(name, "")) for name in ("run", "sweep", "save_as"))
        text = BUTTONS.format(run=run, sweep=sweep, sweep_key=sweep_key, save_as=save_as)
        self._line("buttons", text)

    def _line(self, name: str, text: str) -> None:
        line = self.query_one(f"#workload-{name}", Static)
        line.display = bool(text)
        set_text(line, text)

    @on(Slider.Typing)
    def _say_typing(self, event: Slider.Typing) -> None:
        event.stop()
        slider, only = event.slider, ": only these" if self.draft.sweeping else " applies"
        words = "" if slider.typed is None else f"{slider.label} {slider.typed} · enter{only} · esc drops"
        set_subtitle(self, words)

    @on(Slider.Changed)
    def _take_axis(self, event: Slider.Changed) -> None:
        event.stop()
        if event.slider.id == "seconds":
            self._edit(self.draft.set_seconds(float(event.values[0])))
            return
        if (event.slider.id or "").startswith("mask-"):
            parameter, _ = self._parameters[int((event.slider.id or "").removeprefix("mask-"))]
            masks = mask_editor.with_values(self.draft.choices("mask"), parameter, event.values)
            self._edit(self.draft.set_choice("mask", masks))
            return
        self._edit(self.draft.set_axis((event.slider.id or "").removeprefix("axis-"), event.values))

    @on(Choice.Changed)
    def _take_choice(self, event: Choice.Changed) -> None:
        event.stop()
        self._edit(self.draft.set_choice((event.choice.id or "").removeprefix("choice-"), event.values))

    def _seconds_text(self, number: int) -> str:
        seconds = self.draft.seconds
        return f"{seconds:g} s" if number == _whole_seconds(seconds) else f"{number} s"

    def _edit(self, draft: Draft) -> None:
        self.show(draft)
        self.post_message(self.Edited(draft))


def _whole_seconds(seconds: float) -> int:
    """Return the place on the slider, which has whole seconds; a preset may have parts of them."""
    return max(1, round(seconds))


def _parse_seconds(text: str) -> tuple[int, ...]:
    word = text.strip()
    if not (word.isascii() and word.isdigit() and 1 <= int(word[:6]) <= MAX_SECONDS and len(word) < 6):
        raise ValueError(f"takes whole seconds from 1 to {MAX_SECONDS:,}, not '{word}'")
    return (int(word),)


def shown_workload(draft: Draft) -> Workload | None:
    """Return the first case, which the estimates are about, or None if there is none."""
    try:
        return draft.workloads()[0]
    except UsageError:
        return None


def cases_text(draft: Draft) -> str:
    """Describe what the sliders cannot show: a preset's own cases, the values of a sweep, and errors."""
    try:
        count = len(draft.workloads())
    except UsageError as error:
        return f"{CANNOT}: {'; '.join(error.problems)}"
    if draft.cases:
        others = f"the other {count - 1} cases" if count > 2 else "the other case"
        return f"{count} cases of the preset, the sliders show the first; moving a slider drops {others}"
    parts = [f"{LABELS[name]} {format_numbers(values)}" for name, values in draft.axes.items() if len(values) > 1]
    parts += [f"{CHOICES[name]} {', '.join(values)}" for name, values in draft.several.items()]
    if draft.sweeping:
        swept = (
            " x ".join(parts)
            if parts
            else "space marks a value on a slider or a choice, or type 128,512 or 128..4k, then enter"
        )
        return f"{count} case{'s' if count > 1 else ''}: {swept}"
    extra = [f"{name} {value}" for name in ("kv_seq", "value_dim") if (value := getattr(draft, name)) is not None]
    return f"{' and '.join(extra)}, from the preset" if extra else ""


def counts_text(draft: Draft) -> str:
    """Format FLOPs and bytes of one call, or their range over the cases."""
    try:
        cases = draft.workloads()
    except UsageError:
        return ""
    flops = sorted(case.flops for case in cases)
    moved = sorted(case.bytes_moved for case in cases)
    return f"{_range(formatting.flops, flops)} · {_range(formatting.size, moved)} in and out"


def _range(say_figure: "object", values: list[int]) -> str:
    assert callable(say_figure)
    low, high = say_figure(values[0]), say_figure(values[-1])
    return low if low == high else f"{low} to {high}"
