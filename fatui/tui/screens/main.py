"""The main screen: the implementations and the workload, the live run, the comparison, and the log."""

from typing import ClassVar

from msgspec import structs
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.geometry import Size
from textual.widget import Widget
from textual.widgets import Static

from attention.core.results import Case, Report, Row
from attention.core.workload import Workload
from fatui import formatting
from fatui.draft import UNNAMED
from fatui.report.document import counted
from fatui.telemetry import Reading
from fatui.tui import actions
from fatui.tui.lab import TABLE_TICKS, Lab, command_of
from fatui.tui.painting import SparingScreen
from fatui.tui.screens.base import AppScreen
from fatui.tui.screens.tables import HasTable
from fatui.tui.view_models import availability, cost, table_lines
from fatui.tui.view_models.session import AnySession
from fatui.tui.widgets.bars import SPINNER, TABS, KeyBar, PaneTabs, StatusLine
from fatui.tui.widgets.choice import Choice
from fatui.tui.widgets.comparison_pane import ComparisonPane
from fatui.tui.widgets.implementation_picker import ImplementationPicker
from fatui.tui.widgets.live_pane import LivePane
from fatui.tui.widgets.log_pane import LogPane, LogView
from fatui.tui.widgets.row_table import RowTable
from fatui.tui.widgets.slider import Slider
from fatui.tui.widgets.table_pane import TablePane
from fatui.tui.widgets.text_panes import HomePane, RowPane
from fatui.tui.widgets.workload_pane import WorkloadPane, shown_workload

MIN_SIZE = (60, 16)
MIN_WIDE_SIZE = (110, 32)
"""Minimum size at which all panes are shown side by side."""
MIN_THREE_COLUMNS = (160, 40)
"""Minimum size at which Live stands beside the comparison, with the row under its cursor below it."""
MIN_FOUR_CHOICES = 76
"""Minimum columns at which all choices of the workload fit into one row."""
TOO_SMALL = "fatui needs {0} x {1} characters.\nThis terminal has {2} x {3}; make it larger, or the letters smaller."
PANES = {
    "implementations-pane": "setup",
    "workload": "setup",
    "live": "live",
    "comparison": "results",
    "log": "log",
    "row": "results",
}
"""The tab of each pane, in the order of their numbers."""
FOCUS = {
    "implementations-pane": "#implementations",
    "workload": "#axis-batch",
    "live": "#live",
    "comparison": "#comparison-table",
    "log": "#log-view",
    "row": "#row",
}
"""The widget to focus in each pane."""


