"""Numbers typed into every slider and choice of every screen."""

from contextlib import suppress

import pytest
from textual import events

from attention.core.errors import UsageError
from fatui.tui.input_order import OrderedInput
from fatui.tui.screens.models import ModelScreen
from fatui.tui.view_models import mask_editor
from fatui.tui.widgets.choice import Choice
from fatui.tui.widgets.slider import Slider
from tests.support.marks import thorough
from tests.support.stage import on_stage

VALID, LARGE, ZERO, WRONG = "3", "9" * 9, "0", "1.,"
OPENED_BY = {"main": (), "models": ("m",), "finetuning": ("f",), "streaming": ("a",), "chips": ("C",)}


async def type_into(stage, control, text):
    """Type a text, of a slider its last key alone, and enter."""
    control.focus()
    if isinstance(control, Slider):
        control.typed, text = text[:-1] or None, text[-1]
    await stage.press(*text, "enter")
    assert stage.app.is_running


async def walk_slider(stage, slider):
    await type_into(stage, slider, VALID)
    values = slider.values
    assert values == slider._parse(VALID)
    for text in (LARGE, ZERO, WRONG):
        with pytest.raises(ValueError, match="takes "):
            slider._parse(text)
        await type_into(stage, slider, text)
        assert slider.values == values
        assert f"{slider.label} takes " in stage.app.journal.text().splitlines()[-1]


async def walk_choice(stage, choice):
    await type_into(stage, choice, VALID)
    if choice._typed_option is not None:
        assert choice.value.endswith(VALID)
    for text in (LARGE, ZERO, WRONG):
        await type_into(stage, choice, text)
        if isinstance(stage.app.screen, ModelScreen):
            with suppress(UsageError):
                stage.app.screen.plan()


@pytest.mark.parametrize("screen", [name if name == "models" else thorough(name) for name in OPENED_BY])
async def test_every_control_takes_typed_digits(screen):
    async with on_stage() as stage:
        await stage.press(*OPENED_BY[screen])
        choices = [
            choice
            for choice in stage.app.screen.query(Choice)
            if choice._typed_option is not None or choice._typing is not None
        ]
        for choice in choices:
            await walk_choice(stage, choice)
        sliders = [slider for slider in stage.app.screen.query(Slider) if slider.display]
        for slider in sliders:
            await walk_slider(stage, slider)
        assert choices or sliders, "the screen has nothing to type into"


@pytest.mark.thorough
async def test_every_number_of_a_mask_takes_typed_digits(stage):
    for kind in mask_editor.KINDS:
        stage.app.set_draft(stage.app.draft.set_choice("mask", (kind.mask,)))
        for index, parameter in enumerate(kind.parameters):
            await walk_slider(stage, stage.find(f"#mask-{index}", Slider))
            assert parameter.label in stage.app.journal.text().splitlines()[-1]


@pytest.mark.thorough
async def test_a_window_beyond_all_lengths_is_refused(stage):
    stage.find("#choice-mask", Choice).focus()
    await stage.press(*LARGE)
    assert stage.app.draft.mask == "window:9999999"
    assert "mask takes a whole number from 1 to 16,777,216" in stage.app.journal.text()


async def test_several_values_without_a_sweep_say_what_takes_them(stage):
    stage.find("#axis-seq", Slider).focus()
    await stage.press(*"64,128", "enter")
    assert "seq takes several values in a sweep only, not '64,128'; Sweep starts one" in stage.app.journal.text()
    assert stage.app.draft.axes["seq"] == (512,)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("key", ["up", "k"])
async def test_up_from_the_first_slider_stays(stage, key):
    stage.find("#axis-seq", Slider).focus()
    await stage.press(key, key, key)
    assert stage.app.focused.id == "axis-batch"


def type_ahead(app, *keys):
    """Hand keys to the app at once, as it reads them from a paste or a slow connection."""
    for key in keys:
        app.post_message(events.Key(key, key if len(key) == 1 else None))


@pytest.mark.thorough
@pytest.mark.parametrize("size", [(120, 40), (80, 24)])
async def test_keys_read_at_once_act_where_the_ones_before_led(size):
    async with on_stage(size=size) as stage:
        type_ahead(stage.app, "2", "6", "4", "enter", "down", "2", "5", "6", "enter")
        await stage.settle(lambda: stage.app.draft.axes["seq"] == (256,))
        assert stage.app.draft.axes["batch"] == (64,)


async def test_keys_go_on_after_one_that_got_lost(stage, monkeypatch):
    monkeypatch.setattr("fatui.tui.input_order.MAX_WAIT_S", 0.05)
    monkeypatch.setattr(OrderedInput, "on_key_done", lambda app, event: None)
    type_ahead(stage.app, "2", "3", "enter")
    await stage.settle(lambda: stage.app.draft.axes["batch"] == (3,))


async def test_keys_keep_their_order_while_the_app_has_no_time(stage, monkeypatch):
    """A busy machine may let the app wait for longer than a key may take: the run has what was marked before it."""
    monkeypatch.setattr("fatui.tui.input_order.MAX_WAIT_S", 0)
    type_ahead(stage.app, "s", "2", "down", "right", "space", "r")
    await stage.settle(lambda: stage.app.runs.active)
    assert len(stage.app.session.plan.cases) == 2


@pytest.mark.thorough
async def test_keys_read_at_once_reach_what_they_open(stage):
    type_ahead(stage.app, "w", *"mine", "enter")
    await stage.settle(lambda: "saved as" in stage.app.journal.text())
    assert "mine.toml" in stage.app.journal.text()
    await stage.run_to_the_end()
    table = stage.find("#comparison-table")
    type_ahead(stage.app, "4", "slash", *"poc", "enter", "down")
    await stage.settle(lambda: table.key == "0:demo")
    assert len(table.lines) == 2
