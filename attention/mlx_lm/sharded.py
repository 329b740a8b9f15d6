"""mlx-lm's models over several devices: each rank runs the whole model on its rows of the sequence.

    rank 0    tokens of chunks 0 and 3 ─▶ layers ─▶ logits of these rows        every rank has all weights,
                                   ▲ │                                          and the keys of its own rows
                    keys and values│ ▼in attention
    rank 1    tokens of chunks 1 and 2 ─▶ layers ─▶ logits of these rows

A few tokens, as in decoding, are run by every rank; attention splits the keys among them, and the rank that has the
fewest keeps the new ones.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import mlx.core as mx
from msgspec import Struct

from attention import distributed
from attention.core.errors import UnsupportedError, UsageError
from attention.distributed import collectives
from attention.distributed.layout import Layout, extended, make_layout
from attention.implementations.protocol import Implementation
from attention.mlx_lm.patch import MadeMask, ModelCall, ModelPatch, in_implementation
from attention.monitoring import patch_points

MIN_SHARDED_ROWS: Final = 64
"""Tokens of a call from which they are sharded; fewer are run by every rank."""
PATH: Final = "{} over {} ranks"


class Step(Struct):
    """One call of a model: where its rows and keys are."""

    rows: Layout
    keys: Layout
    rank: int
    owner: int = 0
    """The rank that keeps the keys of rows that every rank has."""
    windows: dict[int, tuple[MadeMask, int]] = {}
    """Windows of masks made in this call, by the identity of the array that stands for them."""


class _Current(threading.local):
    """The call that this thread is in."""

    step: Step | None = None


_current = _Current()


class Positions:
    """Where the keys of a model's caches are, shared by the caches of its layers."""

    def __init__(self) -> None:
        """Start without keys."""
        self.layout: Layout | None = None

    @property
    def length(self) -> int:
        """Number of keys on all ranks."""
        return 0 if self.layout is None else self.layout.seq


class ShardedKVCache:
    """This rank's keys and values of a layer; a drop-in for mlx-lm's KVCache within a `ShardedModel`.

    Attributes:
        offset: number of tokens before the next ones, on all ranks.
    """

    def __init__(self, positions: Positions) -> None:
        """Create it empty."""
        from mlx_lm.models.cache import KVCache

        self.positions = positions
        self.offset = 0
        self._own: Any = KVCache()  # type: ignore[no-untyped-call]
        self._none: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append this rank's part of new keys and values (B, Hkv, rows, D); return all that it has."""
        step = _current.step
        if step is None:
            raise UsageError("cache: a sharded cache is filled by the model that patch.sharded(model) returns")
        self.offset = step.keys.seq
        if step.rows.is_sharded or step.owner == step.rank:
            return cast("tuple[mx.array, mx.array]", self._own.update_and_fetch(keys, values))
        # evaluating this rank's cache must compute what other ranks' caches need of it: they wait in collectives
        if self._own.empty():
            self._none = [keys[:, :, :0], values[:, :, :0]]
            return self._none[0], self._none[1]
        self._own.keys = mx.depends(self._own.keys, [keys, values])
        return cast("tuple[mx.array, mx.array]", self._own.keys_and_values())

    def make_mask(self, rows: int, window_size: int | None = None, return_array: bool = False) -> Any:
        """Return what stands for the mask of the rows: the whole mask is not made."""
        step = _current.step
        if step is None or (window_size is None and not return_array):
            return "causal"
        named = MadeMask(mx.ones((1, 1), mx.bool_))
        step.windows[id(named)] = named, window_size or step.keys.seq
        return named

    @property
    def state(self) -> list[mx.array]:
        """This rank's arrays."""
        return self._none if self._own.empty() else list(self._own.keys_and_values())

    def size(self) -> int:
        """Return the number of this rank's keys."""
        return int(self._own.offset)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's arrays."""
        return sum(array.nbytes for array in self.state)

    def empty(self) -> bool:
        """Return whether no rank has keys."""
        return self.offset == 0

    def is_trimmable(self) -> bool:
        """Return whether `trim` works: it does not."""
        return False


