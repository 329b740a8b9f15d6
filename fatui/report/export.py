"""A report as JSON, CSV, Markdown, JSON lines, SQL and Parquet, made from its rows only."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import inspect, structs

from attention.core.errors import UsageError
from attention.core.results import (
    ORIGIN,
    AnyCase,
    Case,
    Environment,
    FineTuningRow,
    ModelRow,
    Report,
    Row,
    StreamRow,
    flat_row,
    flat_rows,
    origin,
    sealed,
)
from attention.core.stream import Stream
from attention.core.workload import FineTuning, Generation, Workload
from fatui import formatting
from fatui.report.scaling import references_text
from fatui.report.table import (
    ENERGY,
    EXPOSED,
    KV_ERROR,
    SENT,
    FurtherColumns,
    further_columns,
    kv_notes,
    model_columns,
    model_notes,
    rank_notes,
    rate_unit,
)
from fatui.storage.presets import FIELDS
from fatui.trust import trust, trust_line
from fatui.untrusted_text import escape_all, markdown, markdown_cell, markdown_code, spreadsheet
from fatui.verdict import confidence_text, finding, headline, loss_lines, verdicts

FIGURES: Final = (
    *("implementation", "status", "path", "fused", "reason", "tokens_per_second"),
    *("call_s_median", "call_s_low", "call_s_high", "latency_s", "first_call_s"),
    *("speedup_value", "speedup_low", "speedup_high", "speedup_significant"),
    *("over_dense_value", "over_dense_low", "over_dense_high", "over_dense_significant"),
    *("dense_s_median", "dense_s_low", "dense_s_high"),
    *("over_unquantized_value", "over_unquantized_low", "over_unquantized_high", "over_unquantized_significant"),
    *("unquantized_s_median", "unquantized_s_low", "unquantized_s_high"),
    *("over_one_device_value", "over_one_device_low", "over_one_device_high", "over_one_device_significant"),
    *("one_device_s_median", "one_device_s_low", "one_device_s_high", "sent_bytes", "exposed_s"),
    *("rank_call_s", "rank_waiting_s", "rank_sent_bytes", "flops_per_s", "efficiency"),
    *("peak_bytes", "predicted_bytes", "max_error", "rms_error", "kv_error", "joules_per_token", "approximate"),
    *("sample_count", "stopped_by", "throttled"),
)
COLUMNS: Final = (*ORIGIN, "case", *FIELDS, "kv_token_bytes", "reference", "noise_floor", *FIGURES)
SHARE: Final = tuple(f"attention_share_{part}" for part in ("value", "low", "high"))
CALLS: Final = ("replaced_calls", "passed_on_calls")
GENERATION_COLUMNS: Final = (
    *(*ORIGIN, "case", *Generation.__struct_fields__, "weights_bytes", "kv_token_bytes", "cache_bytes"),
    *("reference", "noise_floor", *FIGURES, *SHARE, "layer_s", "fixed_s", *CALLS, "logits_error", "kl_divergence"),
)
FINE_TUNING_COLUMNS: Final = (
    *(*ORIGIN, "case", *FineTuning.__struct_fields__, "weights_bytes", "reference", "noise_floor", *FIGURES),
    *("iterations_per_second", "losses", "loss_difference", *CALLS),
)
STREAM_COLUMNS: Final = (
    *(*ORIGIN, "case", *Stream.__struct_fields__, "weights_bytes", "reference", "noise_floor"),
    *FIGURES,
    *("seen_tokens", "p99_s", "slowest_s", "slow_tokens", "tenth_s", "spread", "end_s", "extrapolated"),
    *("start_bytes", "end_bytes", "device_start_bytes", "device_end_bytes", "bound_s", "bound_share"),
    *("loss_inside", "loss_beyond"),
)
MODEL_FIGURES: Final = (
    *("tokens", "time per token", "99 %", "flat within", "at the end", "of bound", "loss inside", "beyond"),
    "it/s",
    "to 1st token",
    "per token",
    "per iteration",
    "attention",
    "memory",
    "loss",
    "off",
    "KL",
)
HEADS: Final = (
    *("implementation", "path", "tokens/s", "per call", "speedup", "FLOP/s", "efficiency"),
    *("peak memory", "max error", "verdict"),
)
"""Columns of a case in Markdown; "FLOP/s" is in the run's unit of rates."""
SQL_TABLES: Final = ("attention", "models", "fine_tunings", "streams")
"""Names of the SQL tables, by kind of run."""
MAX_INTEGER: Final = 2**63 - 1
DECLARED: Final = {
    field.encode_name: field.type
    for struct in (Environment, Workload, Generation, FineTuning, Stream, Row, ModelRow, FineTuningRow, StreamRow)
    for field in structs.fields(struct)
}
"""The types of columns that are a field."""
NUMBERS: Final[Mapping[type, type]] = {inspect.FloatType: float, inspect.BoolType: bool, inspect.IntType: int}
ENDINGS: Final[Mapping[str, type]] = {
    **dict.fromkeys(("value", "median", "low", "high", "floor", "s"), float),
    **dict.fromkeys(("bytes", "count", "tokens", "case"), int),
    "significant": bool,
}
"""Those of further columns, by the last word of their names."""


