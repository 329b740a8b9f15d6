"""Formats of keys and values as words, as typed texts, and as a choice on the main screen."""

import pytest

from attention.core.kv_format import AFFINE_BITS, AFFINE_GROUPS, parse_kv_format
from fatui.tui.view_models.kv_format import begins, options, say, typed
from fatui.tui.widgets.choice import Choice
from tests.support.stage import on_stage

TEXTS = [*(f"{bits}:{group}" for bits in AFFINE_BITS for group in AFFINE_GROUPS), *map(str, AFFINE_BITS)]


def test_options_have_groups_that_divide_the_widths() -> None:
    assert options([64, 128])[:3] == ("none", "int8", "int6")
    assert options([96])[3] == "int4:32"
    assert options([96, 128])[-3:] == ("mxfp8", "mxfp4", "nvfp4")
    assert options([80])[3] == "int4"  # refused with a reason, rather than left out


@pytest.mark.parametrize("text", [*TEXTS, "8+4:32", "4+mxfp4"])
def test_a_format_reads_as_it_is_typed(text: str) -> None:
    found = typed("none", text)
    assert found is not None
    assert parse_kv_format(found) is not None
    assert say(found, "float16") == text.replace(":64", "")
    assert all(begins("none", text[:end]) for end in range(1, len(text) + 1))


def test_a_plus_or_a_colon_continues_the_present_format() -> None:
    assert typed("mxfp8", "+4") == "mxfp8+int4"
    assert typed("int8+int6", "+4") == "int8+int4"
    assert typed("int4", ":32") == "int4:32"
    assert typed("int8+int4", ":32") == "int8+int4:32"
    assert (typed("int4", "16"), say("none", "float16"), say("none", "float32")) == ("none", "16", "32")


@pytest.mark.parametrize("text", ["1", "8+", "4:3", "+"])
def test_an_incomplete_text_is_no_option_yet(text: str) -> None:
    assert begins("int8", text)
    assert typed("int8", text) is None


@pytest.mark.parametrize("text", ["43", "9", "8+16", "4:33", "m", "8m", "8+4+4", "mxfp4", ""])
def test_other_texts_do_not_begin_a_format(text: str) -> None:
    assert not begins("int8", text)


@pytest.mark.slow
async def test_the_wheel_ends_a_typed_text() -> None:
    async with on_stage() as stage:
        choice = stage.find("#choice-kv_format", Choice)
        choice.focus()
        await stage.press("4")
        assert choice.value_text == "‹4▏"
        choice.action_step(1)  # as the wheel does, which is no key
        assert choice.value_text == "‹3›"


@pytest.mark.slow
async def test_another_dtype_draws_the_bits_of_what_is_not_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_stage() as stage:
        choice, drawn = stage.find("#choice-kv_format", Choice), []
        monkeypatch.setattr(choice, "refresh", lambda: drawn.append(choice.value_text.strip()))
        stage.find("#choice-dtype", Choice).focus()
        await stage.press("home")
        assert drawn == ["32"]


async def test_the_choice_is_turned_or_typed() -> None:
    async with on_stage() as stage:
        stage.find("#choice-kv_format", Choice).focus()
        await stage.press("right")
        assert stage.app.draft.kv_format == "int8"
        await stage.press("4", "+", "m")
        assert stage.app.draft.kv_format == "int4"  # until the name is whole
        assert "4+m▏" in stage.seen()
        await stage.press("x", "f", "p", "8")
        assert stage.app.draft.kv_format == "int4+mxfp8"
        await stage.press("3")
        assert stage.app.draft.kv_format == "int3"
        assert stage.app.draft.workloads()[0].quantized
        await stage.press("x")  # a key of the screen, not of the choice
        assert stage.app.draft.kv_format == "int3"


@pytest.mark.thorough
async def test_a_width_that_no_group_divides_is_reported() -> None:
    async with on_stage() as stage:
        stage.app.set_draft(stage.app.draft.set_axis("head_dim", (80,)).set_choice("kv_format", ("int4",)))
        await stage.pilot.pause()
        assert "cannot run: head_dim: got 80; int4" in stage.seen()
        stage.app.set_draft(stage.app.draft.set_axis("head_dim", (96,)))
        stage.find("#choice-kv_format", Choice).focus()
        await stage.press("home", "right")
        assert stage.app.draft.kv_format == "int8:32"


@pytest.mark.slow
async def test_a_sweep_takes_several_formats() -> None:
    async with on_stage() as stage:
        await stage.press("s")
        stage.find("#choice-kv_format", Choice).focus()
        await stage.press("right", "space", "4", ":", "3", "2", "space")
        assert stage.app.draft.choices("kv_format") == ("none", "int8", "int4:32")
        assert "3 cases: K/V none, int8, int4:32" in stage.seen()
