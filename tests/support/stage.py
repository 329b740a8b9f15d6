"""Test stage of the app: a scripted engine, a clock moved by the test, and a pilot."""

import asyncio
import random
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from unittest.mock import patch

from textual._compositor import Compositor
from textual.css.model import RuleSet
from textual.css.stylesheet import Stylesheet
from textual.pilot import Pilot

from attention.core import events as on
from attention.core.results import Environment, Peaks
from attention.core.route import Route
from attention.engine.record import record_of
from attention.measure.device import Device
from fatui.tui.advisor import AdviceReply
from fatui.tui.app import FatuiApp
from fatui.tui.painting import RepaintBudget
from tests.support.patience import patient

PATHS = {
    "baseline": "manual, unfused",
    "poc": "CPU kernel avx512",
    "practical": "blocks 256 x 512",
    "demo": "poc, tuned",
}
CALL_S = {"baseline": 36e-3, "poc": 0.73e-3, "practical": 33e-3, "demo": 0.74e-3}
DEVICE = Device(
    backend="cpu",
    name="Test CPU",
    cores=2,
    memory_bytes=2**34,
    available_bytes=2**33,
    architecture="x86_64",
    mlx="0.32.4",
)
PEAKS = Peaks(matmul_flops_per_s=60e9, fma_flops_per_s=900e9, copy_bytes_per_s=12e9, launch_s=20e-6)
AT = datetime(2026, 3, 14, 12, 4, 11)


class Clock:
    def __init__(self):
        self.at = 100.0

    def __call__(self):
        return self.at


class ScriptedEngine:
    """An engine with the interface that the app needs, which does only what a test requests."""

    def __init__(self, plan, listener):
        self.record = record_of(plan)
        self.process_id = None
        self.stopped = False
        self.breaks_with = None
        self._listener = listener
        self._ended = asyncio.Event()

    async def run(self):
        await self._ended.wait()
        if self.breaks_with:
            raise self.breaks_with

    def stop(self):
        self.stopped = True
        self._ended.set()

    def end(self):
        self._ended.set()

    def tell(self, *events):
        for event in events:
            self.record.apply(event)
            self._listener(event)

    def begin(self):
        where = Environment(device="Test CPU", backend="cpu", mlx="0.32.4", fatui="0.1.0")
        self.tell(on.RunStarted(environment=where), on.PeaksMeasured(peaks=PEAKS))

    def begin_case(self, case=0):
        plan = self.record.plan
        self.tell(on.CaseStarted(case=case), on.ReferenceChosen(case=case, implementation="baseline"))
        for name in plan.ordered:
            route = Route(path=PATHS[name], fused=name == "poc", reason=f"why {name}", predicted_bytes=2**22)
            quantized = getattr(plan.cases[case], "kv_format", "none") != "none"
            checked = on.AccuracyChecked(
                case=case,
                implementation=name,
                max_error=1e-3,
                rms_error=1e-4,
                accurate=True,
                detail="output",
                kv_error=0.11 if quantized else None,
            )
            self.tell(
                on.RouteFound(case=case, implementation=name, route=route),
                on.FirstCall(case=case, implementation=name, seconds=0.5),
                checked,
                on.MemoryMeasured(case=case, implementation=name, peak_bytes=2**22 if name == "baseline" else 2**20),
                on.LatencyMeasured(case=case, implementation=name, seconds=CALL_S[name]),
                on.StepStarted(case=case, implementation=name, step="rounds"),
            )

    def rounds(self, count=24, case=0, factor=None):
        draw = random.Random(case)
        names = [name for name, row in self.record.cases[case].rows.items() if row.ended is None]
        samples = {
            name: [CALL_S[name] * (factor or {}).get(name, 1.0) * (1 + draw.gauss(0, 0.002)) for _ in range(count)]
            for name in names
        }
        samples[on.REPEATED_REFERENCE] = [CALL_S["baseline"] * (1 + draw.gauss(0, 0.002)) for _ in range(count)]
        counterparts = {
            each: {name: [2 * CALL_S[name] * (1 + draw.gauss(0, 0.002)) for _ in range(count)] for name in names}
            for each in getattr(self.record.plan.cases[case], "counterparts", ())
        }
        self.tell(
            on.RoundsDone(
                case=case, samples=samples, counterparts=counterparts, active_bytes=48 * 2**20, peak_bytes=96 * 2**20
            )
        )

    def end_case(self, case=0):
        self.tell(on.CaseDone(case=case, stopped_by="precision"))

    def finish(self):
        """Play the rest of the first case, and end the run."""
        self.rounds()
        self.end_case()
        self.tell(on.RunDone())
        self.end()

    def play(self, factor=None):
        """Play a whole run except its end."""
        self.begin()
        for case in range(len(self.record.cases)):
            self.begin_case(case)
            self.rounds(case=case, factor=factor(case) if factor else None)
            self.end_case(case)
        self.tell(on.RunDone())


