"""Result files, read with limits on their size and checks of their values; their JSON Schema."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct, structs

from attention.core.errors import UsageError
from attention.core.files import read_bounded
from attention.core.results import (
    SCHEMA,
    FineTuningRow,
    Interval,
    MachineState,
    NoiseFloor,
    Ratio,
    Report,
    Share,
    StreamRow,
    is_edited,
)
from attention.core.stream import StreamBlock
from fatui.untrusted_text import escape_all, one_line

MAX_FILE_BYTES: Final = 2**26
MAX_OBJECTS: Final = 200_000
"""Maximum JSON objects in a file; a run of 1,000 cases and 10 implementations has about 50,000."""
MAX_VALUES: Final = 4_000_000
"""Maximum JSON values in a file, most of which are samples."""
MAX_TEXT: Final = 10_000
"""Maximum characters of one text."""
RUN_ID: Final = re.compile(r"(?!last(~|\Z))[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_SECONDS: Final = 1e9
MAX_RATIO: Final = 1e12
MAX_FIGURE: Final = 1e30
"""Largest plausible rate or error."""
MAX_SHOWN_NUMBER: Final = 1e300
"""Larger integers cannot be printed as floats."""
TINY: Final = 1e-15


def read(path: Path) -> Report:
    """Read a run written by `--json`, an export or `attention.monitor`.

    Raises:
        UsageError: the file cannot be read, or is not a run; the message is one line.
    """
    try:
        content = read_bounded(path, MAX_FILE_BYTES)
        return decode(content)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not a run written by `fatui bench --json`: {error}") from error


def decode(content: bytes) -> Report:
    """Decode a run from JSON, without control characters in its texts.

    Raises:
        ValueError: it is not a run, or has impossible values or names; the message is one line.
    """
    if content.count(b"{") > MAX_OBJECTS or content.count(b",") > MAX_VALUES:
        raise ValueError(f"more than {MAX_OBJECTS:,} rows and figures, or more than {MAX_VALUES:,} values")
    try:
        report = escape_all(msgspec.json.decode(content, type=Report), MAX_TEXT)
    except msgspec.MsgspecError as error:
        raise ValueError(one_line(str(error), 300)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if report.schema > SCHEMA:
        raise ValueError(f"saved by a newer version, of schema {report.schema}")
    problems = [*_identity_problems(report), *_number_problems(report, "")]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{one_line(problems[0], 300)}{more}")
    if report.digest is None:
        return report
    return structs.replace(report, digest=None, edited=report.edited or is_edited(content))


def _identity_problems(report: Report) -> Iterator[str]:
    """Yield the problems with the names that identify runs and rows."""
    if not RUN_ID.fullmatch(report.run.id):
        takes = "letters, digits, '.', '_' and '-', at most 64, and is not 'last'"
        yield f"run.id: got '{one_line(report.run.id, 60)}'; it takes {takes}"
    first: dict[object, int] = {}
    for number, case in enumerate(report.all_cases):
        if (same := first.setdefault(case.workload, number)) != number:
            yield f"case {number + 1}: it is case {same + 1} again"
        names = [row.implementation for row in case.rows]
        if "" in names:
            yield f"case {number + 1}: a row without an implementation"
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"case {number + 1}: '{one_line(name, 60)}' occurs twice"
        if case.reference is not None and case.reference not in names:
            yield f"case {number + 1}: its reference '{one_line(case.reference, 60)}' is not one of its rows"


def _number_problems(value: Any, where: str) -> Iterator[str]:
    """Yield the problems with numbers outside the range of their field."""
    for name in value.__struct_fields__:
        field, path = getattr(value, name), f"{where}{name}"
        if isinstance(field, Struct):
            yield from _number_problems(field, f"{path}.")
        elif isinstance(field, tuple):
            for index, part in enumerate(field):
                if isinstance(part, Struct):
                    yield from _number_problems(part, f"{path}[{index}].")
                elif isinstance(part, float):
                    yield from _problem(part, f"{path}[{index}]", *_limits(value, name))
        elif isinstance(field, int | float) and not isinstance(field, bool):
            yield from _problem(field, path, *_limits(value, name))
    if isinstance(value, Interval | Ratio | NoiseFloor | Share):
        middle = value.median if isinstance(value, Interval) else value.value
        low, high = value.low, value.high
        if low is None or high is None:
            if low is not high:
                yield f"{where[:-1]}: an interval with one end"
        elif any(0 < abs(end) < TINY for end in (low, high)):
            yield f"{where[:-1]}: got {low:g} to {high:g}; an end is 0 or at least {TINY:g}"
        elif not low <= middle <= high:
            yield f"{where[:-1]}: got {middle:g} outside its interval {low:g} to {high:g}"


def _problem(number: float, path: str, least: float, most: float) -> Iterator[str]:
    if not least <= number <= most:
        got = f"{number:g}" if abs(number) < MAX_SHOWN_NUMBER else "a number beyond 1e300"
        yield f"{path}: got {got}; it takes {least:g} to {most:g}"


def _limits(owner: object, name: str) -> tuple[float, float]:
    """Return the smallest and the largest value of a field of a report."""
    match owner, name:
        case Interval(), "median":
            return TINY, MAX_SECONDS
        case Interval(), _:
            return -MAX_SECONDS, MAX_SECONDS
        case NoiseFloor(), "floor":
            return 0, MAX_RATIO
        case ((Ratio() | NoiseFloor()), "value"):
            return 1 / MAX_RATIO, MAX_RATIO
        case ((Ratio() | NoiseFloor() | Share()), _):
            return -MAX_RATIO, MAX_RATIO
        case StreamBlock(), "seconds" | "slowest_s":
            return TINY, MAX_SECONDS
        case ((StreamBlock() | StreamRow()), "loss" | "loss_inside" | "loss_beyond"):
            return 0, MAX_FIGURE
        case StreamRow(), "p99_s" | "slowest_s" | "end_s" | "bound_s" | "tenth_s":
            return TINY, MAX_SECONDS
        case StreamRow(), "spread" | "bound_share":
            return 0, MAX_RATIO
        case _, "samples":
            return TINY, MAX_SECONDS
        case MachineState(), "temperature_c" | "gpu_temperature_c":
            return -MAX_FIGURE, MAX_FIGURE
        case _, "seconds" | "latency_s" | "first_call_s":
            return 0, MAX_SECONDS
        case _, "layer_s" | "fixed_s":
            return -MAX_SECONDS, MAX_SECONDS
        case FineTuningRow(), "losses":
            return -MAX_FIGURE, MAX_FIGURE
        case _, "efficiency" | "loss_difference" | "logits_error" | "kv_error" | "kl_divergence":
            return 0, MAX_RATIO
        case _, "max_error" | "rms_error":
            return 0, float("inf")
    return 0, MAX_FIGURE


PUBLISHED: Final = Path(__file__).with_name("result.schema.json")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
STUDY: Final = "The original study's figures beside the measured ones, for the shapes that it has."


def result_schema() -> dict[str, Any]:
    """Return the schema of a result file, JSON Schema draft 2020-12."""
    made = msgspec.json.schema(Report)
    report = made["$defs"]["Report"]
    report["properties"]["schema"]["maximum"] = SCHEMA
    report["properties"]["study"] = {"description": STUDY, "type": ["object", "null"]}
    title = "Results of fatui"
    return {"$schema": DIALECT, "$id": f"urn:fatui:result:{SCHEMA}", "title": title, **made}


def schema_text() -> str:
    """Return the schema as JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(result_schema(), order="deterministic"), indent=2).decode() + "\n"
