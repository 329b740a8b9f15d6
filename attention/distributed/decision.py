"""The choice of how ranks share a call, from bytes and FLOPs; no MLX.

Bytes that a rank sends in a forward pass over n ranks (b bytes a number, L/n rows of each rank):

    context parallel   (n - 1) * L/n * Hkv * (D + Dv) * b               keys and values; a window sends only its reach
    head parallel      (n - 1)/n * L/n * (H + Hkv) * (D + Dv) * b       rows to heads and back, by an all-to-all;
                       nothing if the arrays are sharded by heads
    split keys         (n - 1) * B * H * Lq * (Dv * b + 4)              partial results and their logsumexps
    alone              nothing: few rows, and every rank has all keys
"""

from collections.abc import Sequence
from typing import Final, Literal

from msgspec import Struct, structs

from attention.core.errors import UsageError
from attention.core.numbers import shown_value
from attention.core.workload import ITEM_BYTES, Workload
from attention.distributed.layout import Kind, Layout, check_ranks, check_weights, make_layout

Method = Literal["context", "heads", "split keys", "alone"]
DEFAULT_BYTES_PER_S: Final = 300e9
"""What peers of one host move over NVLink, one direction, if nothing was measured."""
DEFAULT_FLOPS_PER_S: Final = 600e12
FLOPS_PER_BYTE: Final = 150
"""FLOPs of a GPU in the time of reading a byte, for a memory whose rate was not measured."""
PIECES: Final = 8
"""The share of the communication before the first computation is one over this."""


class Link(Struct, frozen=True):
    """A measured connection between ranks."""

    bytes_per_s: float = DEFAULT_BYTES_PER_S
    """Received by one rank."""
    latency_s: float = 20e-6
    """Of one collective."""
    merge_s: float | None = None
    """Of the merge of partial results of few rows; two collectives if nothing was measured."""


class Option(Struct, frozen=True):
    """A way to share a call, and what it costs."""

    method: Method
    layout: Kind
    bytes_sent: tuple[int, ...]
    """By each rank in one call, forward and backward."""
    flops: tuple[float, ...]
    """Of each rank."""
    predicted_s: float
    exposed_s: float
    """Of it, communication that no computation hides."""
    refusal: str | None = None
    """Why it cannot be taken."""

    @property
    def balance(self) -> float:
        """Mean over maximum of the ranks' FLOPs: 1 is even."""
        most = max(self.flops)
        return sum(self.flops) / len(self.flops) / most if most else 1.0


class Decision(Struct, frozen=True):
    """How a call is shared by ranks, and why."""

    option: Option
    reason: str
    """One sentence."""
    options: tuple[Option, ...]
    """All that were considered, the chosen one among them."""
    ranks: int
    weights: tuple[float, ...] | None = None

    @property
    def method(self) -> Method:
        """How the ranks share the call."""
        return self.option.method

    @property
    def layout(self) -> Kind:
        """Name of the layout."""
        return self.option.layout

    @property
    def bytes_sent(self) -> tuple[int, ...]:
        """Bytes that each rank sends in a call."""
        return self.option.bytes_sent

    @property
    def flops(self) -> tuple[float, ...]:
        """FLOPs of each rank in a call."""
        return self.option.flops

    @property
    def balance(self) -> float:
        """Mean over maximum of the ranks' FLOPs."""
        return self.option.balance