class Stage:
    """The app, its pilot, its clock, and the engine of the active run."""

    def __init__(self, app, pilot, clock, engines):
        self.app, self.pilot, self.clock, self._engines = app, pilot, clock, engines
        self.is_rendered = False

    @property
    def engine(self):
        return self._engines[-1]

    async def press(self, *keys):
        await self.pilot.press(*keys)
        await self.pilot.pause()

    def find(self, what, kind=None):
        return self.app.screen.query_one(what, kind) if kind else self.app.screen.query_one(what)

    async def settle(self, until=lambda: True, seconds=20.0):
        """Let the app run until a condition holds."""
        await self.pilot.pause()
        end = time.monotonic() + patient(seconds)
        while not until():
            assert time.monotonic() < end, "it did not come to that"
            await self.pilot.pause(0.02)

    async def end(self):
        """End the run, and wait until it is kept: threads compute the report, which shows first, and store it."""
        self.engine.end()
        await self.settle(lambda: has_ended(self.app))

    async def run_to_the_end(self, factor=None):
        await self.press("r")
        self.engine.play(factor)
        await self.end()
        self.app.main.show_run()
        await self.pilot.pause()

    def seen(self):
        """All text on the screen, as lines."""
        self.is_rendered = True
        lines = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in lines)


def has_ended(app):
    """Whether the latest run has ended and is stored: until then the app opens panes and takes no other run."""
    return app.runs._ended is not None and app.runs._ended.is_set()


def make_app(clock=None, engines=None, **options):
    clock, engines = clock or Clock(), [] if engines is None else engines

    def make_engine(plan, listener):
        engines.append(ScriptedEngine(plan, listener))
        return engines[-1]

    app = FatuiApp(make_engine=make_engine, clock=clock, now=lambda: AT, advise=False, **options)
    app.repaints = RepaintBudget(share=1e6)  # none is left out, whatever the machine
    app.advice.device = DEVICE
    return app


def advise(app, **routes):
    """Answer as the advisor would."""
    made = {
        name: Route(path=path, fused=name == "poc", reason=f"why {name}", predicted_bytes=2**22)
        for name, path in PATHS.items()
    }
    routes = {**made, **routes}
    largest = {name: route.predicted_bytes for name, route in routes.items() if route.predicted_bytes is not None}
    needs = {name: (size + 2**21,) for name, size in largest.items()}
    app.advice._take(AdviceReply(number=app.advice._number, routes=routes, largest=largest, needs=needs))


def _not_painted(compositor, full=False, **options):
    """Skip the partial repaints of a headless app, about half of its time; `Stage.seen` renders the whole screen."""
    compositor._dirty_regions.clear()
    return compositor.render_full_update(simplify=options.get("simplify", False)) if full else None


IDLE_S = 0.002
"""Seconds without anything to do after which an app is idle; timers and threads may go on later."""


def _has_update(app):
    """Whether the screen is to be drawn at the next frame, and callbacks wait for that."""
    stack = app.screen_stack
    return bool(stack) and stack[-1].is_running and stack[-1]._update_timer._active.is_set()


_wait_for_screen = Pilot._wait_for_screen


async def _wait_patiently(pilot, timeout=30.0):
    """Wait for the messages of all widgets, on a busy machine for longer than Textual's 30 s."""
    return await _wait_for_screen(pilot, patient(timeout))


@contextmanager
def impatient(app):
    """Continue as soon as no task can go on; Textual waits 20 ms and more, until the process uses little of a core."""

    async def until_idle(*_times):
        loop = asyncio.get_running_loop()
        idle = False
        while not idle:
            while loop._ready:
                await asyncio.sleep(0)
            if _has_update(app):
                app.screen._on_timer_update()
                continue
            await asyncio.sleep(IDLE_S)
            idle = not (loop._ready or _has_update(app))

    with (
        patch("textual.pilot.wait_for_idle", until_idle),
        patch("textual.app.wait_for_idle", until_idle),
        patch.object(Pilot, "_wait_for_screen", _wait_patiently),
    ):
        yield


