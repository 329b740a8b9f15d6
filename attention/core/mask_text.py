"""Mask strings of workloads: parsing, canonical spelling, and the exact number of visible pairs.

A string is one part, or several joined by "+": a pair is visible if a part shows it. Query row i of Lq has position
p = i + Lk - Lq among the Lk keys (lower-right alignment).

    none          all keys
    causal        keys 0 to p
    window:N      the last N keys up to p
    documents:N   keys 0 to p of p's own document; sequences are packed, N tokens each, from key 0
    strided:N,S   the N keys p, p - S, p - 2 S, ...
    prefix:N      the first N keys, for every query
    blocks:D      tiles of 128 x 128 drawn at random, seeded, for each head: D of the key tiles for each row tile
    pattern:D     a mask of a program, of which only the share of visible pairs is known; it cannot be run again
"""

import math
import random
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final

from msgspec import Struct, structs

from attention.core.errors import UsageError, suggestion

BLOCK: Final = 128
"""Rows and keys of a random tile."""
MAX_LENGTH: Final = 16_777_216
FORMS: Final = ("none", "causal", "window:N", "documents:N", "prefix:N", "strided:N,S", "blocks:DENSITY")
ACCEPTED: Final = f"it takes {', '.join(FORMS)}, or several joined by +"
BLOCK_SEED: Final = 0
Choice = tuple[tuple[int, ...], ...]
"""The visible key tiles of each row tile of one head, ascending."""


class MaskSpec(Struct, frozen=True, kw_only=True):
    """The parts of a mask string; with none of them every pair is visible."""

    causal: bool = False
    window: int | None = None
    documents: int | None = None
    strided: tuple[int, int] | None = None
    """Number of keys, and their distance."""
    prefix: int | None = None
    blocks: float | None = None
    """Share of the tiles that are visible, above 0 and at most 1."""
    pattern: float | None = None
    """Share of the pairs that a program's own mask shows."""

    @property
    def text(self) -> str:
        """The canonical spelling."""
        parts = [
            f"prefix:{self.prefix}" if self.prefix else "",
            "causal" if self.causal else "",
            f"documents:{self.documents}" if self.documents else "",
            f"window:{self.window}" if self.window else "",
            f"strided:{self.strided[0]},{self.strided[1]}" if self.strided else "",
            f"blocks:{self.blocks:.6g}" if self.blocks else "",
            f"pattern:{self.pattern:.6g}" if self.pattern is not None else "",
        ]
        return "+".join(part for part in parts if part) or "none"

    @property
    def structured(self) -> bool:
        """Whether it is more than the bounds of a causal mask or of a window."""
        return bool(self.prefix or self.documents or self.strided or self.blocks or self.pattern is not None)

    @property
    def per_head(self) -> bool:
        """Whether heads differ."""
        return self.blocks is not None


ALL_VISIBLE: Final = MaskSpec()


def parse_mask(text: object) -> MaskSpec:
    """Parse a mask string; parts that another one contains are dropped.

    Raises:
        UsageError: names the value, what is wrong with it, and what is accepted.
    """
    if not isinstance(text, str):
        raise _refusal(text, ACCEPTED)
    return _parsed(text)


@lru_cache(maxsize=1024)
def _parsed(text: str) -> MaskSpec:
    found: dict[str, MaskSpec] = {}
    for part in text.split("+"):
        name, colon, argument = part.strip().partition(":")
        if name in found:
            raise _refusal(text, f"{name} is there twice")
        read = _READERS.get(name)
        if read is None or bool(colon) == (name in ("none", "causal")):
            hint = suggestion(part, (*FORMS, *(form.partition(":")[0] for form in FORMS)))
            raise _refusal(text, ACCEPTED + hint)
        found[name] = read(text, argument)
    if len(found) > 1 and ("none" in found or "pattern" in found):
        raise _refusal(text, f"nothing can be joined to {'none' if 'none' in found else 'pattern'}")
    return _simplified(found)


def _simplified(found: dict[str, MaskSpec]) -> MaskSpec:
    """Join the parts, without those that another part contains."""
    given: dict[str, Any] = {}
    for part in found.values():
        given |= {name: own for name, own in structs.asdict(part).items() if own is not None and own is not False}
    if "causal" in given:
        given = {name: value for name, value in given.items() if name in ("causal", "prefix", "blocks")}
    if "documents" in given and given["documents"] <= given.get("window", 0):
        del given["documents"]
    return MaskSpec(**given)


