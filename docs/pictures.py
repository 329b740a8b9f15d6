"""Make the pictures of the app from a real run on this machine: python docs/pictures.py [FOLDER]

`app.svg`, `live.svg`, `roofline.svg` and `scaling.svg`, and `recording.svg`, which shows a run from its start to its
verdict. The history, the settings and the remembered state are those of an empty folder.

The first chart of a written report, as a picture of its own: python docs/pictures.py --chart REPORT.html CHART.svg
"""

import asyncio
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

SIZE: Final = (120, 40)
FRAME_S: Final = 1.0
MAX_FRAMES: Final = 12
LAST_S: Final = 4.0
"""Seconds that the recording stays on its last frame."""
END_S: Final = 1.0
"""Seconds in which the processes of the app that has closed end, before the event loop does."""
LINE: Final = 24.4
"""Height of a row in the SVG of Textual's screenshots."""
FONTS: Final = """.matrix { font: 20px Fira Code, monospace; }
.title { font: bold 18px arial; }
rect { shape-rendering: crispEdges; }"""
SHIFT: Final = "translate(9, 41)"
"""Place of the first row in it."""
PATIENCE_S: Final = 300.0


async def settle(pilot: Any, holds: Any) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not within PATIENCE_S.
    """
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await pilot.pause(0.1)


class Frame:
    """A screenshot as one piece of SVG for each row of the terminal, by which two frames can be compared."""

    def __init__(self, svg: str) -> None:
        svg = re.sub(r"@font-face\s*{[^}]*}", "", svg)  # fonts from the network
        body = svg.index(f'<g transform="{SHIFT}"')
        self.window = re.sub(r"<clipPath.*?</clipPath>|<style>.*?</style>|<!--.*?-->", "", svg[:body], flags=re.S)
        found = re.search(r"\.(terminal-\d+)-matrix", svg)
        assert found is not None
        self.window = self.window.replace(f"{found[1]}-", "")
        styles = dict(re.findall(rf"\.{found[1]}-(r\d+) {{ (.*?) }}", svg))
        self.rows: list[str] = [""] * 100
        for rect, y in re.findall(
            r'(<rect fill="[^"]*" x="[^"]*" y="([\d.]+)"[^>]*shape-rendering[^>]*/>)', svg[body:]
        ):
            self.rows[round((float(y) - 1.5) / LINE)] += rect.replace(' shape-rendering="crispEdges"', "")
        text = rf'<text class="{found[1]}-(r\d+)" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"[^>]*>(.*?)</text>'
        for style, x, y, length, words in re.findall(text, svg[body:], re.S):
            if words.replace("&#160;", "").strip():
                made = f'<text style="{styles[style]}" x="{x}" y="{y}" textLength="{length}">{words}</text>'
                self.rows[int(float(y) // LINE)] += made.replace("&#160;", "\xa0")


def picture(frames: list[Frame]) -> str:
    """Return one SVG of the frames, one after another and over and over; a row that stays is written once."""
    seconds = FRAME_S * (len(frames) - 1) + LAST_S
    ends = [FRAME_S * (number + 1) for number in range(len(frames) - 1)] + [seconds]
    classes: dict[str, str] = {}
    shows: dict[tuple[int, int], None] = {}
    parts = []
    for row in range(max(len(frame.rows) for frame in frames)):
        first = 0
        for number in range(1, len(frames) + 1):
            text = frames[first].rows[row]
            if number < len(frames) and frames[number].rows[row] == text:
                continue
            text = re.sub(r'style="([^"]*)"', lambda found: f'class="{_class(found[1], classes)}"', text)
            if text and (first, number) != (0, len(frames)):
                shows[first, number] = None
                text = f'<g class="f{first}-{number}">{text}</g>'
            parts.append(text)
            first = number
    rules = [f".{name} {{ {style} }}" for style, name in classes.items()]
    for first, number in shows:
        begin, end = 100 * (ends[first - 1] if first else 0.0) / seconds, 100 * ends[number - 1] / seconds
        moments = [(0.0, first == 0), (begin, True), *([(end, False)] if number < len(frames) else [])]
        steps = " ".join(f"{at:.2f}% {{ opacity: {int(seen)}; }}" for at, seen in dict(moments).items())
        rules.append(f"@keyframes k{first}-{number} {{ {steps} 100% {{ opacity: {int(number == len(frames))}; }} }}")
        last = "" if number == len(frames) else "opacity: 0; "  # what a viewer without animation shows
        rules.append(f".f{first}-{number} {{ {last}animation: k{first}-{number} {seconds:g}s step-end infinite; }}")
    style = f"<style>{FONTS}\n{chr(10).join(rules)}</style>"
    lines = "\n".join(part for part in parts if part)
    made = f'{frames[0].window}{style}<g transform="{SHIFT}"><g class="matrix">\n{lines}\n</g></g></svg>\n'
    return "\n".join(line.strip() for line in made.splitlines() if line.strip()) + "\n"


def _class(style: str, classes: dict[str, str]) -> str:
    return classes.setdefault(style, f"r{len(classes)}")


async def take(folder: Path) -> None:
    """Run the app with the real engine, and write the pictures."""
    from fatui.tui.app import FatuiApp

    app = FatuiApp(preset="quick")
    async with app.run_test(size=SIZE) as pilot:

        def frame() -> Frame:
            app.clear_notifications()
            return Frame(app.export_screenshot(title="fatui"))

        def write(name: str) -> None:
            (folder / f"{name}.svg").write_text(picture([frame()]), encoding="utf-8")

        await settle(pilot, lambda: app.advice.current and app.advice.answer.routes)
        frames = [frame()]
        await pilot.press("v", "v", "r")
        while app.runs.active:
            await pilot.pause(FRAME_S)
            app.main.show_run()
            frames.append(frame())
            if app.runs.active and app.session and any(each.points for each in app.session.rates.values()):
                write("live")
        await settle(pilot, lambda: app.report is not None)
        await pilot.press("v")
        app.main.show_run()
        await pilot.pause(0.5)
        kept = frames[:: -(-len(frames) // (MAX_FRAMES - 1))]
        (folder / "recording.svg").write_text(picture([*kept, frame()]), encoding="utf-8")
        await pilot.press("plus")
        await settle(pilot, lambda: not app.runs.active and app.report is not None)
        app.main.show_run()
        await pilot.pause(0.5)
        write("app")
        await pilot.press("i")
        await pilot.pause(0.5)
        write("roofline")
        app.set_draft(app.draft.toggle_sweep().set_axis("seq", (64, 128, 256, 512)).set_axis("batch", (1, 2)))
        app.set_draft(app.draft.set_seconds(4.0))
        app.runs.start()
        await settle(pilot, lambda: not app.runs.active and app.report is not None)
        await pilot.press("g", "a")
        await pilot.pause(0.5)
        write("scaling")
    await asyncio.sleep(END_S)


def first_chart(page: str) -> str:
    """Return the first chart of a report's page as an SVG with the page's colours, light and dark."""
    chart = page[page.index("<svg ") : page.index("</svg>") + len("</svg>")]
    colours = re.findall(r"(--(?:ink|series-\d+): #[0-9a-f]+;)", page[: page.index("</style>")])
    light, dark = colours[: len(colours) // 2], colours[len(colours) // 2 :]
    head, _, rest = chart.partition(">")
    style = (
        f"<style>svg {{ {' '.join(light)} color: var(--ink); font-family: system-ui, sans-serif; }} "
        f"@media (prefers-color-scheme: dark) {{ svg {{ {' '.join(dark)} }} }}</style>"
    )
    return f"{head}>{style}{rest}\n"


def main() -> None:
    """Make the pictures."""
    if sys.argv[1:2] == ["--chart"]:
        Path(sys.argv[3]).write_text(first_chart(Path(sys.argv[2]).read_text()))
        return
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as private:
        for name in ("CONFIG", "DATA"):
            os.environ[f"XDG_{name}_HOME"] = str(Path(private) / name.lower())
        asyncio.run(take(folder))


if __name__ == "__main__":
    main()
