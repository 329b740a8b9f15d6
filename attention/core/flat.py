"""Rows as flat records: one value for each name, for tables of other programs."""

from typing import Any, Final

import msgspec

from attention.core.results import AnyCase, Case, FineTuningCase, ModelCase, Report, Row, StreamCase, StreamRow

ORIGIN: Final = ("run_id", "started", "fatui", "mlx", "backend", "device", "host")
INTERVALS: Final = (
    *("call_s", "speedup", "over_dense", "dense_s", "over_unquantized", "unquantized_s"),
    *("over_one_device", "one_device_s", "attention_share"),
)


def origin(report: Report) -> dict[str, object]:
    """Return what all rows of a run have in common."""
    where = report.environment
    identity = {"run_id": report.run.id, "started": report.run.started}
    return {name: identity.get(name) or getattr(where, name) for name in ORIGIN}


def flat_row(number: int, case: AnyCase, row: Row) -> dict[str, object]:
    """Return a row with its case: the parts of intervals are named "call_s_median", samples are counted.

    Args:
        number: of the case in its run, from 1.
        case: the case.
        row: one of its rows.
    """
    fields: dict[str, Any] = msgspec.to_builtins(row)
    samples = fields.pop("samples")
    if isinstance(row, StreamRow):
        del fields["blocks"], fields["bare_bins"]  # in the JSON
        fields["seen_tokens"] = fields.pop("tokens")  # the workload's are those requested
    fields.update(_rank_fields(row))
    del fields["per_rank"]
    for name in INTERVALS:
        parts = fields.pop(name, None) or {}
        fields.update({f"{name}_{part}": value for part, value in parts.items()})
    return {
        "case": number,
        **msgspec.to_builtins(case.workload),
        "reference": case.reference,
        "noise_floor": case.noise_floor.floor if case.noise_floor else None,
        **_sizes(case),
        "sample_count": len(samples),
        **fields,
    }


def flat_rows(report: Report) -> list[dict[str, object]]:
    """Return all rows of a run, each with the run's origin."""
    shared = origin(report)
    return [
        {**shared, **flat_row(number, case, row)}
        for number, case in enumerate(report.all_cases, start=1)
        for row in case.rows
    ]


def _rank_fields(row: Row) -> dict[str, object]:
    """Return what the ranks sent and waited, with one value for each rank where they differ."""
    ranks = row.per_rank
    return {
        "sent_bytes": row.sent_bytes,
        "exposed_s": row.exposed_s,
        "rank_call_s": [rank.call_s for rank in ranks],
        "rank_waiting_s": [rank.waiting_s for rank in ranks],
        "rank_sent_bytes": [rank.sent_bytes for rank in ranks],
    }


def _sizes(case: AnyCase) -> dict[str, object]:
    match case:
        case Case():
            return {"kv_token_bytes": case.workload.kv_token_bytes}
        case ModelCase():
            return {name: getattr(case, name) for name in ("weights_bytes", "kv_token_bytes", "cache_bytes")}
        case FineTuningCase() | StreamCase():
            return {"weights_bytes": case.weights_bytes}
