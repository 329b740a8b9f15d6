"""Colours of a theme that can be read: some themes' warnings, or rows under the cursor, hardly differ from what is
behind them."""

from collections.abc import Mapping
from typing import Final

from textual.color import Color, ColorParseError

MIN_RATIO: Final = 4.5
"""Minimum contrast of text, by WCAG 2 AA."""
STEPS: Final = 20
PAIRS: Final = (
    ("block-cursor-foreground", "block-cursor-background"),
    *((f"text-{name}", "background") for name in ("primary", "secondary", "accent", "success", "warning", "error")),
)
"""Names of colours of text, each with that of what is behind it."""


def contrast(one: Color, other: Color) -> float:
    """Return the contrast of two colours by WCAG 2: from 1, of equal ones, to 21, of black and white."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: Color) -> float:
    parts = [part / 255 for part in color.rgb]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def legible(variables: Mapping[str, str]) -> dict[str, str]:
    """Return a theme's colours, those of text as far towards black or white as they have to be to be read."""
    made = dict(variables)
    for text, behind in PAIRS:
        try:
            ground = Color.parse(made[behind])
            automatic = made[text].startswith("auto")
            color = ground.get_contrast_text(1.0) if automatic else Color.parse(made[text])
        except (KeyError, ColorParseError):  # the terminal's own
            continue
        if color.ansi is None and ground.ansi is None:
            made[text] = _readable(color, ground).hex
    return made


def _readable(color: Color, ground: Color) -> Color:
    ends = (Color(0, 0, 0), Color(255, 255, 255))
    end = max(ends, key=lambda each: contrast(each, ground))
    ways = (color.blend(end, step / STEPS) for step in range(STEPS + 1))
    return next((way for way in ways if contrast(way, ground) >= MIN_RATIO), end)
