"""StreamingKV: the keys and values of a sequence without an end, and attention over them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, Final, Self, cast

import mlx.core as mx
import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from attention.core.errors import KernelUnavailable, UsageError, error_line
from attention.core.forking import check_not_forked
from attention.core.kv_format import DENSE, KVFormat, parse_kv_format
from attention.core.numbers import check_flag, check_numbers, shown_value
from attention.implementations import found_implementation
from attention.implementations.calls import try_evaluate
from attention.implementations.protocol import Implementation
from attention.kernels import cpu
from attention.masks import Mask, dtype_name
from attention.quantized_kv import FLOATS
from attention.streaming import attend, files
from attention.streaming.attend import Part, Settings, attend_parts
from attention.streaming.files import Description
from attention.streaming.rope import Rope
from attention.streaming.slots import HeadKind, Layout, Row, Slots, cut

MAX_PIECE: Final = 1024
"""Tokens of a chunk that are attended to together while the ring has others: their mask has a bit for each pair."""
STEP: Final = 256
"""Tokens by which arrays of full heads grow at least."""


class Rows(Struct, frozen=True, eq=False):
    """Rows of a batch that have seen equally many tokens, and how many are new."""

    batch: slice
    row: Row
    tokens: int
    frame: int
    """Rotary position of the first new token, if queries and keys come rotated; its slot otherwise."""


class Kept:
    """Keys and values of some heads.

    Attributes:
        heads: which K/V heads.
        keys, values: their slots.
    """

    def __init__(self, heads: Sequence[int], keys: Slots, values: Slots) -> None:
        self.heads, self.keys, self.values = tuple(heads), keys, values

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays."""
        return [*self.keys.arrays, *self.values.arrays]

    def write(self, batch: slice, begin: int, k: Sequence[mx.array], v: Sequence[mx.array]) -> None:
        """Store parts of keys and values from a slot on."""
        self.keys.write(batch, begin, k)
        self.values.write(batch, begin, v)


