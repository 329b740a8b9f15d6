"""An attention shape, with its FLOPs, bytes and number of unmasked pairs."""

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, Literal, cast

from msgspec import Struct, structs

from attention.core.errors import UsageError, suggestion
from attention.core.kv_format import DENSE, parse_kv_format
from attention.core.mask_text import MaskSpec, parse_mask, visible_pairs

DType = Literal["float32", "float16", "bfloat16"]
Pass = Literal["forward", "training", "decode"]
Counterpart = Literal["dense", "unquantized", "one_device"]

DTYPES: Final[tuple[DType, ...]] = ("float32", "float16", "bfloat16")
PASSES: Final[tuple[Pass, ...]] = ("forward", "training", "decode")
COUNTERPARTS: Final[dict[Counterpart, str]] = {
    "dense": "with every pair visible",
    "unquantized": "with unquantized keys and values",
    "one_device": "on one device",
}
"""What differs in a case's counterpart, in words."""
ITEM_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}
MAX_SIZES: Final = {
    "batch": 65_536,
    "seq": 16_777_216,
    "kv_seq": 16_777_216,
    "heads": 4_096,
    "kv_heads": 4_096,
    "head_dim": 4_096,
    "value_dim": 4_096,
    "ranks": 64,
}
SEQ: Final = 512
DEFAULTS_FROM: Final = {"kv_seq": "seq", "kv_heads": "heads", "value_dim": "head_dim"}
_DEFAULTED: Any = None  # resolved from another field, as DEFAULTS_FROM says, when the workload is made


