"""The page in a real browser, at the widths of a desktop and a phone."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from attention.core.workload import Workload
from fatui.report.compose import compose
from fatui.report.document import to_html
from tests.support.patience import patient
from tests.support.sample_runs import plan_of, report_of

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
SWEEP = tuple(Workload(seq=seq) for seq in (64, 128, 256, 512, 1024))
PROBE = """<script>
addEventListener("load", () => {
  const box = (each) => each.getBoundingClientRect();
  const told = [];
  const blocks = [...document.querySelectorAll("h1, h2, p, li, .table, pre, figure")]
    .filter((each) => !each.parentElement.closest(".table, li"));
  blocks.forEach((one, index) => {
    const a = box(one);
    if (a.right > innerWidth + 1 || a.left < 0) told.push(["beyond the page", one.textContent.slice(0, 60)]);
    for (const other of blocks.slice(index + 1)) {
      const b = box(other);
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 1) told.push(["overlap", one.textContent.slice(0, 60), other.textContent.slice(0, 60)]);
    }
  });
  for (const drawing of document.querySelectorAll("figure svg")) {
    const words = [...drawing.querySelectorAll("text")];
    words.forEach((one, index) => words.slice(index + 1).forEach((other) => {
      const a = box(one), b = box(other);
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 2) told.push(["words over words", one.textContent, other.textContent]);
    }));
  }
  if (document.documentElement.scrollWidth > innerWidth) told.push(["the page scrolls sideways"]);
  const out = document.createElement("pre");
  out.id = "told";
  out.textContent = JSON.stringify({ width: innerWidth, told });
  document.body.append(out);
});
</script></body>"""


FRAME = """<body style="margin: 0"><iframe src="report.html" width="{width}" height="900"></iframe>
<script>
addEventListener("load", () => setTimeout(() => {{
  const page = document.querySelector("iframe").contentDocument;
  document.body.append(page.querySelector("#told"));
}}, 500));
</script></body>"""
"""A window has a minimum width, a frame has none."""
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"),
    *("--allow-file-access-from-files", "--enable-logging=stderr"),
)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium; apt install chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_overlaps_and_the_console_is_silent(width, tmp_path):
    page, frame = tmp_path / "report.html", tmp_path / "frame.html"
    page.write_text(to_html(compose([report_of(plan_of(SWEEP))])).replace("</body>", PROBE))
    frame.write_text(FRAME.format(width=width))
    command = [BROWSER, *OPTIONS, f"--user-data-dir={tmp_path}", frame.as_uri()]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=patient(120), check=True)
    found = re.search(r'<pre id="told">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found, ran.stderr[-2000:]
    assert json.loads(unescape(found[1])) == {"width": width, "told": []}
    assert "CONSOLE" not in ran.stderr
