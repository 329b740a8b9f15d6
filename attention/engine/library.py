"""`attention.bench`: measure implementations from a program, in the engine's rounds.

By default the engine runs in a process of its own: a crash costs one row, and the program's memory and garbage stay out
of the figures. `in_process=True` measures in the calling process, which functions defined on the fly need.
"""

import asyncio
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import msgspec

from attention.core import events as on
from attention.core.errors import NoBackendError, UsageError, error_line
from attention.core.numbers import flag_problem
from attention.core.plan import MAX_CASES, Assignment, Plan, expand
from attention.core.results import Peaks, Run
from attention.core.workload import Workload
from attention.engine.bench_result import BenchResult
from attention.engine.record import Record, record_of
from attention.engine.resume import MAX_FRUITLESS, exit_reason, mark_file, marked_name, next_assignment, refusal
from attention.implementations import check_name, numbered

if TYPE_CHECKING:
    from attention.implementations.protocol import Implementation

Listener = Callable[[on.AnyEvent], None]
Cases = Workload | Mapping[str, Any] | Iterable[Workload | Mapping[str, Any]]
Given = str | Callable[..., Any]
Implementations = Given | Sequence[Given] | Mapping[str, Given]
F = TypeVar("F", bound=Callable[..., Any])

WORKER: Final = "attention.engine.worker"
STDERR_BYTES: Final = 2**16
END_S: Final = 2.0
"""Seconds that a worker may take to end after its last event."""


class _Named(msgspec.Struct, frozen=True):
    """An implementation of a run: the name that its rows have, and what was given."""

    name: str
    given: Given


def bench(
    cases: Cases | None = None,
    implementations: Implementations | None = None,
    *,
    seconds: float = 6.0,
    precision: float = 0.01,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    force: bool = False,
    in_process: bool = False,
    on_event: Listener | None = None,
) -> BenchResult:
    """Measure implementations on attention shapes, with the engine's interleaved rounds.

    Args:
        cases: a `Workload`, its fields as a mapping, or several of these; a field with a list of values is a sweep:
            `{"seq": [512, 2048], "head_dim": 64}`. By default one case with the default fields.
        implementations: one or several of: names of the catalogue; "FILE.py:NAME" and "package.module:NAME"; classes;
            functions `f(q, k, v)`, which may take the keywords `scale`, `mask` (None, "causal" or a bool array) and
            `softcap`; with `in_process` also objects and lambdas. A mapping names them. Speedups are relative to
            "baseline", or to the first if that is not among them.
        seconds: time limit of the rounds of one case.
        precision: rounds end early when every speedup's interval is narrower than this, relative.
        seed: of the random inputs.
        memory_limit_bytes: cases predicted to need more are refused; None: the device's free memory.
        force: run them nevertheless.
        in_process: measure in this process. The default is a process of its own, which imports classes and functions
            by their module; a script that calls bench() then needs the guard `if __name__ == "__main__":`.
        on_event: called with each event of `attention.core.events` in the calling thread, while nothing is timed.

    Returns:
        The rows: iterable, with `to_json`, `to_pandas` and a table for notebooks.

    Raises:
        UsageError: the request is wrong; one line for each mistake.
        NoBackendError: MLX is missing, or has no backend.
    """
    run = _LibraryRun(_workloads(cases), implementations, in_process)
    plan = run.plan(seconds, precision, seed, memory_limit_bytes, force)
    return run.measure(plan, on_event or (lambda event: None), threading.Event())


async def abench(
    cases: Cases | None = None,
    implementations: Implementations | None = None,
    *,
    seconds: float = 6.0,
    precision: float = 0.01,
    seed: int = 0,
    memory_limit_bytes: int | None = None,
    force: bool = False,
    on_event: Listener | None = None,
) -> BenchResult:
    """Measure as `bench` does, in a process of its own, without blocking the event loop.

    `on_event` is called in the event loop. A task that is cancelled ends the engine's process.
    """
    run = _LibraryRun(_workloads(cases), implementations, in_process=False)
    plan = run.plan(seconds, precision, seed, memory_limit_bytes, force)
    loop, stop = asyncio.get_running_loop(), threading.Event()

    def listen(event: on.AnyEvent) -> None:
        if on_event is not None:
            loop.call_soon_threadsafe(on_event, event)

    thread = asyncio.ensure_future(asyncio.to_thread(run.measure, plan, listen, stop))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        run.kill()
        with suppress(Exception):
            await thread
        raise


