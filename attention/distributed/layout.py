"""Layouts: which positions of a sequence each rank holds. No MLX.

causal, four ranks           zigzag: rank r has chunks r and 2n - 1 - r, so that all have as many visible pairs
keys ->
0 #.......                   chunk   0  1  2  3  4  5  6  7
1 ##......                   rank    0  1  2  3  3  2  1  0
2 ###.....
3 ####....                   contiguous: rank r has one range      rank    0  0  1  1  2  2  3  3
4 #####...                   balanced: one range each, with equal numbers of visible pairs
5 ######..                   heads: the whole sequence of a rank's own heads
6 #######.                   replicated: everything on every rank
7 ########
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Final, Literal, get_args

from msgspec import Struct

from attention.core.errors import UsageError, suggestion
from attention.core.numbers import shown_value

Kind = Literal["zigzag", "contiguous", "balanced", "heads", "replicated"]
LAYOUTS: Final[tuple[Kind, ...]] = get_args(Kind)
Chunk = tuple[int, int]
"""Positions [start, stop)."""
ALIGNMENT: Final = 128
"""Chunks begin at multiples of it where there are enough positions, so that they consist of whole tiles of kernels."""
MAX_RANKS: Final = 4096


class Layout(Struct, frozen=True):
    """The chunks of a sequence that each rank holds: disjoint, and together the whole, unless all ranks hold it all."""

    kind: Kind
    seq: int
    chunks: tuple[tuple[Chunk, ...], ...]
    """For each rank its chunks, ascending; none are empty, and a rank may have none."""

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.chunks)

    @property
    def is_sharded(self) -> bool:
        """Whether each position is on one rank only."""
        return self.kind not in ("heads", "replicated")

    def rows(self, rank: int) -> int:
        """Return the number of positions of a rank."""
        return rows_of(self.chunks[rank])

    @property
    def most_rows(self) -> int:
        """Largest number of positions of a rank."""
        return max(map(self.rows, range(self.ranks)))

    def __str__(self) -> str:
        return f"{self.kind}, {self.seq:,} positions on {self.ranks} ranks"


def extended(layout: Layout | None, rows: Layout, owner: int = 0) -> Layout:
    """Return the layout of keys after those of some rows have been appended.

    Args:
        layout: of the keys before; None if there are none.
        rows: layout of the rows.
        owner: the rank that keeps the keys of rows that every rank has.
    """
    before = 0 if layout is None else layout.seq
    new = rows.chunks if rows.is_sharded else [((0, rows.seq),) if rank == owner else () for rank in range(rows.ranks)]
    old: Sequence[tuple[Chunk, ...]] = [()] * rows.ranks if layout is None else layout.chunks
    chunks = (
        union([*own, *((before + start, before + stop) for start, stop in added)])
        for own, added in zip(old, new, strict=True)
    )
    return Layout("contiguous" if layout is None else layout.kind, before + rows.seq, tuple(chunks))


def rows_of(chunks: Sequence[Chunk]) -> int:
    """Return the number of positions of chunks."""
    return sum(stop - start for start, stop in chunks)


def union(chunks: Iterable[Chunk]) -> tuple[Chunk, ...]:
    """Return ranges as ascending disjoint ones."""
    made: list[Chunk] = []
    for start, stop in sorted(chunks):
        if start >= stop:
            continue
        if made and start <= made[-1][1]:
            made[-1] = (made[-1][0], max(made[-1][1], stop))
        else:
            made.append((start, stop))
    return tuple(made)


def check_layout_name(kind: object) -> Kind:
    """Return the name of a layout.

    Raises:
        UsageError: there is none of that name.
    """
    if kind in LAYOUTS:
        return kind
    raise UsageError(f"layout: got {kind!r}; it takes {', '.join(LAYOUTS)}{suggestion(str(kind), LAYOUTS)}")


def make_layout(
    seq: int,
    ranks: int,
    kind: Kind = "zigzag",
    *,
    costs: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
) -> Layout:
    """Return the layout of a sequence.

    Args:
        seq: number of positions; it need not be a multiple of the number of ranks.
        ranks: number of ranks.
        kind: name of the layout.
        costs: for "balanced" the work of each block of `ALIGNMENT` positions; all equal by default.
        weights: relative speeds of the ranks, all equal by default. Each gets work in proportion: chunks of such
            lengths in "contiguous", blocks of such costs in "balanced", and in "zigzag" two chunks of such lengths.

    Raises:
        UsageError: an argument is out of range.
    """
    check_layout_name(kind)
    if type(seq) is not int or seq < 1:
        raise UsageError(f"seq: got {seq!r}; it takes a whole number from 1")
    check_ranks(ranks)
    shares = check_weights(weights, ranks)
    if kind in ("heads", "replicated"):
        return Layout(kind, seq, (((0, seq),),) * ranks)
    if kind == "zigzag":
        cuts = _cuts(seq, [*shares, *reversed(shares)])
        chunks = [union([cuts[rank], cuts[2 * ranks - 1 - rank]]) for rank in range(ranks)]
    elif kind == "balanced" and costs is not None:
        chunks = [union([cut]) for cut in _balanced_cuts(seq, costs, shares)]
    else:
        chunks = [union([cut]) for cut in _cuts(seq, shares)]
    return Layout(kind, seq, tuple(chunks))


def check_ranks(ranks: int) -> None:
    """Raise UsageError unless a number of ranks is in range."""
    if type(ranks) is not int or not 1 <= ranks <= MAX_RANKS:
        raise UsageError(f"ranks: got {ranks!r}; it takes a whole number from 1 to {MAX_RANKS}")


def check_weights(weights: Sequence[float] | None, ranks: int) -> list[float]:
    """Return the share of each rank.

    Raises:
        UsageError: they are not one positive number for each rank.
    """
    if weights is None:
        return [1 / ranks] * ranks
    try:
        numbers = [float(weight) for weight in weights]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != ranks or not all(0 < number < float("inf") for number in numbers):
        raise UsageError(f"weights: got {weights!r}; it takes one positive number for each of {ranks} ranks")
    return [number / sum(numbers) for number in numbers]


def check_is_whole(layout: object, key_layout: object) -> None:
    """Raise UsageError if the arrays of a call without a group are a part of a sequence; the rest would be left out."""
    problems = []
    for name, given in (("layout", layout), ("key_layout", key_layout)):
        if isinstance(given, Layout) and given.ranks > 1:
            problems.append(f"{name}: got one of {given.ranks} ranks, and no group; it takes group= of as many")
        elif given is not None and not isinstance(given, str | Layout):
            problems.append(f"{name}: got {shown_value(given)}; it takes a layout, as distributed.shard returns it")
    if problems:
        raise UsageError(*problems)


def _cuts(seq: int, shares: Sequence[float]) -> list[Chunk]:
    """Cut a sequence into chunks of lengths in proportion to shares, at multiples of ALIGNMENT if it is long enough."""
    whole = sum(shares)
    step = ALIGNMENT if seq >= ALIGNMENT * len(shares) else 1
    ends = [min(seq, round(seq * end / whole / step) * step) for end in accumulate(shares)]
    return list(pairwise([0, *ends[:-1], seq]))


def _balanced_cuts(seq: int, costs: Sequence[float], shares: Sequence[float]) -> list[Chunk]:
    """Cut a sequence between blocks of ALIGNMENT positions, each chunk with its share of the costs."""
    sums = [0.0, *accumulate(costs)]
    ends, place = [0], 0
    for end in list(accumulate(shares))[:-1]:
        wanted = sums[-1] * end
        while place < len(costs) and abs(sums[place + 1] - wanted) <= abs(sums[place] - wanted):
            place += 1
        ends.append(min(seq, place * ALIGNMENT))
    return list(pairwise([*ends, seq]))
