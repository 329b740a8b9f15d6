"""The examples of docs/streaming.md run and show what they print."""

import doctest
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

PAGE = Path(__file__).parents[3] / "docs" / "streaming.md"


def test_the_examples_of_the_page_run():
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest(PAGE.read_text(encoding="utf-8"), {}, PAGE.name, str(PAGE), 0))
    assert runner.tries > 15
    assert runner.failures == 0