def benchmark(cases: Cases | None = None, *, against: Implementations = "baseline", **options: Any) -> Callable[[F], F]:
    """Decorate a function or a class that computes attention with its own `bench()`.

    `@benchmark({"seq": [512, 2048]}, against=["baseline", "mlx"], seconds=3)` leaves the function as it is, and gives
    it an attribute `bench`: a function that measures it beside the others and takes the options of `attention.bench`,
    which override the decorator's.
    """

    def decorate(function: F) -> F:
        def measure(**given: Any) -> BenchResult:
            others = [against] if isinstance(against, str) or callable(against) else against
            named = dict(others) if isinstance(others, Mapping) else {_name_of(each): each for each in others}
            named[_name_of(function)] = function
            return bench(**{"cases": cases, "implementations": named, **options, **given})

        cast("Any", function).bench = measure
        return function

    return decorate


def _workloads(cases: Cases | None) -> tuple[Workload, ...]:
    """Return the cases of a request, each once.

    Raises:
        UsageError: with every mistake.
    """
    parts: list[object]
    if cases is None:
        parts = [{}]
    elif isinstance(cases, Workload | Mapping):
        parts = [cases]
    else:
        given: object = cases
        parts = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else []
    if cases is not None and not parts:
        raise UsageError(f"cases: got {cases!r:.60}; it takes a Workload, a mapping of its fields, or several of these")
    made: dict[Workload, None] = {}
    problems: dict[str, None] = {}
    for part in parts:
        try:
            made.update(dict.fromkeys(_expanded(part)))
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise UsageError(*problems)
    if not 1 <= len(made) <= MAX_CASES:
        raise UsageError(f"cases: got {len(made):,}; it takes 1 to {MAX_CASES:,}")
    several = [case for case in made if case.ranks > 1]
    if several:
        raise UsageError("ranks: bench() takes one device; the command line divides calls among several")
    return tuple(made)


def _expanded(part: object) -> tuple[Workload, ...]:
    if isinstance(part, Workload):
        return (part,)
    if not isinstance(part, Mapping):
        raise UsageError(f"cases: got {part!r:.60}; it takes a Workload or a mapping of its fields")
    fields = {"pass" if name == "pass_" else name: value for name, value in part.items()}
    known = [name.removesuffix("_") for name in Workload.__struct_fields__]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise UsageError(*(f"{name!s:.60}: not a field of a case; it takes {', '.join(known)}" for name in unknown))
    axes = {name: list(value) for name, value in fields.items() if isinstance(value, list | tuple | range)}
    count = math.prod(len(values) for values in axes.values())
    if not 1 <= count <= MAX_CASES:
        raise UsageError(f"cases: a sweep of {count:,} cases; it takes 1 to {MAX_CASES:,}")
    return expand({name: value for name, value in fields.items() if name not in axes}, axes)


def _named(implementations: Implementations | None) -> list[_Named]:
    """Return what is to be measured, with the names of the rows.

    Raises:
        UsageError: it is none, or two have one name.
    """
    if implementations is None:
        return [_Named(name, name) for name in Plan(cases=()).implementations]
    if isinstance(implementations, Mapping):
        named = [_Named(str(name), given) for name, given in implementations.items()]
    elif isinstance(implementations, str) or callable(implementations):
        named = [_Named(_name_of(implementations), implementations)]
    else:
        named = [_Named(_name_of(given), given) for given in implementations]
    names = [each.name for each in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"implementations: '{name}' occurs twice; a mapping names them" for name in twice]
    problems += [f"implementations: got {each.name!r}; a name is printable" for each in named if not _good(each.name)]
    if problems or not named:
        raise UsageError(*(problems or ["implementations: got none; it takes at least one"]))
    return named


def _good(name: str) -> bool:
    return bool(name) and name.isprintable() and len(name) <= 200


def _name_of(given: object) -> str:
    if isinstance(given, str):
        return given
    own = getattr(given, "name", None)
    return str(own if isinstance(own, str) else getattr(given, "__name__", type(given).__name__))