class Workload(Struct, frozen=True, kw_only=True, rename={"pass_": "pass"}, forbid_unknown_fields=True):
    """An attention call: query (batch, heads, seq, head_dim), key (batch, kv_heads, kv_seq, head_dim),
    value (batch, kv_heads, kv_seq, value_dim), output (batch, heads, seq, value_dim).

    In a decode pass one new token a sequence attends to a cache of kv_seq keys; a seq without kv_seq
    is then the length of that cache, and `seq` becomes 1.

    Raises:
        UsageError: names every invalid field, its value and what is accepted.
    """

    batch: int = 1
    """Independent sequences."""
    seq: int = _DEFAULTED
    """Query rows of each sequence; 512 by default."""
    kv_seq: int = _DEFAULTED
    """Keys of each sequence; seq by default."""
    heads: int = 8
    """Query heads."""
    kv_heads: int = _DEFAULTED
    """Key and value heads, a divisor of heads; heads by default."""
    head_dim: int = 64
    """Width of a query and of a key."""
    value_dim: int = _DEFAULTED
    """Width of a value; head_dim by default."""
    dtype: DType = "float16"
    """Type of inputs and outputs."""
    mask: str = "none"
    """The visible pairs: "none", "causal", "prefix:256+window:1024", "blocks:0.1" and others of `core.mask_text`."""
    pass_: Pass = "forward"
    """"forward", "training" (forward and backward) or "decode"."""
    kv_format: str = DENSE
    """How key and value are quantized: "none", "int8", "int4:32", "int8+int4", "mxfp4"; see `core.kv_format`."""
    ranks: int = 1
    """Processes, each with a device of its own, among which the call is divided."""

    def __post_init__(self) -> None:
        """Resolve the defaulted fields, then validate all fields."""
        problems = self._become_decode() if self.pass_ == "decode" else []
        if cast("int | None", self.seq) is None:
            structs.force_setattr(self, "seq", SEQ)
        for name, source in DEFAULTS_FROM.items():
            if getattr(self, name) is None:
                structs.force_setattr(self, name, getattr(self, source))
        problems += [*_size_problems(self), *_choice_problems(self)]
        try:
            structs.force_setattr(self, "mask", parse_mask(self.mask).text)
        except UsageError as error:
            problems.extend(error.problems)
        problems.extend(self._resolve_format(sizes_known=not problems))
        if problems:
            raise UsageError(*problems)

    def _resolve_format(self, *, sizes_known: bool) -> list[str]:
        """Write the format of keys and values as its canonical text; return what is wrong with it."""
        try:
            formats = parse_kv_format(str(self.kv_format))  # a preset may hold a number
        except UsageError as error:
            return [f"kv_format: {problem.removeprefix('format: ')}" for problem in error.problems]
        if formats is None:
            return []
        structs.force_setattr(self, "kv_format", formats.text)
        if self.pass_ == "training":
            return [f"kv_format: got {formats.text} in a training pass, which has gradients of both; it takes none"]
        if not sizes_known:
            return []
        widths = {"head_dim": (self.head_dim, formats.key), "value_dim": (self.value_dim, formats.value)}
        problems = {
            f"{name}: got {width}; {problem}": None
            for name, (width, form) in widths.items()
            if (problem := form.width_problem(width))
        }
        return list(problems)[: 1 if self.value_dim == self.head_dim else 2]

    def _become_decode(self) -> list[str]:
        """Use a seq without kv_seq as the length of the cache, with a query of one row; return what is wrong."""
        seq, kv_seq = cast("int | None", self.seq), cast("int | None", self.kv_seq)
        if kv_seq is None:
            structs.force_setattr(self, "kv_seq", SEQ if seq is None else seq)
        structs.force_setattr(self, "seq", 1)
        if kv_seq is None or seq in (None, 1, kv_seq):
            return []
        return [f"seq: got {seq}; a decode pass has one query a sequence: seq 1, or kv_seq alone"]

    @property
    def quantized(self) -> bool:
        """Whether key and value are quantized."""
        return self.kv_format != DENSE

    @property
    def mask_spec(self) -> MaskSpec:
        """The parts of the mask."""
        return parse_mask(self.mask)

    @property
    def structured(self) -> bool:
        """Whether the mask is more than the bounds of a causal mask or of a window."""
        return self.mask_spec.structured

    @property
    def window(self) -> int | None:
        """Number of keys in a query's window; None without a window, and for a structured mask."""
        spec = self.mask_spec
        return None if spec.structured else spec.window

    @property
    def causal(self) -> bool:
        """Whether the mask is causal or a window: no key after the query's position; False for a structured mask."""
        spec = self.mask_spec
        return not spec.structured and (spec.causal or spec.window is not None)

    @property
    def counterparts(self) -> "Mapping[Counterpart, Workload]":
        """What the case is compared with: every pair visible (of a mask or window), K and V in the query's dtype.

        On several ranks it is the same call on one device alone.
        """
        return _counterparts(self)

    @property
    def scale(self) -> float:
        """Factor of the scores: 1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)

    @property
    def label(self) -> str:
        """The shape in a few words, for tables and logs."""
        seq = str(self.seq) if self.seq == self.kv_seq else f"{self.seq}x{self.kv_seq}"
        dim = str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        mask = "" if self.mask == "none" else f" {self.mask}"
        work = "" if self.pass_ == "forward" else f" {self.pass_}"
        form = "" if self.kv_format == DENSE else f" K/V {self.kv_format}"
        ranks = "" if self.ranks == 1 else f" on {self.ranks} ranks"
        return f"B={self.batch} L={seq} D={dim} H={heads} {self.dtype}{form}{mask}{work}{ranks}"

    @property
    def tokens(self) -> int:
        """Tokens produced by one call: batch x seq, or batch in a decode pass."""
        return self.batch * self.seq

    @property
    def pairs(self) -> int:
        """Exact number of visible (query, key) pairs of one call, over all sequences and heads."""
        return self.batch * visible_pairs(self.mask_spec, self.seq, self.kv_seq, self.heads)

    @property
    def density(self) -> float:
        """Share of the pairs that are visible."""
        return self.pairs / self.scores

    @property
    def flops(self) -> int:
        """Multiplications and additions of the matrix products of one call.

        Forward 2 P (D + Dv), as FlashAttention counts them, with P the exact number of visible pairs.
        A backward pass recomputes the scores and makes dP, dQ, dK and dV: 2 P (3 D + 2 Dv).
        """
        width = self.head_dim + self.value_dim
        if self.pass_ == "training":
            width += 3 * self.head_dim + 2 * self.value_dim
        return 2 * self.pairs * width

    @property
    def query_bytes(self) -> int:
        """Bytes of the query."""
        return self.batch * self.heads * self.seq * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def key_value_bytes(self) -> int:
        """Bytes of the key and the value together; shared heads count once."""
        return self.batch * self.kv_seq * self.kv_token_bytes

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of the keys and values of one token, scales and biases included."""
        item, formats = ITEM_BYTES[self.dtype], parse_kv_format(self.kv_format)
        if formats is None:
            return self.kv_heads * (self.head_dim + self.value_dim) * item
        rows = formats.key.row_bytes(self.head_dim, item) + formats.value.row_bytes(self.value_dim, item)
        return self.kv_heads * rows

    @property
    def value_bits(self) -> float:
        """Bits of one value of keys and values, with its share of scales and biases."""
        return 8 * self.kv_token_bytes / (self.kv_heads * (self.head_dim + self.value_dim))

    @property
    def result_bytes(self) -> int:
        """Bytes of one attention output."""
        return self.batch * self.heads * self.seq * self.value_dim * ITEM_BYTES[self.dtype]

    @property
    def input_bytes(self) -> int:
        """Bytes of a call's inputs: query, key, value, and in training the output's gradient."""
        gradient = self.result_bytes if self.pass_ == "training" else 0
        return self.query_bytes + self.key_value_bytes + gradient

    @property
    def held_bytes(self) -> int:
        """Bytes of a measured case's inputs on one device.

        Quantized keys and values are kept beside those they were made from, a rank's part beside the whole.
        """
        before = self.counterparts.get("unquantized")
        part = self.input_bytes // self.ranks if self.ranks > 1 else 0
        return self.input_bytes + part + (before.key_value_bytes if before else 0)

    @property
    def output_bytes(self) -> int:
        """Bytes of a call's outputs: the output, and in training the gradients of query, key and value."""
        gradients = self.query_bytes + self.key_value_bytes if self.pass_ == "training" else 0
        return self.result_bytes + gradients

    @property
    def bytes_moved(self) -> int:
        """Minimum bytes moved by a fused kernel: every input read once, every output written once."""
        return self.input_bytes + self.output_bytes

    @property
    def scores(self) -> int:
        """Entries of the score matrix, batch x heads x seq x kv_seq, which an unfused path materialises."""
        return self.batch * self.heads * self.seq * self.kv_seq


