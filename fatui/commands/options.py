"""Workload options, shared by the commands that take one; several values make a sweep."""

import argparse
from collections.abc import Sequence
from typing import Any, Final

from attention.errors import UsageError
from attention.workload import LARGEST, Workload
from fatui.preset_format import FIELDS, MOST_CASES, Preset, checked_names, workloads
from fatui.preset_writing import given_fields
from fatui.stops import parse

Values = dict[str, list[Any]]
HELP: Final = {
    "batch": "independent sequences",
    "seq": "query rows of each sequence; in a decode pass the length of the cache",
    "kv_seq": "keys of each sequence (as seq, unless given)",
    "heads": "query heads",
    "kv_heads": "key and value heads, a divisor of heads (as heads, unless given)",
    "head_dim": "width of a query and of a key",
    "value_dim": "width of a value (as head-dim, unless given)",
    "dtype": "float32, float16 or bfloat16",
    "mask": "none, causal or window:N",
    "pass": "forward, training or decode",
}
LONGEST_SHOWN: Final = 40


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per workload field, and --impl."""
    group = parser.add_argument_group("workload", "each takes one value, or several with commas: a sweep; 4k is 4096")
    for name in FIELDS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", metavar="A,B", help=HELP[name])
    parser.add_argument("--impl", metavar="A,B", help="implementations: names, or FILE.py:CLASS for one of your own")


def given_values(arguments: argparse.Namespace) -> Values:
    """Return the fields given on the command line, each with its values."""
    texts = {name: getattr(arguments, f"field_{name}") for name in FIELDS}
    return {name: _values(text, name) for name, text in texts.items() if text is not None}


def _values(text: str, name: str) -> list[Any]:
    return [_number_or_text(part.strip(), name) for part in text.split(",")]


def _number_or_text(text: str, name: str) -> int | str:
    shown = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
    try:
        if name in LARGEST and text[-1:].lower() in ("k", "m"):
            return parse(text, name)  # 4k, as the app's sliders take it
        return int(text) if len(text) <= LONGEST_SHOWN and text.isascii() else shown
    except ValueError:
        return shown


def implementations(text: str | None, preset: Preset) -> tuple[str, ...]:
    """Return the implementations of --impl, or the preset's.

    Raises:
        UsageError: with one problem for each unknown name.
    """
    return preset.implementations if text is None else checked_names([part.strip() for part in text.split(",")])


def overridden(cases: Sequence[Workload], values: Values) -> tuple[Workload, ...]:
    """Return a preset's cases with the given fields overridden.

    Raises:
        UsageError: with the mistakes of all combinations, each once.
    """
    if not values:
        return tuple(cases)
    made: dict[Workload, None] = {}
    problems: dict[str, None] = {}
    for case in cases:
        try:
            made.update(dict.fromkeys(_one_overridden(case, values)))
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise UsageError(*problems)
    if len(made) > MOST_CASES:
        raise UsageError(f"the options make {len(made):,} cases; at most {MOST_CASES:,} are taken")
    return tuple(made)


def _one_overridden(case: Workload, values: Values) -> tuple[Workload, ...]:
    base = given_fields(case)
    if case.pass_ == "decode" and ("seq" in values or "pass" in values):
        base["seq"] = base.pop("kv_seq")  # the length of the cache, under the name that all passes use
    if "kv_seq" in values and values.get("pass", [base["pass"]]) == ["decode"] and "seq" not in values:
        base.pop("seq", None)
    count = 1
    for several in values.values():
        count *= len(several)
    if count > MOST_CASES:
        raise UsageError(f"the options make {count:,} cases of each of the preset's; at most {MOST_CASES:,} are taken")
    single = {name: several[0] for name, several in values.items() if len(several) == 1}
    return workloads({**base, **single}, {name: several for name, several in values.items() if len(several) > 1})
