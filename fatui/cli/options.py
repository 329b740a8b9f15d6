"""Options shared by commands: workloads, of which several values make a sweep, and the options of a run."""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import structs

from attention.core.errors import UsageError
from attention.core.plan import MAX_CASES, MODEL_IMPLEMENTATIONS, FineTuningPlan, GenerationPlan, RunOptions
from attention.core.workload import MAX_SIZES, Workload
from fatui.quantities import parse_number, parse_size
from fatui.storage.presets import (
    FIELDS,
    MAX_SECONDS,
    MIN_SECONDS,
    check_blas,
    check_names,
    given_fields,
    number_between,
    workloads,
)

if TYPE_CHECKING:
    from attention.core.plan import Blas
    from fatui.cli.output import Export
    from fatui.remote import Remote


Values = dict[str, list[Any]]
HELP: Final = {
    "batch": "independent sequences",
    "seq": "query rows of each sequence; in a decode pass the length of the cache",
    "kv_seq": "keys of each sequence (as seq, unless given)",
    "heads": "query heads",
    "kv_heads": "key and value heads, a divisor of heads (as heads, unless given)",
    "head_dim": "width of a query and of a key",
    "value_dim": "width of a value (as head-dim, unless given)",
    "ranks": "processes, each with its own device, among which a call is divided (1)",
    "dtype": "float32, float16 or bfloat16",
    "kv_format": "none, int8, int4 and others of mx.quantize; int4:32 has groups of 32, int8+int4 int8 K and int4 V",
    "mask": "none, causal, window:N, documents:N, prefix:N, strided:N,S, blocks:DENSITY, or several joined by +; "
    "blocks:0.5,0.25 is two masks",
    "pass": "forward, training or decode",
}
MAX_SHOWN: Final = 80
BLAS_HELP: Final = (
    "what multiplies float32 matrices on a CPU: MLX as shipped, or numpy's OpenBLAS in place of a reference BLAS"
)
DTYPE_HELP: Final = "float32, float16 or bfloat16 (bfloat16; on a CPU float32)"


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per workload field, and --impl."""
    group = parser.add_argument_group("workload", "each takes one value, or several with commas: a sweep; 4k is 4096")
    for name in FIELDS:
        group.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", metavar="A,B", help=HELP[name])
    parser.add_argument("--impl", metavar="A,B", help="implementations: names, or FILE.py:CLASS for one of your own")


def given_values(arguments: argparse.Namespace) -> Values:
    """Return the fields given on the command line, each with its values."""
    texts = {name: getattr(arguments, f"field_{name}") for name in FIELDS}
    return {name: _values(text, name) for name, text in texts.items() if text is not None}


def _values(text: str, name: str) -> list[Any]:
    if name == "mask":
        return [_clipped(mask) for mask in split_masks(text)]
    return [_number_or_text(part.strip(), name) for part in text.split(",")]


def split_masks(text: str) -> list[str]:
    """Split masks at commas: blocks:0.5,0.25 is two masks, strided:256,4 one, and window:8,strided:9,2,causal three."""
    masks: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        before = masks[-1] if masks else ""
        own, colon, argument = before.rpartition(":")
        if not part[:1].isdigit() or not colon:
            masks.append(part)
        elif own.rpartition("+")[2] == "strided" and "," not in argument:
            masks[-1] = f"{before},{part}"
        else:
            masks.append(f"{own}:{part}")
    return masks


def _clipped(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _number_or_text(text: str, name: str) -> int | str:
    shown = _clipped(text)
    try:
        if name in MAX_SIZES and text[-1:].lower() in ("k", "m"):
            return parse_number(text, MAX_SIZES[name])  # 4k, as the app's sliders take it
        return int(text) if len(text) <= MAX_SHOWN and text.isascii() else shown
    except ValueError:
        return shown


def with_overrides(cases: Sequence[Workload], values: Values) -> tuple[Workload, ...]:
    """Return a preset's cases with the given fields overridden.

    Raises:
        UsageError: with the mistakes of all combinations, each once.
    """
    if not values:
        return tuple(cases)
    made: dict[Workload, None] = {}
    problems: dict[str, None] = {}
    for case in cases:
        try:
            made.update(dict.fromkeys(_one_overridden(case, values)))
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise UsageError(*problems)
    if len(made) > MAX_CASES:
        raise UsageError(f"the options make {len(made):,} cases; at most {MAX_CASES:,} are taken")
    return tuple(made)


def _one_overridden(case: Workload, values: Values) -> tuple[Workload, ...]:
    base = given_fields(case)
    if case.pass_ == "decode" and ("seq" in values or "pass" in values):
        base["seq"] = base.pop("kv_seq")  # the length of the cache, under the name that all passes use
    if "kv_seq" in values and values.get("pass", [base["pass"]]) == ["decode"] and "seq" not in values:
        base.pop("seq", None)
    count = math.prod(len(several) for several in values.values())
    if count > MAX_CASES:
        raise UsageError(f"the options make {count:,} cases of each of the preset's; at most {MAX_CASES:,} are taken")
    single = {name: several[0] for name, several in values.items() if len(several) == 1}
    return workloads({**base, **single}, {name: several for name, several in values.items() if len(several) > 1})


T = TypeVar("T")
P = TypeVar("P", bound=RunOptions)
M = TypeVar("M", GenerationPlan, FineTuningPlan)


class Problems:
    """Collector of usage errors, to report them together."""

    def __init__(self) -> None:
        self._problems: list[str] = []

    def catch(self, read: Callable[[], T]) -> T | None:
        """Return the result of `read`, or record its usage error and return None."""
        try:
            return read()
        except UsageError as error:
            self._problems.extend(error.problems)
            return None

    def raise_all(self) -> None:
        """Raise one UsageError with all problems, if there are any."""
        if self._problems:
            raise UsageError(*self._problems)


def add_limit_options(parser: argparse.ArgumentParser, seconds: str, blas: "Blas") -> None:
    """Add --seconds, --memory-limit, --blas and --force.

    Args:
        parser: the parser to extend.
        seconds: help text of --seconds.
        blas: the default of --blas.
    """
    parser.add_argument("--seconds", metavar="S", help=seconds)
    parser.add_argument("--memory-limit", metavar="SIZE", help="refuse cases that need more memory, such as 8GiB")
    parser.add_argument("--blas", metavar="mlx|numpy", help=f"{BLAS_HELP} ({blas})")
    parser.add_argument("--force", action="store_true", help="also run cases predicted not to fit in memory")


def add_host_options(parser: argparse.ArgumentParser) -> None:
    """Add --hosts and --hostfile."""
    parser.add_argument(
        "--hosts", metavar="A,B", help="machines for the ranks: names for ssh, HOST or HOST:PORT (this machine alone)"
    )
    parser.add_argument("--hostfile", metavar="FILE", help="the machines as a hostfile of mlx.launch")


def ranks_of_hosts(arguments: argparse.Namespace) -> Values:
    """Return a rank for each host given on the command line, as a field's value; empty without valid hosts."""
    from fatui.rank_launch import hosts_of

    try:
        hosts = hosts_of(override_hosts(RunOptions(), arguments))
    except UsageError:  # reported with the other options
        return {}
    return {"ranks": [len(hosts.hosts)]} if hosts else {}