def to_json(report: Report, study: Mapping[str, Any] | None = None) -> str:
    """Encode the whole report; unknown figures are null.

    Args:
        report: the report to write.
        study: the study's own figures, written under the key `study`.
    """
    report = escape_all(report)
    return msgspec.json.format(sealed(report, {"study": study} if study else None), indent=2).decode() + "\n"


def to_csv(report: Report) -> str:
    """Write one line per row, unrounded; unknown values are empty.

    A text that a spreadsheet would take for a formula is prefixed with an apostrophe.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, columns_of(report), lineterminator="\n")
    writer.writeheader()
    for line in flat_rows(report):
        writer.writerow({name: _cell(value) for name, value in line.items()})
    return out.getvalue()


def columns_of(report: Report) -> tuple[str, ...]:
    """Return the columns of a run's rows, by its kind."""
    if report.streams:
        return STREAM_COLUMNS
    return GENERATION_COLUMNS if report.models else FINE_TUNING_COLUMNS if report.fine_tunings else COLUMNS


def _cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return " ".join("" if each is None else repr(each) for each in value)
    if isinstance(value, str):
        return spreadsheet(value)
    if isinstance(value, float) and value - value != 0:  # infinite, or not a number
        return ""
    return value


def to_markdown(report: Report) -> str:
    """Format a table per case, to paste into issues and documents."""
    unit = rate_unit(report.all_cases)
    cases = [_case(case, unit) for case in report.all_cases]
    return "\n\n".join(["# fatui", verdict_markdown(report), _heading(report), *cases, *_summary(report)]) + "\n"


def verdict_markdown(report: Report) -> str:
    """Format the verdict of a run, why the others lose, how sure it is, and what the figures depend on."""
    made = verdicts(report)
    lines = [] if made else [f"**{markdown(finding(report))}**"]
    for verdict in made:
        lines.append(f"**{markdown(headline(verdict))}**")
        points = [*verdict.notes, *loss_lines(verdict), *([confidence_text(verdict)] if verdict.winner else [])]
        lines.append("\n".join(f"- {markdown(point)}" for point in points))
    found = trust(report)
    return "\n\n".join(part for part in (*lines, markdown(trust_line(found))) if part)


