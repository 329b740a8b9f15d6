"""`fatui finetune`: LoRA fine-tuning with each implementation as the model's attention."""

import argparse
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from attention.core.plan import FineTuningPlan
    from attention.core.workload import FineTuning
    from fatui.cli.output import Export

SIZES: Final = ("iters", "seq", "batch", "rank")
EXAMPLE: Final = """examples:
  fatui finetune tiny-llama --iters 20 --seq 128
  fatui finetune tinyllama-1.1b --seq 1024 --json tuning.json
  fatui finetune ~/models/Qwen2.5-1.5B --data notes.txt --rank 16

Models without a folder have random weights and need no download: {models}.
mlx-lm's own trainer runs once for each implementation, from the same weights and on the same batches (`mlx` is mlx-lm
as it is, the others are patched in); the first one
then runs again, and what it differs from itself by is the noise floor. Losses that differ from the first one's by more
than rounding explains mark a row as inaccurate. The text is the Declaration of Independence unless --data gives one,
byte by byte where the weights are random. It needs mlx-lm: pip install 'fatui[models]'.
Exit codes: 0 done, 1 a row failed or is inaccurate, 2 wrong usage, 3 no backend or no mlx-lm, 130 interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    from attention.core.plan import FineTuningPlan
    from fatui.cli.options import DTYPE_HELP, add_limit_options, add_model_options
    from fatui.cli.output import add_export_options

    add_model_options(parser, EXAMPLE)
    parser.add_argument("--iters", metavar="N", default="100", help="iterations (100)")
    parser.add_argument("--seq", metavar="N", default="512", help="tokens of each sequence (512)")
    parser.add_argument("--batch", metavar="N", default="4", help="sequences of an iteration (4)")
    parser.add_argument("--rank", metavar="N", default="8", help="rank of the LoRA weights (8)")
    parser.add_argument("--lora-layers", metavar="N", default="16", help="the last layers are tuned (16, as mlx-lm)")
    parser.add_argument("--dtype", help=DTYPE_HELP)
    parser.add_argument("--data", metavar="FILE", help="a text file to learn")
    plan = FineTuningPlan(cases=())
    add_limit_options(parser, f"time limit of each fine-tuning ({plan.seconds:g})", plan.blas)
    add_export_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; return the exit code.

    Raises:
        UsageError: with every mistake in the request, before anything has run.
        NoBackendError: mlx-lm is not installed.
    """
    plan, exports = request(arguments)
    from fatui.cli.run import run_model_plan
    from fatui.reproduce import finetune_command

    return run_model_plan(arguments, plan, finetune_command(plan), exports)


def request(arguments: argparse.Namespace) -> "tuple[FineTuningPlan, list[Export]]":
    """Build the plan from the command line, and report all mistakes at once."""
    from attention.core.plan import FineTuningPlan
    from fatui.cli.options import model_plan

    return model_plan(arguments, FineTuningPlan, lambda: (_case(arguments),))


def _case(arguments: argparse.Namespace) -> "FineTuning":
    from attention.core.workload import FineTuning
    from attention.mlx_lm.configuration import find_model
    from attention.mlx_lm.text import read
    from fatui.cli.options import fetch_model, model_dtype, whole_numbers

    fetch_model(arguments, arguments.model)
    layers = find_model(arguments.model).layers
    read(arguments.data, "data")
    sizes = {name: whole_numbers(getattr(arguments, name), f"--{name}", single=True)[0] for name in SIZES}
    tuned = whole_numbers(arguments.lora_layers, "--lora-layers", single=True)[0]
    return FineTuning(
        model=arguments.model,
        layers=layers,
        tuned_layers=min(tuned, layers),
        dtype=model_dtype(arguments.dtype),  # type: ignore[arg-type]  # checked as it is made
        data=arguments.data,
        **sizes,
    )