def override_hosts(defaults: P, arguments: argparse.Namespace) -> P:
    """Return options with the hosts given on the command line, which replace those of the defaults."""
    hosts: str | None = getattr(arguments, "hosts", None)
    hostfile: str | None = getattr(arguments, "hostfile", None)
    if hosts is None and hostfile is None:
        return defaults
    names = tuple(part.strip() for part in hosts.split(",")) if hosts is not None else ()
    return structs.replace(defaults, hosts=names, hostfile=hostfile)


def override_options(defaults: P, arguments: argparse.Namespace, problems: Problems) -> P:
    """Return the options of a run as given on the command line, and otherwise as in the defaults.

    Args:
        defaults: a plan, or only its options.
        arguments: the parsed command line with --impl, --seconds, --memory-limit, --blas and --force.
        problems: collects what is wrong with them.
    """
    from fatui.rank_launch import hosts_of

    defaults = override_hosts(defaults, arguments)
    problems.catch(lambda: hosts_of(defaults))
    given: dict[str, Any] = {"force": arguments.force}
    if arguments.impl is not None:
        given["implementations"] = problems.catch(lambda: parse_names(arguments.impl))
    if arguments.seconds is not None:
        given["seconds"] = problems.catch(lambda: parse_seconds(arguments.seconds, MIN_SECONDS, MAX_SECONDS))
    if arguments.memory_limit is not None:
        given["memory_limit_bytes"] = problems.catch(lambda: parse_size(arguments.memory_limit, "--memory-limit"))
    if arguments.blas is not None:
        given["blas"] = problems.catch(lambda: check_blas(arguments.blas, "--blas"))
    return structs.replace(defaults, **given)


