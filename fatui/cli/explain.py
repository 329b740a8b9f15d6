"""`fatui explain`: the path that each implementation would take, and why, without running it."""

import argparse
from typing import TYPE_CHECKING, Final

from fatui import cli

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attention.core.route import Route
    from attention.core.workload import Workload
    from attention.measure.device import Device

KERNELS: Final = {True: "fused", False: "unfused", None: "n/a"}
EXAMPLE: Final = """examples:
  fatui explain --seq 8192 --head-dim 96 --mask causal
  fatui explain llama-7b --impl practical,mlx
  fatui explain --pass decode --kv-seq 4096 --heads 32 --kv-heads 8"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    from fatui.cli.options import add_workload_options

    parser.add_argument("preset", nargs="?", metavar="PRESET", help="explain a preset's cases")
    add_workload_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print a block for each case.

    Raises:
        UsageError: the request is wrong.
        NoBackendError: there is nothing to run on.
    """
    from attention.implementations import NAMES
    from attention.measure.device import probe
    from fatui.cli.options import given_values, parse_names, with_overrides
    from fatui.cli.output import show
    from fatui.storage.presets import load

    preset = load("quick" if arguments.preset is None else arguments.preset)
    cases = with_overrides(preset.cases, given_values(arguments))
    names = preset.implementations if arguments.preset else NAMES
    if arguments.impl is not None:
        names = parse_names(arguments.impl)
    device = probe()
    for case in cases:
        show(_explained(case, names, device), "")
        if "practical" in names and case.ranks == 1:
            show(_chosen(case, device), "")
    return cli.DONE


def _explained(case: "Workload", names: tuple[str, ...], device: "Device") -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    from fatui import formatting
    from fatui.report.table import FittedTable, short_name

    title = Text(case.label, style="bold")
    facts = f" · {formatting.flops(case.flops)} · {formatting.size(case.bytes_moved)} in and out"
    if sizes := formatting.kv_sizes(case):
        facts += f" · K/V {sizes}"
    title.append(f"{facts} · {formatting.size(device.available_bytes)} free", style="not bold dim")
    table = FittedTable("", "path", "kernel", dropped_first=("kernel", "memory"))
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for name in names:
        route = _route(name, case, device)
        kernel = KERNELS[route.fused if route.supported else None]
        style = "" if route.supported else "dim"
        needs = formatting.predicted_size(route)
        table.add_row(short_name(name), route.path, kernel, needs, _why(route, case, device), style=style)
    return Group(title, table)


def _chosen(case: "Workload", device: "Device") -> "RenderableType":
    """Render what `practical` chose, and why."""
    from rich.console import Group
    from rich.text import Text

    from attention.implementations.bounded.explain import explain
    from attention.implementations.bounded.implementation import Practical
    from fatui.report.table import FittedTable

    table = FittedTable(show_header=False)
    for number in range(3):
        table.add_column(no_wrap=number < 2, overflow="fold", style="dim" if number == 0 else "")
    for fact in explain(Practical(), case, device):
        table.add_row(fact.what, fact.value, fact.why)
    return Group(Text("what practical chose", style="dim"), table)


def _route(name: str, case: "Workload", device: "Device") -> "Route":
    from attention.core.errors import UsageError
    from attention.core.route import unsupported
    from attention.engine.ranks import route_here
    from attention.implementations import load_implementation

    try:
        return route_here(load_implementation(name), case, device)
    except UsageError:
        raise
    except Exception as error:
        return unsupported(f"not available: {type(error).__name__}: {error}")


def _why(route: "Route", case: "Workload", device: "Device") -> str:
    from fatui import formatting

    needed = case.input_bytes + (route.predicted_bytes or 0)
    if route.supported and needed > device.available_bytes:
        return (
            f"{route.reason}; will not fit: needs {formatting.size(needed)} of "
            f"{formatting.size(device.available_bytes)}"
        )
    return route.reason
