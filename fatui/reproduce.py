"""What a run is called, and the command that makes it again."""

import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from attention.errors import UsageError
from attention.plan import Asked, FineTuningPlan, GenerationPlan, Plan
from attention.report import Run
from fatui.preset_format import FIELDS, Preset
from fatui.preset_writing import as_product
from fatui.sizes import size_text


class Started:
    """A run that has begun: its name and its clock."""

    def __init__(self, command: str, preset: str | None) -> None:
        self._command, self._preset = command, preset
        self._id = secrets.token_hex(4)
        self._at = datetime.now().astimezone().isoformat(timespec="seconds")
        self._clock = time.monotonic()

    def run(self, interrupted: bool = False) -> Run:
        """What a report says of the run, as of now."""
        return Run(
            id=self._id,
            started=self._at,
            seconds=round(time.monotonic() - self._clock, 3),
            command=self._command,
            preset=self._preset,
            interrupted=interrupted,
        )


def bench_command(preset: str | None, values: Mapping[str, Sequence[Any]], options: Mapping[str, object]) -> str:
    """A `fatui bench` command line from a preset's name, fields with their values, and further options.

    Args:
        preset: a name or a file, or None.
        values: workload fields by their names in presets.
        options: further options by their names without dashes; True for one without a value, None and False for none.
    """
    fields = {name.replace("_", "-"): ",".join(map(str, several)) for name, several in values.items()}
    return _command(["fatui", "bench", *([preset] if preset else [])], {**fields, **options})


def _command(words: list[str], options: Mapping[str, object]) -> str:
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def model_command(plan: GenerationPlan) -> str:
    """The command that measures a model again."""
    first = plan.cases[0]
    options = {
        "prompt": ",".join(map(str, dict.fromkeys(case.prompt for case in plan.cases))),
        "generate": first.generate,
        "batch": ",".join(map(str, dict.fromkeys(case.batch for case in plan.cases))),
        "layers": first.measured_layers,
        "dtype": first.dtype,
        **_limits(plan),
    }
    return _command(["fatui", "model", first.model], options)


def finetune_command(plan: FineTuningPlan) -> str:
    """The command that makes a fine-tuning again."""
    case = plan.cases[0]
    options = {name: getattr(case, name) for name in ("iters", "seq", "batch", "rank", "dtype", "data")}
    return _command(["fatui", "finetune", case.model], {**options, "lora-layers": case.tuned_layers, **_limits(plan)})


def _limits(plan: Asked) -> dict[str, object]:
    """The options that all commands which measure take."""
    limit = plan.memory_limit_bytes
    return {
        "impl": ",".join(plan.implementations),
        "seconds": f"{plan.seconds:g}",
        "memory-limit": None if limit is None else size_text(limit),
        "force": plan.force,
    }


def command_for(plan: Plan, preset: Preset | None = None) -> str:
    """The command that measures a plan again.

    Args:
        plan: what runs.
        preset: the preset that it was made from, if any; named in the command where its cases are the plan's.

    Raises:
        UsageError: the cases are neither a preset's nor a sweep; save them as a preset first.
    """
    if preset is not None and preset.cases == plan.cases:
        name = (
            str(preset.source)
            if preset.source and not preset.bundled and preset.name != preset.source.stem
            else preset.name
        )
        return bench_command(name, {}, _options(plan, preset))
    product = as_product(plan.cases)
    if product is None:
        raise UsageError("these cases are no sweep; saved as a preset they can be named in a command")
    shared, axes = product
    values = {name: axes.get(name, [shared[name]] if name in shared else []) for name in FIELDS}
    return bench_command(None, {name: several for name, several in values.items() if several}, _options(plan, None))


def _options(plan: Plan, preset: Preset | None) -> dict[str, object]:
    """The options in which a plan differs from a preset; all that matter where there is none."""
    options: dict[str, object] = {}
    if preset is None or plan.implementations != preset.implementations:
        options["impl"] = ",".join(plan.implementations)
    if preset is None or plan.seconds != preset.seconds:
        options["seconds"] = f"{plan.seconds:g}"
    if plan.memory_limit_bytes is not None and (preset is None or plan.memory_limit_bytes != preset.memory_limit_bytes):
        options["memory-limit"] = size_text(plan.memory_limit_bytes)
    options["force"] = plan.force
    return options
