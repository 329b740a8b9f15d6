"""A stream: the case of a run without an end, what is measured of its tokens, and what follows from that."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final, cast

from msgspec import Struct, structs

from attention.core.errors import UsageError
from attention.core.kv_format import DENSE, parse_kv_format
from attention.core.workload import DType, Workload, short_name

FULL: Final = "full"
RECOMPUTED: Final = "recomputed"
WINDOW: Final = "window"
STREAMING: Final = "streaming"
STREAM_ROWS: Final[dict[str, str]] = {
    FULL: "every token is kept, and attended to",
    RECOMPUTED: "the window's tokens pass through the model again for each new one",
    WINDOW: "the last tokens alone are kept",
    STREAMING: "the first tokens and the last are kept",
}
"""The rows of a run over a stream, and what each one keeps."""
ATTENTION_ROWS: Final = (FULL, STREAMING)
"""Rows without a model: a plain window has the same cost as `streaming`, and nothing is to be recomputed."""
SHAPE: Final = ("heads", "kv_heads", "head_dim")
"""Fields of a stream's attention calls, which a model has of its own."""
MAX_STREAM_SIZES: Final = {"tokens": 1_000_000_000, "window": 1_048_576, "chunk": 65_536}
MAX_BLOCKS: Final = 500
"""Maximum number of blocks that the tokens of a stream are grouped in, and those that are shorter for their time."""
TENTHS: Final = 10
SLOW: Final = 5.0
"""A token counts as slow if it takes more than this multiple of the median."""
BIN_GROWTH: Final = 1.02
"""Ratio of the ends of a bin of the histogram of times, and so the resolution of quantiles."""


class Stream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens one after another, each attending to a bounded part of those before it: attention alone, or a model's.

    Raises:
        UsageError: names every invalid field, its value and what is accepted.
    """

    model: str | None = None
    """Name of a bundled configuration, or an mlx-lm folder; None for attention alone, on random inputs."""
    tokens: int = 100_000
    """Tokens of the stream."""
    window: int = 1024
    """Last tokens that are kept."""
    first: int = 4
    """First tokens that are kept beside them."""
    chunk: int = 1
    """Tokens that are given at once."""
    heads: int = 8
    kv_heads: int = 0
    """Key and value heads, a divisor of heads; 0 for as many as heads."""
    head_dim: int = 64
    dtype: DType = "bfloat16"
    kv_format: str = DENSE
    """How the kept keys and values are quantized, as in `Workload`."""
    text: str | None = None
    """A text file whose loss a model is measured on; None is the bundled text, repeated."""

    def __post_init__(self) -> None:
        """Resolve the defaults, then validate all fields."""
        if not self.kv_heads:
            structs.force_setattr(self, "kv_heads", self.heads)
        problems = [problem for name in MAX_STREAM_SIZES if (problem := self._size_problem(name))]
        first: object = self.first
        if not problems and (type(first) is not int or not 0 <= first <= self.window):
            problems.append(
                f"first: got {first!r}; it takes a whole number from 0 to the window, which is {self.window:,}"
            )
        if not problems and self.chunk > self.tokens:
            problems.append(f"chunk: got {self.chunk:,}; it takes at most as many tokens as there are, {self.tokens:,}")
        try:
            structs.force_setattr(self, "kv_format", self._workload(self.window if not problems else 1).kv_format)
        except UsageError as error:
            problems += [problem for problem in error.problems if not problem.startswith("value_dim")]
        if problems:
            raise UsageError(*problems)

    def _size_problem(self, name: str) -> str | None:
        value, largest = cast("object", getattr(self, name)), MAX_STREAM_SIZES[name]
        if type(value) is int and 1 <= value <= largest:
            return None
        return f"{name}: got {value!r}; it takes a whole number from 1 to {largest:,}"

    def _workload(self, keys: int, kv_format: str | None = None) -> Workload:
        return Workload(
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            kv_format=self.kv_format if kv_format is None else kv_format,
            kv_seq=keys,
            pass_="decode",
        )

    @property
    def kept(self) -> int:
        """Tokens that are kept once the window is full."""
        return self.first + self.window

    @property
    def workload(self) -> Workload:
        """The attention call of one token in a layer, with the window full."""
        return self._workload(self.kept)

    def full_workload(self, keys: int) -> Workload:
        """The attention call of one token that attends to all keys so far, unquantized as mlx-lm keeps them."""
        return self._workload(keys, DENSE)

    @property
    def quantized(self) -> bool:
        """Whether the kept keys and values are quantized."""
        return parse_kv_format(self.kv_format) is not None

    @property
    def block_tokens(self) -> int:
        """Tokens of a block, unless its time is up before: a multiple of the chunk, for MAX_BLOCKS blocks at most."""
        return self.chunk * math.ceil(self.tokens / (self.chunk * MAX_BLOCKS))

    @property
    def label(self) -> str:
        """The case in a few words, for tables and logs."""
        kind = f"{short_name(self.model)} " if self.model else ""
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        shape = "" if self.model else f" D={self.head_dim} H={heads}"
        form = "" if self.kv_format == DENSE else f" K/V {self.kv_format}"
        chunk = "" if self.chunk == 1 else f" by {self.chunk}"
        return f"{kind}stream of {self.tokens:,}{chunk}, {self.first} + {self.window:,}{shape} {self.dtype}{form}"


class StreamBlock(Struct, frozen=True, kw_only=True):
    """Consecutive tokens of a stream, or calls at one length of the cache."""

    end: int
    """Tokens seen at its end."""
    count: int
    """Steps that were timed in it."""
    seconds: float
    """Median time of a token."""
    slowest_s: float
    bins: dict[int, int] = {}
    """Number of steps by bin of their time per token, see `bin_of`."""
    resident_bytes: int | None = None
    """Resident memory of the process at its end."""
    device_bytes: int | None = None
    """MLX's active memory at its end."""
    loss: float | None = None
    """Mean loss of a token, in nats."""
    losses: int = 0
    """Tokens that the loss is the mean of."""