def decide(
    workload: Workload,
    ranks: int,
    *,
    link: Link | None = None,
    flops_per_s: float = DEFAULT_FLOPS_PER_S,
    memory_bytes_per_s: float | None = None,
    weights: Sequence[float] | None = None,
    method: Method | None = None,
    layout: Kind | None = None,
    all_to_all: bool = False,
    sharded_by: Literal["any", "sequence"] = "any",
) -> Decision:
    """Choose how ranks share a call.

    Args:
        workload: the call.
        ranks: number of ranks.
        link: the connection between ranks.
        flops_per_s: what one rank computes.
        memory_bytes_per_s: what one rank reads of its memory, which bounds steps of few rows; from `flops_per_s` if
            nothing was measured.
        weights: relative speeds of the ranks.
        method: the method to take, instead of choosing.
        layout: the layout to take, instead of choosing.
        all_to_all: whether the transport has an all-to-all, which sharding by heads needs if the rows are sharded.
        sharded_by: "sequence" if rows are sharded by sequence already, as in a model; "any" if the caller shards as
            the decision says.

    Raises:
        UsageError: the requested method is not possible, with the reason, or an argument is out of range.
    """
    if not isinstance(workload, Workload):
        raise UsageError(f"workload: got {shown_value(workload)}; it takes an attention.Workload")
    check_ranks(ranks)
    check_weights(weights, ranks)
    own_link, memory = link or Link(), memory_bytes_per_s or flops_per_s / FLOPS_PER_BYTE
    options = [
        _finished(option, workload, own_link, flops_per_s, memory, weights)
        for option in _options(workload, ranks, weights, layout, all_to_all, sharded_by)
    ]
    if ranks == 1:
        return Decision(options[0], "There is one rank.", tuple(options), 1, None)
    named = [option for option in options if method in (None, option.method)]
    open_ = [option for option in named if option.refusal is None]
    if not open_:
        reasons = "; ".join(f"{option.method}: {option.refusal}" for option in named) or f"no {method} for such a call"
        raise UsageError(f"method: {reasons}")
    chosen = min(open_, key=lambda option: option.predicted_s)
    made = None if weights is None else tuple(float(weight) for weight in weights)
    return Decision(chosen, _reason(chosen, open_, options, method), tuple(options), ranks, made)


