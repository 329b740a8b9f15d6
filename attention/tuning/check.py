"""How good the choices are: each beside every candidate that comes near it, in interleaved rounds."""

import math
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from attention import statistics
from attention.device import probe
from attention.implementations.runner import make_inputs
from attention.masks import of_workload
from attention.measure.clock import shared_calls
from attention.measure.rounds import Arm, Limits, run_rounds
from attention.report import Ratio
from attention.tuning.candidates import fitting
from attention.tuning.demo import Demo
from attention.tuning.halving import BEHIND, Halving
from attention.tuning.task import BoundCall, Task
from attention.workload import Workload

LEAST_SHARE: Final = 0.97
"""What demo's speed may be of the best candidate's at the least."""
LEAST_FOUND: Final = 0.95
"""Share of the cases in which the choice must be the best or inside the noise floor of it."""
SAMPLE_S: Final = 0.004
PRECISION: Final = 0.005
AGAIN: Final = "(again)"
DEMO: Final = "(demo)"


class Checked(Struct, frozen=True, kw_only=True):
    """One case."""

    workload: Workload
    chosen: str
    best: str
    """The candidate with the best median."""
    share: Ratio
    """Demo's speed over the best candidate's, paired; 1 is as fast."""
    found: bool
    """Whether the choice is the best, or not significantly apart from it: inside the noise floor."""
    floor: float


def check(demo: Demo, workload: Workload, seconds: float, seed: int = 0) -> Checked:
    """Checks the choice for a workload, which is tuned beforehand if it was not.

    Every candidate that fits is called once; those that come within 1.5 times the best of them take part in rounds.

    Args:
        demo: what chooses.
        workload: the case.
        seconds: of the rounds.
        seed: of the inputs and of the order.

    Raises:
        RuntimeError: nothing could be run.
    """
    inputs = make_inputs(workload, seed)
    task = Task(workload=workload, inputs=inputs, scale=workload.scale, mask=of_workload(workload))
    own = demo.runner(workload, inputs, workload.scale)
    chosen = demo.standing(task).name
    device = probe()
    names = fitting(demo.candidates, workload, device, task.needs)
    looks = Halving(math.inf, workload.output_bytes, device.backend == "cpu", demo.clock)
    ordered = [chosen, *(name for name in names if name != chosen)]
    seen = looks.look({name: BoundCall(demo.candidates[name], task) for name in ordered})
    limit = BEHIND * min(each.sighted_s for each in seen)
    near = {each.name: each for each in seen if each.sighted_s <= limit or each.name == chosen}
    arms = [Arm(name=each.name, runner=each.runner, call_s=each.sighted_s) for each in near.values()]
    arms[1:1] = [
        Arm(name=AGAIN, runner=near[chosen].runner, call_s=near[chosen].sighted_s),
        Arm(name=DEMO, runner=own, call_s=near[chosen].sighted_s),
    ]
    _run(arms, workload, seconds, seed, on_gpu=device.backend != "cpu")
    return _judged(workload, {arm.name: arm.samples for arm in arms}, chosen)


def _run(arms: list[Arm], workload: Workload, seconds: float, seed: int, on_gpu: bool) -> None:
    numbers = shared_calls([arm.call_s for arm in arms], SAMPLE_S, workload.output_bytes)
    for arm, calls in zip(arms, numbers, strict=True):
        arm.calls, arm.lead_in = calls, on_gpu
    run_rounds(
        list(arms),
        Limits(seconds=seconds, precision=PRECISION),
        seed=seed,
        before=lambda arm: None,
        failed=lambda arm, error: arm.samples.clear(),
        after=lambda running: None,
    )


def _judged(workload: Workload, samples: dict[str, list[float]], chosen: str) -> Checked:
    reference = samples[chosen]
    floor = statistics.noise_floor(reference, samples[AGAIN])
    ratios = {
        name: ratio
        for name, times in samples.items()
        if name not in (AGAIN, DEMO, chosen) and (ratio := statistics.speedup(reference, times, floor))
    }
    fastest = max(ratios, key=lambda name: ratios[name].value, default=chosen)
    best = fastest if fastest in ratios and ratios[fastest].value > 1 else chosen
    share = statistics.speedup(samples[best], samples[DEMO], floor)
    if floor is None or share is None:
        raise RuntimeError(f"{workload.label}: too few rounds")
    found = best == chosen or not ratios[best].significant
    return Checked(workload=workload, chosen=chosen, best=best, share=share, found=found, floor=floor.floor)


def worst(cases: Sequence[Checked]) -> Checked:
    """The case in which demo falls behind most."""
    return min(cases, key=lambda case: case.share.value)


def holds(cases: Sequence[Checked]) -> bool:
    """Whether demo is never below 0.97 times the best, and finds it in 95 % of the cases."""
    found = sum(case.found for case in cases)
    return worst(cases).share.value >= LEAST_SHARE and found >= LEAST_FOUND * len(cases)