class ShardedPatch(ModelPatch):
    """The patch of `patch_mlx_lm(implementation, group=group)`."""

    def __init__(self, implementation: str | Implementation, group: mx.distributed.Group) -> None:
        """Look up the implementation; nothing is replaced yet."""
        super().__init__(implementation)
        self.group = group

    def sharded(self, model: Any) -> "ShardedModel":
        """Return a model that runs `model` over the ranks; every rank calls it with the same tokens."""
        return ShardedModel(model, self)

    def sequence_loss(self, model: Any, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        """Compute this rank's part of mlx-lm's training loss: pass it as `loss` to its `train`, with `whole_batches`.

        `train` averages losses and gradients over the ranks, so that this part is multiplied by their number.

        Args:
            model: the model.
            batch: tokens (B, L + 1), the same on all ranks.
            lengths: (B, 2), the first and the last position that counts.

        Returns:
            The loss, and this rank's share of the tokens that count.
        """
        import mlx.nn as nn

        inputs, targets = batch[:, :-1], batch[:, 1:]
        places = mx.arange(1, targets.shape[1] + 1)
        counts = mx.logical_and(places >= lengths[:, 0:1], places <= lengths[:, 1:])
        rows = self.layout_of(int(inputs.shape[1]))
        with self.step(Step(rows, rows, self.group.rank())), _gradients_together(model):
            logits = model(self.own_tokens(inputs, rows))
        losses = nn.losses.cross_entropy(logits, self.own_tokens(targets, rows)) * self.own_tokens(counts, rows)
        tokens = counts.sum()
        ranks = self.group.size()
        return ranks * losses.astype(mx.float32).sum() / tokens, tokens / ranks

    @staticmethod
    def whole_batches(**arguments: Any) -> Iterator[Any]:
        """Yield mlx-lm's training batches, the same on all ranks: pass it as `iterate_batches` to its `train`."""
        from mlx_lm.tuner import trainer

        batches: Any = trainer.iterate_batches
        return cast("Iterator[Any]", batches(**{"seed": 0, **arguments, "comm_group": None}))

    def layout_of(self, seq: int) -> Layout:
        """Return the layout of a sequence's rows.

        Raises:
            UsageError: it is too short for every rank to have a row of both chunks.
        """
        if seq < 2 * self.group.size():
            raise UsageError(f"tokens: got {seq}; {self.group.size()} ranks take at least {2 * self.group.size()}")
        return make_layout(seq, self.group.size(), "zigzag")

    def own_tokens(self, tokens: mx.array, rows: Layout) -> mx.array:
        """Return this rank's columns of (B, L)."""
        return distributed.own_rows(tokens[..., None], rows, self.group.rank())[..., 0]

    @contextmanager
    def step(self, step: Step) -> Iterator[None]:
        """Attend within it as the step says; the patch must be open."""
        if not self.is_open:
            raise UsageError("model: a sharded model runs while its patch is open: with patch_mlx_lm(..., group=group)")
        before, _current.step = _current.step, step
        try:
            with collectives.in_sequence():
                yield
        finally:
            _current.step = before

    def _places(self) -> Sequence[tuple[patch_points.PatchPoint, Callable[..., Any]]]:
        return [*super()._places(), (patch_points.fast_rope(), self._rotate)]

    def _rotate(self, x: mx.array, *args: Any, offset: Any, **named: Any) -> mx.array:
        """Replacement of `mx.fast.rope`: each chunk of the rows is rotated by its own positions."""
        rope, step = patch_points.fast_rope().observed, _current.step
        if step is None or not step.rows.is_sharded:
            return cast("mx.array", rope(x, *args, offset=offset, **named))
        chunks, made, first = step.rows.chunks[step.rank], [], 0
        for start, stop in chunks:
            part = x[..., first : first + stop - start, :]
            made.append(rope(part, *args, offset=offset + start, **named))
            first += stop - start
        return mx.concatenate(made, axis=-2)

    def _attend(
        self,
        queries: mx.array,
        keys: Any,
        values: Any,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        step = _current.step
        if step is None:
            return super()._attend(queries, keys, values, cache, scale, mask, sinks)
        if sinks is not None:
            raise UnsupportedError("patch_mlx_lm: a model with attention sinks over several ranks")
        window = self._window(ModelCall(queries, keys, values, scale, mask), step)
        with in_implementation():
            out = distributed.attention(
                queries,
                keys,
                values,
                group=self.group,
                layout=step.rows,
                key_layout=step.keys,
                scale=scale,
                mask="causal",
                window=window,
                implementation=self.implementation,
            )
        method = "context" if step.rows.is_sharded else "split keys"
        self.count_taken(PATH.format(method, self.group.size()))
        return cast("mx.array", out)

    def _window(self, call: ModelCall, step: Step) -> int | None:
        """Return the window of a call's mask.

        Raises:
            UnsupportedError: the mask is an array that is not known to be causal or a window.
        """
        if not isinstance(call.mask, mx.array):
            return None
        if id(call.mask) in step.windows and step.windows[id(call.mask)][0].is_as_made:
            return step.windows[id(call.mask)][1]
        known = self._masks.by_position(call)
        if isinstance(known.mask, mx.array) or known.pattern is not None:
            raise UnsupportedError("patch_mlx_lm: an array mask over several ranks")
        return known.window

    def _attend_in_gemma2(self, layer: Any, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        if _current.step is not None:
            raise UnsupportedError("patch_mlx_lm: Gemma 2 over several ranks")
        return super()._attend_in_gemma2(layer, x, mask, cache)


@contextmanager
def _gradients_together(model: Any) -> Iterator[None]:
    """Make the gradients of a model's parameters available at once, before `train` averages them over the ranks."""
    from mlx.utils import tree_flatten, tree_unflatten

    parameters = model.trainable_parameters()
    names, arrays = zip(*tree_flatten(parameters), strict=True)
    model.update(tree_unflatten(list(zip(names, collectives.together(arrays), strict=True))))
    try:
        yield
    finally:
        model.update(parameters)


class ShardedModel:
    """A model of mlx-lm whose calls are shared by the ranks; other attributes are the model's own.

    A call takes tokens (B, L), the same on every rank, and returns logits (B, L, vocabulary), on every rank; those of
    a long prompt are only gathered if they are used.
    """

    def __init__(self, model: Any, patch: ShardedPatch) -> None:
        self._model, self._patch = model, patch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def make_cache(self) -> list[ShardedKVCache]:
        """Return caches for a generation, one a layer.

        Raises:
            UsageError: the model has caches of another kind.
        """
        from mlx_lm.models.cache import KVCache, make_prompt_cache

        plain = make_prompt_cache(self._model)
        other = next((type(each).__name__ for each in plain if type(each) is not KVCache), None)
        if other is not None:
            raise UsageError(f"model: got one with a {other}; over several ranks it takes plain caches")
        positions = Positions()
        return [ShardedKVCache(positions) for _ in plain]

    def __call__(self, tokens: mx.array, cache: Sequence[ShardedKVCache] | None = None, **more: Any) -> mx.array:
        """Run the model on this rank's rows, or on all if they are few; return all logits."""
        patch, seq = self._patch, int(tokens.shape[1])
        group = patch.group
        positions = Positions() if cache is None else cache[0].positions
        if seq < max(MIN_SHARDED_ROWS, 2 * group.size()):
            before = positions.layout
            owner = 0 if before is None else min(range(group.size()), key=before.rows)
            rows = make_layout(seq, group.size(), "replicated")
            step = Step(rows, extended(before, rows, owner), group.rank(), owner)
            kept = self.make_cache() if cache is None else cache
            with patch.step(step):
                logits = self._model(tokens, cache=kept, **more)
            positions.layout = step.keys
            return cast("mx.array", logits)
        rows = patch.layout_of(seq)
        step = Step(rows, extended(positions.layout, rows), group.rank())
        with patch.step(step):
            logits = self._model(patch.own_tokens(tokens, rows), cache=cache, **more)
        positions.layout = step.keys
        return distributed.unshard(logits[:, None], rows, group)[:, 0]
