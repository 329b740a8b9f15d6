"""`fatui stream`: a stream of tokens through a bounded cache, beside full attention."""

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from attention.core.stream import ATTENTION_ROWS, SHAPE, STREAM_ROWS, Stream

if TYPE_CHECKING:
    from attention.core.plan import StreamPlan
    from fatui.cli.output import Export

SIZES: Final = ("tokens", "window", "first", "chunk")
EXAMPLE: Final = """examples:
  fatui stream --tokens 1000000
  fatui stream --heads 32 --kv-heads 8 --head-dim 128 --window 4096 --kv-format int4 --json stream.json
  fatui stream tiny-llama --tokens 4000 --window 252
  fatui stream ~/models/tiny --text book.txt --rows full,recomputed,window,streaming

Without a model: one attention call per token, on random inputs, of the shape that the options give, or of a preset's
first case. With one of the models named below (random weights), ORG/NAME of Hugging Face's hub, or an mlx-lm folder:
the model's time per token and its loss on a text, token after token.
{rows}
Full attention is measured as far as time and memory allow, and extrapolated beyond; the results say from where.
A stream ends at --tokens or --seconds; ctrl+c keeps what was measured. Models need mlx-lm: pip install 'fatui[models]'.
Models: {models}.
Exit codes: 0 done, 1 a row failed, 2 wrong usage, 3 no backend or no mlx-lm, 130 interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    from attention.core.plan import StreamPlan
    from attention.mlx_lm.configuration import bundled_names
    from fatui.cli.options import HELP, add_limit_options
    from fatui.cli.output import add_export_options

    width = max(map(len, STREAM_ROWS))
    rows = "\n".join(f"  {name:<{width}}  {words}" for name, words in STREAM_ROWS.items())
    parser.epilog = EXAMPLE.format(models=", ".join(bundled_names()), rows=f"Rows:\n{rows}")
    parser.add_argument("name", nargs="?", metavar="MODEL|PRESET", help="a model, an mlx-lm folder, or a preset")
    given: Any = {field.name: field.default for field in _fields()}
    parser.add_argument("--tokens", metavar="N", help=f"tokens of the stream ({given['tokens']:,})")
    parser.add_argument("--window", metavar="N", help=f"last tokens that are kept ({given['window']:,})")
    parser.add_argument("--first", metavar="N", help=f"first tokens that are kept beside them ({given['first']})")
    parser.add_argument("--chunk", metavar="N", help=f"tokens given at once ({given['chunk']})")
    for name in SHAPE:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="N", help=f"{HELP[name]}; without a model")
    parser.add_argument("--dtype", help=f"{HELP['dtype']} ({given['dtype']})")
    parser.add_argument("--kv-format", metavar="A", help="format of the kept keys and values: int8, int4, ... (none)")
    parser.add_argument("--text", metavar="FILE", help="the text of a model's stream, repeated if it is too short")
    both = f"{','.join(ATTENTION_ROWS)}; with a model {','.join(STREAM_ROWS)}"
    parser.add_argument("--rows", metavar="A,B", help=f"what is measured ({both})")
    plan = StreamPlan(cases=())
    add_limit_options(parser, f"time limit of each row ({plan.seconds:g})", plan.blas)
    add_export_options(parser)


def _fields() -> Any:
    import msgspec

    return msgspec.structs.fields(Stream)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit code.

    Raises:
        UsageError: with every mistake in the request, before anything has run.
        NoBackendError: a model is given, and mlx-lm is not installed.
    """
    plan, exports, preset = request(arguments)
    from fatui.cli.options import given_remote

    remote = given_remote(arguments)
    if plan.cases[0].model and remote is None:
        from attention.mlx_lm.configuration import check_mlx_lm

        check_mlx_lm()
    from fatui.cli.run import run_plan
    from fatui.reproduce import stream_command

    return run_plan(plan, stream_command(plan), preset, exports, remote)


