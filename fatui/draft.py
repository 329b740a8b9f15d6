"""The draft of a run: the values on the sliders, or a preset's cases that the sliders cannot represent."""

import math
from typing import Any, Final

from msgspec import field, structs

from attention.core.errors import UsageError
from attention.core.kv_format import DENSE
from attention.core.plan import MAX_CASES, Plan, RunOptions, expand
from attention.core.workload import DType, Pass, Workload

AXES: Final = ("batch", "seq", "head_dim", "heads", "kv_heads", "ranks")
DEFAULT_AXES: Final = {"batch": (1,), "seq": (512,), "head_dim": (64,), "heads": (8,), "kv_heads": (), "ranks": (1,)}
UNNAMED: Final = "unnamed"
CHANGED: Final = ", changed"
SHARED: Final = ("dtype", "kv_format", "mask", "pass_")


class Draft(RunOptions, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """An immutable draft of a plan; every change returns a new one."""

    axes: dict[str, tuple[int, ...]] = field(default_factory=lambda: dict(DEFAULT_AXES))
    """The values of each axis, one unless sweeping; no kv_heads means as many as heads."""
    dtype: DType = "float16"
    kv_format: str = DENSE
    mask: str = "none"
    pass_: Pass = "forward"
    kv_seq: int | None = None
    """Number of keys, if a preset has another than seq; in decode, seq is the length of the cache."""
    value_dim: int | None = None
    """Width of a value, if a preset has another than head_dim."""
    sweeping: bool = False
    several: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The values of dtype, format of keys and values, mask and pass for which a sweep has more than one."""
    cases: tuple[Workload, ...] = ()
    """A preset's own list of cases; the sliders show the first. Empty once a slider was moved."""
    offered: tuple[str, ...] = ()
    """Implementations of the user's own that were selected once, and are listed further when they are not."""
    preset: str | None = None
    changed: bool = False
    """Whether it differs from the preset it was made from."""

    def __post_init__(self) -> None:
        """Complete the axes of an earlier version's draft."""
        if "ranks" not in self.axes:
            structs.force_setattr(self, "axes", {**self.axes, "ranks": (1,)})

    def change(self, **fields: Any) -> "Draft":
        """Return the draft with fields replaced, and without a preset's own list of cases."""
        return structs.replace(self, cases=(), changed=True, **fields)

    def set_axis(self, name: str, values: tuple[int, ...]) -> "Draft":
        """Return the draft with other values on one axis; K/V heads that no longer divide heads follow heads again."""
        axes = {**self.axes, name: values}
        if name == "kv_heads" and values == axes["heads"]:
            axes["kv_heads"] = ()
        if name == "heads" and any(heads % shared for heads in values for shared in axes["kv_heads"]):
            axes["kv_heads"] = ()
        forget = {"seq": {"kv_seq": None}, "head_dim": {"value_dim": None}}.get(name, {})
        return self.change(axes=axes, **forget)

    def set_seconds(self, seconds: float) -> "Draft":
        """Return the draft with another time limit of the rounds of each case."""
        return structs.replace(self, seconds=seconds, changed=True)

    def choices(self, name: str) -> tuple[str, ...]:
        """Return the values of one of SHARED."""
        return self.several.get(name) or (getattr(self, name),)

    def set_choice(self, name: str, values: tuple[str, ...]) -> "Draft":
        """Return the draft with another value of one of SHARED, or several."""
        several = {each: chosen for each, chosen in self.several.items() if each != name}
        if len(values) > 1:
            several[name] = values
        return self.change(several=several, **{name: values[0]})

    def toggle_sweep(self) -> "Draft":
        """Start a sweep, or end it with the first value of each axis; the draft counts as changed only if values do."""
        swept = self.several or any(len(values) > 1 for values in self.axes.values())
        if not self.sweeping or not swept:
            return structs.replace(self, sweeping=not self.sweeping)
        return self.change(sweeping=False, several={}, axes={name: values[:1] for name, values in self.axes.items()})

    def runs_as(self, plan: Plan) -> bool:
        """Whether it would run the same cases, in any order, with the same implementations and limits."""
        try:
            own = self.plan()
        except UsageError:
            return False
        return structs.replace(own, cases=plan.cases) == plan and set(own.cases) == set(plan.cases)

    def toggle(self, implementation: str) -> "Draft":
        """Select or deselect an implementation; it stays among those that are offered."""
        inside = implementation in self.implementations
        names = [name for name in self.implementations if name != implementation]
        chosen = tuple(names if inside else [*names, implementation])
        offered = tuple(dict.fromkeys([*self.offered, implementation]))
        return structs.replace(self, implementations=chosen, offered=offered, changed=True)

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """The values on the K/V heads axis, those of heads unless set."""
        return self.axes["kv_heads"] or self.axes["heads"]

    def workloads(self) -> tuple[Workload, ...]:
        """Return all cases that would run.

        Raises:
            UsageError: with every mistake in them.
        """
        if self.cases:
            return self.cases
        count = math.prod(max(1, len(values)) for values in (*self.axes.values(), *self.several.values()))
        if count > MAX_CASES:
            raise UsageError(f"{count:,} cases; a sweep takes {MAX_CASES:,} at most")
        base = {name: getattr(self, name) for name in SHARED}
        base |= {name: getattr(self, name) for name in ("kv_seq", "value_dim") if getattr(self, name) is not None}
        return expand(base, {name: values for name, values in {**self.axes, **self.several}.items() if values})

    def plan(self) -> Plan:
        """Return the plan that would run.

        Raises:
            UsageError: with every mistake in it.
        """
        if not self.implementations:
            raise UsageError("no implementation is selected; space toggles the one under the cursor")
        return Plan(cases=self.workloads(), **self.options())

    @property
    def name(self) -> str | None:
        """The name of its runs: the preset's, marked if the draft has changed; None without a preset."""
        return f"{self.preset}{CHANGED}" if self.preset and self.changed else self.preset

    def title(self) -> str:
        """Return the name, also of a draft without one."""
        return self.name or UNNAMED


def draft_of(plan: Plan, name: str | None) -> Draft:
    """Make a draft of a plan under its name; cases that do not form a full grid are kept as a list."""
    first = plan.cases[0]
    preset = name.removesuffix(CHANGED) if name else None
    shown = Draft(
        axes={name: _values(first, name) for name in AXES},
        dtype=first.dtype,
        kv_format=first.kv_format,
        mask=first.mask,
        pass_=first.pass_,
        kv_seq=first.kv_seq if first.kv_seq != first.seq and first.pass_ != "decode" else None,
        value_dim=first.value_dim if first.value_dim != first.head_dim else None,
        preset=preset,
        changed=preset != name,
        **plan.options(),
    )
    if len(plan.cases) == 1:
        return shown
    several = {name: tuple(dict.fromkeys(getattr(case, name) for case in plan.cases)) for name in SHARED}
    several = {name: values for name, values in several.items() if len(values) > 1}
    grid = structs.replace(shown, sweeping=True, axes=_grid_axes(plan.cases), several=several)
    if _same_cases(grid, plan.cases):
        return grid
    return structs.replace(shown, cases=plan.cases)


def _values(workload: Workload, name: str) -> tuple[int, ...]:
    if name == "kv_heads" and workload.kv_heads == workload.heads:
        return ()
    if name == "seq" and workload.pass_ == "decode":
        return (workload.kv_seq,)
    return (getattr(workload, name),)


def _grid_axes(cases: tuple[Workload, ...]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(sorted({value for case in cases for value in _values(case, name)})) for name in AXES}


def _same_cases(draft: Draft, cases: tuple[Workload, ...]) -> bool:
    try:
        return set(draft.workloads()) == set(cases)
    except UsageError:
        return False