AXES: Final = (
    *("batch", "seq", "kv_seq", "heads", "kv_heads", "head_dim", "ranks", "dtype", "kv_format", "mask", "pass_"),
)
"""The fields over which runs sweep."""


def swept_axes(workloads: Sequence[Workload]) -> tuple[str, ...]:
    """Return the axes on which workloads differ, without those that only follow another."""
    columns = {axis: [getattr(workload, axis) for workload in workloads] for axis in AXES}
    axes = [axis for axis in AXES if len(set(columns[axis])) > 1]
    for follower, leader in (("kv_seq", "seq"), ("kv_heads", "heads")):
        if follower in axes and leader in axes and columns[follower] == columns[leader]:
            axes.remove(follower)
    return tuple(axes)


@lru_cache(maxsize=256)
def _counterparts(case: Workload) -> Mapping[Counterpart, Workload]:
    """Return the counterparts of a case; cached, since each event of a run's progress asks for them."""
    if case.ranks > 1:
        return MappingProxyType({"one_device": structs.replace(case, ranks=1)})
    made: dict[Counterpart, Workload] = {}
    if case.structured or case.window is not None:
        made["dense"] = structs.replace(case, mask="none")
    if case.quantized:
        made["unquantized"] = structs.replace(case, kv_format=DENSE)
    return MappingProxyType(made)


def _size_problems(workload: Workload) -> list[str]:
    problems = []
    for name, largest in MAX_SIZES.items():
        value: object = getattr(workload, name)
        if name in DEFAULTS_FROM and value is getattr(workload, DEFAULTS_FROM[name]):
            continue  # reported once, under the name that was given
        if type(value) is not int or not 1 <= value <= largest:
            problems.append(f"{name}: got {value!r}; it takes a whole number from 1 to {largest:,}")
    if not problems and workload.heads % workload.kv_heads:
        problems.append(f"kv_heads: got {workload.kv_heads}; it must divide heads, which is {workload.heads}")
    return problems


def _choice_problems(workload: Workload) -> list[str]:
    problems = []
    for name, value, known in (("dtype", workload.dtype, DTYPES), ("pass", workload.pass_, PASSES)):
        if value not in known:
            problems.append(f"{name}: got {value!r}; it takes {', '.join(known)}{suggestion(str(value), known)}")
    return problems


Phase = Literal["prefill", "decode"]
PHASES: Final[tuple[Phase, ...]] = ("prefill", "decode")
MAX_MODEL_SIZES: Final = {
    "batch": 4_096,
    "prompt": 1_048_576,
    "generate": 65_536,
    "seq": 1_048_576,
    "rank": 4_096,
    "iters": 1_000_000,
    "layers": 10_000,
    "tuned_layers": 10_000,
    "measured_layers": 10_000,
    "ranks": 64,
}
MIN_SIZES: Final = {"prompt": 2, "measured_layers": 2}
"""Minimum values above 1: a prompt's last token is a decode step; a layer's time needs two numbers of layers."""
OPTIONS: Final = {"measured_layers": "layers", "tuned_layers": "lora-layers"}
"""Fields whose command-line option has another name."""


