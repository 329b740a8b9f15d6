"""Snapshots of the app."""

from itertools import product

import pytest

from tests.support.stage import Clock, advise, cheap_styles, impatient, make_app, unpainted

SIZES = ((80, 24), (120, 40))


def picture(snap_compare, size, steps, press=()):
    clock, engines = Clock(), []
    app = make_app(clock, engines)

    async def before(pilot):
        advise(app)
        await pilot.pause()
        await steps(app, pilot, engines, clock)
        app.clear_notifications()
        app.main.show_run()
        await pilot.pause()

    with impatient(app), cheap_styles(), unpainted():
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
    for _ in range(100):
        await pilot.pause(0.02)
        if app.report is not None and not app.runs.active and app.main.tab == "results":
            return


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


@pytest.mark.parametrize(
    ("steps", "size"),
    [
        pytest.param(
            steps, size, marks=() if number % 2 else pytest.mark.slow, id=f"{steps.__name__}-{columns}x{lines}"
        )
        for number, (steps, size) in enumerate(product((idle, running, done), SIZES))
        for columns, lines in (size,)
    ],
)
def test_main_screen(snap_compare, size, steps):
    picture(snap_compare, size, steps)


def test_a_sweep_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), swept)


def test_a_mask_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), masked)


def test_quantized_keys_and_values_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), quantized)


def test_scaling_at_120_x_40(snap_compare):
    picture(snap_compare, (120, 40), scaled)


def test_without_colour(snap_compare, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "")
    picture(snap_compare, (120, 40), done)


def test_in_the_colours_of_the_terminal(snap_compare):
    async def steps(app, pilot, engines, clock):
        app.theme = "ansi-dark"
        await done(app, pilot, engines, clock)

    picture(snap_compare, (80, 24), steps)
