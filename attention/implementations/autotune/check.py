"""Measure how good the tuner's choices are: each against every close candidate, in interleaved rounds."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Final

from msgspec import Struct, structs

from attention.core import statistics
from attention.core.results import Ratio
from attention.core.workload import Workload
from attention.implementations.autotune.halving import Prescreen
from attention.implementations.autotune.implementation import Demo
from attention.implementations.autotune.trial import AccuracyCheck, BoundCall, Task, fitting_candidates
from attention.implementations.calls import make_inputs
from attention.masks import of_workload
from attention.measure.device import probe
from attention.measure.rounds import Arm, Clock, Limits, run_rounds, shared_calls

MIN_SPEED_SHARE: Final = 0.97
"""Required speed of demo relative to the best candidate."""
MIN_FOUND_SHARE: Final = 0.95
"""Required share of the cases in which the choice is the best or within the noise floor of the best."""
SAMPLE_S: Final = 0.004
MAX_EXTENSION: Final = 4.0
MAX_SLOWDOWN: Final = 1.5
"""Candidates slower than this multiple of the best are not measured."""
PRECISION: Final = 0.005
REPEATED_CHOICE: Final = "(again)"
TUNED: Final = "(demo)"


class ChoiceCheck(Struct, frozen=True, kw_only=True):
    """The result of checking one case."""

    workload: Workload
    chosen: str
    best: str
    """The candidate with the best median."""
    share: Ratio
    """Demo's speed over the best candidate's, from paired samples; 1 means equal."""
    found: bool
    """Whether the choice is the best, or within the noise floor of it."""
    floor: float


def check_choice(demo: Demo, workload: Workload, seconds: float, seed: int = 0) -> ChoiceCheck:
    """Check the choice for a workload, tuning it first if necessary.

    Every candidate that fits is called and warmed up. The accurate ones within 1.5 times the best then run in
    interleaved rounds, together with a second copy of the choice (for the noise floor) and with `demo` as a run calls
    it.

    Args:
        demo: the tuner.
        workload: the case.
        seconds: duration of the rounds; up to MAX_EXTENSION times as long while it is undecided whether demo reaches
            MIN_SPEED_SHARE.
        seed: of the inputs and of the order.

    Raises:
        RuntimeError: no candidate could be run.
    """
    inputs = make_inputs(workload, seed)
    task = Task(workload=workload, inputs=inputs, scale=workload.scale, mask=of_workload(workload))
    own = demo.runner(workload, inputs, workload.scale)
    chosen = demo.active_choice(task).name
    choice, *others = _close_candidates(demo, task, chosen)
    arms = [
        choice,
        structs.replace(choice, name=REPEATED_CHOICE, samples=[]),
        structs.replace(choice, name=TUNED, samples=[], runner=own),
        *others,
    ]
    _run(arms, workload, seconds, seed, demo.clock)
    return _check_result(workload, {arm.name: arm.samples for arm in arms}, chosen)


def _close_candidates(demo: Demo, task: Task, chosen: str) -> list[Arm]:
    """Return the choice and the accurate candidates close to the best."""
    device = probe()
    names = [chosen, *fitting_candidates(demo.candidates, task.workload, device, task.needs)]
    prescreen = Prescreen(math.inf, task.workload.output_bytes, device.backend != "cpu", demo.clock)
    runners = {name: BoundCall(demo.candidates[name], task) for name in names}
    choice, *others = prescreen.time_all(runners)
    if choice.name != chosen:
        raise RuntimeError(f"{chosen} cannot be run any more: {prescreen.failed[chosen]}")
    warm = prescreen.warm_up_promising([choice, *others], SAMPLE_S)
    limit = MAX_SLOWDOWN * min((arm.call_s for arm in warm), default=math.inf)
    accuracy = AccuracyCheck(task)
    close = [arm for arm in warm if arm is not choice and arm.call_s <= limit]
    return [choice, *(arm for arm in close if not accuracy.error(demo.candidates[arm.name])[1])]


def _run(arms: list[Arm], workload: Workload, seconds: float, seed: int, clock: Clock) -> None:
    numbers = shared_calls([arm.call_s for arm in arms], SAMPLE_S, workload.output_bytes)
    for arm, calls in zip(arms, numbers, strict=True):
        arm.calls = calls
    choice, _, own, *others = arms
    started = clock()

    def after(running: list[Arm]) -> str | None:
        if clock() - started < seconds or not all(arm in running for arm in (choice, own)):
            return None
        best = min((arm for arm in running if arm in others), key=lambda arm: median(arm.samples), default=choice)
        best = min((choice, best), key=lambda arm: median(arm.samples))
        _, low, high = statistics.ratio_interval(statistics.log_ratios(best.samples, own.samples))
        return None if low < math.log(MIN_SPEED_SHARE) <= high else "decided"

    run_rounds(
        list(arms),
        Limits(seconds=MAX_EXTENSION * seconds, precision=PRECISION),
        seed=seed,
        before=lambda arm: None,
        failed=lambda arm, error: arm.samples.clear(),
        after=after,
        clock=clock,
    )


def _check_result(workload: Workload, samples: dict[str, list[float]], chosen: str) -> ChoiceCheck:
    reference = samples[chosen]
    floor = statistics.noise_floor(reference, samples[REPEATED_CHOICE])
    ratios = {
        name: ratio
        for name, times in samples.items()
        if name not in (REPEATED_CHOICE, TUNED, chosen) and (ratio := statistics.speedup(reference, times, floor))
    }
    fastest = max(ratios, key=lambda name: ratios[name].value, default=chosen)
    best = fastest if fastest in ratios and ratios[fastest].value > 1 else chosen
    share = statistics.speedup(samples[best], samples[TUNED], floor)
    if floor is None or share is None:
        raise RuntimeError(f"{workload.label}: too few rounds")
    found = best == chosen or not ratios[best].significant
    return ChoiceCheck(workload=workload, chosen=chosen, best=best, share=share, found=found, floor=floor.floor)


def worst(cases: Sequence[ChoiceCheck]) -> ChoiceCheck:
    """Return the case in which demo is slowest relative to the best candidate."""
    return min(cases, key=lambda case: case.share.value)


def holds(cases: Sequence[ChoiceCheck]) -> bool:
    """Return whether demo is never below 0.97 times the best and finds the best in 95 % of the cases."""
    found = sum(case.found for case in cases)
    return worst(cases).share.value >= MIN_SPEED_SHARE and found >= MIN_FOUND_SHARE * len(cases)