def request(arguments: argparse.Namespace) -> "tuple[StreamPlan, list[Export], str | None]":
    """Build the plan from the command line, and report all mistakes at once."""
    from attention.core.plan import StreamPlan
    from fatui.cli.options import Problems, override_options
    from fatui.cli.output import requested_exports

    mistakes = Problems()
    arguments.impl = None
    source = mistakes.catch(lambda: _source(arguments)) or {}
    preset = source.pop("preset", None)
    case = mistakes.catch(lambda: _case(arguments, source))
    rows = mistakes.catch(lambda: _rows(arguments.rows, source.get("model")))
    plan = StreamPlan(cases=(case,) if case else (), implementations=rows or ())
    plan = override_options(plan, arguments, mistakes)
    exports = mistakes.catch(lambda: requested_exports(arguments))
    mistakes.raise_all()
    return plan, exports or [], preset


def _source(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that a model, or the first case of a preset, gives to a stream.

    Raises:
        UsageError: it is neither.
    """
    name: str | None = arguments.name
    if name is None:
        return {}
    from attention.core.errors import UsageError
    from attention.core.files import expand_home
    from attention.mlx_lm.configuration import bundled_names, find_model
    from attention.mlx_lm.hub import is_hub_name
    from fatui.cli.options import fetch_model
    from fatui.storage.presets import load

    named = is_hub_name(name) and not name.endswith(".toml")
    if named:
        fetch_model(arguments, name)
    if named or name in bundled_names() or expand_home(name).is_dir():
        found = find_model(name)
        return {"model": name, "heads": found.heads, "kv_heads": found.kv_heads, "head_dim": found.head_dim}
    try:
        loaded = load(name)
    except UsageError as error:
        text = f"neither a model ({', '.join(bundled_names())}, ORG/NAME of the hub, or an mlx-lm folder) nor a preset"
        raise UsageError(f"'{name[:80]}': {text}: {error.problems[0]}") from error
    first = loaded.cases[0]
    fields: dict[str, Any] = {name: getattr(first, name) for name in (*SHAPE, "dtype", "kv_format")}
    return {**fields, **({"window": first.window} if first.window else {}), "preset": loaded.name}


def _case(arguments: argparse.Namespace, source: dict[str, Any]) -> Stream:
    from fatui.cli.options import Problems

    mistakes = Problems()
    given: dict[str, Any] = dict(source)
    for name in (*SIZES, *SHAPE):
        if getattr(arguments, name) is not None:
            given[name] = mistakes.catch(partial(_number, arguments, name))
    if source.get("model"):
        taken = [f"--{name.replace('_', '-')}" for name in SHAPE if getattr(arguments, name) is not None]
        mistakes.catch(lambda: _refuse(taken, "the model has its own"))
        mistakes.catch(lambda: _check_text(arguments.text))
    elif arguments.text is not None:
        mistakes.catch(lambda: _refuse(["--text"], "there is no model to read it"))
    mistakes.raise_all()
    for name in ("dtype", "kv_format"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)[:80]
    if arguments.text is not None:
        given["text"] = arguments.text
    if "heads" in given and "kv_heads" in given and arguments.heads and not arguments.kv_heads:
        given["kv_heads"] = 0  # those of the preset need not divide the heads given
    return Stream(**given)


def _number(arguments: argparse.Namespace, name: str) -> int:
    from fatui.cli.options import whole_numbers

    return whole_numbers(getattr(arguments, name), f"--{name.replace('_', '-')}", single=True)[0]


def _refuse(options: list[str], why: str) -> None:
    from attention.core.errors import UsageError

    if options:
        raise UsageError(f"{', '.join(options)}: not taken here; {why}")


def _check_text(path: str | None) -> None:
    from attention.mlx_lm.text import read

    read(path, "text")


def _rows(text: str | None, model: str | None) -> tuple[str, ...]:
    """Parse the value of --rows.

    Raises:
        UsageError: a name is unknown, or needs a model.
    """
    from attention.core.errors import UsageError, suggestion

    known = tuple(STREAM_ROWS) if model else ATTENTION_ROWS
    if text is None:
        return known
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    without = "" if model else " without a model"
    problems = [
        f"--rows: got '{name[:40]}'; it takes {', '.join(known)}{without}{suggestion(name, known)}"
        for name in names
        if name not in known
    ]
    if problems:
        raise UsageError(*problems)
    return names