def block_of(
    end: int,
    times_s: Sequence[float],
    *,
    resident_bytes: int | None = None,
    device_bytes: int | None = None,
    loss: float | None = None,
    losses: int = 0,
) -> StreamBlock:
    """Summarise the steps of a block.

    Args:
        end: tokens seen at its end.
        times_s: seconds per token of each step.
        resident_bytes, device_bytes, loss, losses: as in `StreamBlock`.
    """
    return StreamBlock(
        end=end,
        count=len(times_s),
        seconds=median(times_s),
        slowest_s=max(times_s),
        bins=dict(Counter(map(bin_of, times_s))),
        resident_bytes=resident_bytes,
        device_bytes=device_bytes,
        loss=loss,
        losses=losses,
    )


def bin_of(seconds: float) -> int:
    """Return the bin of a time, counted from one nanosecond."""
    return math.floor(math.log(max(seconds, 1e-9) / 1e-9) / math.log(BIN_GROWTH))


def bin_top_s(number: int) -> float:
    """Return the upper end of a bin, in seconds."""
    return float(1e-9 * BIN_GROWTH ** (number + 1))


def merged_bins(blocks: Sequence[StreamBlock]) -> Counter[int]:
    """Return the number of steps of all blocks by bin."""
    merged: Counter[int] = Counter()
    for block in blocks:
        merged.update(block.bins)
    return merged


def quantile_s(bins: Mapping[int, int], share: float) -> float | None:
    """Return the time that a share of the steps does not exceed, to the resolution of a bin; None without steps."""
    wanted, seen = share * sum(bins.values()), 0
    for number in sorted(bins):
        seen += bins[number]
        if seen >= wanted:
            return bin_top_s(number)
    return None


def slow_steps(bins: Mapping[int, int], typical_s: float) -> int:
    """Return the number of steps that took more than SLOW times the typical time."""
    return sum(count for number, count in bins.items() if bin_top_s(number) > BIN_GROWTH * SLOW * typical_s)


def tenths(blocks: Sequence[StreamBlock], tokens: int) -> list[float]:
    """Return the median time of a token in each tenth of the tokens: the median of its blocks' medians.

    A tenth without a block, of a stream that was interrupted, ends the list.
    """
    made = []
    for index in range(TENTHS):
        low, high = index * tokens / TENTHS, (index + 1) * tokens / TENTHS
        inside = [block.seconds for block in blocks if low < block.end <= high]
        if not inside:
            break
        made.append(median(inside))
    return made


def spread(times_s: Sequence[float], tokens: int, kept: int) -> float | None:
    """Return how far the tenths differ from the first one in which the window was full throughout, relative to it.

    None if fewer than two tenths had a full window.
    """
    full = [seconds for index, seconds in enumerate(times_s) if index * tokens / TENTHS >= kept]
    if len(full) < 2:
        return None
    return max(abs(seconds / full[0] - 1) for seconds in full[1:])


class Line(Struct, frozen=True):
    """A straight line of time per token over the keys attended to."""

    at_0: float
    slope: float

    def at(self, keys: float) -> float:
        """Return the seconds of a token that attends to so many keys."""
        return self.at_0 + self.slope * keys


def fitted_line(blocks: Sequence[StreamBlock]) -> Line | None:
    """Fit the climbing cost of full attention, to extrapolate it; None for fewer than three lengths.

    The upper half of the lengths counts, where the share of the call's fixed cost is smallest: the slope is the median
    of those between all pairs (Theil and Sen), which a slow moment does not tilt; below zero it is noise, taken as 0.
    """
    upper = [(float(block.end), block.seconds) for block in blocks][len(blocks) // 2 :]
    if len(blocks) < 3 or len(upper) < 2:
        return None
    slopes = [(b - a) / (y - x) for i, (x, a) in enumerate(upper) for y, b in upper[i + 1 :] if y > x]
    slope = max(0.0, median(slopes))
    return Line(median([seconds - slope * keys for keys, seconds in upper]), slope)


def mean_loss(blocks: Sequence[StreamBlock]) -> float | None:
    """Return the mean loss of the tokens of all blocks; None if none has a loss."""
    known = [(block.loss, block.losses) for block in blocks if block.loss is not None and block.losses]
    total = sum(count for _, count in known)
    return sum(loss * count for loss, count in known) / total if total else None
