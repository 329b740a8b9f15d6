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
PATIENCE_S: Final = 300.0


async def settle(pilot: Any, holds: Any) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: it did not within PATIENCE_S.
    """
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await pilot.pause(0.1)


def still(app: Any) -> str:
    """Return the screen as an SVG without fonts from the network."""
    return re.sub(r"@font-face\s*{[^}]*}", "", app.export_screenshot(title="fatui"))


def recording(frames: list[str]) -> str:
    """Return one SVG that shows the frames one after another, over and over."""
    seconds = FRAME_S * (len(frames) - 1) + LAST_S
    view = re.search(r'viewBox="[^"]*"', frames[0])
    assert view is not None
    rules, parts = [], []
    for number, frame in enumerate(frames):
        begin = 100 * FRAME_S * number / seconds
        end = 100 * FRAME_S * (number + 1) / seconds if number < len(frames) - 1 else 100.0
        shown = f"{begin:.2f}% {{ visibility: visible; }} {end:.2f}% {{ visibility: hidden; }}"
        rules.append(f"@keyframes f{number} {{ 0% {{ visibility: hidden; }} {shown} }}")
        body = frame[frame.index("<svg") :]
        parts.append(f'<g style="visibility: hidden; animation: f{number} {seconds:g}s step-end infinite">{body}</g>')
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view[0]}><style>{" ".join(rules)}</style>{"".join(parts)}</svg>'


async def take(folder: Path) -> None:
    """Run the app with the real engine, and write the pictures."""
    from fatui.tui.app import FatuiApp

    app = FatuiApp(preset="quick")
    async with app.run_test(size=SIZE) as pilot:

        def write(name: str) -> None:
            app.clear_notifications()
            (folder / f"{name}.svg").write_text(still(app))

        await settle(pilot, lambda: app.advice.current and app.advice.answer.routes)
        frames = [still(app)]
        await pilot.press("v", "v", "r")
        while app.runs.active:
            await pilot.pause(FRAME_S)
            app.main.show_run()
            frames.append(still(app))
            if app.session is not None and any(each.points for each in app.session.rates.values()):
                write("live")
        await settle(pilot, lambda: app.report is not None)
        await pilot.press("v")
        app.main.show_run()
        await pilot.pause(0.5)
        write("app")
        kept = frames[:: -(-len(frames) // (MAX_FRAMES - 1))]
        (folder / "recording.svg").write_text(recording([*kept, still(app)]))
        await pilot.press("i")
        await pilot.pause(0.5)
        write("roofline")
        app.set_draft(app.draft.toggle_sweep().set_axis("seq", (64, 128, 256, 512)).set_axis("batch", (1, 2)))
        app.set_draft(app.draft.set_seconds(2.0))
        app.runs.start()
        await settle(pilot, lambda: not app.runs.active and app.report is not None)
        await pilot.press("g", "a")
        await pilot.pause(0.5)
        write("scaling")


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
    with tempfile.TemporaryDirectory() as private:
        for name in ("CONFIG", "DATA"):
            os.environ[f"XDG_{name}_HOME"] = str(Path(private) / name.lower())
        asyncio.run(take(folder))


if __name__ == "__main__":
    main()
