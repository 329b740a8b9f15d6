"""The example of docs/quantized.md on caches runs and shows what it prints."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

PAGE = Path(__file__).parents[3] / "docs" / "quantized.md"


def test_the_example_of_the_page_runs() -> None:
    text = "## Caches" + PAGE.read_text(encoding="utf-8").partition("## Caches")[2]
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0))
    assert runner.tries > 5
    assert runner.failures == 0