class StreamingKV:
    """The keys and values of a sequence: the first tokens and a window of the latest.

    A query at position p attends to the tokens j < first and p - window < j <= p, its own included; also within chunks
    of any length. Memory is allocated by the first call and does not grow (but for full heads).
    """

    def __init__(
        self,
        first: int = 4,
        window: int = 2048,
        format: str | KVFormat | None = None,
        *,
        rope: Rope | None = None,
        heads: HeadKind | Sequence[HeadKind] = "streaming",
        spare: int = 0,
    ) -> None:
        """Create an empty state.

        Args:
            first: tokens kept from the start (attention sinks).
            window: latest tokens attended to, a query's own included.
            format: of the stored keys and values, as "int8", "int4:32" or "int8+int4", keys first; None: as they come.
            rope: rotary positions; q and k are then passed unrotated. Distances are those within the kept tokens.
            heads: "streaming", or for each K/V head "streaming" or "full": full ones keep all tokens.
            spare: tokens kept beyond the window, so that rewinds by up to as many lose nothing.

        Raises:
            UsageError: a number is out of range, or there is no such format or kind of head.
        """
        self.layout = Layout(first, window, spare)
        self.formats = parse_kv_format(format) if isinstance(format, str) else format
        if not isinstance(self.formats, KVFormat | None):
            raise UsageError(f"format: got {type(format).__name__}; it takes None or a name, as 'int8' or 'int8+int4'")
        if rope is not None and not isinstance(rope, Rope):
            raise UsageError(f"rope: got {type(rope).__name__}; it takes None or attention.Rope(dims)")
        self.rope = rope
        self.heads = _checked_heads(heads)
        self._rows: list[Row] = []
        self._kept: dict[HeadKind, Kept] = {}
        self._fused = attend.Step(self.layout, self.formats, rope)
        self._pending: tuple[mx.array, mx.array, Sequence[int] | None, bool] | None = None

    # What it holds

    def __repr__(self) -> str:
        return f"StreamingKV(first={self.first}, window={self.window}, {self.format}, position {self.position})"

    @property
    def first(self) -> int:
        """Tokens kept from the start."""
        return self.layout.first

    @property
    def window(self) -> int:
        """Latest tokens attended to."""
        return self.layout.window

    @property
    def format(self) -> str:
        """Format of the stored keys and values; "none" if they are dense."""
        return DENSE if self.formats is None else self.formats.text

    @property
    def dtype(self) -> mx.Dtype | None:
        """Dtype of keys and values as they come; None before the first."""
        if self._pending is not None:
            return self._pending[1].dtype
        return next((one.values.dtype for one in self._kept.values()), None)

    @property
    def position(self) -> int | list[int]:
        """Number of tokens seen; a list if the rows of the batch differ."""
        seen = self._seen_with_pending()
        return seen[0] if len({*seen}) == 1 else seen

    @property
    def offset(self) -> int | list[int]:
        """Rotary position of the next token: its slot, which is bounded; a list if the rows of the batch differ."""
        slots = [self.layout.slot(seen) for seen in self._seen_with_pending()]
        return slots[0] if len({*slots}) == 1 else slots

    def _seen_with_pending(self) -> list[int]:
        """Return the tokens seen by each row, those of the latest `update` included."""
        seen = [row.seen for row in self._rows] or [0]
        if self._pending is not None:
            k, _, lengths, _ = self._pending
            seen = [one + more for one, more in zip(seen, lengths or [k.shape[2]] * len(seen), strict=True)]
        return seen

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, unused slots included."""
        self._flush()
        return sum(one.keys.nbytes + one.values.nbytes for one in self._kept.values())

    def kept(self, row: int = 0) -> NDArray[np.int64]:
        """Return the positions of the tokens that a batch row's latest query attends to, in order.

        Raises:
            UsageError: there is no such row.
        """
        self._flush()
        return self._chosen(row)[0].kept(self.layout) if self._rows else np.arange(0)

    def evaluated(self) -> "StreamingKV":
        """Evaluate all arrays; return the state."""
        check_not_forked()
        self._flush()
        self._fused.settle()
        mx.eval([array for one in self._kept.values() for array in one.arrays])
        return self

    # Tokens in and out

    def append(self, k: mx.array, v: mx.array, *, lengths: Sequence[int] | None = None, rotated: bool = False) -> None:
        """Store keys and values (B, Hkv, L, ·); arguments as in `attend`."""
        check_flag("rotated", rotated)
        self._flush()
        for group in self._groups(k, v, lengths):
            self._append(group, k, v, rotated)

    def update(
        self, k: mx.array, v: mx.array, *, lengths: Sequence[int] | None = None, rotated: bool = False
    ) -> tuple["StreamingKV", "StreamingKV"]:
        """Return what `attention` takes as keys and values: the state after these tokens; arguments as in `attend`.

        They are stored by that call, or before anything else that needs them.
        """
        check_flag("rotated", rotated)
        self._flush()
        self._groups(k, v, lengths)
        # what the caller changes in place from here on is not stored
        self._pending = (mx.array(k), mx.array(v), None if lengths is None else [*lengths], rotated)
        return self, self

    def attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: mx.array | None = None,
        lengths: Sequence[int] | None = None,
        rotated: bool = False,
        implementation: str | Implementation = "poc",
    ) -> mx.array:
        """Store the keys and values of new tokens, and attend with their queries.

        Args:
            q: query (B, H, L, D).
            k: key (B, Hkv, L, D), Hkv a divisor of H.
            v: value (B, Hkv, L, Dv).
            scale: factor of the scores; 1 / sqrt(D) by default.
            softcap: replaces scaled scores s by softcap * tanh(s / softcap).
            sinks: (H,): one more logit of each head's softmax, without a value.
            lengths: new tokens of each row of the batch, up to L; the queries after them give 0.
            rotated: with `rope`: q and k of token t are rotated to `offset` + t already.
            implementation: a name, or an implementation of attention.

        Returns:
            (B, H, L, Dv) in the query's dtype.

        Raises:
            UsageError: shapes or dtypes are not those of the first call, or do not fit each other, or a number is out
                of range; nothing is stored.
        """
        given = (scale, softcap, rotated, implementation)
        if lengths is None and sinks is None and self._pending is None:
            repeated = self._fused.repeat(q, k, v, given)
            if repeated is not None:
                for row in self._rows:
                    row.seen += 1
                    row.oldest += 1
                return repeated
        check_flag("rotated", rotated)
        shape = q.shape if isinstance(q, mx.array) else ()
        if len(shape) != 4:
            _check_query(q, k)
        factor, cap = check_numbers(scale, softcap, shape[3])
        if self._pending is not None:
            self._flush()
        elif lengths is None and sinks is None and shape[2] == 1:
            stepped = self._step(q, k, v, factor, cap, rotated, implementation, given)
            if stepped is not None:
                return stepped
        chosen = found_implementation(implementation)
        return self._attend(q, k, v, lengths, rotated, Settings(chosen, factor, cap, sinks))

    def attend_pending(
        self,
        q: mx.array,
        implementation: Implementation,
        scale: float,
        softcap: float | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attend with the queries of the tokens of the latest `update`; arguments as in `attend`.

        Raises:
            UsageError: there are none, or they were attended to before.
        """
        if self._pending is None:
            raise UsageError("k, v: got a StreamingKV without new tokens; it takes attention(q, *state.update(k, v))")
        (k, v, lengths, rotated), self._pending = self._pending, None
        if lengths is None and sinks is None and q.shape[2] == 1:
            stepped = self._step(q, k, v, scale, softcap, rotated, implementation)
            if stepped is not None:
                return stepped
        return self._attend(q, k, v, lengths, rotated, Settings(implementation, scale, softcap, sinks))

    def _flush(self) -> None:
        if self._pending is not None:
            (k, v, lengths, rotated), self._pending = self._pending, None
            self.append(k, v, lengths=lengths, rotated=rotated)

    def _step(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        softcap: float | None,
        rotated: bool,
        implementation: str | Implementation,
        given: tuple[object, object, bool, object] | None = None,
    ) -> mx.array | None:
        """Store a token and attend with its query in one operation of a kernel; None if that cannot be.

        `given` as in `attend.Token`.
        """
        held = self._kept.get("streaming")
        backend = None if held is None or len(self._kept) > 1 else self._fused.backend_for(implementation)
        if held is None or backend is None:
            return None
        keys, values = held.keys.arrays, held.values.arrays
        slots = [*keys, *values]
        token = attend.Token(q, k, v, scale, softcap, rotated, given)
        out: mx.array | None = None
        try:
            if backend == "cpu":
                out = self._fused.on_cpu(token, slots, [(row.seen, row.oldest) for row in self._rows])
            elif len(self._rows) == 1 or all(row == self._rows[0] for row in self._rows[1:]):
                out = self._fused.on_cuda(token, slots, self._rows[0], self._takes)
        except (KernelUnavailable, TypeError, ValueError):  # the general way says what is wrong
            return None
        if out is None:
            return None
        if backend == "cpu" or slots[0] is not keys[0]:  # on CUDA all are replaced, or none
            keys[:], values[:] = slots[: len(keys)], slots[len(keys) :]
        for row in self._rows:
            row.advance(self.layout, 1)
        return out

    def _takes(self, q: mx.array, k: mx.array, v: mx.array) -> bool:
        """Return whether one token's arrays fit those that are kept."""
        try:
            _check_query(q, k)
            self._check(k, v, None)
        except UsageError:
            return False
        return True

    def _attend(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        lengths: Sequence[int] | None,
        rotated: bool,
        settings: Settings,
    ) -> mx.array:
        _check_query(q, k)
        _check_sinks(settings.sinks, q.shape[1])
        groups = self._groups(k, v, lengths)
        made = []
        for group in groups:
            rows = q.shape[2] - group.tokens
            out = self._attend_group(group, q, k, v, rotated, settings)
            if out is None:
                out = mx.zeros((group.batch.stop - group.batch.start, q.shape[1], rows, v.shape[3]), q.dtype)
            elif rows:
                out = mx.pad(out, [(0, 0), (0, 0), (0, rows), (0, 0)])
            made.append(out)
        return made[0] if len(made) == 1 else mx.concatenate(made, axis=0)

    def _groups(self, k: mx.array, v: mx.array, lengths: Sequence[int] | None) -> list[Rows]:
        """Check new tokens, and return the rows of the batch in groups of equal lengths."""
        check_not_forked()
        self._fused.settle()
        self._check(k, v, lengths)
        if cpu.is_traced(k, v) and not try_evaluate(k, v):
            raise UsageError("k, v: got arrays that mx.compile or mx.vmap traces; it takes calls outside these")
        batch, tokens = k.shape[0], k.shape[2]
        if not self._rows:
            self._allocate(k, v)
        counts = [tokens] * batch if lengths is None else [*lengths]
        groups: list[Rows] = []
        for i, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
            if groups and groups[-1].row == row and groups[-1].tokens == count:
                groups[-1] = structs.replace(groups[-1], batch=slice(groups[-1].batch.start, i + 1))
            else:
                groups.append(Rows(slice(i, i + 1), structs.replace(row), count, self.layout.slot(row.seen)))
        return groups

    def _check(self, k: mx.array, v: mx.array, lengths: Sequence[int] | None) -> None:
        problems = [
            f"{name}: got {_described(array)}; it takes float32, float16 or bfloat16 of shape "
            "(batch, K/V heads, length, width), none of them 0"
            for name, array in (("k", k), ("v", v))
            if not isinstance(array, mx.array) or array.ndim != 4 or 0 in array.shape or array.dtype not in FLOATS
        ]
        if problems:
            raise UsageError(*problems)
        if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
            raise UsageError(f"v: got {_described(v)}; it takes batch, heads, length and dtype of k, {_described(k)}")
        if self._rows:
            self._check_like_before(k, v)
        if not isinstance(self.heads, str) and len(self.heads) != k.shape[1]:
            raise UsageError(f"heads: got {len(self.heads)} kinds; it takes one for each of {k.shape[1]} K/V heads")
        if self.rope is not None:
            self.rope.check_width(k.shape[3])
        if lengths is not None and (
            not isinstance(lengths, Sequence)
            or len(lengths) != k.shape[0]
            or not all(type(n) is int and 0 <= n <= k.shape[2] for n in lengths)
        ):
            raise UsageError(
                f"lengths: got {shown_value(lengths)}; it takes {k.shape[0]} whole numbers from 0 to {k.shape[2]}, "
                "one a row"
            )

    def _check_like_before(self, k: mx.array, v: mx.array) -> None:
        heads = sum(len(one.heads) for one in self._kept.values())
        held = next(iter(self._kept.values()))
        for name, array, slots in (("k", k, held.keys), ("v", v, held.values)):
            want = (len(self._rows), heads, slots.shape[3])
            if (array.shape[0], array.shape[1], array.shape[3]) != want or array.dtype != slots.dtype:
                raise UsageError(
                    f"{name}: got {_described(array)}; this state has {slots.dtype} with batch {want[0]}, "
                    f"{want[1]} heads and width {want[2]}"
                )

    def _allocate(self, k: mx.array, v: mx.array) -> None:
        kinds = [self.heads] * k.shape[1] if isinstance(self.heads, str) else [*self.heads]
        key, value = (None, None) if self.formats is None else (self.formats.key, self.formats.value)

        def kept(heads: list[int], slots: int) -> Kept:
            shape = (k.shape[0], len(heads), slots)
            keys = Slots.empty((*shape, k.shape[3]), key, k.dtype, "k")
            return Kept(heads, keys, Slots.empty((*shape, v.shape[3]), value, v.dtype, "v"))

        slots: dict[HeadKind, int] = {"streaming": self.layout.slots, "full": STEP}
        heads = {kind: [i for i, one in enumerate(kinds) if one == kind] for kind in slots}
        self._kept = {kind: kept(heads[kind], slots[kind]) for kind in slots if heads[kind]}
        self._rows = [Row() for _ in range(k.shape[0])]

    # Storing

    def _append(self, group: Rows, k: mx.array, v: mx.array, rotated: bool) -> None:
        for begin, end in self._pieces(group):
            self._store(
                self._piece(group, begin, end, rotated),
                cut(k, group.batch, begin, end),
                cut(v, group.batch, begin, end),
                rotated,
            )
        self._advance(group)

    def _advance(self, group: Rows) -> None:
        for row in self._rows[group.batch]:
            row.advance(self.layout, group.tokens)

    def _piece(self, group: Rows, begin: int, end: int, rotated: bool) -> Rows:
        """Return a group as it is before tokens [begin, end) of its new ones."""
        row = structs.replace(group.row)
        if begin:
            row.advance(self.layout, begin)
        frame = group.frame + begin if rotated else self.layout.slot(row.seen)
        return Rows(group.batch, row, end - begin, frame)

    def _pieces(self, group: Rows) -> Iterator[tuple[int, int]]:
        """Split new tokens: after the first tokens, and, once the ring has tokens, into lengths with small masks."""
        begin, seen = 0, group.row.seen
        while begin < group.tokens:
            position = seen + begin
            if position < self.first:
                end = min(group.tokens, begin + self.first - position)
            else:
                end = group.tokens if position == self.first else min(group.tokens, begin + MAX_PIECE)
            yield begin, end
            begin = end

    def _store(self, piece: Rows, k: mx.array, v: mx.array, rotated: bool) -> None:
        """Write a piece's keys and values (B, Hkv, L, ·); their rotary position is their slot's."""
        seen, end = piece.row.seen, piece.row.seen + piece.tokens
        if (held := self._kept.get("streaming")) is not None:
            begin = max(seen, end - self.layout.ring) if seen >= self.first else seen
            some_k, some_v = (_heads(x, held.heads)[:, :, begin - seen :] for x in (k, v))
            if self.rope is not None:
                some_k = self._at_slots(some_k, begin, piece.frame + begin - seen, rotated)
            packed = held.keys.packed(some_k), held.values.packed(some_v)
            for start, stop in self.layout.by_slot(begin, end):
                k_parts, v_parts = ([part[:, :, start - begin : stop - begin] for part in parts] for parts in packed)
                held.write(piece.batch, self.layout.slot(start), k_parts, v_parts)
        if (held := self._kept.get("full")) is not None:
            self._grow(held, end)
            some_k = _heads(k, held.heads)
            if self.rope is not None:
                some_k = self._at_positions(some_k, piece, rotated)
            held.write(piece.batch, seen, held.keys.packed(some_k), held.values.packed(_heads(v, held.heads)))

    def _at_slots(self, k: mx.array, begin: int, frame: int, rotated: bool) -> mx.array:
        """Return keys of tokens from `begin` on, rotated to their slots; if `rotated`, token t is at `frame` + t."""
        assert self.rope is not None
        slots = self.layout.slots_of(np.arange(begin, begin + k.shape[2]))
        at = np.arange(frame, frame + k.shape[2]) if rotated else np.zeros_like(slots)
        if not rotated and int(slots[-1] - slots[0]) == k.shape[2] - 1:
            return self.rope.consecutive(k, int(slots[0]))
        return self.rope.turned(k, slots - at)

    def _at_positions(self, x: mx.array, piece: Rows, rotated: bool) -> mx.array:
        """Return queries or keys of full heads rotated to their positions in the whole sequence."""
        assert self.rope is not None
        seen = piece.row.seen
        return self.rope.turned(x, seen - piece.frame) if rotated else self.rope.consecutive(x, seen)

    @staticmethod
    def _grow(held: Kept, tokens: int) -> None:
        slots = held.keys.shape[2]
        if tokens > slots:
            more = max(STEP, slots // 2, -(-(tokens - slots) // STEP) * STEP)
            held.keys.extended(more)
            held.values.extended(more)

    # Attending

    def _attend_group(
        self, group: Rows, q: mx.array, k: mx.array, v: mx.array, rotated: bool, settings: Settings
    ) -> mx.array | None:
        """Store a group's new tokens and attend with their queries; None if there are none."""
        made = []
        for begin, end in self._pieces(group):
            piece = self._piece(group, begin, end, rotated)
            query, key, value = (cut(x, group.batch, begin, end) for x in (q, k, v))
            made.append(self._attend_piece(piece, query, key, value, rotated, settings))
        self._advance(group)
        return None if not made else made[0] if len(made) == 1 else mx.concatenate(made, axis=2)

    def _attend_piece(
        self, piece: Rows, q: mx.array, k: mx.array, v: mx.array, rotated: bool, settings: Settings
    ) -> mx.array:
        group = q.shape[1] // k.shape[1]
        if piece.tokens == 1:
            self._store(piece, k, v, rotated)
            for one in self._rows[piece.batch]:  # gone, even if the call below fails
                one.overwrite(self.layout, piece.row.seen + 1)
        made, heads = [], []
        for kind, held in self._kept.items():
            own = [head * group + i for head in held.heads for i in range(group)]
            rows = _heads(q, own)
            named = (
                settings if settings.sinks is None else structs.replace(settings, sinks=settings.sinks[mx.array(own)])
            )
            new = (_heads(k, held.heads), _heads(v, held.heads))
            parts = (
                self._window(held, piece, rows, *new, rotated)
                if kind == "streaming"
                else self._all(held, piece, rows, *new, rotated)
            )
            made.append(attend_parts(parts, named))
            heads += own
        if piece.tokens > 1:
            self._store(piece, k, v, rotated)
        if len(made) == 1:
            return made[0]
        return mx.concatenate(made, axis=1)[:, mx.array(np.argsort(heads))]

    def _all(self, held: Kept, piece: Rows, q: mx.array, k: mx.array, v: mx.array, rotated: bool) -> list[Part]:
        """Return the parts of full heads: the tokens before, and the new ones."""
        seen = piece.row.seen
        if self.rope is not None:
            q, k = (self._at_positions(x, piece, rotated) for x in (q, k))
        before = seen + 1 if piece.tokens == 1 else seen
        kept = [Part(q, held.keys.at(piece.batch, 0, before), held.values.at(piece.batch, 0, before))] if before else []
        return kept if piece.tokens == 1 else [*kept, Part(q, k, v, Mask(causal=True))]

    def _window(self, held: Kept, piece: Rows, q: mx.array, k: mx.array, v: mx.array, rotated: bool) -> list[Part]:
        """Return the parts of streaming heads: the first tokens, the ring's laps, and more than one new token."""
        layout, row, tokens = self.layout, piece.row, piece.tokens
        seen, end = row.seen, row.seen if tokens > 1 else row.seen + 1
        frame = piece.frame
        if self.rope is not None and not rotated:
            q, k = self.rope.consecutive(q, frame), self.rope.consecutive(k, frame)
        after = structs.replace(row)  # a single token is in the ring already
        after.advance(layout, tokens if tokens == 1 else 0)
        positions = np.arange(seen, seen + tokens)
        begins = np.array([after.begins(layout, int(p)) for p in positions])

        def part(query: mx.array, start: int, stop: int, mask: Mask) -> Part:
            slot = layout.slot(start)
            return Part(
                query,
                held.keys.at(piece.batch, slot, slot + stop - start),
                held.values.at(piece.batch, slot, slot + stop - start),
                mask,
            )

        parts = []
        in_order = int(begins[0]) == layout.first
        if self.rope is None and (in_order or (tokens == 1 and end - int(begins[0]) == layout.ring)):
            # One run of slots; a single query that sees them all does not need their order.
            if used := min(end, layout.slots):
                parts.append(part(q, 0, used, self._seen(0, used, begins) if in_order else Mask()))
        else:
            if min(end, self.first):
                by = np.where(positions < self.first, positions, self.first + positions - begins) - (
                    positions - seen + frame
                )
                query = q if self.rope is None else self.rope.turned(q, by if tokens > 1 else int(by[0]))
                parts.append(part(query, 0, min(end, self.first), Mask()))
            for start, stop in layout.by_slot(int(begins[0]), end):
                turn = seen - layout.lap(start) * layout.ring - frame
                query = q if self.rope is None else self.rope.turned(q, turn)
                parts.append(part(query, start, stop, self._seen(start, stop, begins)))
        if tokens > 1:
            bounded = seen >= self.first and tokens > layout.window
            parts.append(Part(q, k, v, Mask(window=layout.window) if bounded else Mask(causal=True)))
        return parts

    def _seen(self, start: int, stop: int, begins: NDArray[np.int64]) -> Mask:
        """Return which of the tokens [start, stop) queries see whose windows begin at `begins`."""
        if int(begins[-1]) <= max(start, self.first):
            return Mask()
        keys = mx.arange(stop - start)  # counted from `start`, as positions may exceed 32 bits
        begins = (begins - start).astype(np.int32)
        return Mask(array=(keys >= mx.array(begins)[:, None]) | (keys < max(0, self.first - start)))

    # Copies and going back

    def fork(self) -> "StreamingKV":
        """Return a state with the same tokens, which goes on by itself; what both have is shared until one writes."""
        self._flush()
        self._fused.settle()
        made = StreamingKV.__new__(StreamingKV)
        vars(made).update(vars(self))
        made._fused = attend.Step(self.layout, self.formats, self.rope)
        made._rows = [structs.replace(row) for row in self._rows]
        made._kept = {kind: Kept(held.heads, held.keys.twin(), held.values.twin()) for kind, held in self._kept.items()}
        return made

    def __copy__(self) -> "StreamingKV":
        """Return a fork."""
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> "StreamingKV":
        """Return a fork; mlx-lm copies the caches of prompts."""
        return self.fork()

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a pickle is made of: the parts of a saved file."""
        return type(self).of_description, self.described()

    def removable_exactly(self) -> int:
        """Return how many tokens `rewind` can take back from all rows so that the window stays full."""
        self._flush()
        return min((one.removable_exactly(self.layout) for one in self._rows), default=0)

    def removable(self, *, row: int | None = None) -> int:
        """Return how many tokens `rewind` can take back from one row of the batch, or from all.

        Raises:
            UsageError: there is no such row.
        """
        self._flush()
        return min((one.removable(self.layout) for one in self._chosen(row)), default=0)

    def _chosen(self, row: int | None) -> list[Row]:
        """Return one row of the batch, or all of them."""
        if row is None or not self._rows:
            return self._rows
        if type(row) is not int or not 0 <= row < len(self._rows):
            raise UsageError(f"row: got {row!r}; it takes a whole number from 0 to {len(self._rows) - 1}")
        return [self._rows[row]]

    def rewind(self, tokens: int, *, row: int | None = None) -> None:
        """Forget the latest tokens, of one row of the batch or of all.

        Tokens that the ring has overwritten do not come back: with `spare` slots for them none are missing; otherwise
        the window has fewer tokens until new ones arrive.

        Raises:
            UsageError: fewer tokens are kept, or there is no such row.
        """
        most = self.removable(row=row)
        if type(tokens) is not int or not 0 <= tokens <= most:
            raise UsageError(f"tokens: got {tokens!r}; this state can take back from 0 to {most}")
        self._fused.again = None  # the ring is not full any more
        for one in self._chosen(row):
            one.seen -= tokens

    # Files

    def described(self) -> tuple[dict[str, mx.array], Description]:
        """Return all arrays by name, and what they are."""
        self.evaluated()
        arrays = {
            f"{kind}.{name}.{i}": array
            for kind, one in self._kept.items()
            for name, slots in (("keys", one.keys), ("values", one.values))
            for i, array in enumerate(slots.arrays)
        }
        rope = None
        if self.rope is not None:
            rope = {name: getattr(self.rope, name) for name in ("dims", "base", "traditional", "scale")}
            if self.rope.freqs is not None:
                arrays["rope.freqs"] = self.rope.freqs
        held = [*self._kept.values()]
        description = Description(
            first=self.first,
            window=self.window,
            spare=self.layout.spare,
            format=self.format,
            heads=self.heads if isinstance(self.heads, str) else [*self.heads],
            rope=rope,
            rows=[(row.seen, row.oldest) for row in self._rows],
            dtypes=[dtype_name(slots.dtype) for slots in (held[0].keys, held[0].values)] if held else [],
            kept=[(kind, [*one.heads]) for kind, one in self._kept.items()],
        )
        return arrays, description

    @classmethod
    def of_description(cls, arrays: dict[str, mx.array], description: Description) -> Self:
        """Return the state with these arrays.

        Raises:
            UsageError: they do not fit the description.
        """
        rope = None
        if description.rope is not None:
            rope = Rope(**description.rope, freqs=arrays.get("rope.freqs"))  # type: ignore[arg-type]  # checked there
        made = cls(
            description.first,
            description.window,
            description.format,
            rope=rope,
            heads=cast("Any", description.heads),
            spare=description.spare,
        )
        made._rows = [Row(seen, oldest) for seen, oldest in description.rows]
        if any(row.seen < 0 or row.oldest < 0 for row in made._rows):
            raise UsageError("it has negative positions")
        for kind, heads in description.kept:
            made._hold(kind, heads, arrays, description)
        if bool(made._rows) != bool(made._kept):
            raise UsageError("it has rows without keys, or keys without rows")
        return made

    def _hold(self, kind: HeadKind, heads: list[int], arrays: dict[str, mx.array], description: Description) -> None:
        """Take over saved arrays of one kind of heads."""
        forms = (None, None) if self.formats is None else (self.formats.key, self.formats.value)
        slots = []
        for name, form, dtype in zip(("keys", "values"), forms, description.dtypes, strict=True):
            parts = [arrays[f"{kind}.{name}.{i}"] for i in range(1 if form is None else 3 if form.has_biases else 2)]
            slots.append(Slots(parts, form, getattr(mx, dtype)))
            shape = slots[-1].shape
            rows = self.layout.slots if kind == "streaming" else max(row.seen for row in self._rows)
            fits = shape[2] == rows if kind == "streaming" else shape[2] >= rows
            if len(shape) != 4 or (shape[0], shape[1]) != (len(self._rows), len(heads)) or not fits:
                raise UsageError(f"{kind} {name} have shape {tuple(shape)}")
        self._kept[kind] = Kept(heads, *slots)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, as a whole or not at all.

        Raises:
            UsageError: the path is none.
            OSError: it cannot be written.
        """
        files.save(path, *self.described())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return a saved state, which goes on bit for bit as the saved one would have.

        Raises:
            UsageError: the path is none, or the file is not a saved state, or was damaged: one line.
            OSError: it cannot be read.
        """
        check_not_forked()
        arrays, description = files.load(path)
        try:
            return cls.of_description(arrays, description)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = error_line(error).partition(": ")[2]
            raise UsageError(f"{path}: not a saved StreamingKV, or damaged: {reason}") from error


def _checked_heads(heads: Any) -> HeadKind | tuple[HeadKind, ...]:
    kinds = (heads,) if isinstance(heads, str) else heads
    try:
        known = len(kinds) > 0 and all(kind in ("streaming", "full") for kind in kinds)
    except TypeError:
        known = False
    if not known:
        raise UsageError(f"heads: got {heads!r}; it takes 'streaming', or 'streaming' or 'full' for each K/V head")
    return heads if isinstance(heads, str) else tuple(heads)  # type: ignore[return-value]  # checked


def _check_query(q: object, k: object) -> None:
    if not isinstance(q, mx.array) or not isinstance(k, mx.array) or q.ndim != 4 or k.ndim != 4:
        raise UsageError(f"q: got {_described(q)}; it takes an array (batch, heads, length, width), as k")
    same = (q.shape[0], q.shape[2], q.shape[3], q.dtype) == (k.shape[0], k.shape[2], k.shape[3], k.dtype)
    if not same or q.shape[1] % max(1, k.shape[1]):
        raise UsageError(
            f"q: got {_described(q)}; it takes k's batch, length, width and dtype, and a multiple of its heads: "
            f"{_described(k)}"
        )


def _check_sinks(sinks: object, heads: int) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, mx.array) or tuple(sinks.shape) != (heads,) or sinks.dtype not in FLOATS:
        raise UsageError(
            f"sinks: got {_described(sinks)}; it takes None, or float32, float16 or bfloat16 of shape ({heads},), "
            "one a query head"
        )


def _described(array: object) -> str:
    return f"{array.dtype} of shape {tuple(array.shape)}" if isinstance(array, mx.array) else type(array).__name__


def _heads(x: mx.array, heads: Sequence[int]) -> mx.array:
    """Return some heads of (B, heads, L, ·)."""
    begin, end = heads[0], heads[-1] + 1
    if end - begin == len(heads):
        return x if len(heads) == x.shape[1] else x[:, begin:end]
    return x[:, mx.array([*heads])]
