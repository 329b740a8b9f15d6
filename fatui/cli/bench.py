"""`fatui bench`: measure, and print the table."""

import argparse
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from attention.core.plan import Plan
    from attention.core.results import Report
    from fatui.cli.output import Export
    from fatui.storage.presets import Preset

DEFAULT_PRESET: Final = "quick"
EXAMPLE: Final = """examples:
  fatui bench quick
  fatui bench llama-7b --impl baseline,mlx --json llama.json
  fatui bench --batch 1,2 --seq 512,2048 --head-dim 128 --mask causal
  fatui bench llama-7b --beside h200,m4-max
  fatui bench --ranks 1,2 --seq 32k --mask causal
  fatui bench --ranks 2 --hosts mac-a,mac-b

Options override the preset's; without a preset they change the one case of `quick`. Without a preset and a shape, batch
and length are those that fit this machine: a call is timed first.
Ranks are processes with a device each: the GPUs of this machine, shares of its cores, or hosts over ssh.
Exit codes: 0 done, 1 a case failed or is inaccurate, 2 wrong usage or preset, 3 no backend, 130 interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    from attention.core.plan import DEFAULTS
    from fatui.cli.options import add_host_options, add_limit_options, add_workload_options
    from fatui.cli.output import add_export_options

    parser.add_argument("preset", nargs="?", metavar="PRESET", help=f"a preset's name or file ({DEFAULT_PRESET})")
    add_workload_options(parser)
    add_limit_options(parser, "time for the rounds of one case", DEFAULTS.blas)
    add_host_options(parser)
    parser.add_argument(
        "--beside", metavar="A,B", help="chips, by the keys of `fatui predict --chips`: the same cases predicted there"
    )
    add_export_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit code.

    Raises:
        UsageError: with every mistake in the request, before anything has run.
    """
    from msgspec import structs

    from fatui.alternation import next_file
    from fatui.cli.options import given_remote
    from fatui.cli.run import run_plan

    plan, preset, exports = request(arguments)
    if _fits_machine(arguments, plan):
        _fit(arguments)
        plan, preset, exports = request(arguments)

    command, remote = _command(arguments, preset), given_remote(arguments)
    name = preset.name if plan.cases == preset.cases else None  # lists of runs show the shape of other cases
    while True:
        code = run_plan(plan, command, name, exports, remote, _beside(arguments))
        file = next_file()  # of further runs for `fatui gate`, each of a worker of its own
        if file is None:
            return code
        exports = [structs.replace(each, target=file) if each.format == "json" else each for each in exports]


def _beside(arguments: argparse.Namespace) -> "Callable[[Report], None] | None":
    """Return what prints predictions for other chips below the measured table, or None."""
    if arguments.beside is None:
        return None
    from fatui.cli.predict import chips_named

    chips = chips_named(arguments.beside)

    def show_predictions(report: "Report") -> None:
        from fatui.cli.output import show
        from fatui.report.predictions import basis_lines, beside_table, predictions_of

        made = predictions_of(report, chips)
        show("", beside_table(report, chips, made), *basis_lines(made, chips))

    return show_predictions


def _fits_machine(arguments: argparse.Namespace, plan: "Plan") -> bool:
    """Return whether the size of the case is left to this machine: no preset and no shape are given."""
    from fatui.cli.options import given_remote, given_values

    return (
        arguments.preset is None and not given_values(arguments) and not plan.hosts and given_remote(arguments) is None
    )


def _fit(arguments: argparse.Namespace) -> None:
    """Choose batch and length so that the table is soon there and its figures mean something; without MLX nothing."""
    import asyncio

    from attention.core.plan import Assignment
    from fatui import cli, formatting
    from fatui.engine_process import Engine
    from fatui.fitting import REFERENCE, find

    found = asyncio.run(find(lambda plan, on: Engine(plan, on, assignment=Assignment(plan=plan, cost_only=True))))
    if found is None:
        return
    size = found.workload
    arguments.field_batch, arguments.field_seq = str(size.batch), str(size.seq)
    arguments.field_head_dim = str(size.head_dim)
    call = formatting.seconds(found.call_s)
    cli.print_line(f"batch {size.batch}, length {size.seq} fit this machine: a call of {REFERENCE} takes about {call}")


def request(arguments: argparse.Namespace) -> "tuple[Plan, Preset, list[Export]]":
    """Build the plan from the command line, and report all mistakes at once."""
    from msgspec import structs

    from fatui.cli import options as cli_options
    from fatui.cli.output import requested_exports
    from fatui.storage.presets import load

    mistakes = cli_options.Problems()
    preset = mistakes.catch(lambda: load(preset_name(arguments))) or load(DEFAULT_PRESET)
    values = {**cli_options.ranks_of_hosts(arguments), **cli_options.given_values(arguments)}
    cases = mistakes.catch(lambda: cli_options.with_overrides(preset.cases, values))
    plan = cli_options.override_options(preset.plan(), arguments, mistakes)
    exports = mistakes.catch(lambda: requested_exports(arguments))
    mistakes.catch(lambda: _beside(arguments))
    mistakes.raise_all()
    return structs.replace(plan, cases=cases), preset, exports or []


def preset_name(arguments: argparse.Namespace) -> str:
    """Return the preset given on the command line, or the default; an empty name counts as given."""
    return DEFAULT_PRESET if arguments.preset is None else str(arguments.preset)


def _command(arguments: argparse.Namespace, preset: "Preset") -> str:
    from fatui.cli.options import given_values
    from fatui.reproduce import bench_command

    further = {
        "impl": arguments.impl,
        "seconds": arguments.seconds,
        "memory-limit": arguments.memory_limit,
        "blas": arguments.blas,
        "force": arguments.force,
        "hosts": arguments.hosts,
        "hostfile": arguments.hostfile,
    }
    return bench_command(
        preset.name if arguments.preset is None else arguments.preset, given_values(arguments), further
    )