_parsed = {}
_parse_rules = Stylesheet._parse_rules


def _parse_rules_once(stylesheet, *source, **options):
    """Share parsed styles between apps: parsing them is a tenth of an app's start."""
    key = (source, *sorted(options.items()), *sorted(stylesheet._variables.items()))
    if key not in _parsed:
        _parsed[key] = _parse_rules(stylesheet, *source, **options)
    return _parsed[key]


@contextmanager
def cheap_styles():
    """Parse styles once, and hash their rules by identity in C: Textual does so in Python, 200 for each widget."""
    with (
        patch.object(Stylesheet, "_parse_rules", _parse_rules_once),
        patch.object(RuleSet, "__hash__", object.__hash__),
    ):
        yield


_process_component_classes = Stylesheet._process_component_classes


def _process_once(stylesheet, node):
    """Style the parts of a widget when it is mounted, not again at each change of a class above it.

    Those changes are of colours, which no text shows; computing them is a quarter of an app's time.
    """
    if not node._component_styles:
        _process_component_classes(stylesheet, node)


def unpainted():
    """Repaint only on demand: `Stage.seen`, and the picture of a snapshot."""
    return patch.object(Compositor, "render_update", _not_painted)


def styled_once():
    """Give the parts of a widget the colours that they have when it is mounted."""
    return patch.object(Stylesheet, "_process_component_classes", _process_once)


@asynccontextmanager
async def on_stage(size=(120, 40), paints=False, **options):
    """Start the app, give its Stage, and quit the app as a user would.

    Args:
        size: columns and lines of the screen.
        paints: repaint on each change, as in a terminal; otherwise only `Stage.seen` renders, at least once.
        options: arguments of the app.
    """
    clock, engines = Clock(), []
    app = make_app(clock, engines, **options)
    with ExitStack() as stack:
        for each in (impatient(app), cheap_styles(), *(() if paints else (unpainted(), styled_once()))):
            stack.enter_context(each)
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            stage = Stage(app, pilot, clock, engines)
            yield stage
            if app.is_running and not (paints or stage.is_rendered):
                stage.seen()
            if app.runs.active:
                await app.runs.end()


SPEED = {"baseline": 0.05, "mlx": 0.04, "practical": 0.04, "poc": 0.025, "demo": 0.025}
WAVE = [1 + 0.002 * (index % 5) for index in range(15)]


def play_generation(engine):
    """Play a whole run of a model."""
    engine.begin()
    for case in range(len(engine.record.cases)):
        engine.tell(on.CaseStarted(case=case), on.WeightsLoaded(case=case, weights_bytes=2 * 2**30))
        engine.tell(on.ReferenceChosen(case=case, implementation="baseline"))
        arms = {
            **{name: SPEED[name] for name in engine.record.plan.ordered},
            on.REPEATED_REFERENCE: 0.05,
            on.WITHOUT_ATTENTION: 0.02,
        }
        times = {name: [seconds * each for each in WAVE] for name, seconds in arms.items()}
        engine.tell(on.RoundsDone(case=case, samples=times, active_bytes=2**20, peak_bytes=2**21))
        engine.tell(on.CaseDone(case=case, stopped_by="time"))
    engine.tell(on.RunDone())


def play_iterations(engine, names, count):
    """Play iterations of a fine-tuning."""
    for name in names:
        for number in range(1, count + 1):
            engine.tell(
                on.IterationDone(
                    case=0,
                    implementation=name,
                    number=number,
                    loss=6.0 - 0.25 * number,
                    seconds=SPEED.get(name, 0.05) * WAVE[number],
                    active_bytes=2**20,
                    peak_bytes=2**21,
                )
            )


def play_tuning(engine):
    """Play a whole fine-tuning."""
    engine.begin()
    engine.tell(on.CaseStarted(case=0), on.ReferenceChosen(case=0, implementation="baseline"))
    play_iterations(engine, [*engine.record.plan.ordered, on.REPEATED_REFERENCE], 12)
    engine.tell(on.CaseDone(case=0, stopped_by="iterations"), on.RunDone())
