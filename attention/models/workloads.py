"""What a model is asked to do: generate from a prompt, or be fine-tuned. Importing this imports no MLX."""

import itertools
from collections.abc import Sequence
from typing import Any, Final, Literal

from msgspec import Struct

from attention.errors import UsageError, suggestion
from attention.workload import DTYPES, DType

Phase = Literal["prefill", "decode"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")
COMPARED: Final = ("baseline", "mlx", "practical", "poc", "demo")
"""The implementations that are put into models unless others are named."""
LARGEST: Final = {
    "batch": 4_096,
    "prompt": 1_048_576,
    "generate": 65_536,
    "seq": 1_048_576,
    "rank": 4_096,
    "iters": 1_000_000,
    "layers": 10_000,
    "tuned_layers": 10_000,
    "measured_layers": 10_000,
}
LEAST: Final = {"prompt": 2, "measured_layers": 2}
"""Where one is too few: a prompt's last token is a decode step, and two numbers of layers give a layer's time."""
OPTIONS: Final = {"measured_layers": "layers", "tuned_layers": "lora-layers"}
"""Where a field has another name for whoever gives it."""


class Generation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt taken in (prefill, to the first token), or tokens made one after another (decode).

    Raises:
        UsageError: naming every field that is wrong, what it got and what it takes.
    """

    model: str
    """A name from the configurations, or a folder of mlx-lm's."""
    phase: Phase
    prompt: int
    """Tokens of each sequence's prompt."""
    generate: int = 64
    """Tokens that one decode sample makes after the prompt."""
    batch: int = 1
    dtype: DType = "bfloat16"
    layers: int
    """Layers of the whole model."""
    measured_layers: int | None = None
    """Layers that run; None is all. With fewer, all figures are estimates of the whole model."""

    def __post_init__(self) -> None:
        """Checks all fields."""
        _check(self, ("prompt", "generate", "batch", "layers", "measured_layers"), self.dtype)

    @property
    def estimated(self) -> bool:
        """Whether fewer layers run than the model has."""
        return self.measured_layers is not None and self.measured_layers < self.layers

    @property
    def running_layers(self) -> int:
        """Layers that run."""
        return self.measured_layers or self.layers

    @property
    def tokens(self) -> int:
        """Tokens of one timed step: the whole prompts, or one token of each sequence."""
        return self.batch * (self.prompt if self.phase == "prefill" else 1)

    @property
    def label(self) -> str:
        """The case in a few words, as tables and logs show it."""
        work = str(self.prompt) if self.phase == "prefill" else f"{self.generate} at {self.prompt}"
        part = f", estimated from {self.measured_layers} of {self.layers} layers" if self.estimated else ""
        return f"{short_name(self.model)} {self.phase} {work} B={self.batch} {self.dtype}{part}"


def generations(
    layers: int, *, model: str, prompts: Sequence[int], batches: Sequence[int], **fields: Any
) -> tuple[Generation, ...]:
    """Both phases at every batch and prompt length.

    Raises:
        UsageError: with the mistakes of all of them, each told once.
    """
    if (fields.get("measured_layers") or 0) >= layers:
        fields["measured_layers"] = None
    cases: dict[Generation, None] = {}
    problems: dict[str, None] = {}
    for batch, prompt, phase in itertools.product(batches, prompts, PHASES):
        try:
            cases[Generation(model=model, phase=phase, prompt=prompt, batch=batch, layers=layers, **fields)] = None
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise UsageError(*problems)
    return tuple(cases)


class FineTuning(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA fine-tuning with mlx-lm's trainer.

    Raises:
        UsageError: naming every field that is wrong, what it got and what it takes.
    """

    model: str
    """A name from the configurations, or a folder of mlx-lm's."""
    seq: int = 512
    """Tokens of each sequence that are predicted."""
    batch: int = 4
    iters: int = 100
    rank: int = 8
    tuned_layers: int
    """The last layers of the model get LoRA weights; gradients go no further."""
    dtype: DType = "bfloat16"
    layers: int
    """Layers of the whole model."""
    data: str | None = None
    """A text file; None is the bundled text."""

    def __post_init__(self) -> None:
        """Checks all fields."""
        _check(self, ("seq", "batch", "iters", "rank", "tuned_layers", "layers"), self.dtype)

    @property
    def tokens(self) -> int:
        """Tokens of one iteration."""
        return self.batch * self.seq

    @property
    def label(self) -> str:
        """The case in a few words, as tables and logs show it."""
        return f"{short_name(self.model)} LoRA rank {self.rank} B={self.batch} L={self.seq} {self.dtype}"


def short_name(model: str) -> str:
    """A model's name: of a folder the last part."""
    return model.rstrip("/").rpartition("/")[2] or model


def _check(case: Generation | FineTuning, sizes: tuple[str, ...], dtype: str) -> None:
    problems = []
    for name in sizes:
        value: object = getattr(case, name)
        least, largest = LEAST.get(name, 1), LARGEST[name]
        if value is not None and (type(value) is not int or not least <= value <= largest):
            option = OPTIONS.get(name, name)
            problems.append(f"{option}: got {value!r}; it takes a whole number from {least} to {largest:,}")
    if dtype not in DTYPES:
        problems.append(f"dtype: got {dtype!r}; it takes {', '.join(DTYPES)}{suggestion(dtype, DTYPES)}")
    if problems:
        raise UsageError(*dict.fromkeys(problems))
