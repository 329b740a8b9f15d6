"""Snapshots of the app."""

from contextlib import nullcontext
from itertools import product

import pytest

from tests.support.sample_runs import compared
from tests.support.stage import (
    Clock,
    Stage,
    advise,
    cheap_styles,
    has_ended,
    impatient,
    make_app,
    play_generation,
    play_tuning,
    unpainted,
)
from tests.support.streams import stream_report

SIZES = ((80, 24), (120, 40))
WIDE = (200, 55)


def picture(snap_compare, size, steps, press=(), paints=False):
    """Compare the app after some steps; `paints`: as in a terminal, which overlays need."""
    clock, engines = Clock(), []
    app = make_app(clock, engines)

    async def before(pilot):
        advise(app)
        await pilot.pause()
        await steps(app, pilot, engines, clock)
        app.clear_notifications()
        app.main.show_run()
        await pilot.pause()

    with impatient(app), cheap_styles(), nullcontext() if paints else unpainted():
        assert snap_compare(app, terminal_size=size, run_before=before, press=press)


async def idle(app, pilot, engines, clock):
    pass


async def running(app, pilot, engines, clock):
    await pilot.press("r")
    await pilot.pause()
    engine = engines[-1]
    engine.begin()
    engine.begin_case()
    for _ in range(6):
        engine.rounds(5)
    from attention.core import events as on

    engine.tell(on.Progress(done=0.4, remaining_s=6.0, now="poc: rounds"))
    clock.at += 3


async def done(app, pilot, engines, clock):
    await pilot.press("r")
    await pilot.pause()
    engines[-1].play()
    clock.at += 9
    engines[-1].end()
    await Stage(app, pilot, clock, engines).settle(lambda: has_ended(app))
    assert app.main.tab == "results"


async def swept(app, pilot, engines, clock):
    app.set_draft(app.draft.toggle_sweep().set_axis("seq", (64, 128, 256)).set_axis("batch", (1, 2)))
    await done(app, pilot, engines, clock)


async def masked(app, pilot, engines, clock):
    app.set_draft(app.draft.set_axis("seq", (2048,)).set_choice("mask", ("blocks:0.25",)))
    await done(app, pilot, engines, clock)


async def quantized(app, pilot, engines, clock):
    app.set_draft(app.draft.toggle_sweep().set_axis("seq", (2048,)).set_choice("pass_", ("decode",)))
    app.set_draft(app.draft.set_choice("kv_format", ("none", "int4", "int8+int4")))
    await done(app, pilot, engines, clock)
    app.main.open_row(1, "poc")


async def scaled(app, pilot, engines, clock):
    await swept(app, pilot, engines, clock)
    await pilot.press("g", "a")


async def scaled_latency(app, pilot, engines, clock):
    await scaled(app, pilot, engines, clock)
    await pilot.press("tab")


async def scaled_flops(app, pilot, engines, clock):
    await scaled(app, pilot, engines, clock)
    await pilot.press("tab", "tab")


async def scaled_memory(app, pilot, engines, clock):
    await scaled(app, pilot, engines, clock)
    await pilot.press("tab", "tab", "tab")


async def sweep(app, pilot, engines, clock):
    app.set_draft(app.draft.toggle_sweep().set_axis("seq", (64, 128, 256)).set_axis("batch", (1, 2)))


async def roofline(app, pilot, engines, clock):
    await done(app, pilot, engines, clock)
    await pilot.press("i")


async def maximised(app, pilot, engines, clock):
    await done(app, pilot, engines, clock)
    await pilot.press("4")
    await pilot.pause()
    await pilot.press("z")


async def jump(app, pilot, engines, clock):
    await done(app, pilot, engines, clock)
    app.clear_notifications()
    await pilot.press("semicolon")


async def compare(app, pilot, engines, clock):
    from fatui.tui.screens.history import Compare

    app.push_screen(Compare(*compared(mlx="0.33.0", blas="MKL", device="Apple M4")))


async def ended(app, pilot, engines, screen):
    engines[-1].end()
    await Stage(app, pilot, None, engines).settle(lambda: has_ended(app))
    assert screen in app.runs.model_reports
    for _ in range(2):  # the verdict has as many lines as the layout, once it knows the rows, leaves it
        app.screen._show()
        await pilot.pause()


async def models(app, pilot, engines, clock):
    await pilot.press("m", "r")
    play_generation(engines[-1])
    await ended(app, pilot, engines, "models")


async def fine_tuning(app, pilot, engines, clock):
    await pilot.press("f", "r")
    play_tuning(engines[-1])
    await ended(app, pilot, engines, "finetuning")


async def streaming(app, pilot, engines, clock):
    app.open_report(stream_report("tiny-llama"))
    await pilot.pause()
    app.screen._show()


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        pytest.param(
            steps,
            size,
            marks=() if (steps, size) == (running, SIZES[1]) else pytest.mark.slow,
            id=f"{steps.__name__}-{size[0]}x{size[1]}",
        )
        for steps, size in product((idle, running, done), SIZES)
    ],
)
def test_main_screen(snap_compare, size, steps):
    picture(snap_compare, size, steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [idle, running, done], ids=lambda steps: steps.__name__)
def test_main_screen_of_a_wide_terminal(snap_compare, steps):
    picture(snap_compare, WIDE, steps)


OTHERS = (
    *(sweep, swept, scaled, scaled_latency, scaled_flops, scaled_memory, roofline, maximised),
    *(compare, models, fine_tuning, streaming),
)
QUICK = ((roofline, SIZES[1]),)
EARLIER = ((swept, SIZES[1]), (scaled, SIZES[1]))
"""Those with a test of their own below."""


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        pytest.param(
            steps,
            size,
            marks=() if (steps, size) in QUICK else pytest.mark.slow,
            id=f"{steps.__name__}-{size[0]}x{size[1]}",
        )
        for steps, size in (*product(OTHERS, SIZES), (models, WIDE), (swept, WIDE))
        if (steps, size) not in EARLIER
    ],
)
def test_other_screens(snap_compare, size, steps):
    picture(snap_compare, size, steps)


@pytest.mark.slow
@pytest.mark.parametrize("size", [*SIZES, WIDE], ids=lambda size: f"{size[0]}x{size[1]}")
def test_jump_mode(snap_compare, size):
    picture(snap_compare, size, jump, paints=True)


@pytest.mark.slow
def test_a_sweep_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), swept)


@pytest.mark.slow
def test_a_mask_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), masked)


@pytest.mark.slow
def test_quantized_keys_and_values_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), quantized)


@pytest.mark.slow
def test_scaling_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), scaled)


@pytest.mark.thorough
def test_without_colour(snap_compare, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    picture(snap_compare, (120, 40), done)


@pytest.mark.slow
def test_in_the_colours_of_the_terminal(snap_compare):
    async def steps(app, pilot, engines, clock):
        app.theme = "ansi-dark"
        await done(app, pilot, engines, clock)

    picture(snap_compare, (80, 24), steps)
