"""The examples of docs/masks.md run and show what they print."""

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs" / "masks.md"


def test_the_examples_of_the_page_run():
    failed, tried = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert (failed, tried > 5) == (0, True)
