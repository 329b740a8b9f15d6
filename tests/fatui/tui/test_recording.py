"""The pictures of the documentation: each row once, and frames one after another."""

import importlib.util
import re
from pathlib import Path
from xml.dom import minidom

import pytest

from tests.support.stage import on_stage

SCRIPT = Path(__file__).parents[3] / "docs" / "pictures.py"


@pytest.mark.thorough
async def test_a_recording_writes_a_row_that_stays_once():
    spec = importlib.util.spec_from_file_location("pictures", SCRIPT)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    async with on_stage(paints=True) as stage:
        first = pictures.Frame(stage.app.export_screenshot())
        await stage.press("r")
        second = pictures.Frame(stage.app.export_screenshot())
    still, recording = pictures.picture([first]), pictures.picture([first, second])
    for made in (still, recording):
        minidom.parseString(made)
        assert made.count("1\xa0Implementations") == 1
    assert "animation" not in still
    assert "starting\xa0the\xa0engine" in recording
    assert re.search(r"\.f0-1 { opacity: 0; animation: k0-1 5s step-end infinite; }", recording)