class MainScreen(HasTable, AppScreen, SparingScreen[None]):
    """Main screen of the app's state; the only state of its own is the open tab."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *actions.bindings(actions.MAIN),
        Binding("escape", "restore", "Show all panes again", show=False, id="back"),
    ]
    app: Lab

    _status: StatusLine
    _key_bar: KeyBar
    _live: LivePane
    _comparison: ComparisonPane
    _log: LogPane
    _ticks = 0
    _maximised: Widget | None = None
    """The pane that fills the screen."""
    _model_ran = False
    """Whether a model run was active at the last tick, so that its end is shown too."""

    def compose(self) -> ComposeResult:
        """Yield the panes; the classes of the layout come first, as setting them later styles every widget again."""
        keys = self.app.keys
        turns, alone = f"{keys['previous_pane']} and {keys['next_pane']} turn", f"{keys['maximise']} maximises a pane"
        tabs = PaneTabs(f"{turns} · {alone}")
        tabs.show("log" if self.app.remembered.tab == "log" else "setup")  # nothing has run yet
        self._status, self._key_bar = StatusLine(), KeyBar()
        self._live = LivePane(id="live", view=self.app.remembered.view)
        self._log, self._comparison = LogPane(self.app.journal, id="log"), ComparisonPane(id="comparison")
        self.set_classes(self._layout_classes(tabs.tab))
        yield self._status
        yield Static(id="too-small", markup=False)
        yield tabs
        with Horizontal(id="body"):
            with Vertical(id="left"):
                with Vertical(id="implementations-pane", classes="pane") as pane:
                    pane.border_title = "1 Implementations"
                    yield ImplementationPicker(id="implementations")
                yield WorkloadPane(self.app.draft, id="workload")
                if self.has_class("-wide"):
                    yield self._log
            with Vertical(id="right"):
                yield self._live
                yield HomePane(id="home")
                yield self._comparison
                if not self.has_class("-wide"):
                    yield self._log
                yield RowPane(id="row")
        yield self._key_bar

    def on_mount(self) -> None:
        """Draw the initial state, and start the repaint timer."""
        remembered = self.app.remembered
        by = remembered.sort if remembered.sort in table_lines.SORTABLE else ""
        comparison = self._comparison
        comparison.by, comparison.descending = by, remembered.descending
        for name in remembered.hidden:
            if name in PANES:
                self.query_one(f"#{name}").add_class("-away")
        self.show_past()
        self._fill_the_grid()
        self.show_draft()
        self.show_run()
        self.set_interval(self.app.REPAINT_S, self._tick)

    def _tick(self) -> None:
        active = self.app.runs.active_session
        if active is not None:
            cost.note_time_left(active)
        if self.app.session is not None and self.app.session.active:
            self.app.runs.watch_silence()
            self._ticks += 1
            affordable = self.app.repaints.allows()
            if self._ticks % TABLE_TICKS == 0:
                self.show_run()
            elif affordable:
                self._show_live(memory=False)
                self._show_bars()
        elif self.app.runs.active != self._model_ran or self.app.runs.active:
            self._model_ran = self.app.runs.active
            self._show_bars()
        self._log.refresh_lines()

    def on_resize(self) -> None:
        """Choose between panes, tabs, and the notice that the terminal is too small."""
        self._lay_out()
        if self.has_class("-small"):
            self.query_one("#too-small", Static).update(TOO_SMALL.format(*MIN_SIZE, *self.app.size))
        self.call_after_refresh(self.show_run)

    def _lay_out(self) -> None:
        """Set the classes that the layout depends on, all at once, as each change restyles every widget."""
        self._offer_tab()
        classes = self._layout_classes(self.tab)
        if classes != self.classes:
            self.set_classes(classes)
        self._place_log()
        self._fill_the_grid()

    def _offer_tab(self) -> None:
        """Let Live show the roofline on the first screen of wide terminals, where there is room for it."""
        known = self._is_home and self.app.peaks.flops_per_s is not None
        self._live.offer("roofline" if known and _is_wide(self.app.size) else "trends")

    def _place_log(self) -> None:
        """Let the log stand below the set-up on wide terminals, else below the comparison: as another widget of it,
        since a widget keeps its parent.
        """
        column, old = self.query_one("#left" if self.has_class("-wide") else "#right"), self._log
        if old.parent is column:
            return
        focused = self._focused_pane() is old
        self._log = LogPane(self.app.journal, id="log", like=old)
        if self._maximised is old:
            self._maximised = self._log
        old.remove()
        column.mount(self._log, after=self.query_one("#workload" if column.id == "left" else "#comparison"))
        self._mark_holder()
        if focused:
            self.call_after_refresh(self._log.view.focus)

    def _layout_classes(self, tab: str) -> frozenset[str]:
        """Return the screen's classes for the terminal's size and an open tab."""
        width, height = self.app.size
        narrow = width < MIN_WIDE_SIZE[0] or height < MIN_WIDE_SIZE[1]
        wanted = {
            "-wide": _is_wide(self.app.size),
            "-max": self._maximised is not None,
            "-home": self._is_home,
            "-roofline": self._live.opened == "roofline",
            "-small": width < MIN_SIZE[0] or height < MIN_SIZE[1],
            "-narrow": narrow,
            "-slim": width < MIN_FOUR_CHOICES,
            **{f"-{name}": narrow and name == tab for name, _ in TABS},
        }
        return frozenset((self.classes - wanted.keys()) | {name for name, is_set in wanted.items() if is_set})

    def _fill_the_grid(self) -> None:
        """Let the visible panes of wide terminals fill their grid: Live on the left, the others on the right."""
        home = self._is_home
        panes = [self.query_one(f"#{name}") for name in ("live", *(("home",) if home else ("comparison", "row")))]
        away = self.query_one("#comparison").has_class("-away")
        seen = [pane for pane in panes if not (away if pane.id == "home" else pane.has_class("-away"))]
        beside = [pane for pane in seen if pane.id != "live"]
        for pane in panes:
            alone = len(beside if pane.id != "live" and not home else seen) == 1
            pane.set_class(alone or (pane.id == "live" and not home), "-tall")
            pane.set_class(home or len(seen) == len(beside) or not beside, "-broad")
        self.query_one("#workload").set_class(self._log.has_class("-away"), "-alone")

    def show_draft(self) -> None:
        """Draw the draft and the advice for it."""
        app = self.app
        workload = shown_workload(app.draft)
        self.query_one(ImplementationPicker).show(
            availability.make_picker_rows(
                app.draft, workload, app.advice, self._paths_taken(workload), self._call_times(workload)
            )
        )
        pane = self.query_one(WorkloadPane)
        devices = app.advice.device.max_ranks if app.advice.device else 1
        if pane.draft is not app.draft or pane.devices != devices:
            pane.devices = devices
            pane.show(app.draft)
        self._lay_out()
        self._show_live()
        pane.show_cost(self._cost_lines() if workload else [], app.keys)
        self._show_bars()

    def _call_times(self, workload: Workload | None) -> dict[str, availability.CallTime]:
        if workload is None:
            return {}
        app = self.app
        names = availability.names_for(app.draft)
        launch_s = app.peaks.launch_s if app.peaks else None
        return cost.call_times(workload, names, app.remembered.pace, app.device_name, launch_s)

    def _paths_taken(self, workload: Workload | None) -> dict[str, str]:
        """Return the path that each implementation took on the workload in the run shown."""
        cases = self.app.report.cases if self.app.report else ()
        rows = [row for case in cases if case.workload == workload for row in case.rows]
        return {row.implementation: row.path for row in rows if row.path and row.status == "ok"}

    def _cost_lines(self) -> list[str]:
        """Return what a run would take: its time, the memory of the largest case, and what would be refused."""
        app, draft = self.app, self.app.draft
        if not draft.implementations:
            return ["no implementation is selected; space selects one"]
        plan = draft.plan()
        needs = availability.needs_text(draft, app.advice)
        time = cost.time_line(plan, app.remembered.pace, app.device_name, app.costs.of(plan))
        if cost.nothing_runs(draft, app.advice):
            time = "nothing would be measured"
        return [time, *cost.refusal_lines(draft, app.advice), *([needs] if needs else [])]

    def show_run(self) -> None:
        """Draw the current run, or the report that was opened."""
        if not self.is_mounted:
            return
        session = self.app.session
        self._lay_out()
        self._show_live()
        comparison = self._comparison
        if session is not None:
            comparison.show_session(session, self.app.report, self.app.keys)
        elif self.app.report is not None:
            comparison.show_report(self.app.report, self.app.keys)
        self._log.refresh_lines()
        self.show_row()
        self._show_bars()

    def show_row(self) -> None:
        """Draw the row under the comparison's cursor, where there is a pane for it."""
        if not self.has_class("-wide"):
            return
        key = self._comparison.table.key
        case, row, command = self._row_of(*table_lines.split_key(key)) if key else (None, None, "")
        self.query_one(RowPane).show(case, row, command)

    @on(RowTable.Highlighted, "#comparison-table")
    def _follow_cursor(self) -> None:
        self.show_row()

    def show_roofline(self) -> None:
        """Draw the roofline of the workload on the sliders, with what the run has measured."""
        live = self._live
        if not live.draws_roofline:
            return
        app, session = self.app, self.app.session
        cases = app.report.cases if app.report else ()
        if session is not None and app.report is None:
            cases = tuple(session.case(index) for index, case in enumerate(session.record.cases) if case.started)
        live.show_roofline(shown_workload(app.draft), app.peaks, cases, app.keys["run"])

    def over_reference(self, report: Report) -> Report:
        """Return a report with its speedups over the reference that the comparison shows."""
        return self._comparison.over_reference_of(report)

    def action_unfold(self) -> None:
        """Show or hide the controls of the workload that are at their defaults."""
        self.query_one(WorkloadPane).toggle_fold()

    def action_live_view(self) -> None:
        """Draw the trends of Live in the next view."""
        self.open_tab("live")
        live = self._live
        live.turn_view()
        self.app.remembered.view = live.view

    def action_live_tab(self) -> None:
        """Open the other tab of Live."""
        self.open_tab("live")
        self._live.turn_tab()

    @on(LivePane.Turned)
    def _show_turned(self) -> None:
        self._lay_out()
        self._show_live()

    def _show_live(self, *, memory: bool = True) -> None:
        reference = self._comparison.reference
        self._live.show(self.app.session, self.app.report, self.app.keys, memory=memory, reference=reference)
        self.show_roofline()

    def show_reading(self, reading: Reading) -> None:
        """Draw a reading of the machine."""
        self._live.show_reading(reading)

    def _show_bars(self) -> None:
        app = self.app
        errors = app.journal.errors
        alarm = errors > 0 or bool(app.session and app.session.silent)
        self._status.show(self._left_text(), self._right_text(), alarm=alarm)
        bar = actions.RUNNING_BAR if app.runs.active else actions.DONE_BAR if app.report else actions.IDLE_BAR
        not_now = {"longer": not app.runs.can_go_on, "maximise": self._maximised is not None}
        names = [name for name in bar if not not_now.get(name)]
        by_name = {action.name: action for action in actions.ACTIONS}
        keys = [(app.keys[name], by_name[name].label, by_name[name].does) for name in names]
        back = [(app.keys["maximise"], "All panes", "screen.maximise")] if self._maximised else []
        self._key_bar.show((*back, *keys))

    def _left_text(self) -> str:
        """Format what is set up and on which machine: "quick · AMD EPYC, 2 cores · MLX 0.32.4"."""
        session, advice = self.app.session, self.app.advice
        parts = [session.preset or UNNAMED if session and session.active else self.app.draft.title()]
        if advice.device is not None:
            device = advice.device
            cores = f", {counted(device.cores, 'core')}" if device.backend == "cpu" else ""
            parts += [f"{self.app.device_name}{cores}"]
            parts += [f"MLX {device.mlx}"] if device.mlx else []
        else:
            parts.append(advice.problem.splitlines()[0] if advice.problem else "probing the device")
        return " · ".join(parts)

    def _right_text(self) -> str:
        """Format the phase, the time, and the number of errors."""
        app, errors = self.app, self.app.journal.errors
        suffix = f" · {errors} error{'s' if errors > 1 else ''}, see the log" if errors else ""
        session, active = app.session, app.runs.active_session
        if active is not None and active is not session:
            left = cost.remaining(active)
            return f"{active.plan.cases[0].model or 'a stream'} runs{f' · {left.words}' if left else ''}{suffix}"
        if session is None:
            return f"{f'run {app.report.run.id} is open' if app.report else 'ready'}{suffix}"
        elapsed = formatting.duration(session.elapsed_s)
        if not session.active:
            return f"{session.phase_text}, {elapsed}{suffix}"
        turn = SPINNER[int(session.elapsed_s * 2) % len(SPINNER)]
        if session.silent:
            silent = formatting.duration(session.silent_s)
            return f"engine silent for {silent}; {app.keys['stop']} stops it{suffix} {turn}"
        return f"{_phase(session)}{suffix} {turn}"

    @property
    def tab(self) -> str:
        """The open tab, where panes are tabs."""
        return self.query_one(PaneTabs).tab

    def open_tab(self, tab: str) -> None:
        """Open a tab, and focus its first pane unless one has the focus; without effect where all panes are visible."""
        self._show_tab(tab)
        pane = self._focused_pane()
        if self.has_class("-narrow") and (pane is None or PANES.get(pane.id or "", "results") != tab):
            first = next((name for name in self._reachable_panes if PANES[name] == tab), None)
            if first is not None:
                self.app.focus_after_layout(self._focusable(first))

    def _show_tab(self, tab: str) -> None:
        self.query_one(PaneTabs).show(tab)
        full = self._maximised
        if full is not None and self.has_class("-narrow") and PANES.get(full.id or "", "results") != tab:
            self._maximise(None)
        self._lay_out()

    @on(PaneTabs.Opened)
    def _open_clicked(self, event: PaneTabs.Opened) -> None:
        self.open_tab(event.tab)

    def action_pane(self, count: int) -> None:
        """Focus the next or previous visible pane; where panes are tabs, open the next or previous tab."""
        panes = self._reachable_panes
        if not panes:
            return
        if self.has_class("-narrow"):
            tabs = list(dict.fromkeys(PANES[name] for name in panes))
            tab = _neighbour(tabs, self.tab, count)
            here = next(name for name in panes if PANES[name] == tab)
        else:
            focused = self._focused_pane()
            name = focused.id if focused else None
            here = _neighbour(panes, "comparison" if name == "home" else name, count)
        self._go_to(here)

    def action_go_to_pane(self, number: int) -> None:
        """Focus the pane with a number; a hidden one is shown again."""
        name = list(PANES)[number - 1]
        if name == "row" and name not in self._reachable_panes and not self.has_class("-wide"):
            self.app.tell(f"the row's pane needs {MIN_THREE_COLUMNS[0]} columns; enter on a row shows the same")
            return
        self.query_one(f"#{name}").remove_class("-away")
        self._go_to(name)

    def leave_sliders(self) -> None:
        """Go from the workload to the comparison, where digits go to panes and enter opens a row."""
        pane = self._focused_pane()
        there = "comparison" in self._reachable_panes and not self.has_class("-narrow") and self._maximised is None
        if pane is not None and pane.id == "workload" and there:
            self.query_one(FOCUS["comparison"]).focus()

    @property
    def _reachable_panes(self) -> list[str]:
        """The names of the panes that are not hidden."""
        wide = self.has_class("-wide")
        return [name for name in PANES if (wide or name != "row") and not self.query_one(f"#{name}").has_class("-away")]

    def _go_to(self, name: str) -> None:
        """Focus a pane; while one is maximised, this one instead."""
        if self._maximised is not None:
            self._maximise(self.query_one(f"#{name}"))
        self._show_tab(PANES[name])
        target = self._focusable(name)
        if target.region.area and not self.has_class("-narrow"):
            self.set_focus(target)
        else:
            self.app.focus_after_layout(target)

    def _focusable(self, name: str) -> Widget:
        """Return the widget to focus in a pane."""
        return self.query_one("#home" if name == "comparison" and self._is_home else FOCUS[name])

    def _focused_pane(self) -> Widget | None:
        node = self.focused
        ids = {**PANES, "home": "results"}
        return next((each for each in node.ancestors_with_self if each.id in ids), None) if node else None  # type: ignore[return-value]

    def action_maximise(self) -> None:
        """Let the focused pane fill the screen; if one does, show all again."""
        self._maximise(None if self._maximised else self._focused_pane())

    def action_restore(self) -> None:
        """Show all panes again."""
        self._maximise(None)

    def _maximise(self, pane: Widget | None) -> None:
        if pane is not None and pane.id == "comparison" and self._is_home:
            pane = self.query_one("#home")
        self._maximised = pane
        for each in self.query(".pane"):
            each.set_class(each is pane, "-maximised")
        self._mark_holder()
        self._lay_out()
        self.call_after_refresh(self.show_run)

    def _mark_holder(self) -> None:
        """Show the column of the pane that fills the screen, if one does."""
        for name in ("left", "right"):
            column = self.query_one(f"#{name}")
            column.set_class(self._maximised is not None and self._maximised.parent is column, "-holds")

    @property
    def _is_home(self) -> bool:
        """Whether nothing was run or opened yet."""
        return self.app.session is None and self.app.report is None

    def show_past(self) -> None:
        """Draw the last run on this machine on the first screen."""
        self.query_one(HomePane).show(self.app.past, self.app.keys, self.app.where)

    @on(HomePane.Opened)
    def _open_past(self) -> None:
        if self.app.past is not None:
            self.app.open_report(self.app.past.report)

    def action_put_away(self) -> None:
        """Hide the focused pane; if any is hidden already, show all again."""
        away = list(self.query(".-away"))
        for each in away:
            each.remove_class("-away")
        pane = self._focused_pane()
        if not away and pane is not None and pane.id in PANES:
            self._maximise(None)
            pane.add_class("-away")
            title = actions.PANE_TITLES[list(PANES).index(pane.id)]
            self.app.tell(f"{title} is hidden; {self.app.keys['put_away']} brings it back")
            self.action_pane(0)
        self._fill_the_grid()

    @property
    def hidden(self) -> list[str]:
        """The names of the hidden panes."""
        return [pane.id for pane in self.query(".-away") if pane.id]

    @on(TablePane.OrderChanged)
    def _remember_order(self) -> None:
        pane = self._comparison
        self.app.remembered.sort, self.app.remembered.descending = pane.by, pane.descending

    @on(TablePane.ReferenceRequested)
    def _take_reference(self, event: TablePane.ReferenceRequested) -> None:
        """Show speedups over a row's implementation; over the run's own reference again if it was that already."""
        pane = self._comparison
        _, name = table_lines.split_key(event.key)
        pane.refer_to(None if pane.reference == name else name)
        self.show_run()

    def action_find(self) -> None:
        """Filter the comparison if it has the focus; else search the log."""
        pane = self._focused_pane()
        if pane is not None and pane.id == "comparison":
            self._pane().ask_filter()
            return
        self.open_tab("log")
        self._log.ask()

    @on(LogView.Opened)
    def _open_log_line(self, event: LogView.Opened) -> None:
        from fatui.tui.screens.dialogs import FullText

        self.app.push_screen(FullText(f"{event.line.level} of {event.line.at}", event.line.text))

    def action_pause(self) -> None:
        """Pause or resume the log."""
        self._log.toggle_pause()

    @on(WorkloadPane.Edited)
    def _take_draft(self, event: WorkloadPane.Edited) -> None:
        self.app.set_draft(event.draft)

    def go_to_implementation(self, name: str) -> None:
        """Put the cursor of the list of implementations on one of them."""
        self.query_one(ImplementationPicker).go_to(name)

    @on(ImplementationPicker.Toggled)
    def _toggle(self, event: ImplementationPicker.Toggled) -> None:
        self.app.set_draft(self.app.draft.toggle(event.name))

    @on(ImplementationPicker.Explained)
    def _explain(self, event: ImplementationPicker.Explained) -> None:
        from fatui.tui.screens.dialogs import FullText

        self.app.push_screen(FullText(event.name, event.text))

    def pending(self) -> str:
        """Return what to do about a number that is still being typed, in words; empty without one."""
        return next((slider.pending for slider in self.query(Slider) if slider.typed is not None), "")

    @on(Slider.Refused)
    @on(Choice.Refused)
    def _tell_refusal(self, event: Slider.Refused | Choice.Refused) -> None:
        self.app.tell(event.reason, "warning")

    @on(RowTable.Chosen, "#comparison-table")
    def _open_row(self, event: RowTable.Chosen) -> None:
        if event.key is not None:
            self.open_row(*table_lines.split_key(event.key))

    def open_row(self, index: int, implementation: str) -> None:
        """Show the details of a row of a case."""
        from fatui.tui.screens.dialogs import RowDetails

        case, row, command = self._row_of(index, implementation)
        if case is not None and row is not None:
            self.app.push_screen(RowDetails(case, row, command))
        elif case is not None:
            self.app.tell(f"{implementation} has no figures yet")

    def _row_of(self, index: int, implementation: str) -> tuple[Case | None, Row | None, str]:
        """Return a case, one of its rows, and the command that measures it; None for what there is not."""
        session, report = self.app.session, self.app.report
        over_reference = self._comparison.over_reference
        if session is not None:
            case = over_reference(index, session.case(index))
            command = command_of(structs.replace(session.plan, cases=(case.workload,)), None)
        elif report is not None and index < len(report.cases):
            case = over_reference(index, report.cases[index])
            command = report.run.command  # its plan is not kept, so the command is the whole run's
        else:
            return None, None, ""
        return case, next((row for row in case.rows if row.implementation == implementation), None), command


def _is_wide(size: Size) -> bool:
    return size.width >= MIN_THREE_COLUMNS[0] and size.height >= MIN_THREE_COLUMNS[1]


def _phase(session: AnySession) -> str:
    left = cost.remaining(session)
    if session.phase != "running" or left is None:
        return f"{session.phase_text} · {formatting.duration(session.elapsed_s)}"
    if session.building:
        return f"compiling {session.building} · {formatting.duration(session.elapsed_s)}"
    many = len(session.plan.cases)
    case = f" case {(session.case_number or 0) + 1} of {many}" if many > 1 else ""
    return f"running{case} · {formatting.duration(session.elapsed_s)} · {left.words}"


def _neighbour(names: list[str], here: str | None, count: int) -> str:
    """Return the name `count` places after `here`, wrapping around, or the first if `here` is not in the list."""
    return names[(names.index(here) + count) % len(names)] if here in names else names[0]
