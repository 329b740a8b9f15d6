"""`fatui model`: generation with a whole model, with each implementation as its attention."""

import argparse
from typing import TYPE_CHECKING, Any, Final

from attention.core.kv_format import DENSE

if TYPE_CHECKING:
    from attention.core.plan import GenerationPlan
    from fatui.cli.output import Export

PROMPTS: Final = "512"
GENERATE: Final = "64"
KV_HELP: Final = (
    "formats of the cache: int8, int4, int8+int4, mxfp4 and others of `fatui bench`; none: not quantized (none)"
)
EXAMPLE: Final = """examples:
  fatui model tinyllama-1.1b --prompt 512,2048
  fatui model llama-7b-like --layers 4 --impl baseline,practical
  fatui model ~/models/Qwen2.5-1.5B --json qwen.json
  fatui model mlx-community/Qwen2.5-1.5B-Instruct-bf16
  fatui model tinyllama-1.1b --layers 4 --prompt 2048 --kv-format none,int8,int4
  fatui model tinyllama-1.1b --prompt 8192 --ranks 2

These models have random weights and need no download: {models}.
ORG/NAME is downloaded once from Hugging Face's hub, as mlx-lm does it, into the hub's cache.
Prefill is the time from the prompt to the first token, in steps of 2048 tokens as mlx-lm takes them; decode makes
tokens one after another. `mlx` is mlx-lm as it is; the others are patched in, and pay for that. The attention share
is the share of the model's time that is saved, in the same rounds, when attention returns its query unchanged.
With a quantized cache `mlx` is mlx-lm's own quantized attention, the K/V speedup is over the same implementation with
an unquantized cache, and KL the divergence (in nats) of the next token's distribution from that with one.
With --layers fewer layers run, in two numbers, and the whole model is estimated from them; the table says so.
It needs mlx-lm: pip install 'fatui[models]'.
Exit codes: 0 done, 1 a case failed or is inaccurate, 2 wrong usage, 3 no backend or no mlx-lm, 130 interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    from attention.core.plan import GenerationPlan
    from fatui.cli.options import DTYPE_HELP, add_host_options, add_limit_options, add_model_options
    from fatui.cli.output import add_export_options

    add_model_options(parser, EXAMPLE)
    parser.add_argument("--prompt", metavar="A,B", default=PROMPTS, help=f"tokens of each prompt ({PROMPTS})")
    parser.add_argument("--generate", metavar="N", default=GENERATE, help=f"tokens of a decode sample ({GENERATE})")
    parser.add_argument("--batch", metavar="A,B", default="1", help="sequences at once (1)")
    parser.add_argument("--layers", metavar="N", help="run only N layers, at least 2, and estimate the whole model")
    parser.add_argument("--dtype", help=DTYPE_HELP)
    parser.add_argument("--ranks", metavar="N", help="devices among which the sequence is divided (1)")
    parser.add_argument("--kv-format", metavar="A,B", default=DENSE, help=KV_HELP)
    plan = GenerationPlan(cases=())
    add_limit_options(parser, f"time for the rounds of one phase at one prompt length ({plan.seconds:g})", plan.blas)
    add_host_options(parser)
    add_export_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit code.

    Raises:
        UsageError: with every mistake in the request, before anything has run.
        NoBackendError: mlx-lm is not installed.
    """
    plan, exports = request(arguments)
    from fatui.cli.run import run_model_plan
    from fatui.reproduce import model_command

    return run_model_plan(arguments, plan, model_command(plan), exports)


def request(arguments: argparse.Namespace) -> "tuple[GenerationPlan, list[Export]]":
    """Build the plan from the command line, and report all mistakes at once."""
    from attention.core.plan import GenerationPlan
    from fatui.cli.options import model_plan

    return model_plan(arguments, GenerationPlan, lambda: _cases(arguments))


def _ranks(arguments: argparse.Namespace) -> int:
    """Return the number of ranks: as given, or one for each host."""
    from fatui.cli.options import ranks_of_hosts, whole_numbers

    if arguments.ranks is not None:
        return whole_numbers(arguments.ranks, "--ranks", single=True)[0]
    return int(ranks_of_hosts(arguments).get("ranks", [1])[0])


def _cases(arguments: argparse.Namespace) -> tuple[Any, ...]:
    from attention.core.workload import generations
    from attention.mlx_lm.configuration import find_model
    from fatui.cli.options import MAX_SHOWN, fetch_model, model_dtype, whole_numbers

    fetch_model(arguments, arguments.model)
    configuration, layers = find_model(arguments.model), arguments.layers
    formats = [part.strip()[:MAX_SHOWN] for part in arguments.kv_format.split(",")]
    cases = generations(
        configuration.layers,
        model=arguments.model,
        kv_formats=formats,
        prompts=whole_numbers(arguments.prompt, "--prompt"),
        batches=whole_numbers(arguments.batch, "--batch"),
        generate=whole_numbers(arguments.generate, "--generate", single=True)[0],
        measured_layers=None if layers is None else whole_numbers(layers, "--layers", single=True)[0],
        dtype=model_dtype(arguments.dtype),
        ranks=_ranks(arguments),
    )
    for case in cases:
        configuration.check_kv_format(case.kv_format)
    return cases
