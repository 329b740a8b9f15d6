"""Run identities, and the commands that reproduce runs."""

import os
import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from attention.core.errors import UsageError
from attention.core.kv_format import DENSE
from attention.core.plan import FineTuningPlan, GenerationPlan, Plan, RunOptions, StreamPlan
from attention.core.results import Run
from attention.core.stream import SHAPE
from attention.engine.turns import TURNS
from fatui import storage
from fatui.quantities import size_text
from fatui.storage.presets import FIELDS, Preset, factor_cases


class RunIdentity:
    """A started run: its id, command and clock."""

    def __init__(self, command: str, preset: str | None) -> None:
        self._command, self._preset = command, preset
        self._id = secrets.token_hex(4)
        self._at = datetime.now().astimezone().isoformat(timespec="seconds")
        self._clock = time.monotonic()

    def run(self, interrupted: bool = False) -> Run:
        """Return the run as described in a report, up to now."""
        return Run(
            id=self._id,
            started=self._at,
            seconds=round(time.monotonic() - self._clock, 3),
            command=self._command,
            preset=self._preset,
            interrupted=interrupted,
            in_turns=Path(turns).parent.name if (turns := os.environ.get(TURNS)) else None,
        )


def bench_command(preset: str | None, values: Mapping[str, Sequence[Any]], options: Mapping[str, object]) -> str:
    """Build a `fatui bench` command line from a preset's name, workload fields, and further options.

    Args:
        preset: a name or a file, or None.
        values: workload fields, each with its values, named as in presets.
        options: further options, named without dashes; True for a flag, None or False to omit.
    """
    fields = {name.replace("_", "-"): ",".join(map(str, several)) for name, several in values.items()}
    return _command(["fatui", "bench", *([preset] if preset else [])], {**fields, **options})


def _command(words: list[str], options: Mapping[str, object]) -> str:
    for name, value in options.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(words)


def model_command(plan: GenerationPlan) -> str:
    """Return the command that repeats a model run."""
    first = plan.cases[0]
    formats = [*dict.fromkeys(case.kv_format for case in plan.cases)]
    options = {
        "prompt": ",".join(map(str, dict.fromkeys(case.prompt for case in plan.cases))),
        "generate": first.generate,
        "batch": ",".join(map(str, dict.fromkeys(case.batch for case in plan.cases))),
        "layers": first.measured_layers,
        "dtype": first.dtype,
        "ranks": None if first.ranks == 1 else first.ranks,
        "kv-format": None if formats == [DENSE] else ",".join(formats),
        **_options(plan),
    }
    return _command(["fatui", "model", first.model], options)


def finetune_command(plan: FineTuningPlan) -> str:
    """Return the command that repeats a fine-tuning run."""
    case = plan.cases[0]
    options = {name: getattr(case, name) for name in ("iters", "seq", "batch", "rank", "dtype", "data")}
    return _command(["fatui", "finetune", case.model], {**options, "lora-layers": case.tuned_layers, **_options(plan)})


def stream_command(plan: StreamPlan) -> str:
    """Return the command that repeats a run over a stream."""
    case = plan.cases[0]
    shape = {} if case.model else {name.replace("_", "-"): getattr(case, name) for name in SHAPE}
    options = {
        **{name: getattr(case, name) for name in ("tokens", "window", "first")},
        "chunk": case.chunk if case.chunk != 1 else None,
        **shape,
        "dtype": case.dtype,
        "kv-format": case.kv_format if case.kv_format != DENSE else None,
        "text": case.text,
        **{"rows" if name == "impl" else name: value for name, value in _options(plan).items()},
    }
    return _command(["fatui", "stream", *([case.model] if case.model else [])], options)


def command_for(plan: Plan, preset: Preset | None = None) -> str:
    """Return the command that repeats a plan.

    Args:
        plan: the plan.
        preset: the preset it was made from, if any; the command names it if the cases are still the plan's.

    Raises:
        UsageError: the cases are neither a preset's nor a sweep; save them as a preset first.
    """
    if preset is not None and preset.cases == plan.cases:
        return bench_command(_called(preset), {}, _options(plan, preset))
    product = factor_cases(plan.cases)
    if product is None:
        raise UsageError("these cases are not a sweep; save them as a preset to name them in a command")
    shared, axes = product
    values = {name: axes.get(name, [shared[name]] if name in shared else []) for name in FIELDS}
    return bench_command(None, {name: several for name, several in values.items() if several}, _options(plan))


def _called(preset: Preset) -> str:
    """Return what names a preset on a command line: its name, or its file if that is not among the user's own."""
    if preset.source is None or preset.bundled or preset.source.parent == storage.own_presets():
        return preset.name
    return str(preset.source.absolute())


def _options(plan: RunOptions, preset: Preset | None = None) -> dict[str, object]:
    """Return the options in which a plan differs from a preset, or all relevant ones without a preset."""
    limit = plan.memory_limit_bytes
    options: dict[str, object] = {}
    if preset is None or plan.implementations != preset.implementations:
        options["impl"] = ",".join(plan.implementations)
    if preset is None or plan.seconds != preset.seconds:
        options["seconds"] = f"{plan.seconds:g}"
    if limit is not None and (preset is None or limit != preset.memory_limit_bytes):
        options["memory-limit"] = size_text(limit)
    usual = preset.blas if preset else "numpy" if isinstance(plan, GenerationPlan | FineTuningPlan) else "mlx"
    if plan.blas != usual:
        options["blas"] = plan.blas
    if plan.hosts and (preset is None or plan.hosts != preset.hosts):
        options["hosts"] = ",".join(plan.hosts)
    if plan.hostfile and (preset is None or plan.hostfile != preset.hostfile):
        options["hostfile"] = plan.hostfile
    return {**options, "force": plan.force}
