"""Rows as records of other programs: JSON lines, SQL statements, Parquet."""

import io
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from attention.core.errors import UsageError
from attention.core.flat import flat_row, flat_rows, origin
from attention.core.results import AnyCase, Report
from fatui.report.export import columns_of
from fatui.untrusted_text import escape_all

TABLES: Final = ("attention", "models", "fine_tunings", "streams")
"""Names of the SQL tables, by kind of run."""
LARGEST_INTEGER: Final = 2**63 - 1


def to_json_lines(report: Report) -> str:
    """Write a line of JSON for each row, flat, with the run's origin."""
    return "".join(map(_line, flat_rows(escape_all(report))))


def case_lines(report: Report, number: int, case: AnyCase) -> str:
    """Write the lines of one case, the number of which in its run is given, from 1.

    Args:
        report: the run, of which only the origin is used.
        number: the number.
        case: the case.
    """
    shared, case = origin(report), escape_all(case)
    return "".join(_line({**shared, **flat_row(number, case, row)}) for row in case.rows)


def _line(record: Mapping[str, object]) -> str:
    return msgspec.json.encode(record).decode() + "\n"


def to_sql(report: Report) -> str:
    """Write SQL statements that create a table, unless it exists, and insert the rows; for sqlite3.

    The table is named after the kind of run; its columns are those of the CSV. Unknown values are NULL.
    """
    report = escape_all(report)
    columns, records = columns_of(report), flat_rows(report)
    table = _table(report)
    declared = ",\n".join(f"  {_name(column)}{_type(column, records)}" for column in columns)
    lines = [f"CREATE TABLE IF NOT EXISTS {table} (\n{declared}\n);"]
    names = ", ".join(map(_name, columns))
    for record in records:
        values = ", ".join(_literal(record.get(column)) for column in columns)
        lines.append(f"INSERT INTO {table} ({names}) VALUES ({values});")
    return "\n".join(lines) + "\n"


def _table(report: Report) -> str:
    kinds = (report.cases, report.models, report.fine_tunings, report.streams)
    return next((name for name, cases in zip(TABLES, kinds, strict=True) if cases), TABLES[0])


def _name(column: str) -> str:
    return f'"{column}"'


def _type(column: str, records: Iterable[Mapping[str, object]]) -> str:
    """Return the type of a column, with a blank before it; none if all its values are unknown."""
    kinds = {type(record[column]) for record in records if record.get(column) is not None}
    if not kinds:
        return ""
    if kinds <= {bool, int}:
        return " INTEGER"
    return " REAL" if kinds <= {bool, int, float} else " TEXT"


def _literal(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value) if abs(value) <= LARGEST_INTEGER or isinstance(value, float) else repr(float(value))
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    quoted = text.replace("'", "''")
    return f"'{quoted}'"


def check_parquet() -> None:
    """Raise UsageError unless pyarrow is installed."""
    _pyarrow()


def to_parquet(report: Report) -> bytes:
    """Write the rows as a Parquet file, with the columns of the CSV.

    Raises:
        UsageError: pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    report = escape_all(report)
    records = flat_rows(report)
    columns = {name: [_plain(record.get(name)) for record in records] for name in columns_of(report)}
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


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
