"""Checks that each rank of a group makes; run as a program, once a rank. Prints a line for each failure.

Every rank makes the same inputs and knows the whole result, in float64, and compares its own part.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # several ranks share the cores, and wait for each other busily

import mlx.core as mx
import numpy as np

from attention import attention, distributed, masks
from attention.core.errors import UnsupportedError
from attention.distributed import Layout, collectives, movement
from attention.distributed.peers import PeerCopies, RowPlan
from attention.implementations.baseline import Baseline, in_tf32
from attention.implementations.calls import current_backend
from attention.masks import Pattern
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Options

HEADS, KV_HEADS, DIM = 4, 2, 32
FLOOR = 4e-6
"""Rounding of the CPU kernel's own sums in float32."""
NEAR = 1e-4
"""Largest difference between several ranks' float32 results and one device's."""
TF32_NEAR = 4e-3
"""That of results of products in TF32, per largest value: each operand is rounded by up to 2^-11, and one device's
product may be in TF32 where a rank's, of fewer keys, is not. Emulated on the CPU, gradients of `baseline` differ by up
to 1.04e-3. Parts of a wrong rank or call differ by about the largest value."""
failures: list[str] = []


def documents(seq: int) -> Pattern:
    return masks.causal() & masks.documents([seq // 3, seq // 3, seq - 2 * (seq // 3)])


def arrays(seq: int, kv_seq: int, dtype: mx.Dtype) -> list[mx.array]:
    shapes = [(1, HEADS, seq, DIM), (1, KV_HEADS, kv_seq, DIM), (1, KV_HEADS, kv_seq, DIM), (1, HEADS, seq, DIM)]
    keys = mx.random.split(mx.random.key(seq + kv_seq), 4)
    return [mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=True)]


def compare(got: mx.array, exact: np.ndarray, plain: np.ndarray, factor: float, what: str) -> None:
    try:
        if got.size:
            oracle.assert_near(got, exact, plain, got.dtype, factor, what, FLOOR if got.dtype == mx.float32 else 0)
    except AssertionError as error:
        failures.append(str(error) or f"{what}: shape {got.shape}, expected {exact.shape}")


def compare_with_one(got: mx.array, wanted: mx.array, implementation: str, what: str) -> None:
    """Compare with what one device computes by the same implementation, in float32."""
    if not got.size:
        return
    tf32 = implementation == "baseline" and in_tf32("float32", current_backend())  # poc avoids it
    allowed = max(NEAR, TF32_NEAR * mx.abs(wanted).max().item()) if tf32 else NEAR
    error = mx.abs(got - wanted).max().item()
    if not error < allowed:
        failures.append(f"{what}: error {error:.3g}, allowed {allowed:.3g}")


def must_be_refused(call: Callable[[], object], what: str) -> None:
    try:
        call()
        failures.append(f"{what} was not refused")
    except UnsupportedError:
        pass


def rows(x: np.ndarray, layout: Layout, rank: int, axis: int = 2) -> np.ndarray:
    if layout.kind == "heads":
        return np.array_split(x, layout.ranks, axis=1)[rank]
    if not layout.is_sharded:
        return x
    return np.take(x, [p for start, stop in layout.chunks[rank] for p in range(start, stop)], axis=axis)


def options_of(keywords: dict, shape: tuple[int, int, int, int]) -> Options:
    mask = keywords.get("mask")
    dense = None
    if isinstance(mask, Pattern):
        dense = np.broadcast_to(np.array(mask.dense(shape)), shape)
    elif isinstance(mask, mx.array):
        dense = np.array(mask)
    return Options(DIM**-0.5, mask == "causal" if isinstance(mask, str) else False, keywords.get("window"), None, dense)


def self_attention(group, kind: str, seq: int, dtype: mx.Dtype, weights=None, **keywords) -> None:
    """Forward and gradients of a sequence in a layout, and the same bits again."""
    rank = group.rank()
    if mx.default_device() == mx.gpu:
        dtype = mx.bfloat16  # a GPU's float32 products may round to fewer bits
    q, k, v, cotangent = arrays(seq, seq, dtype)
    mask = keywords.get("mask")
    parts = distributed.shard(
        q, k, v, group, kind, mask=mask if isinstance(mask, Pattern | str) else None, weights=weights
    )
    own_cotangent = distributed.shard(cotangent, cotangent, cotangent, group, parts.layout).q

    def call(*own: mx.array) -> mx.array:
        return attention(*own, group=group, layout=parts.layout, implementation="poc", **keywords)

    results = []
    for _ in range(2):
        (out,), gradients = mx.vjp(call, list(parts[:3]), [own_cotangent])
        mx.eval(out, gradients)
        results.append([out, *gradients])
    whole = distributed.unshard(results[0][0], parts.layout, group)
    mx.eval(whole)
    what = f"rank {rank}, {kind}, {seq}, {dtype}, {keywords if mask is None or isinstance(mask, str) else mask!r}"
    if not all(mx.array_equal(*pair).item() for pair in zip(*results, strict=True)):
        failures.append(f"{what}: other bits the second time")
    options = options_of(keywords, (1, HEADS, seq, seq))
    given = [oracle.numbers(x) for x in (q, k, v, cotangent)]
    exact = [oracle.attention(*given[:3], options)[0], *oracle.gradients(*given, options)]
    plain = [
        oracle.plain_attention(*given[:3], options, dtype),
        *oracle.plain_gradients(*given, options, dtype),
    ]
    for name, got, one, other in zip(("output", "dQ", "dK", "dV"), results[0], exact, plain, strict=True):
        factor = 2 if name == "output" else 3
        compare(got, rows(one, parts.layout, rank), rows(other, parts.layout, rank), factor, f"{what}: {name}")
    compare(whole, exact[0], plain[0], 2, f"{what}: unsharded output")


def decode(group, kind: str, seq: int, kv_seq: int, **keywords) -> None:
    """A few rows, which every rank has, against a sharded cache."""
    rank = group.rank()
    q, k, v, cotangent = arrays(seq, kv_seq, mx.float32)
    keys = distributed.make_layout(kv_seq, group.size(), kind)
    own = [distributed.own_rows(x, keys, rank) for x in (k, v)]

    def call(*given: mx.array) -> tuple[mx.array, mx.array]:
        return attention(
            *given,
            group=group,
            layout=distributed.make_layout(seq, group.size(), "replicated"),
            key_layout=keys,
            return_lse=True,
            implementation="poc",
            **keywords,
        )

    (out, logsumexp), gradients = mx.vjp(call, [q, *own], [cotangent, mx.zeros(q.shape[:3])])
    mx.eval(out, logsumexp, gradients)
    options = options_of(keywords, (1, HEADS, seq, kv_seq))
    given = [oracle.numbers(x) for x in (q, k, v)]
    exact, exact_lse, _ = oracle.attention(*given, options)
    what = f"rank {rank}, decode {kind}, {seq} x {kv_seq}, {keywords}"
    compare(out, exact, oracle.plain_attention(*given, options, mx.float32), 4, what)
    if np.abs(oracle.numbers(logsumexp) - exact_lse).max() > 1e-5:
        failures.append(f"{what}: logsumexp")
    # each rank has a loss of the whole output: the gradients are those of their sum
    exact_gradients = oracle.gradients(*given, oracle.numbers(cotangent), options)
    for name, got, one in zip(("dK", "dV"), gradients[1:], exact_gradients[1:], strict=True):
        wanted = group.size() * rows(one, keys, rank)
        if np.abs(oracle.numbers(got) - wanted).max(initial=0) > 1e-4:
            failures.append(f"{what}: {name}")
    whole_dq = mx.distributed.all_sum(gradients[0], group=group)
    if np.abs(oracle.numbers(whole_dq) - group.size() * exact_gradients[0]).max() > 1e-4:
        failures.append(f"{what}: dQ summed over the ranks")


def few(group) -> None:
    """The checks of the default suite."""
    kinds = ("zigzag", "contiguous", "balanced")
    for kind in kinds:
        self_attention(group, kind, 300, mx.bfloat16, mask="causal")
    if KV_HEADS % group.size() == 0:
        self_attention(group, "heads", 64, mx.float32, mask="causal")
    self_attention(group, "zigzag", 37, mx.float32)
    self_attention(group, "contiguous", 300, mx.float32, window=40)
    self_attention(group, "balanced", 512, mx.float32, mask=documents(512))
    self_attention(group, "zigzag", 101, mx.float32, mask=masks.prefix(5) | masks.window(30))
    self_attention(group, "zigzag", 300, mx.float32, mask="causal", weights=[1 + n for n in range(group.size())])
    decode(group, "contiguous", 1, 301, mask="causal")
    decode(group, "zigzag", 3, 301, window=40)
    decode(group, "contiguous", 2, 301, mask=masks.causal() & masks.documents([150, 151]))
    decode(group, "zigzag", 3, 301, mask=masks.window(40) | masks.prefix(5))
    decode(group, "zigzag", 5, 61, mask=mx.arange(61) % 3 > 0, window=40)
    biased(group)
    gradient_of_one_input(group)
    one_result(group)
    independent_calls(group)
    compiled_calls(group)
    covered_rows(group)
    refusals(group)
    refuse_vmap(group)
    by_plan(group)


def biased(group) -> None:
    """Biases depend on positions of the whole sequence; outputs would not show that of a row's, logsumexps do."""
    rank, bias = group.rank(), masks.alibi([0.5, -0.2, 0.1, 0.02])
    q, k, v, _ = arrays(101, 101, mx.float32)
    for kind in ("zigzag", "contiguous"):
        for mask in ("causal", masks.documents([30, 71]), masks.window(9) | masks.prefix(60)):
            parts = distributed.shard(q, k, v, group, kind)
            more = {"mask": mask, "score_mod": bias, "return_lse": True, "implementation": "practical"}
            found = attention(*parts[:3], group=group, layout=parts.layout, **more)
            wanted = attention(q, k, v, **more)
            for got, one, what in zip(found, wanted, ("output", "logsumexp"), strict=True):
                own = mx.array(rows(np.array(one), parts.layout, rank))
                compare_with_one(got, own, "practical", f"rank {rank}, ALiBi, {kind}, {mask}: {what}")


def gradient_of_one_input(group) -> None:
    """A rank that rows see no key of waits for the gradients of the others too, whatever they are of."""
    rank = group.rank()
    for kv_seq, mask, inputs in ((300, masks.window(20), (1, 2)), (3, None, (1, 2, 3)), (1, None, (1, 2, 3))):
        q, k, v, _ = arrays(1, kv_seq, mx.float32)
        keys = distributed.make_layout(kv_seq, group.size(), "contiguous")
        own = [distributed.own_rows(x, keys, rank) for x in (k, v)]
        layouts = {"layout": distributed.make_layout(1, group.size(), "replicated"), "key_layout": keys}
        array = mx.random.normal((1, kv_seq), key=mx.random.key(1))

        def loss(*given, mask=mask, **keywords) -> mx.array:
            *qkv, array = given
            return (
                attention(*qkv, mask=array if mask is None else mask, implementation="poc", **keywords).square().sum()
            )

        for of in inputs:
            got = mx.grad(loss, of)(q, *own, array, group=group, **layouts)
            wanted = group.size() * mx.grad(loss, of)(q, k, v, array)
            if of == 3:
                got = mx.distributed.all_sum(got, group=group)
            else:
                wanted = distributed.own_rows(wanted, keys, rank)
            mx.eval(got)  # a rank without keys too
            compare_with_one(got, wanted, "poc", f"rank {rank}: gradient of input {of} alone, {kv_seq} keys")


def one_result(group) -> None:
    """The logsumexp alone, and gradients of an implementation whose logsumexp does not depend on the values."""
    rank = group.rank()
    q, k, v, _ = arrays(64, 64, mx.float32)
    own = distributed.shard(q, k, v, group, "contiguous")

    def logsumexp(*given, **keywords) -> mx.array:
        return attention(*given, mask="causal", implementation="poc", return_lse=True, **keywords)[1]

    def found(k) -> mx.array:
        return logsumexp(own.q, k, own.v, group=group, layout=own.layout).square().sum()

    sums = logsumexp(*own[:3], group=group, layout=own.layout)
    mx.eval(sums)
    slope = mx.grad(found)(own.k)
    wanted = [logsumexp(q, k, v)[..., None], mx.grad(lambda k: logsumexp(q, k, v).square().sum())(k)]
    for got, one in zip((sums[..., None], slope), wanted, strict=True):
        mine = distributed.own_rows(one, own.layout, rank)
        compare_with_one(got, mine, "poc", f"rank {rank}: the logsumexp alone, or its gradient")
    q = q[:, :, :2]
    step = {"layout": distributed.make_layout(2, group.size(), "replicated"), "key_layout": own.layout}

    def loss(v, q=q, k=k, **keywords) -> mx.array:
        return attention(q, k, v, window=2, implementation="baseline", **keywords).square().sum()

    got, one = mx.grad(loss)(own.v, k=own.k, group=group, **step), mx.grad(loss)(v)
    mine = group.size() * distributed.own_rows(one, own.layout, rank)
    compare_with_one(got, mine, "baseline", f"rank {rank}: gradient of values by an implementation in steps")


def refuse_vmap(group) -> None:
    """MLX's rule for a gather mixes the mapped axis with that of the ranks."""
    q, k, v = (mx.stack([x] * 3) for x in arrays(16, 16, mx.float32)[:3])
    step = {"layout": distributed.make_layout(16, group.size(), "replicated")}
    step["key_layout"] = distributed.make_layout(16 * group.size(), group.size(), "contiguous")
    for axes, layouts in (((0, 0, 0), {}), ((0, None, None), {}), ((0, 0, 0), step)):
        given = [x if axis == 0 else x[0] for x, axis in zip((q, k, v), axes, strict=True)]

        def call(q, k, v, layouts=layouts) -> mx.array:
            return attention(q, k, v, mask="causal", implementation="poc", group=group, **layouts)

        mapped = mx.vmap(call, in_axes=axes)
        must_be_refused(partial(mapped, *given), f"rank {group.rank()}: mx.vmap over {axes}")


def independent_calls(group) -> None:
    """Calls that do not depend on each other, evaluated together: ranks must not exchange parts of different ones."""
    rank = group.rank()
    rows, keys = (distributed.make_layout(length, group.size(), "contiguous") for length in (37, 300))
    for row_layout in (rows, distributed.make_layout(4, group.size(), "replicated")):
        shared = {"layout": row_layout, "key_layout": keys}
        given, own = [], []
        for number in range(3):
            seeds = mx.random.split(mx.random.key(number), 3)
            shapes = [(1, HEADS, row_layout.seq, DIM), *[(1, KV_HEADS, 300, DIM)] * 2]
            given.append([mx.random.normal(shape, key=key) for shape, key in zip(shapes, seeds, strict=True)])
            q, *others = given[-1]
            own_q = distributed.own_rows(q, row_layout, rank) if row_layout.is_sharded else q
            own.append([own_q, *(distributed.own_rows(x, keys, rank) for x in others)])

        def loss(arrays: list[list[mx.array]], **keywords) -> mx.array:
            outs = [attention(*each, window=20, implementation="baseline", **keywords) for each in arrays]
            return sum((out * (1 + number)).square().sum() for number, out in enumerate(outs))

        got = [attention(*each, window=20, implementation="baseline", group=group, **shared) for each in own]
        slopes = mx.grad(loss)(own, group=group, **shared)
        mx.eval([*reversed(got), slopes])
        wanted = [attention(*each, window=20, implementation="baseline") for each in given]
        wanted_slopes = mx.grad(loss)(given)
        losses = 1 if row_layout.is_sharded else group.size()
        for number in range(3):
            one = wanted[number]
            pairs = [(got[number], distributed.own_rows(one, row_layout, rank) if row_layout.is_sharded else one)]
            for found, exact in zip(slopes[number][1:], wanted_slopes[number][1:], strict=True):
                pairs.append((found, losses * distributed.own_rows(exact, keys, rank)))
            for found, exact in pairs:
                what = f"rank {rank}: call {number} of three that are independent, {row_layout}"
                compare_with_one(found, exact, "baseline", what)


def compiled_calls(group) -> None:
    """Inside mx.compile nothing gives independent calls an order: they are refused unless they are in sequence."""
    given = arrays(64, 64, mx.float32)[:3]
    own = distributed.shard(*given, group, "contiguous")

    def call(*parts: mx.array) -> mx.array:
        return attention(*parts, mask="causal", implementation="poc", group=group, layout=own.layout)

    def in_sequence(*parts: mx.array) -> mx.array:
        with distributed.in_sequence():
            return call(call(*parts), *parts[1:])

    what = f"rank {group.rank()}: mx.compile of a call that is not in sequence"
    must_be_refused(partial(mx.compile(call), *own[:3]), what)
    once = attention(*given, mask="causal", implementation="poc")
    twice = attention(once, *given[1:], mask="causal", implementation="poc")
    found = mx.compile(in_sequence)(*own[:3])
    mine = distributed.own_rows(twice, own.layout, group.rank())
    compare_with_one(found, mine, "poc", f"rank {group.rank()}: compiled calls in sequence")


def covered_rows(group) -> None:
    """In half precision a row that -1e9 covers keeps its scores, which a logsumexp near -1e9 has no room for."""
    q, k, v, _ = arrays(2, 60, mx.bfloat16)
    mask = mx.array([[-1e9], [0.0]]) + mx.zeros((2, 60))
    keys = distributed.make_layout(60, group.size(), "contiguous")
    own = [distributed.own_rows(x, keys, group.rank()) for x in (k, v)]
    layout = distributed.make_layout(2, group.size(), "replicated")
    got = attention(q, *own, group=group, layout=layout, key_layout=keys, mask=mask, implementation="poc")
    gap = mx.abs(got.astype(mx.float32) - attention(q, k, v, implementation="poc").astype(mx.float32)).max().item()
    if gap > 0.03:
        failures.append(f"rank {group.rank()}, a covered row: {gap} off")


def refusals(group) -> None:
    """What an implementation refuses on ranks with rows, it refuses on those without: these would wait for ever."""
    whole = [mx.zeros((1, heads, 1, DIM)) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    rows = distributed.shard(*whole, group, "contiguous")
    split = {"layout": distributed.make_layout(1, group.size(), "replicated"), "key_layout": rows.layout}
    for name, q, options in (("rows", rows.q, {"layout": rows.layout}), ("keys", whole[0], split)):
        call = partial(attention, q, rows.k, rows.v, group=group, implementation=NoSoftcap(), softcap=5.0, **options)
        must_be_refused(call, f"rank {group.rank()}: a call without {name}")


class NoSoftcap(Baseline):
    """The baseline, which refuses a softcap when it is called."""

    def __call__(self, *arrays: mx.array, softcap: float | None = None, **options) -> mx.array:
        self.refuse(softcap)
        return super().__call__(*arrays, **options)

    def with_logsumexp(self, *arrays: mx.array, softcap: float | None = None, **options) -> tuple[mx.array, mx.array]:
        self.refuse(softcap)
        return super().with_logsumexp(*arrays, **options)

    def refuse(self, softcap: float | None) -> None:
        if softcap is not None:
            raise UnsupportedError("planted: it has no softcap")


def by_plan(group) -> None:
    """The rows that peer copies move, by a gather that follows the same plan with collectives."""

    class ByCollectives:
        def gather(self, part: mx.array, plan: RowPlan) -> mx.array:
            own = mx.zeros((*part.shape[:2], max(plan.contributed), part.shape[3]), part.dtype)
            for _, first, place, count in plan.sent:
                own[:, :, place : place + count] = part[:, :, first : first + count]
            own = mx.depends(own, part)  # in the order of the gathers, also if nothing is sent
            every = mx.distributed.all_gather(own[None], group=group)
            made = mx.zeros((*part.shape[:2], plan.rows, part.shape[3]), part.dtype)
            for rank, first, place, count in plan.needed:
                source = part if rank == group.rank() else every[rank]
                made[:, :, place : place + count] = source[:, :, first : first + count]
            return mx.depends(made, every)  # as copies, it takes part though it may need nothing

    found, least = collectives.peer_copies, movement.MIN_BYTES
    collectives.peer_copies, movement.MIN_BYTES = lambda _: (ByCollectives(), "a test"), 0
    try:
        self_attention(group, "zigzag", 300, mx.bfloat16, mask="causal")
        self_attention(group, "contiguous", 300, mx.float32, window=40)
        self_attention(group, "balanced", 512, mx.float32, mask=documents(512))
        self_attention(group, "zigzag", 101, mx.float32, mask=masks.prefix(5) | masks.window(30))
    finally:
        collectives.peer_copies, movement.MIN_BYTES = found, least


def many(group) -> None:
    """All layouts and masks."""
    few(group)
    self_attention(group, "zigzag", 1024, mx.bfloat16, mask="causal")  # whole tiles on four ranks too
    self_attention(group, "balanced", 1024, mx.bfloat16, mask=documents(1024))
    for seq in (512, 333, 37):
        array = mx.random.normal((seq, seq), key=mx.random.key(1)) > 0
        kinds: list[str] = ["zigzag", "contiguous", "balanced"]
        if KV_HEADS % group.size() == 0:
            kinds.append("heads")
        for kind in kinds:
            for keywords in ({}, {"mask": "causal"}, {"window": 100}, {"mask": documents(seq)}, {"mask": array}):
                self_attention(group, kind, seq, mx.float32, **keywords)
                self_attention(group, kind, seq, mx.bfloat16, **keywords)
    for kind in ("contiguous", "zigzag"):
        for seq, keywords in ((1, {}), (4, {"mask": "causal"}), (1, {"window": 64}), (5, {"window": 64})):
            decode(group, kind, seq, 1000, **keywords)


def peers_of(group) -> PeerCopies | None:
    """Return the group's peer copies; that there are none is a failure."""
    peers, reason = collectives.peer_copies(group)
    if peers is None:
        failures.append(f"no peer copies: {reason}")
    return peers


def peer_copies(group) -> None:
    """Parts of several sizes by peer copies, as by the group's own gather, and a call in pieces."""
    peers = peers_of(group)
    if peers is None:
        return
    rank, ranks = group.rank(), group.size()
    for heads, length in ((1, 1), (3, 1000), (7, 131072), (40, 20000)):
        plan = RowPlan(
            ((rank, 0, 0, length),),
            tuple((each, 0, length * each, length) for each in range(ranks)),
            (length,) * ranks,
            length * ranks,
        )
        part = mx.random.normal((1, heads, length, 128), key=mx.random.key(length + rank)).astype(mx.bfloat16)
        for _ in range(3):  # slots are used again
            found = peers.gather(part, plan)
            expected = mx.distributed.all_gather(part, group=group, stream=collectives.communication_stream())
            if not mx.array_equal(found, expected.swapaxes(0, 1).reshape(found.shape)).item():
                failures.append(f"rank {rank}: {heads} planes of {length} rows are gathered wrong")
    seq = 16384
    keys = mx.random.split(mx.random.key(1), 4)
    shapes = [(1, heads, seq, 128) for heads in (8, 4, 4, 8)]
    q, k, v, cotangent = (mx.random.normal(s, key=key).astype(mx.bfloat16) for s, key in zip(shapes, keys, strict=True))
    parts = distributed.shard(q, k, v, group)
    own_cotangent = distributed.shard(cotangent, cotangent, cotangent, group, parts.layout).q

    def whole(*arrays: mx.array) -> mx.array:
        return attention(*arrays, mask="causal", implementation="poc")

    def sharded(*arrays: mx.array) -> mx.array:
        return attention(*arrays, mask="causal", group=group, layout=parts.layout, implementation="poc")

    expected_out, expected_gradients = mx.vjp(whole, [q, k, v], [cotangent])
    for _ in range(3):
        outs, gradients = mx.vjp(sharded, list(parts[:3]), [own_cotangent])
        mx.eval(outs, gradients)
        for name, got, wanted in zip(
            ("output", "dQ", "dK", "dV"), [*outs, *gradients], [*expected_out, *expected_gradients], strict=True
        ):
            own = distributed.own_rows(wanted, parts.layout, group.rank())
            error = mx.abs(got - own).max().item() / mx.abs(own).max().item()
            if not error < (1e-6 if name == "output" else 0.02):
                failures.append(f"rank {group.rank()}: {name} by peer copies differs by {error:.3g}")


def check_close(found: Sequence[mx.array], wanted: Sequence[mx.array], what: str) -> None:
    """Compare with other tiles of rows, and so other sums of weights in half precision."""
    for x, y in zip(found, wanted, strict=True):
        error = mx.abs(x.astype(mx.float32) - y.astype(mx.float32)).max().item()
        if not error < 0.02:
            failures.append(f"{what} off by {error:.3g}")


def one_launch_of(group) -> None:
    """Calls whose keys arrive while they run, as on one device."""
    if peers_of(group) is None:
        return
    rank = group.rank()
    calls: list[tuple[str, int, dict]] = [
        ("zigzag", 16384, {"mask": "causal"}),
        ("zigzag", 12345, {"mask": "causal"}),
        ("zigzag", 16384, {"window": 1000}),
        ("contiguous", 16384, {"window": 1000}),
        ("contiguous", 12345, {"window": 2000}),
        ("contiguous", 9000, {}),
        ("zigzag", 8192, {"softcap": 20.0, "mask": "causal"}),
    ]
    for kind, seq, keywords in calls:
        for batch, heads, kv_heads, dim in ((1, 8, 4, 128), (2, 4, 2, 64)):
            keys = mx.random.split(mx.random.key(seq), 3)
            shapes = [(batch, each, seq, dim) for each in (heads, kv_heads, kv_heads)]
            arrays = [mx.random.normal(s, key=key).astype(mx.bfloat16) for s, key in zip(shapes, keys, strict=True)]
            parts = distributed.shard(*arrays, group, kind)
            whole = attention(*arrays, implementation="poc", return_lse=True, **keywords)
            wanted = [distributed.own_rows(x, parts.layout, rank) for x in (whole[0], whole[1][..., None])]
            before = distributed.statistics().by_method.get("one launch", 0)
            what = f"rank {rank}: {kind}, {seq}, {dim}, {keywords}"
            for _ in range(3):
                got = attention(
                    *parts[:3], group=group, layout=parts.layout, implementation="poc", return_lse=True, **keywords
                )
                mx.eval(got)
                check_close((got[0], got[1][..., None]), wanted, f"{what} in one launch:")
            if distributed.statistics().by_method.get("one launch", 0) != before + 3:
                failures.append(f"{what} was not one launch")


def merges(group) -> None:
    """Decode steps whose partial results are merged in each other's memory, as on one device."""
    if peers_of(group) is None:
        return
    rank = group.rank()
    for seq, kv_seq, keywords in ((1, 100_000, {}), (3, 5001, {"mask": "causal"}), (1, 7, {})):
        keys = mx.random.split(mx.random.key(kv_seq), 3)
        shapes = [(2, 8, seq, 128), (2, 2, kv_seq, 128), (2, 2, kv_seq, 128)]
        q, k, v = (mx.random.normal(s, key=key).astype(mx.bfloat16) for s, key in zip(shapes, keys, strict=True))
        layout = distributed.make_layout(kv_seq, group.size(), "contiguous")
        own = [distributed.own_rows(x, layout, rank) for x in (k, v)]
        wanted = list(attention(q, k, v, implementation="poc", return_lse=True, **keywords))
        layouts = {"layout": distributed.make_layout(seq, group.size(), "replicated"), "key_layout": layout}
        keywords |= {"implementation": "poc", "return_lse": True}
        results = [attention(q, *own, group=group, **layouts, **keywords) for _ in range(20)]  # queued together
        mx.eval(results)
        for got in results:
            check_close(got, wanted, f"rank {rank}: merge of {seq} x {kv_seq} is")


CHECKS: dict[str, Callable] = {
    "few": few,
    "many": many,
    "peers": peer_copies,
    "one launch": one_launch_of,
    "merges": merges,
}


def main() -> int:
    group = mx.distributed.init(strict=True, backend="ring" if "MLX_HOSTFILE" in os.environ else "nccl")
    for name in sys.argv[1:]:
        CHECKS[name](group)
    mx.eval(mx.distributed.all_sum(mx.array(1.0), group=group))
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
