"""The rows of a case that still runs: the same figures as at its end, with intervals that cost microseconds."""

import math
from collections.abc import Sequence
from statistics import fmean, median

from attention import statistics
from attention.record import UNITY, CaseRecord, Measured
from attention.report import Case, Interval, NoiseFloor, Peaks, Ratio, Row
from attention.workload import Workload


def standing(workload: Workload, record: CaseRecord, peaks: Peaks) -> Case:
    """Makes provisional rows; Student's t stands in for the bootstrap of the final ones."""
    reference = record.rows[record.reference].samples if record.reference else []
    floor = _floor(reference, record.again)
    rows = [
        _row(each, workload, peaks, UNITY if name == record.reference else _speedup(reference, each.samples, floor))
        for name, each in record.rows.items()
        if each.samples or each.ended
    ]
    return Case(workload=workload, reference=record.reference, noise_floor=floor, rows=tuple(rows))


def _interval(reference: Sequence[float], times: Sequence[float]) -> tuple[float, float, float] | None:
    logs = statistics.log_ratios(reference, times)
    if len(logs) < 2:
        return None
    low, high = statistics.mean_interval(logs)
    return fmean(logs), low, high


def _floor(reference: Sequence[float], again: Sequence[float]) -> NoiseFloor | None:
    found = _interval(reference, again)
    if found is None:
        return None
    middle, low, high = found
    floor = max(math.expm1(abs(low)), math.expm1(abs(high)), statistics.SMALLEST_FLOOR)
    return NoiseFloor(value=math.exp(middle), low=math.exp(low), high=math.exp(high), floor=floor)


def _speedup(reference: Sequence[float], times: Sequence[float], floor: NoiseFloor | None) -> Ratio | None:
    found = _interval(reference, times)
    if found is None:
        return None
    middle, low, high = found
    edge = math.log1p(floor.floor) if floor else math.inf
    significant = low > edge or high < -edge
    return Ratio(value=math.exp(middle), low=math.exp(low), high=math.exp(high), significant=significant)


def _row(measured: Measured, workload: Workload, peaks: Peaks, speedup: Ratio | None) -> Row:
    ended, route, check = measured.ended, measured.route, measured.check
    accurate = check is None or check.accurate
    call = median(measured.samples) if measured.samples else None
    flops = workload.flops / call if call else None
    peak = peaks.flops_per_s
    return Row(
        implementation=measured.implementation,
        status=ended.status if ended else ("ok" if accurate else "inaccurate"),
        path=route.path if route else None,
        fused=route.fused if route and route.supported else None,
        reason=ended.reason if ended else route.reason if route else None,
        tokens_per_second=workload.tokens / call if call else None,
        call_s=Interval(median=call, low=min(measured.samples), high=max(measured.samples)) if call else None,
        latency_s=measured.latency_s,
        first_call_s=measured.first_call_s,
        speedup=None if ended else speedup,
        flops_per_s=flops,
        efficiency=flops / peak if flops and peak else None,
        peak_bytes=measured.peak_bytes,
        predicted_bytes=route.predicted_bytes if route else None,
        max_error=check.max_error if check else None,
        rms_error=check.rms_error if check else None,
    )