def _refusal(text: object, what: str) -> UsageError:
    return UsageError(f"mask: got {text!r}; {what}")


def _whole(text: str, name: str, argument: str) -> int:
    digits = argument.strip()
    if digits.isascii() and digits.isdigit() and len(digits) < 12 and 1 <= int(digits) <= MAX_LENGTH:
        return int(digits)
    raise _refusal(text, f"{name} takes whole numbers from 1 to {MAX_LENGTH:,}")


def _strided(text: str, argument: str) -> MaskSpec:
    count, comma, stride = argument.partition(",")
    if not comma:
        raise _refusal(text, "strided takes two numbers: strided:N,S is N keys, S apart")
    return MaskSpec(strided=(_whole(text, "strided", count), _whole(text, "strided", stride)))


def _density(argument: str) -> float:
    """Return a density to six digits, which its spelling has; NaN if it is no number."""
    try:
        return float(f"{float(argument):.6g}")
    except ValueError:
        return math.nan


def _blocks(text: str, argument: str) -> MaskSpec:
    density = _density(argument)
    if not 0 < density <= 1:
        raise _refusal(text, "blocks takes a density above 0 and at most 1, as in blocks:0.1")
    return MaskSpec(blocks=density)


def _pattern(text: str, argument: str) -> MaskSpec:
    density = _density(argument)
    if not 0 <= density <= 1:
        raise _refusal(text, "pattern takes a density from 0 to 1")
    return MaskSpec(pattern=density)


_READERS: Final = {
    "none": lambda text, argument: ALL_VISIBLE,
    "causal": lambda text, argument: MaskSpec(causal=True),
    "window": lambda text, argument: MaskSpec(window=_whole(text, "window", argument)),
    "documents": lambda text, argument: MaskSpec(documents=_whole(text, "documents", argument)),
    "prefix": lambda text, argument: MaskSpec(prefix=_whole(text, "prefix", argument)),
    "strided": _strided,
    "blocks": _blocks,
    "pattern": _pattern,
}