def _heading(report: Report) -> str:
    where, peaks = report.environment, report.peaks
    known = [where.machine, where.backend, where.mlx and f"MLX {where.mlx}", where.blas, where.os]
    lines = [f"- {markdown(', '.join(part for part in known if part) or formatting.UNKNOWN)}"]
    if peaks.flops_per_s:
        best = f"best rate {formatting.flops(peaks.flops_per_s)}/s, which is 100 % efficiency"
        copy = formatting.bytes_per_second(peaks.copy_bytes_per_s)
        lines.append(f"- {best}, best copy {copy}, measured in this run")
    state = ", interrupted" if report.run.interrupted else ""
    run = f"run {report.run.id}, {report.run.started}, {formatting.duration(report.run.seconds)}{state}"
    lines += [f"- {markdown(run)}", f"- {markdown_code(report.run.command)}"]
    return "\n".join(lines)


def _case(case: AnyCase, unit: tuple[float, str]) -> str:
    floor = f", noise floor {formatting.percent(case.noise_floor.floor)}" if case.noise_floor else ""
    reference = f"\n\nSpeedups are relative to {markdown(case.reference)}{floor}." if case.reference else ""
    return f"## {markdown(case.workload.label)}{reference}\n\n{_rows(case, unit)}"


def _rows(case: AnyCase, unit: tuple[float, str]) -> str:
    if isinstance(case, Case):
        further, (factor, rate) = further_columns([case]), unit
        after = HEADS.index("speedup") + 1
        heads = (*HEADS[:after], *further, *(rate if head == "FLOP/s" else head for head in HEADS[after:]))
        lines = [_cells(row, case, further, factor) for row in case.rows]
        return _noted(_table(heads, lines), [*kv_notes(case), *rank_notes(case), *formatting.same_paths(case)])
    columns = model_columns(case)
    lines = [
        (*cells[:-1], formatting.verdict(row, case))
        for row, cells in zip(case.rows, zip(*(column.cells for column in columns), strict=True), strict=True)
    ]
    heads = ("implementation", *(column.head for column in columns[1:]))
    return _noted(_table(heads, lines), [*model_notes(case), *rank_notes(case), *formatting.same_paths(case)])


def _noted(table: str, notes: Sequence[str]) -> str:
    return "\n\n".join([table, *(["\n".join(f"- {markdown(note)}" for note in notes)] if notes else [])])


def _cells(row: Row, case: Case, further: FurtherColumns, factor: float) -> tuple[str, ...]:
    return (
        row.implementation,
        row.path or formatting.UNKNOWN,
        formatting.tokens_per_second(row.tokens_per_second),
        formatting.interval_text(row.call_s),
        formatting.speedup_text(row.speedup),
        *(cell(row) for cell in further.values()),
        formatting.per(row.flops_per_s, factor),
        formatting.percent(row.efficiency),
        formatting.size(row.peak_bytes),
        formatting.row_error(row),
        formatting.verdict(row, case),
    )


def _summary(report: Report) -> list[str]:
    if len(report.cases) < 2:
        return []
    lines = [
        (line.implementation, formatting.speedup_text(line.speedup), str(line.cases), str(line.not_ok))
        for line in report.summary
    ]
    table = _table(("implementation", "speedup", "cases", "not ok"), lines)
    several = len({case.reference for case in report.cases}) > 1
    note = f"\n\nSpeedups are relative to {markdown(references_text(report))}." if several else ""
    return [f"## Geometric mean over the cases{note}\n\n{table}"]


