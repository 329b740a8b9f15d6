"""The tests themselves: short names, helpers in `tests/support`, no test module imported by another."""

import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
MAX_NAME = 59


@cache
def files() -> dict[str, str]:
    """Return the texts of all modules by path."""
    return {path.relative_to(TESTS).as_posix(): path.read_text() for path in TESTS.rglob("*.py")}


def test_names_have_less_than_60_characters():
    names = [name for text in files().values() for name in re.findall(r"def (test_\w+)", text)]
    assert names
    assert [name for name in names if len(name) > MAX_NAME] == []


def test_helpers_are_in_support():
    own = re.compile(r"(.*/)?(test_\w+|conftest|__init__)\.py")
    others = [name for name in files() if not own.fullmatch(name) and not name.startswith(("support/", "fuzz/"))]
    assert others == []


def test_no_test_module_is_imported():
    importing = re.compile(r"^\s*(?:from|import) tests\.(?!support|fuzz)", re.MULTILINE)
    assert [name for name, text in files().items() if importing.search(text)] == []