def parse_names(text: str) -> tuple[str, ...]:
    """Parse the value of --impl.

    Raises:
        UsageError: with one problem for each unknown name.
    """
    return check_names([part.strip() for part in text.split(",")])


def parse_seconds(text: str, least: float, most: float) -> float:
    """Parse the value of --seconds.

    Raises:
        UsageError: the text is not a number, or outside the accepted range.
    """
    try:
        value: object = float(text)
    except ValueError:
        value = text
    return number_between(value, "--seconds", least, most)


def add_model_options(parser: argparse.ArgumentParser, example: str) -> None:
    """Add what commands on whole models have in common: the examples, the model and the implementations."""
    from attention.mlx_lm.configuration import bundled_names

    parser.epilog = example.format(models=", ".join(bundled_names()))
    what = "one of the models named below, ORG/NAME of Hugging Face's hub, or an mlx-lm folder"
    parser.add_argument("model", metavar="NAME|ORG/NAME|PATH", help=what)
    parser.add_argument("--impl", metavar="A,B", help=f"implementations ({','.join(MODEL_IMPLEMENTATIONS)})")


def fetch_model(arguments: argparse.Namespace, model: str) -> None:
    """Download a model named as on the hub, unless it is in its cache; for a run on another machine its shapes alone.

    Raises:
        UsageError: there is none, or the hub cannot be reached.
        NoBackendError: mlx-lm is not installed.
    """
    from attention.mlx_lm import hub
    from attention.mlx_lm.configuration import check_mlx_lm
    from fatui import cli

    if not hub.is_hub_name(model):
        return
    there = given_remote(arguments) is not None
    if hub.cached_folder(model, hub.CONFIGURATION if there else hub.NEEDED) is None:
        if not there:
            check_mlx_lm()
        cli.print_line(f"looking for '{model}' on the hub")
        hub.download(model, only_configuration=there)


def model_plan(
    arguments: argparse.Namespace, kind: type[M], read_cases: Callable[[], Sequence[Any]]
) -> "tuple[M, list[Export]]":
    """Build the plan of a command that measures models, and report all mistakes at once.

    Args:
        arguments: the parsed command line.
        kind: the type of the plan.
        read_cases: builds the cases from the command line.

    Raises:
        UsageError: with every mistake.
    """
    from fatui.cli.output import requested_exports

    mistakes = Problems()
    cases = mistakes.catch(read_cases)
    plan = override_options(kind(cases=tuple(cases or ())), arguments, mistakes)
    exports = mistakes.catch(lambda: requested_exports(arguments))
    mistakes.raise_all()
    return plan, exports or []


def given_remote(arguments: argparse.Namespace) -> "Remote | None":
    """Return the machine that runs the command, as `fatui remote` sets it; None for this one."""
    return getattr(arguments, "remote", None)


def model_dtype(given: str | None, on_cpu: bool | None = None) -> str:
    """Return the dtype of a model's weights: as given, or by default the one that its products are fast in.

    Args:
        given: the dtype of the command line.
        on_cpu: whether MLX computes on the CPU; None: as on this machine.
    """
    from attention.measure.device import computes_on_cpu

    if given is not None:
        return given
    return "float32" if (computes_on_cpu() if on_cpu is None else on_cpu) else "bfloat16"


def print_dtype_reason(given: str | None) -> None:
    """Print why the default of `model_dtype` is float32, if it is and no dtype was given."""
    from fatui import cli
    from fatui.formatting import CPU_DTYPE_REASON

    if given is None and model_dtype(None) == "float32":
        cli.print_line(f"{CPU_DTYPE_REASON} (--dtype bfloat16 selects it)")


def whole_numbers(text: str, option: str, *, single: bool = False) -> list[int]:
    """Parse the comma-separated whole numbers of an option.

    Args:
        text: the option's value.
        option: the option's name, for the error message about a text; the range of a number is for its user to check.
        single: whether exactly one number is accepted.

    Raises:
        UsageError: a part is not a whole number, or there are several where one is accepted.
    """
    parts = [part.strip() for part in text.split(",")]
    digits = [part.removeprefix("-") for part in parts]
    wrong = [part for part in digits if not (part.isascii() and part.isdigit() and len(part) < 12)]
    if wrong or (single and len(parts) > 1):
        takes = "one whole number" if single else "comma-separated whole numbers"
        raise UsageError(f"{option}: got '{text[:40]}'; it takes {takes}")
    return [int(part) for part in parts]