def _table(heads: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    right = {
        "tokens/s",
        "per call",
        "speedup",
        *formatting.OVER.values(),
        ENERGY,
        KV_ERROR,
        SENT,
        EXPOSED,
        "TFLOP/s",
        "GFLOP/s",
        "efficiency",
        "peak memory",
        "max error",
        "cases",
        "not ok",
        *MODEL_FIGURES,
    }
    rule = ("---:" if head in right else "---" for head in heads)
    return "\n".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |" for line in (heads, rule, *lines))


def to_json_lines(report: Report) -> str:
    """Write a line of JSON for each row, flat, with the run's origin."""
    return "".join(map(_json_line, flat_rows(escape_all(report))))


def case_lines(report: Report, number: int, case: AnyCase) -> str:
    """Write the lines of one case, the number of which in its run is given, from 1.

    Args:
        report: the run, of which only the origin is used.
        number: the number.
        case: the case.
    """
    shared, case = origin(report), escape_all(case)
    return "".join(_json_line({**shared, **flat_row(number, case, row)}) for row in case.rows)


def _json_line(record: Mapping[str, object]) -> str:
    return msgspec.json.encode(record).decode() + "\n"


def to_sql(report: Report) -> str:
    """Write SQL statements that create a table, unless it exists, and insert the rows; for sqlite3.

    The table is named after the kind of run; its columns are those of the CSV. Unknown values are NULL.
    """
    report = escape_all(report)
    columns, records = columns_of(report), flat_rows(report)
    table = _sql_table(report)
    declared = ",\n".join(f"  {_sql_name(column)}{_sql_type(column, records)}" for column in columns)
    lines = [f"CREATE TABLE IF NOT EXISTS {table} (\n{declared}\n);"]
    names = ", ".join(map(_sql_name, columns))
    for record in records:
        values = ", ".join(_sql_literal(record.get(column)) for column in columns)
        lines.append(f"INSERT INTO {table} ({names}) VALUES ({values});")
    return "\n".join(lines) + "\n"


def _sql_table(report: Report) -> str:
    kinds = (report.cases, report.models, report.fine_tunings, report.streams)
    return next((name for name, cases in zip(SQL_TABLES, kinds, strict=True) if cases), SQL_TABLES[0])


def _sql_name(column: str) -> str:
    return f'"{column}"'


def _sql_type(column: str, records: Iterable[Mapping[str, object]]) -> str:
    """Return the type of a column, with a blank before it; none if all its values are unknown."""
    kinds = {type(record[column]) for record in records if record.get(column) is not None}
    if not kinds:
        return ""
    if kinds <= {bool, int}:
        return " INTEGER"
    return " REAL" if kinds <= {bool, int, float} else " TEXT"


def _sql_literal(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value) if abs(value) <= MAX_INTEGER or isinstance(value, float) else repr(float(value))
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    quoted = text.replace("'", "''")
    return f"'{quoted}'"


def check_parquet() -> None:
    """Raise UsageError unless pyarrow is installed."""
    _pyarrow()


def to_parquet(report: Report) -> bytes:
    """Write the rows as a Parquet file, with the columns of the CSV; those of several runs can be read together.

    Raises:
        UsageError: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    report = escape_all(report)
    records = flat_rows(report)
    types = {float: pyarrow.float64(), bool: pyarrow.bool_(), int: pyarrow.int64(), str: pyarrow.string()}
    columns = {
        name: pyarrow.array([_plain(record.get(name)) for record in records], types[column_type(name)])
        for name in columns_of(report)
    }
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def column_type(column: str) -> type:
    """Return the type of a column's values, also where none is known: float, bool, int or str."""
    if column in DECLARED:
        return _number_type(inspect.type_info(DECLARED[column])) or str
    if column.startswith("rank_"):
        return str  # lists, as JSON
    return ENDINGS.get(column.rpartition("_")[2], str)


def _number_type(found: inspect.Type) -> type | None:
    """Return float, bool or int, if a declared type is one of them, or one of them or None; otherwise None."""
    if isinstance(found, inspect.UnionType):
        kinds = [_number_type(each) for each in found.types]
        return next((kind for kind in (float, bool, int) if kind in kinds), None)
    if isinstance(found, inspect.Metadata):
        return _number_type(found.type)
    return NUMBERS.get(type(found))


def _plain(value: object) -> object:
    """Return a value whose column has one type: lists as JSON."""
    return msgspec.json.encode(value).decode() if isinstance(value, list | tuple | dict) else value


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise UsageError("--parquet: pyarrow is not installed; `pip install pyarrow`, or use --csv") from error
    return pyarrow, pyarrow.parquet
