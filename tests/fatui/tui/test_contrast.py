"""Colours that can be read, in every theme."""

import pytest
from textual.color import Color
from textual.theme import BUILTIN_THEMES

from fatui.tui.contrast import MIN_RATIO, PAIRS, contrast, legible


def colours_of(theme):
    return {**theme.to_color_system().generate(), **theme.variables}


@pytest.mark.parametrize("name", [name for name in BUILTIN_THEMES if "ansi" not in name])
def test_text_stands_out_in_every_theme(name):
    colours = legible(colours_of(BUILTIN_THEMES[name]))
    for text, behind in PAIRS:
        assert contrast(Color.parse(colours[text]), Color.parse(colours[behind])) >= MIN_RATIO, text


def test_colours_of_the_terminal_are_left_alone():
    given = {"block-cursor-foreground": "ansi_default", "block-cursor-background": "ansi_blue"}
    assert legible(given) == given


def test_a_colour_that_can_be_read_stays():
    colours = colours_of(BUILTIN_THEMES["nord"])
    assert legible(colours)["text-error"] == Color.parse(colours["text-error"]).hex


def test_the_contrast_is_that_of_wcag():
    assert contrast(Color(0, 0, 0), Color(255, 255, 255)) == pytest.approx(21)
    assert contrast(Color(7, 7, 7), Color(7, 7, 7)) == 1
    assert contrast(Color.parse("#767676"), Color(255, 255, 255)) == pytest.approx(4.54, abs=0.01)