def block_count(length: int) -> int:
    """Return the number of random tiles that cover a length."""
    return -(-length // BLOCK)


@lru_cache(maxsize=256)
def draw_blocks(density: float, seq: int, kv_seq: int, head: int) -> Choice:
    """Draw the visible key tiles of a head's row tiles: as many for each row tile, at least one, seeded."""
    draw = random.Random(f"{BLOCK_SEED} {head}")
    every, count = range(block_count(kv_seq)), chosen_blocks(density, kv_seq)
    return tuple(tuple(sorted(draw.sample(every, count))) for _ in range(block_count(seq)))


def chosen_blocks(density: float, kv_seq: int) -> int:
    """Return the number of visible key tiles of each row tile."""
    return max(1, round(density * block_count(kv_seq)))


@lru_cache(maxsize=1024)
def visible_pairs(spec: MaskSpec, seq: int, kv_seq: int, heads: int) -> int:
    """Return the number of visible (query, key) pairs of one sequence, over all its heads.

    It is exact, and to six digits for a program's own mask.
    """
    if spec.pattern is not None:
        return round(heads * seq * kv_seq * spec.pattern)
    if spec.blocks is not None:
        return _pairs_with_blocks(spec, spec.blocks, seq, kv_seq, heads)
    return heads * (seq * kv_seq if spec == ALL_VISIBLE else _Rows(spec, seq, kv_seq).total())


class _Rows:
    """What one query row sees by position: keys [0, prefix), keys [start(p), p], and a stride's keys."""

    def __init__(self, spec: MaskSpec, seq: int, kv_seq: int) -> None:
        self.spec, self.seq, self.kv_seq = spec, seq, kv_seq
        self.prefix = min(spec.prefix or 0, kv_seq)
        self.first = max(0, kv_seq - seq)
        """The first position that is not before all keys; queries before it see the prefix alone."""

    def start(self, position: int) -> int:
        """Return the first key of the run of keys that ends at a position; position + 1 if there is no such run."""
        spec = self.spec
        if spec.causal:
            return 0
        start = position + 1
        if spec.window:
            start = max(0, start - spec.window)
        if spec.documents:
            start = min(start, position - position % spec.documents)
        return start

    def beyond_prefix(self, position: int) -> int:
        """Return the keys of the run that are not in the prefix."""
        return max(0, position + 1 - max(self.start(position), self.prefix))

    def strided(self, position: int, low: int, high: int) -> int:
        """Return the number of a stride's keys in [low, high)."""
        if self.spec.strided is None:
            return 0
        count, stride = self.spec.strided
        nearest = max(0, -(-(position + 1 - high) // stride))
        return max(0, min(count - 1, (position - low) // stride) - nearest + 1)

    def visible(self, position: int, low: int, high: int) -> int:
        """Return the number of visible keys in [low, high)."""
        seen = max(0, min(high, self.prefix) - low)
        if position < 0:
            return seen
        after = max(low, self.prefix)
        start = self.start(position)
        seen += max(0, min(high, position + 1) - max(after, start))
        return seen + self.strided(position, after, min(high, start))

    def total(self) -> int:
        """Return the visible pairs of all rows."""
        return self.seq * self.prefix + self._runs() + self._strides()

    def _runs(self) -> int:
        """Return the sum of `beyond_prefix` over all rows: linear between breakpoints, then periodic in documents."""
        spec, begin, end = self.spec, max(self.first, self.prefix), self.kv_seq
        period = spec.documents or end
        settled = -(-max(begin, self.prefix + (spec.window or 0)) // period) * period
        tail = max(settled, end - (end - settled) % period) if settled < end else end
        periods = (tail - settled) // period if settled < end else 0
        return (
            self._linear(begin, min(settled, end))
            + periods * self._linear(settled, settled + period)
            + self._linear(tail, end)
        )

    def _linear(self, begin: int, end: int) -> int:
        spec = self.spec
        points = {begin, end}
        if spec.window:
            points |= {spec.window - 1, self.prefix + spec.window - 1}
        if spec.documents:
            for document in range(begin - begin % spec.documents, end, spec.documents):
                points |= {document, document + (spec.window or 1) - 1}
        ordered = sorted(point for point in points if begin <= point <= end)
        return sum(
            (self.beyond_prefix(low) + self.beyond_prefix(high - 1)) * (high - low) // 2
            for low, high in pairwise(ordered)
        )

    def _strides(self) -> int:
        """Return the pairs that only the stride shows."""
        spec = self.spec
        if spec.strided is None:
            return 0
        positions = range(max(self.first, self.prefix), self.kv_seq)
        if spec.documents:
            return sum(self.strided(position, self.prefix, self.start(position)) for position in positions)
        # Beside a window the stride's keys start at the same distance in every row.
        count, stride = spec.strided
        nearest = -(-(spec.window or 0) // stride)
        low = max(positions.start - self.prefix, nearest * stride)
        high = max(low, positions.stop - self.prefix)
        return _sum_of_quotients(low, high, stride, count - 1) - (high - low) * (nearest - 1) if nearest < count else 0


def _sum_of_quotients(low: int, high: int, divisor: int, most: int) -> int:
    """Return the sum of min(n // divisor, most) over low <= n < high."""

    def below(end: int) -> int:
        capped = min(end, divisor * most)
        whole, rest = divmod(capped, divisor)
        return divisor * whole * (whole - 1) // 2 + rest * whole + (end - capped) * most

    return below(high) - below(low)


def _pairs_with_blocks(spec: MaskSpec, density: float, seq: int, kv_seq: int, heads: int) -> int:
    alone = spec.text.startswith("blocks")
    if alone and kv_seq % BLOCK == 0:
        return heads * seq * chosen_blocks(density, kv_seq) * BLOCK
    positional = structs.replace(spec, blocks=None)
    rows = _Rows(positional, seq, kv_seq)
    added: dict[tuple[int, int], int] = {}

    def pairs_of(row_tile: int, key_tile: int) -> int:
        """Return the pairs of a tile that nothing but the tile shows."""
        low, high = key_tile * BLOCK, min((key_tile + 1) * BLOCK, kv_seq)
        run = range(row_tile * BLOCK, min((row_tile + 1) * BLOCK, seq))
        if alone:
            return len(run) * (high - low)
        return sum(high - low - rows.visible(row + kv_seq - seq, low, high) for row in run)

    total = 0 if alone else heads * rows.total()
    for head in range(heads):
        for row_tile, key_tiles in enumerate(draw_blocks(density, seq, kv_seq, head)):
            for key_tile in key_tiles:
                place = row_tile, key_tile
                if place not in added:
                    added[place] = pairs_of(*place)
                total += added[place]
    return total