def _options(
    workload: Workload,
    ranks: int,
    weights: Sequence[float] | None,
    layout: Kind | None,
    all_to_all: bool,
    sharded_by: str,
) -> list[Option]:
    item = ITEM_BYTES[workload.dtype]
    width = workload.head_dim + workload.value_dim
    even = (workload.flops / ranks,) * ranks
    passes = 2 if workload.pass_ == "training" else 1  # keys and values forward, their gradients backward
    if ranks == 1:
        return [Option("alone", "replicated", (0,), (workload.flops,), 0.0, 0.0)]
    if workload.seq != workload.kv_seq:
        sent = (ranks - 1) * workload.batch * workload.heads * workload.seq * (workload.value_dim * item + 4)
        made = [Option("split keys", layout or "contiguous", (sent,) * ranks, even, 0.0, 0.0)]
        sharded = "the keys are sharded by sequence" if sharded_by == "sequence" else None
        made.append(Option("alone", "replicated", (0,) * ranks, (workload.flops,) * ranks, 0.0, 0.0, sharded))
    else:
        kind: Kind = layout if layout not in (None, "heads", "replicated") else best_layout(workload)
        placed = make_layout(workload.seq, ranks, kind, weights=weights)
        sent_rows = _rows_sent(workload, placed)
        sent = passes * (ranks - 1) * sent_rows * workload.batch * workload.kv_heads * width * item
        made = [Option("context", kind, (sent,) * ranks, _flops(workload, placed), 0.0, 0.0)]
    refusal = _heads_refusal(workload, ranks, all_to_all, sharded_by)
    moved = 0
    if sharded_by == "sequence":
        rows = -(-workload.seq // ranks)
        heads = workload.heads + workload.kv_heads
        moved = passes * (ranks - 1) * rows * workload.batch * heads * width * item // ranks
    made.append(Option("heads", "heads", (moved,) * ranks, even, 0.0, 0.0, refusal))
    return made


def best_layout(workload: Workload) -> Kind:
    """Return the layout that balances a mask: zigzag for causal, one range for a window, equal pairs for others."""
    if workload.structured:
        return "balanced"
    if workload.window is not None and 4 * workload.window < workload.seq:
        return "contiguous"
    return "zigzag" if workload.causal else "contiguous"


def _heads_refusal(workload: Workload, ranks: int, all_to_all: bool, sharded_by: str) -> str | None:
    if workload.heads % ranks or workload.kv_heads % ranks:
        return f"{workload.kv_heads} K/V heads are not a multiple of {ranks} ranks"
    if sharded_by == "sequence" and not all_to_all:
        return "the rows are sharded by sequence, and the transport has no all-to-all"
    return None


def _rows_sent(workload: Workload, layout: Layout) -> int:
    """Return the rows of keys that each rank contributes, padded to the largest."""
    if workload.window is None or workload.structured:
        return layout.most_rows
    reach = workload.window - 1
    # the last rows of a chunk are seen from the next one
    return max(min(layout.rows(rank), reach * len(layout.chunks[rank])) for rank in range(layout.ranks))


def _flops(workload: Workload, layout: Layout) -> tuple[float, ...]:
    """Return the FLOPs of each rank, by the visible pairs of its rows; a structured mask's are taken as balanced."""
    if workload.structured:
        return (workload.flops / layout.ranks,) * layout.ranks
    pairs = [
        sum(_pairs_up_to(workload, stop) - _pairs_up_to(workload, start) for start, stop in chunks)
        for chunks in layout.chunks
    ]
    whole = sum(pairs) or 1
    return tuple(workload.flops * own / whole for own in pairs)


def _pairs_up_to(workload: Workload, row: int) -> int:
    """Return the visible pairs of rows before one, with as many keys as rows."""
    if not workload.causal:
        return row * workload.kv_seq
    window = workload.window
    if window is None or row <= window:
        return row * (row + 1) // 2
    return window * (window + 1) // 2 + (row - window) * window


def _finished(
    option: Option,
    workload: Workload,
    link: Link,
    flops_per_s: float,
    memory_bytes_per_s: float,
    weights: Sequence[float] | None,
) -> Option:
    """Return an option with its predicted time: the slowest rank's, and the communication that nothing hides."""
    speeds = [1.0] * len(option.flops) if weights is None else [w * len(weights) / sum(weights) for w in weights]
    computing = max(flops / flops_per_s / speed for flops, speed in zip(option.flops, speeds, strict=True))
    if workload.seq != workload.kv_seq:  # bound by reading the keys
        kv = workload.batch * workload.kv_heads * workload.kv_seq * (workload.head_dim + workload.value_dim)
        readers = 1 if option.method == "alone" else len(option.flops)
        computing = max(computing, kv * ITEM_BYTES[workload.dtype] / readers / memory_bytes_per_s)
    most = max(option.bytes_sent)
    latency = 2 * link.latency_s if option.method != "split keys" or link.merge_s is None else link.merge_s
    moving = most / link.bytes_per_s + (latency if most else 0.0)
    exposed = moving if option.method == "split keys" else max(moving / PIECES, moving - computing * (1 - 1 / PIECES))
    return structs.replace(option, predicted_s=computing + exposed, exposed_s=exposed)


def _reason(chosen: Option, open_: Sequence[Option], options: Sequence[Option], method: Method | None) -> str:
    """Return why an option was chosen, in one sentence."""
    sent = f"{max(chosen.bytes_sent) / 1e6:,.1f} MB sent by a rank"
    if method is not None:
        return f"{chosen.method} was requested: {sent}."
    others = [option for option in options if option is not chosen]
    alone = next((option for option in others if option.method == "alone"), None)
    if alone is not None and alone.refusal is not None and alone.predicted_s < chosen.predicted_s:
        times = f"{alone.predicted_s * 1e3:.3g} ms against {chosen.predicted_s * 1e3:.3g}"
        return f"{chosen.method}, {sent}: {alone.refusal}, though one rank alone would take {times}."
    refused = next((option for option in others if option.refusal), None)
    if len(open_) == 1 and refused is not None:
        return f"{chosen.method}, {sent}: {refused.refusal}."
    other = next((option for option in open_ if option is not chosen), None)
    if other is None:
        return f"{chosen.method}, {sent}: the only way to share such a call."
    return (
        f"{chosen.method}, {sent}, against {max(other.bytes_sent) / 1e6:,.1f} MB with {other.method}: "
        f"{chosen.predicted_s * 1e3:.3g} ms predicted against {other.predicted_s * 1e3:.3g}."
    )
