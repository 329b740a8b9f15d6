"""Repaints that cost little: of what changed, and of what an update shows.

Textual's own compositor renders every line of every widget of the screen for each update, containers behind other
widgets included: three quarters of what the app took during a run.
"""

import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, TypeVar

from rich.segment import Segment
from rich.style import Style
from textual._compositor import ChopsUpdate, Compositor
from textual._styles_cache import StylesCache
from textual.color import Color
from textual.content import Content
from textual.filter import LineFilter
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from fatui.tui.terminal import literal

R = TypeVar("R")
Span = tuple[int, int, int]
"""A line, its first column, and the column after its last."""
USED: Final = (
    "_dirty_regions",
    "_regions_to_spans",
    "_render_chops",
    "cuts",
    "visible_widgets",
)
"""What it takes from Textual's compositor beyond the documented interface; without any of it Textual's own is used."""


MAX_SHARE: Final = 0.028
"""Share of a core that the app takes during a run: rounds are measured meanwhile, and 3 % is the limit."""
MAX_SAVED_S: Final = 0.02
MAX_OWED_S: Final = 0.1
"""CPU seconds that count of what was saved, or was too much, earlier."""


class RepaintBudget:
    """The CPU time for repaints that can be left out: of trends, of which the next one shows as much.

    Where a repaint costs more than the share, because the processor is slow or a key was pressed, fewer are drawn.
    """

    def __init__(
        self,
        share: float = MAX_SHARE,
        *,
        cpu: Callable[[], float] = time.process_time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._share, self._cpu, self._clock = share, cpu, clock
        self._used_s, self._at, self._saved_s = cpu(), clock(), 0.0

    def allows(self) -> bool:
        """Account for the time since the last call, and return whether the app has taken no more than its share."""
        used_s, at = self._cpu(), self._clock()
        saved_s = self._saved_s + (at - self._at) * self._share - (used_s - self._used_s)
        self._used_s, self._at, self._saved_s = used_s, at, max(-MAX_OWED_S, min(saved_s, MAX_SAVED_S))
        return self._saved_s >= 0


class SparingCompositor(Compositor):
    """Compositor that skips widgets without a part in the update, and those that are covered by others."""

    def render_partial_update(self) -> ChopsUpdate | None:
        """Render the parts of the screen that changed; None if nothing did."""
        screen = self.size.region
        regions = [region.intersection(screen) for region in self._dirty_regions]
        self._dirty_regions.clear()
        spans = list(self._regions_to_spans(region for region in regions if region))
        if not spans:
            return None
        lines = {y for y, _, _ in spans}
        return ChopsUpdate(
            self._render_spans(spans), spans, [cuts[1:] if y in lines else [] for y, cuts in enumerate(self.cuts)]
        )

    def _render_chops(self, crop: Region, is_rendered_line: Callable[[int], bool]) -> Sequence[Mapping[int, Strip]]:
        width = self.size.width
        lines = (y for y in crop.line_range if y < len(self.cuts) and is_rendered_line(y))
        return self._render_spans((y, 0, width) for y in lines)  # type: ignore[return-value]  # the screen covers all

    def _render_spans(self, spans: Iterable[Span]) -> list[dict[int, Strip | None]]:
        """Render the pieces of the lines that are in the spans, the foremost widget first; others are None."""
        cuts = self.cuts
        chops: list[dict[int, Strip | None]] = [{} for _ in cuts]
        missing: dict[int, set[int]] = {}
        for y, begin, end in spans:
            places = cuts[y]
            chops[y] = dict.fromkeys(places[:-1])
            found = {cut for cut, after in pairwise(places) if cut < end and after > begin}
            missing.setdefault(y, set()).update(found)
        for widget, (region, clip) in self.visible_widgets.items():
            if not missing:
                break
            shown = region.intersection(clip)
            left, right = shown.column_span
            lines = [y for y in shown.line_range if y in missing and any(left <= cut < right for cut in missing[y])]
            if not lines:
                continue
            first = lines[0]
            strips = widget.render_lines(Region(left - region.x, first - region.y, shown.width, lines[-1] - first + 1))
            for y in lines:
                places = [cut for cut in cuts[y] if left <= cut <= right]
                pieces = strips[y - first].divide([cut - left for cut in places[1:]])
                wanted, line = missing[y], chops[y]
                for cut, piece in zip(places, pieces, strict=False):
                    if cut in wanted:
                        line[cut] = piece
                        wanted.discard(cut)
                if not wanted:
                    del missing[y]
        return chops


class SparingScreen(Screen[R]):
    """Screen that repaints while a run goes on, at little cost."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if all(hasattr(self._compositor, name) for name in USED):
            self._compositor = SparingCompositor()


def _filtered(strip: Strip, each: LineFilter, background: Color) -> Strip:
    """Return the strip as a filter leaves it: often as it was, of which Textual makes a copy."""
    segments = list(strip)
    made = each.apply(segments, background)
    return strip if made is segments else Strip(made, strip.cell_length)


class LineCache(StylesCache):
    """Cache of the lines of a widget without a frame.

    Attributes:
        lines: those drawn since they were refreshed last.
        drawn_for: what else they depend on.
    """

    def __init__(self) -> None:
        self.lines: dict[int, Strip] = {}
        self.drawn_for: object = None
        super().__init__()

    def set_dirty(self, *regions: Region) -> None:
        """Drop the lines of some regions, or all."""
        super().set_dirty(*regions)
        for region in regions:
            for y in region.line_range:
                self.lines.pop(y, None)

    def clear(self) -> None:
        """Drop all lines."""
        super().clear()
        self.lines.clear()


class KeepsStyles(Widget):
    """Widget that keeps the styles of its parts until they change; Textual computes them anew for each repaint.

    Attributes:
        room: the size of what is drawn, found once for all lines of a repaint; Textual asks the screen for each.
    """

    room = Size()
    _kept: dict[str, Style] | None = None
    _background: Color | None = None
    """Found with the styles too, through all containers."""
    _framed: bool | None = None
    """Whether anything is drawn besides the lines; found with the styles."""

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draw some lines; without a frame or an effect, which Textual looks for at each line, they are as they are."""
        if self._framed is None:
            self._framed = has_frame(self)
        if self._framed:
            self.room = self.scrollable_content_region.size
            return super().render_lines(crop)
        region = self.region
        self.room = region.shrink(self.scrollbar_gutter).size
        width, height = region.size
        if self._background is None:
            self._background = self.background_colors[1]
        background, filters, style = self._background, self.get_line_filters(), self.blank_style
        lines = self._drawn_lines((width, background, style, tuple(filters)))
        strips = []
        for y in crop.line_range:
            if y not in lines:
                strip = (
                    self.render_line(y).adjust_cell_length(width, style) if y < height else Strip.blank(width, style)
                )
                for each in filters:
                    strip = _filtered(strip, each, background)
                lines[y] = strip
            strips.append(lines[y])
        if crop.column_span != (0, width):
            strips = [strip.crop(*crop.column_span) for strip in strips]
        return strips

    def _drawn_lines(self, drawn_for: object) -> dict[int, Strip]:
        """Return the lines drawn so far, without those that were refreshed; none if they were drawn otherwise."""
        if not isinstance(self._styles_cache, LineCache):
            self._styles_cache = LineCache()
        if self._styles_cache.drawn_for != drawn_for:
            self._styles_cache.clear()
            self._styles_cache.drawn_for = drawn_for
        return self._styles_cache.lines

    @property
    def blank_style(self) -> Style:
        """The style of what is not drawn on: the background alone."""
        return Style(bgcolor=self.part_style().bgcolor)

    def part_style(self, part: str = "") -> Style:
        """Return the style of a component class, or the widget's own."""
        if self._kept is None:
            self._kept = {}
        if part not in self._kept:
            self._kept[part] = self.get_component_rich_style(part) if part else self.rich_style
        return self._kept[part]

    def notify_style_update(self) -> None:
        """Drop the styles: a class, the focus or the theme has changed."""
        self._kept = self._framed = self._background = None
        super().notify_style_update()


def has_frame(widget: Widget) -> bool:
    """Whether a widget has a border, padding, an outline, or an effect over its lines."""
    styles = widget.styles
    return bool(
        any(styles.gutter)
        or any(edge for edge, _ in styles.outline)
        or styles.has_rule("hatch")
        or styles.tint.a
        or styles.text_opacity != 1.0
        or widget.opacity != 1.0
    )


def _wrapped(line: str, width: int) -> list[str]:
    return [line] if len(line) <= width else textwrap.wrap(line, width) or [""]


class TextLines(KeepsStyles):
    """Wrapped text that repaints the lines that changed; laid out again only if their number changes."""

    DEFAULT_CSS = "TextLines { height: auto; }"

    def __init__(self, text: str = "", *, id: str) -> None:
        super().__init__(id=id)
        self.text = text
        self._wrapped: tuple[object, list[str]] = (None, [])

    def show(self, text: str) -> None:
        """Set the text."""
        if text == self.text:
            return
        width = self.size.width
        before, self.text = self._lines(width), text
        after = self._lines(width)
        if len(after) != len(before):
            self.refresh(layout=True)
        else:
            changed = (y for y, line in enumerate(after) if line != before[y])
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def _lines(self, width: int) -> list[str]:
        key = self.text, width
        if self._wrapped[0] != key:
            self._wrapped = key, [part for line in self.text.split("\n") for part in _wrapped(line, max(1, width))]
        return self._wrapped[1]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Return the number of lines at a width."""
        return len(self._lines(width))

    def render_line(self, y: int) -> Strip:
        """Draw a line."""
        lines = self._lines(self.room.width)
        parts = [Segment(lines[y], self.part_style())] if y < len(lines) else []
        return Strip(parts).adjust_cell_length(self.room.width, self.blank_style)


def set_title(widget: Widget, title: str) -> None:
    """Set a pane's title; the same again repaints nothing, and another one its line only."""
    _set_edge(widget, "border_title", title)


def set_subtitle(widget: Widget, subtitle: str) -> None:
    """Set the text in a pane's lower edge, of which only that line is repainted."""
    _set_edge(widget, "border_subtitle", subtitle)


@lru_cache(64)
def _marked_up(words: str) -> tuple[Content, str]:
    text = literal(words)
    return text, text.markup


def _set_edge(widget: Widget, name: str, words: str) -> None:
    (text, markup), kept = _marked_up(words), f"_{name}"
    if (getattr(widget, name) or "") == markup:
        return
    size, offset = widget.outer_size, widget.content_offset
    if not size or not hasattr(widget, kept):  # Textual's own way repaints the whole pane
        setattr(widget, name, text)
        return
    setattr(widget, kept, text)
    y = 0 if name == "border_title" else size.height - 1
    widget.refresh(Region(-offset.x, y - offset.y, size.width, 1))


def set_text(static: Static, text: str) -> None:
    """Set a text; the same again repaints nothing, and one of as many lines does not lay the screen out again."""
    if static.content == text:
        return
    height = static.styles.height
    if height is None or not height.is_auto:
        static.update(text, layout=False)
        return
    size = static.content_size
    before = static.get_content_height(size, static.app.size, size.width)
    static.update(text, layout=False)
    if static.get_content_height(size, static.app.size, size.width) != before:
        static.refresh(layout=True)


def set_scroll_size(view: ScrollView, size: Size) -> None:
    """Set what a view scrolls over; only a scroll bar that comes or goes lays the screen out again."""
    if size != view.virtual_size:
        view.set_reactive(ScrollView.virtual_size, size)
        view._scroll_update(size)