class Generation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Prefill of a prompt up to the first token, or decoding of tokens one after another.

    Raises:
        UsageError: names every invalid field, its value and what is accepted.
    """

    model: str
    """Name of a bundled configuration, or an mlx-lm folder."""
    phase: Phase
    prompt: int
    """Tokens of each sequence's prompt."""
    generate: int = 64
    """Tokens generated by one decode sample after the prompt."""
    batch: int = 1
    dtype: DType = "bfloat16"
    kv_format: str = DENSE
    """How the cache quantizes keys and values, as in `Workload`."""
    layers: int
    """Layers of the whole model."""
    measured_layers: int | None = None
    """Layers that run; None means all. With fewer, all results are estimates for the whole model."""
    ranks: int = 1
    """Processes, each with a device of its own and the whole model, among which the sequence is divided."""

    def __post_init__(self) -> None:
        """Validate all fields."""
        problems = _problems(self, ("prompt", "generate", "batch", "layers", "measured_layers", "ranks"), self.dtype)
        try:
            formats = parse_kv_format(str(self.kv_format))
            structs.force_setattr(self, "kv_format", formats.text if formats else DENSE)
        except UsageError as error:
            problems += [f"kv_format: {problem.removeprefix('format: ')}" for problem in error.problems]
        if problems:
            raise UsageError(*problems)

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
        """The case in a few words, for tables and logs."""
        work = str(self.prompt) if self.phase == "prefill" else f"{self.generate} at {self.prompt}"
        form = "" if self.kv_format == DENSE else f" K/V {self.kv_format}"
        part = f", estimated from {self.measured_layers} of {self.layers} layers" if self.estimated else ""
        ranks = "" if self.ranks == 1 else f" on {self.ranks} ranks"
        return f"{short_name(self.model)} {self.phase} {work} B={self.batch} {self.dtype}{form}{part}{ranks}"


def generations(
    layers: int,
    *,
    model: str,
    prompts: Sequence[int],
    batches: Sequence[int],
    kv_formats: Sequence[str] = (DENSE,),
    **fields: Any,
) -> tuple[Generation, ...]:
    """Return both phases at every batch size, prompt length and format of keys and values.

    Raises:
        UsageError: the mistakes of all combinations, each reported once.
    """
    if (fields.get("measured_layers") or 0) >= layers:
        fields["measured_layers"] = None
    cases: dict[Generation, None] = {}
    problems: dict[str, None] = {}
    for batch, prompt, phase, kv_format in itertools.product(batches, prompts, PHASES, kv_formats):
        own: dict[str, Any] = {"phase": phase, "prompt": prompt, "batch": batch, "kv_format": kv_format}
        try:
            cases[Generation(model=model, layers=layers, **own, **fields)] = None
        except UsageError as error:
            problems.update(dict.fromkeys(error.problems))
    if problems:
        raise UsageError(*problems)
    return tuple(cases)


class FineTuning(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A LoRA fine-tuning with mlx-lm's trainer.

    Raises:
        UsageError: names every invalid field, its value and what is accepted.
    """

    model: str
    """Name of a bundled configuration, or an mlx-lm folder."""
    seq: int = 512
    """Predicted tokens per sequence."""
    batch: int = 4
    iters: int = 100
    rank: int = 8
    tuned_layers: int
    """Number of last layers with LoRA weights; gradients stop there."""
    dtype: DType = "bfloat16"
    layers: int
    """Layers of the whole model."""
    data: str | None = None
    """A text file; None is the bundled text."""

    def __post_init__(self) -> None:
        """Validate all fields."""
        problems = _problems(self, ("seq", "batch", "iters", "rank", "tuned_layers", "layers"), self.dtype)
        if problems:
            raise UsageError(*problems)

    @property
    def tokens(self) -> int:
        """Tokens of one iteration."""
        return self.batch * self.seq

    @property
    def label(self) -> str:
        """The case in a few words, for tables and logs."""
        return f"{short_name(self.model)} LoRA rank {self.rank} B={self.batch} L={self.seq} {self.dtype}"


def short_name(model: str) -> str:
    """Return a model's name; for a folder its last part."""
    return model.rstrip("/").rpartition("/")[2] or model


def _problems(case: Generation | FineTuning, sizes: tuple[str, ...], dtype: str) -> list[str]:
    problems: list[str] = []
    for name in sizes:
        value: object = getattr(case, name)
        least, largest = MIN_SIZES.get(name, 1), MAX_MODEL_SIZES[name]
        if value is not None and (type(value) is not int or not least <= value <= largest):
            option = OPTIONS.get(name, name)
            problems.append(f"{option}: got {value!r}; it takes a whole number from {least} to {largest:,}")
    if dtype not in DTYPES:
        problems.append(f"dtype: got {dtype!r}; it takes {', '.join(DTYPES)}{suggestion(dtype, DTYPES)}")
    return [*dict.fromkeys(problems)]
