"""Runs and presets whose every text has markup, escape codes, bidi controls, and Markdown, HTML and formula syntax."""

import itertools
import unicodedata
from typing import Any, get_args, get_type_hints

from msgspec import Struct, structs

from attention.core.results import (
    Case,
    Environment,
    FineTuningCase,
    FineTuningRow,
    Interval,
    ModelCase,
    ModelRow,
    NoiseFloor,
    Peaks,
    Ratio,
    Report,
    Row,
    Run,
    Summary,
)
from attention.core.workload import FineTuning, Generation, Workload

TEXT = "=[/x][b]\x1b[2J\x1b]0;t\x07\u202e\u2066\x9b1m\r`|*_<script>\u200b"
UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
SAMPLES = (0.010, 0.011, 0.010, 0.012, 0.010, 0.011, 0.010)
INTERVAL = Interval(median=0.010, low=0.0099, high=0.0101)


def unsafe_in(text: str) -> set[str]:
    """The characters of a text that no output may contain."""
    return {each for each in text if each != "\n" and unicodedata.category(each) in UNSAFE}


def planted(value: Any, count: "itertools.count[int] | None" = None) -> Any:
    """Build a struct with TEXT and a distinct number in every field that accepts any text, found by its type."""
    count = count or itertools.count()
    hints = get_type_hints(type(value))
    changed: dict[str, Any] = {}
    for field in structs.fields(value):
        old, kind = getattr(value, field.name), hints[field.name]
        if isinstance(old, Struct):
            changed[field.name] = planted(old, count)
        elif isinstance(old, tuple) and old and isinstance(old[0], Struct):
            changed[field.name] = tuple(planted(part, count) for part in old)
        elif (kind is str or str in get_args(kind)) and field.name not in ("mask", "dtype", "kv_format"):
            changed[field.name] = f"{TEXT}{next(count)}"
    return structs.replace(value, **changed)


def report(kind: str, identity: str) -> Report:
    """A run with hostile texts everywhere: "shapes", "model" or "finetune"."""
    ratio = Ratio(value=2.0, low=1.9, high=2.1, significant=True)
    figures: dict[str, Any] = {"tokens_per_second": 1e4, "call_s": INTERVAL, "peak_bytes": 2**20, "samples": SAMPLES}
    figures |= {"path": "p", "reason": "r", "stopped_by": "time", "latency_s": 0.01, "first_call_s": 0.1}
    makes: dict[str, tuple[type[Row], str, list[Any]]] = {
        "shapes": (Row, "cases", [Workload(seq=seq, heads=1) for seq in (16, 32, 64)]),
        "model": (ModelRow, "models", [Generation(model="m", phase="prefill", prompt=8, layers=2)]),
        "finetune": (FineTuningRow, "fine_tunings", [FineTuning(model="m", tuned_layers=2, layers=2, data="d")]),
    }
    row, field, workloads = makes[kind]
    case = {"shapes": Case, "model": ModelCase, "finetune": FineTuningCase}[kind]
    floor = NoiseFloor(value=1.0, low=0.99, high=1.01, floor=0.01)
    cases = []
    for workload in workloads:
        rows = (
            row(implementation="0", status="ok", speedup=Ratio(value=1, low=1, high=1), **figures),
            row(implementation="1", status="ok", speedup=ratio, **figures),
            row(implementation="2", status="inaccurate", **figures),
            row(implementation="3", status="failed", path="p", reason="r"),
        )
        if kind == "finetune":
            rows = tuple(structs.replace(each, losses=(2.0, 1.5), loss_difference=0.01) for each in rows)
        cases.append(case(workload=workload, reference="0", noise_floor=floor, rows=rows))
    where = Environment(**{field.name: "e" for field in structs.fields(Environment) if field.name != "memory_bytes"})
    run = Run(id=identity, started="2026-01-02", seconds=1.0, command="c", preset="p")
    summary = tuple(Summary(implementation=str(number), cases=3, speedup=ratio) for number in range(3))
    peaks = Peaks(matmul_flops_per_s=1e11)
    made = Report(run=run, environment=where, peaks=peaks, summary=summary, **{field: tuple(cases)})
    return _named(planted(made), identity, field)


def _named(made: Report, identity: str, field: str) -> Report:
    """Return the report with a valid id, and consistent names of rows."""
    cases = tuple(
        structs.replace(
            case,
            reference=f"{TEXT}name0",
            rows=tuple(
                structs.replace(row, implementation=f"{TEXT}name{number}") for number, row in enumerate(case.rows)
            ),
        )
        for case in getattr(made, field)
    )
    summary = tuple(structs.replace(line, implementation=f"{TEXT}name{i}") for i, line in enumerate(made.summary))
    run = structs.replace(made.run, id=identity)
    return structs.replace(made, run=run, summary=summary, **{field: cases})


def _toml(text: str) -> str:
    return '"' + "".join(f"\\U{ord(each):08x}" for each in text) + '"'


PRESET = f"""schema = 1  # \u202e a comment
title = {_toml(TEXT)}
summary = {_toml(TEXT)}
implementations = ["baseline", "mlx"]
seconds = 0.05
[workload]
seq = 16
heads = 1
head_dim = 16
"""
BROKEN_PRESET = f"""schema = {_toml(TEXT)}
{_toml(TEXT)} = 1
implementations = [{_toml(TEXT)}]
[workload]
{_toml(TEXT)} = 2
mask = {_toml(TEXT)}
kv_format = {_toml(TEXT)}
dtype = {_toml(TEXT)}
seq = {_toml(TEXT)}
"""
