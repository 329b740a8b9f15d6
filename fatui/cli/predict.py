"""`fatui predict`: what a preset's cases would take on chips that are not here."""

import argparse
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from attention.chips.prediction import Prediction
    from attention.chips.table import Chip
    from attention.core.workload import Workload
    from fatui.cli.output import Export

DEFAULT_CHIPS: Final = "h100,h200,b200,m4-max"
WHAT_IF: Final = {
    "bandwidth": "memory bandwidth times this",
    "rate": "matrix and vector rates times this",
    "cores": "cores times this, with their rates",
    "shared": "shared memory of a core times this",
    "cache": "last cache times this",
}
EXAMPLE: Final = """examples:
  fatui predict llama-7b --chip m4-max,b200
  fatui predict --seq 8192 --head-dim 128 --mask causal --dtype bfloat16 --impl poc,mlx --chip h100
  fatui predict llama-7b --chip h200 --bandwidth 2 --shared 0.5
  fatui predict quick --chip h100 --launch 1.2us
  fatui predict --chips

Predictions are not measurements: each has a 90 % interval, wider the less the chip is like the one of the calibration.
Exit codes: 0 done, 1 no case could be predicted, 2 wrong usage or preset."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    from fatui.cli.options import add_workload_options

    parser.add_argument("preset", nargs="?", metavar="PRESET", help="a preset's name or file (quick)")
    parser.add_argument("--chip", metavar="A,B", help=f"chips by their keys ({DEFAULT_CHIPS})")
    parser.add_argument("--chips", action="store_true", help="list the chips and their figures, each with its source")
    add_workload_options(parser)
    group = parser.add_argument_group("what if", "factors of the chips' figures; 1 leaves a figure as it is")
    for name, text in WHAT_IF.items():
        group.add_argument(f"--{name}", type=float, metavar="FACTOR", help=text)
    group.add_argument("--launch", metavar="TIME", help="what the chip's host launches a call in, as its doctor says")
    parser.add_argument("--json", metavar="FILE", help="write the predictions as JSON; '-' is stdout")
    parser.add_argument("--markdown", metavar="FILE", help="write the predictions as Markdown; '-' is stdout")


def run(arguments: argparse.Namespace) -> int:
    """Print the predictions; return the exit code.

    Raises:
        UsageError: the request is wrong.
    """
    if arguments.chips:
        return _list_chips()
    from attention.chips.prediction import predict
    from fatui.cli.output import requested_exports, show
    from fatui.report.predictions import basis_lines, predictions_table

    exports = requested_exports(arguments, ("json", "markdown"))
    cases, names, chips, launch_s = _request(arguments)
    made = [predict(case, name, chip, launch_s=launch_s) for case in cases for chip in chips for name in names]
    if not exports or all(export.target != "-" for export in exports):
        for case in cases:
            show(predictions_table(case.label, [each for each in made if each.workload == case]), "")
        for line in basis_lines(made, chips):
            show(line)
    unscaled = dict.fromkeys(each.implementation for each in made if each.predicted_s and each.host is None)
    if launch_s and unscaled:
        cli.print_line(f"--launch changes nothing for {', '.join(unscaled)}: their calibration has no such figure")
    problems = _write(made, exports)
    for problem in problems:
        cli.print_line(problem)
    return cli.FAILED if problems or all(each.predicted_s is None for each in made) else cli.DONE


def _request(
    arguments: argparse.Namespace,
) -> "tuple[tuple[Workload, ...], tuple[str, ...], list[Chip], float | None]":
    """Return cases, implementations, chips and the time of a launch, and report all mistakes at once."""
    from attention.chips.prediction import PREDICTED, what_if
    from fatui.cli.options import Problems, given_values, parse_names, with_overrides
    from fatui.quantities import parse_seconds
    from fatui.storage.presets import load

    mistakes = Problems()
    preset = mistakes.catch(lambda: load("quick" if arguments.preset is None else arguments.preset)) or load("quick")
    cases = mistakes.catch(lambda: with_overrides(preset.cases, given_values(arguments)))
    names = preset.implementations
    if arguments.impl is not None:
        names = mistakes.catch(lambda: parse_names(arguments.impl)) or names
    else:
        names = tuple(name for name in names if name in PREDICTED)
    found = mistakes.catch(lambda: chips_named(DEFAULT_CHIPS if arguments.chip is None else arguments.chip))
    factors = mistakes.catch(lambda: given_factors(arguments)) or {}
    launch = arguments.launch
    launch_s = None if launch is None else mistakes.catch(lambda: parse_seconds(launch, "--launch"))
    mistakes.raise_all()
    return cases or (), names, [what_if(chip, factors) for chip in found or []], launch_s


def chips_named(text: str) -> "list[Chip]":
    """Return the chips of a list of keys.

    Raises:
        UsageError: a key is unknown.
    """
    from attention.chips.table import find_chips

    return find_chips(dict.fromkeys(part.strip() for part in text.split(",")))


def given_factors(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the factors given on the command line.

    Raises:
        UsageError: a factor is not positive.
    """
    import math

    from attention.core.errors import UsageError

    given = {name: value for name in WHAT_IF if (value := getattr(arguments, name)) is not None}
    problems = [
        f"--{name}: got {value:g}; it takes a factor from 0.01 to 100"
        for name, value in given.items()
        if not (math.isfinite(value) and 0.01 <= value <= 100)
    ]
    if problems:
        raise UsageError(*problems)
    return given


def _write(made: "list[Prediction]", exports: "list[Export]") -> list[str]:
    """Write the exports; return the error messages."""
    import msgspec

    from fatui.cli.output import write_text
    from fatui.report.predictions import to_markdown

    document = msgspec.json.encode({"predictions": made})
    texts = {"json": msgspec.json.format(document, indent=2).decode() + "\n", "markdown": to_markdown(made)}
    return [problem for export in exports if (problem := write_text(export, texts[export.format]))]


def _list_chips() -> int:
    from rich.table import Table

    from attention.chips.table import FIGURES, chips
    from fatui import formatting
    from fatui.cli.output import show

    for chip in chips().values():
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold", style="dim")
        for name in FIGURES:
            value = getattr(chip, name)
            if value is None:
                continue
            source = chip.sources[name]
            table.add_row(
                name, formatting.rate(value), f"{source.note}; {source.title}" if source.note else source.title
            )
        show(f"{chip.key}: {chip.name}, {chip.architecture}", table, "")
    return cli.DONE
