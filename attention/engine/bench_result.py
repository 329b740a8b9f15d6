"""What `attention.bench` returns: the rows of a run, for programs and notebooks."""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import structs

from attention.core.errors import UsageError
from attention.core.files import checked_path, replace_file
from attention.core.results import Case, Ratio, Report, Row, flat_rows, sealed
from attention.core.workload import Workload

UNKNOWN: Final = "n/a"
WIDE: Final = 0.25
"""An interval that reaches this far from 1 is unclear, as in the tables of the command line."""
HEADS: Final = ("case", "implementation", "path", "per call", "tokens/s", "speedup", "memory", "max error", "status")
TIMES: Final = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZES: Final = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


class BenchRow(NamedTuple):
    """One row with its workload."""

    workload: Workload
    row: Row


class BenchResult:
    """The rows of a run; iterating yields pairs of a workload and a row.

    Attributes:
        report: the whole run, as written to result files.
    """

    def __init__(self, report: Report) -> None:
        self.report = report

    @property
    def cases(self) -> tuple[Case, ...]:
        """The rows by workload, with reference and noise floor."""
        return self.report.cases

    @property
    def rows(self) -> list[BenchRow]:
        """All rows."""
        return [BenchRow(case.workload, row) for case in self.cases for row in case.rows]

    def __iter__(self) -> Iterator[BenchRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def renamed(self, names: Mapping[str, str]) -> "BenchResult":
        """Return the result with other names of implementations."""
        if all(name == new for name, new in names.items()):
            return self
        cases = tuple(
            structs.replace(
                case,
                reference=names.get(case.reference or "", case.reference),
                rows=tuple(structs.replace(row, implementation=names[row.implementation]) for row in case.rows),
            )
            for case in self.cases
        )
        summary = tuple(
            structs.replace(line, implementation=names[line.implementation]) for line in self.report.summary
        )
        return BenchResult(structs.replace(self.report, cases=cases, summary=summary))

    def to_json(self) -> str:
        """Return the run as JSON, in the format of result files."""
        return msgspec.json.format(sealed(self.report), indent=2).decode() + "\n"

    def save(self, path: str | Path) -> None:
        """Write the run as a JSON file, as a whole.

        Raises:
            UsageError: the path is none.
            OSError: it cannot be written.
        """
        replace_file(checked_path(path), self.to_json().encode(), 0o644)

    def to_dicts(self) -> list[dict[str, object]]:
        """Return a flat mapping for each row, with the names of columns of `flat_row`."""
        return flat_rows(self.report)

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line for each row.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-not-found,import-untyped,unused-ignore]
        except ImportError as error:
            raise UsageError("to_pandas: pandas is not installed; `pip install pandas`, or use to_dicts()") from error
        return pandas.DataFrame(self.to_dicts())

    def __repr__(self) -> str:
        """Return the table as lines of text."""
        lines = [HEADS, *self._cells()]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        heads = "".join(f"<th>{head}</th>" for head in HEADS)
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>" for line in self._cells())
        where = self.report.environment
        device = escape(_printable(", ".join(filter(None, (where.device, where.backend)))))
        note = f"{device}; an interval of 95 % follows each speedup; ≈ 1 is inside the noise floor, ? is unclear"
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table><p>{note}</p>"

    def _cells(self) -> list[tuple[str, ...]]:
        return [tuple(map(_printable, _cells_of(case, row))) for case in self.cases for row in case.rows]


def _cells_of(case: Case, row: Row) -> tuple[str, ...]:
    rate = row.tokens_per_second
    return (
        case.workload.label,
        row.implementation,
        row.path or UNKNOWN,
        _scaled(row.call_s.median, TIMES) if row.call_s else UNKNOWN,
        UNKNOWN if rate is None else f"{rate:,.0f}",
        "reference" if row.implementation == case.reference else _speedup(row.speedup),
        UNKNOWN if row.peak_bytes is None else _scaled(row.peak_bytes, SIZES),
        UNKNOWN if row.max_error is None else f"{row.max_error:.1e}",
        row.status if row.status == "ok" or not row.reason else f"{row.status}: {row.reason}",
    )


def _speedup(ratio: Ratio | None) -> str:
    if ratio is None:
        return UNKNOWN
    span = f"{ratio.low:.3g} to {ratio.high:.3g}"
    if ratio.significant:
        return f"{ratio.value:.3g} ({span})"
    near = ratio.significant is not None and max(ratio.high - 1, 1 - ratio.low) <= WIDE
    return f"≈ 1 ({span})" if near else f"{span}?"


def _scaled(value: float, units: tuple[tuple[float, str], ...]) -> str:
    factor, unit = next(((factor, unit) for factor, unit in units if value >= factor), (1.0, "B"))
    return f"{value / factor:.3g} {unit}"


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else f"\\u{ord(each):04x}" for each in text)
