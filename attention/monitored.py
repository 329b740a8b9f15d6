"""Statistics of one kind of call, as collected by a monitor."""

from collections.abc import Callable

from msgspec import Struct, field

from attention.pace import MOST_GAP
from attention.report import Row
from attention.route import Route
from attention.statistics import median_interval
from attention.workload import Workload


class Kind(Struct):
    """All calls of one implementation on one workload."""

    implementation: str
    workload: Workload
    ask: Callable[[], Route | None]
    """Returns the route; evaluated only for the rows: per call it would exceed the overhead allowed."""
    calls: int = 0
    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    ask_at: int = 1
    """Number of the call at which timing is considered again."""
    gap: int = 1

    def asked(self, timed: bool, stride: int) -> None:
        """Set when timing is considered next: soon after a timed call, with exponential back-off otherwise."""
        self.gap = 1 if timed else min(2 * self.gap, MOST_GAP)
        self.ask_at = self.calls + self.gap * stride

    def row(self, estimated: bool) -> Row:
        """Return a result row as a benchmark has it; the number of calls may be an estimate."""
        call = median_interval(self.samples) if self.samples else None
        route = self.ask()
        told = f"; {route.reason}" if route else ""
        return Row(
            implementation=self.implementation,
            status="ok",
            path=route.path if route else None,
            fused=route.fused if route else None,
            reason=f"{self._counted(estimated)} in a program, {len(self.samples):,} of them timed{told}",
            tokens_per_second=self.workload.tokens / call.median if call else None,
            call_s=call,
            flops_per_s=self.workload.flops / call.median if call else None,
            peak_bytes=self.peak_bytes,
            predicted_bytes=route.predicted_bytes if route else None,
            samples=tuple(self.samples),
        )

    def line(self, estimated: bool) -> str:
        """Return the row as one line of text."""
        row = self.row(estimated)
        timed = f"{row.call_s.median * 1e3:.3f} ms" if row.call_s else "not timed"
        memory = f"{row.peak_bytes / 2**20:.1f} MiB" if row.peak_bytes is not None else "n/a"
        counted = self._counted(estimated)
        return f"{self.implementation}  {self.workload.label}  {row.path or '-'}  {counted}  {timed}  {memory}"

    def _counted(self, estimated: bool) -> str:
        return f"{'about ' if estimated else ''}{self.calls:,} calls"