class _LibraryRun:
    """One call of `bench`."""

    def __init__(self, cases: tuple[Workload, ...], implementations: Implementations | None, in_process: bool) -> None:
        self._cases, self._in_process = cases, in_process
        self._named = _named(implementations)
        self._process: subprocess.Popen[bytes] | None = None
        if not in_process:
            _check_not_in_worker()
        problems: list[str] = []
        self._locations: dict[str, str] = {}
        """The rows' names by those of the plan."""
        for number, each in enumerate(self._named, 1):
            try:
                name = self._plan_name(each)
            except UsageError as error:
                problems.extend(error.problems)
                continue
            self._locations[numbered(name, number) if name in self._locations else name] = each.name
        if problems:
            raise UsageError(*problems)

    def _plan_name(self, each: _Named) -> str:
        """Return the name by which the engine loads an implementation."""
        if isinstance(each.given, str):
            check_name(each.given)
            return each.given
        if not callable(each.given):
            raise UsageError(f"implementations: got {each.given!r:.60}; it takes names, functions and classes")
        return each.name if self._in_process else _location(each.given)

    def plan(self, seconds: float, precision: float, seed: int, memory_limit_bytes: int | None, force: bool) -> Plan:
        """Return the plan of the run.

        Raises:
            UsageError: an option is out of its range.
        """
        problems = [
            f"{name}: got {value!r:.60}; it takes a number from {least:g} to {most:g}"
            for name, value, least, most in (("seconds", seconds, 0.01, 86_400), ("precision", precision, 0, 1))
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most
        ]
        for name, whole in (("seed", seed), ("memory_limit_bytes", memory_limit_bytes)):
            if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int) or not 0 <= whole < 2**63):
                problems.append(f"{name}: got {whole!r:.60}; it takes a whole number from 0")
        flags = (flag_problem("force", force), flag_problem("in_process", self._in_process))
        problems += [problem for problem in flags if problem]
        if problems:
            raise UsageError(*problems)
        return Plan(
            cases=self._cases,
            implementations=tuple(self._locations),
            seconds=float(seconds),
            precision=float(precision),
            seed=seed,
            memory_limit_bytes=memory_limit_bytes,
            force=force,
        )

    def measure(self, plan: Plan, listener: Listener, stop: threading.Event) -> BenchResult:
        """Run the plan to its end.

        Raises:
            UsageError, NoBackendError: nothing could run.
        """
        started, clock = datetime.now().astimezone(), time.monotonic()
        record = cast("Record", record_of(plan))

        def dispatch(event: on.AnyEvent) -> None:
            record.apply(event)
            listener(event)

        if self._in_process:
            self._run_here(plan, dispatch)
        else:
            self._run_workers(plan, record, dispatch, stop)
        if record.refused:
            _raise_refusal(record.refused)
        run = Run(
            id=secrets.token_hex(4),
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - clock, 3),
            command=f"attention.bench(seconds={plan.seconds:g})",
            interrupted=stop.is_set(),
        )
        return BenchResult(record.report(run)).renamed(self._locations)

    def _run_here(self, plan: Plan, dispatch: Listener) -> None:
        """Run the plan in this process."""
        peaks = _process_peaks()
        from attention.engine.bench import Bench
        from attention.engine.case_runner import DeviceStateUnknown
        from attention.implementations import given_implementations

        dispatch(on.PeaksMeasured(peaks=peaks))

        def emit(event: on.AnyEvent) -> None:
            dispatch(event)
            if isinstance(event, on.RowEnded) and event.reason.startswith(KeyboardInterrupt.__name__):
                raise KeyboardInterrupt

        named = {each.name: each for each in self._named if not isinstance(each.given, str)}
        own = {plan: _instance(named[name]) for plan, name in self._locations.items() if name in named}
        with given_implementations(own), suppress(DeviceStateUnknown):
            Bench(Assignment(plan=plan, peaks=peaks), plan, emit).run()

    def _run_workers(self, plan: Plan, record: Record, dispatch: Listener, stop: threading.Event) -> None:
        """Run the plan in worker processes, each of which goes on where the one before it crashed."""
        assignment, fruitless = Assignment(plan=plan), 0
        while not (record.done or record.refused or stop.is_set()):
            reason, culprit = self._run_worker(assignment, dispatch, stop)
            if record.done or record.refused or stop.is_set():
                return
            before = assignment
            if record.current_case is not None:
                following = next_assignment(assignment, record, culprit, reason, dispatch)
                if following is None:
                    dispatch(on.RunDone())
                    return
                assignment = following
            fruitless = fruitless + 1 if assignment == before else 0
            if fruitless == MAX_FRUITLESS:
                dispatch(refusal(culprit, reason))

    def _run_worker(self, assignment: Assignment, dispatch: Listener, stop: threading.Event) -> tuple[str, str | None]:
        """Run one worker to its end; return how it ended, and the implementation that it was running."""
        mark = mark_file()
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", WORKER, "--mark", str(mark)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=(mark,),
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(part or str(Path.cwd()) for part in sys.path)},
            )
            self._process = process
            if stop.is_set():  # before there was a process to kill
                self.kill()
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                with suppress(OSError):
                    process.stdin.write(msgspec.json.encode(assignment) + b"\n")
                    process.stdin.flush()
                for line in process.stdout:
                    dispatch(_event(line))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(END_S)
            finally:
                self.kill()
                process.wait()
                self._process = None
                for pipe in (process.stdin, process.stdout):
                    with suppress(OSError):
                        cast("Any", pipe).close()
                culprit = marked_name(mark, assignment.plan.ordered)
                os.close(mark)
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - STDERR_BYTES))
            tail = errors.read().decode(errors="replace").splitlines()
        return exit_reason(process.returncode, tail), culprit

    def kill(self) -> None:
        """Kill the worker and its children, if there is one."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


@cache
def _process_peaks() -> Peaks:
    """Measure this machine's best rates, once in a process.

    Raises:
        NoBackendError: MLX is missing, or has no backend.
    """
    from attention.measure.device import probe

    device = probe()
    from attention.engine.peaks import measure_peaks

    return measure_peaks(device)


def _event(line: bytes) -> on.AnyEvent:
    try:
        return on.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return on.Message(level="warning", text=f"a line of the engine could not be read: {error_line(error)}")


def _raise_refusal(refusal: on.RunRefused) -> None:
    if refusal.kind == "no backend":
        raise NoBackendError(refusal.reason, refusal.why, refusal.remedy)
    if refusal.kind == "usage":
        raise UsageError(*refusal.reason.splitlines())
    raise UsageError(" ".join(refusal.reason.split()))


def _instance(each: _Named) -> "Implementation":
    """Return an implementation of the caller, of a class, an object or a function."""
    from attention.implementations.functions import FunctionImplementation, computes_attention
    from attention.implementations.protocol import Implementation

    given: object = each.given
    if isinstance(given, type):
        try:
            given = given()
        except TypeError as error:
            raise UsageError(f"implementations: {each.name} cannot be constructed: {error_line(error)}") from error
    if isinstance(given, Implementation):
        return given
    if computes_attention(given):
        return FunctionImplementation(cast("Callable[..., Any]", given), each.name)
    raise UsageError(
        f"implementations: got {each.name}; it takes a function of q, k and v, or an object with name, route and call"
    )


def _location(given: Callable[..., Any]) -> str:
    """Return the import path of a function or a class: "package.module:NAME" or "FILE.py:NAME".

    Raises:
        UsageError: another process cannot import it.
    """
    name = getattr(given, "__qualname__", None)
    here = "; in_process=True measures it in this process"
    if not isinstance(given, type | FunctionType) and getattr(given, "__module__", None) is not None and name is None:
        raise UsageError(f"implementations: got an object of {type(given).__name__}; give its class{here}")
    module = sys.modules.get(str(getattr(given, "__module__", "")))
    if name is None or module is None or getattr(module, name, None) is not given:
        shown = name or repr(given)
        raise UsageError(
            f"implementations: {shown:.80} cannot be imported by the engine's process, which takes functions and "
            f"classes of a module's top level{here}"
        )
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).is_file():
        raise UsageError(f"implementations: {name} is not defined in a file, which the engine's process imports{here}")
    return f"{Path(file).resolve()}:{name}"


def _check_not_in_worker() -> None:
    """Raise UsageError in the engine's own process, which imports the script that called bench()."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name == WORKER:
        raise UsageError(
            "bench() was called while the engine imported an implementation from this file; "
            'put the call below `if __name__ == "__main__":`'
        )
