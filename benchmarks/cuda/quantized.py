"""Benchmark of quantized keys and values, on a GPU: `python -m benchmarks.cuda.quantized`.

Parts are decode and prefill; `--json PATH` writes the timings. Arms of a row share its rounds: this package's kernels
on bfloat16 and on each format, MLX's SDPA on bfloat16, and for decoding mlx-lm's path for quantized caches (two
quantized products), which is marked if its result is not that of attention. A decoding step is timed in five ways:

    repeated      20 calls are made and evaluated together (8 of long ones), start and end of the queue included, all
                  of them over the same keys and values, of which the L2 cache holds a part, or all
    queued        the same over several sets of keys and values in turn, which are read from memory
    sustained     so many that a sample takes 30 ms: start and end no longer count
    chained       as many, each with the output of the one before as its query, as the layers of a model are: none
                  hides another one's start and end
    one by one    a call is evaluated before the next is made: mostly the time until the GPU has it and the host knows

Each part ends with its target figures and whether they are met, in decoding by the first four.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention.core.kv_format import parse_format
from attention.kernels.cuda import flash_attention, flash_attention_quantized
from attention.measure.rounds import TimedCall
from attention.quantized_kv import QuantizedArray, quantized
from benchmarks.cuda.harness import check_target, peak_beyond_output, random_arrays, run_parts
from benchmarks.rounds import ChainedCalls, MlxCalls, medians, one_at_a_time, queued

Rows = list[dict[str, Any]]
FORMATS: Final = ("int8", "int4", "mxfp8", "mxfp4", "nvfp4")
HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE: Final = DIM**-0.5
SIZES: Final = ((1, 8192, 8), (1, 32768, 4), (1, 131072, 3), (16, 8192, 3))
"""Batch, keys, and sets of inputs that calls cycle through, so that these are read from memory."""
QUEUED: Final = 20
"""Calls that are queued and evaluated together."""
LONG, QUEUED_LONG = 100_000, 8
"""Number of keys from which fewer are queued, and how many."""
METHODS: Final = ("repeated", "queued", "sustained", "chained")
"""Of timing a step: those that targets are for."""
MLX_LM_FORMATS: Final = ("int4",)
"""MLX compiles each of its products at the first call, for half a minute."""
PEER_ERROR: Final = 0.03
"""Difference of a peer's output beyond which it is marked as wrong, relative to the largest element."""


def like_mlx_lm(q: mx.array, k: QuantizedArray, v: QuantizedArray) -> mx.array:
    """Compute attention as mlx-lm does with a quantized cache."""
    batch, heads, queries, dim = q.shape
    shared = k.shape[1]
    query = (q * SCALE).reshape(batch, shared, heads // shared, queries, dim)
    scores = _product(query, k, transpose=True)
    made = _product(mx.softmax(scores, axis=-1, precise=True), v, transpose=False)
    return made.reshape(batch, heads, queries, dim)


def _product(x: mx.array, packed: QuantizedArray, transpose: bool) -> mx.array:
    numbers, scales, *biases = (mx.expand_dims(part, 2) for part in packed.arrays)
    form = packed.format
    bias = biases[0] if biases else None
    return mx.quantized_matmul(x, numbers, scales, bias, transpose, form.group_size, form.bits, form.mode)


def decode() -> Rows:
    """Benchmark a decoding step: 32 query and 8 key heads of 128."""
    rows: Rows = []
    copied = medians({"copy": _copy()})["copy"]  # not in the rounds: its outputs displace memory that short calls reuse
    rate = 2 * 2**30 / copied
    mx.clear_cache()
    for batch, keys, count in SIZES:
        dense = [_inputs(batch, 1, keys) for _ in range(count)]
        sets: dict[str, tuple[Any, Sequence[Sequence[Any]]]] = {"bf16": (_dense, dense), "mlx": (_sdpa, dense)}
        errors = {}
        sizes = dict.fromkeys(sets, dense[0][1].nbytes + dense[0][2].nbytes)
        for form in FORMATS:
            packed = [(q, quantized(k, form), quantized(v, form)) for q, k, v in dense]
            mx.eval([part.arrays for _, k, v in packed for part in (k, v)])
            sets[form] = _ours, packed
            sizes[form] = packed[0][1].nbytes + packed[0][2].nbytes
            if form in MLX_LM_FORMATS:
                sets[f"mlx-lm {form}"] = like_mlx_lm, packed
                sizes[f"mlx-lm {form}"] = sizes[form]
                errors[f"mlx-lm {form}"] = _error(like_mlx_lm(*packed[0]), _ours(*packed[0]))
        runs: dict[str, TimedCall] = {name: _calls(*given) for name, given in sets.items()}
        same: dict[str, TimedCall] = {name: _calls(call, given[:1]) for name, (call, given) in sets.items()}
        chains: dict[str, TimedCall] = {name: _chain(*given) for name, given in sets.items()}
        together = QUEUED if keys < LONG else QUEUED_LONG
        found = {
            "repeated": queued(same, together),
            "queued": queued(runs, together),
            "sustained": medians(runs),
            "chained": medians(chains),
            "one by one": one_at_a_time(runs),
        }
        print(f"{batch} x {keys}: us, and how many times as long bf16 takes", flush=True)
        print(f"  {'':12} {''.join(f'{method:>17}' for method in found)}   sustained read")
        for name in runs:
            columns = [
                f"{seconds[name] * 1e6:8.1f} {seconds['bf16'] / seconds[name]:6.2f}x" for seconds in found.values()
            ]
            own = sizes[name] / found["sustained"][name]
            wrong = f"; wrong by {errors[name]:.0%} of the largest output" if errors.get(name, 0) > PEER_ERROR else ""
            read = f"{own / 1e9:6.0f} GB/s, {own / rate:4.0%} of a copy"
            print(f"  {name:12} {' '.join(columns)} {read}{wrong}", flush=True)
        rows.append(
            {
                "label": f"decode {batch} x {keys}",
                "seconds": found,
                "bytes": sizes,
                "copy bytes/s": rate,
                "errors": errors,
            }
        )
        mx.clear_cache()
    by_size = dict(zip([size[:2] for size in SIZES], rows, strict=True))
    return rows + [row for method in METHODS for row in _decode_targets(by_size, method)]


def _error(found: mx.array, expected: mx.array) -> float:
    """Return the largest difference of a peer's output, relative to the largest element of the expected one."""
    wide = expected.astype(mx.float32)
    return float(np.array(mx.abs(found.astype(mx.float32) - wide).max() / mx.abs(wide).max()))


def _decode_targets(found: dict[tuple[int, int], dict[str, Any]], method: str) -> Rows:
    def time(batch: int, keys: int, name: str) -> float:
        return float(found[batch, keys]["seconds"][method][name])

    def check(text: str, least: float, measured: float) -> dict[str, Any]:
        return check_target(f"{method}: {text}", least, measured)

    def over(batch: int, keys: int, fast: str, slow: str = "bf16") -> float:
        return time(batch, keys, slow) / time(batch, keys, fast)

    long = found[1, 131072]
    rate = long["bytes"]["int4"] / time(1, 131072, "int4") / long["copy bytes/s"]
    return [
        check("int4, 1 x 8192, 12 us over", 1.0, 12e-6 / time(1, 8192, "int4")),
        check("int4, 1 x 32768, 17 us over", 1.0, 17e-6 / time(1, 32768, "int4")),
        check("int4, 1 x 32768, over bf16", 2.3, over(1, 32768, "int4")),
        check("int4, 1 x 32768, over mlx-lm's path", 12.0, over(1, 32768, "int4", "mlx-lm int4")),
        check("int4, 1 x 131072, over bf16", 3.0, over(1, 131072, "int4")),
        check("int4, 16 x 8192, over bf16", 2.8, over(16, 8192, "int4")),
        check("int8, 1 x 131072, over bf16", 1.7, over(1, 131072, "int8")),
        check("mxfp4 beside int4, 1 x 131072", 0.9, over(1, 131072, "mxfp4", "int4")),
        check("mxfp8 beside int8, 1 x 131072", 0.9, over(1, 131072, "mxfp8", "int8")),
        check("int4, 1 x 131072, share of the copy", 0.75, rate),
        check("bf16, 1 x 8192, 15 us over", 1.0, 15e-6 / time(1, 8192, "bf16")),
        check("bf16, 1 x 32768, over MLX's SDPA", 1.0, over(1, 32768, "bf16", "mlx")),
    ]


PREFILL_SIZES: Final = ((8192, 128, True), (8192, 128, False), (2048, 128, True), (8192, 64, True), (8192, 96, True))
"""Queries and keys, head dim, and whether the mask is causal."""


def prefill() -> Rows:
    """Benchmark prefill: 32 query and 8 key heads."""
    rows: Rows = []
    for length, dim, causal in PREFILL_SIZES:
        shape = (1, KV_HEADS, length, dim)
        q, k, v = random_arrays((1, HEADS, length, dim), shape, shape)
        options = {"scale": dim**-0.5, "causal": causal}
        sdpa = functools.partial(mx.fast.scaled_dot_product_attention, q, k, v, scale=dim**-0.5)
        runs: dict[str, TimedCall] = {
            "bf16": MlxCalls(functools.partial(flash_attention, q, k, v, **options)),
            "mlx": MlxCalls(functools.partial(sdpa, mask="causal" if causal else None)),
        }
        memory = {}
        for form in FORMATS:
            if dim % parse_format(form).group_size:
                continue
            packed = [quantized(x, form) for x in (k, v)]
            mx.eval([part.arrays for part in packed])
            call = functools.partial(_first_of, flash_attention_quantized, q, *packed, **options)
            memory[form] = peak_beyond_output(call)
            runs[form] = MlxCalls(call)
        seconds = medians(runs)
        operations = 4 * HEADS * length**2 * dim / (2 if causal else 1)
        label = f"prefill {length}, head dim {dim}, {'causal' if causal else 'full'}"
        for name, time in seconds.items():
            beyond = f", {memory[name] / 2**20:.1f} MiB beyond the output" if name in memory else ""
            print(
                f"{label:38} {name:6} {time * 1e3:8.3f} ms {operations / time / 1e12:5.0f} TFLOP/s, "
                f"{seconds['bf16'] / time:.3f} of bf16{beyond}",
                flush=True,
            )
        rows.append({"label": label, "seconds": seconds, "bytes beyond the output": memory})
        mx.clear_cache()
    return rows + _prefill_targets(rows[0])


def _prefill_targets(row: dict[str, Any]) -> Rows:
    seconds, memory = row["seconds"], row["bytes beyond the output"]
    return [
        check
        for form in ("int8", "int4")
        for check in (
            check_target(f"{form}, prefill of 8192, beside bf16", 0.85, seconds["bf16"] / seconds[form]),
            check_target(f"{form}, prefill of 8192, 64 MiB over what is allocated", 1.0, 2**26 / max(1, memory[form])),
        )
    ]


def _first_of(call: Callable[..., Sequence[mx.array]], *given: Any, **keywords: Any) -> mx.array:
    return call(*given, **keywords)[0]


_dense = functools.partial(flash_attention, scale=SCALE)
_sdpa = functools.partial(mx.fast.scaled_dot_product_attention, scale=SCALE)


def _ours(q: mx.array, k: QuantizedArray, v: QuantizedArray) -> mx.array:
    return flash_attention_quantized(q, k, v, scale=SCALE)[0]


def _inputs(batch: int, queries: int, keys: int) -> list[mx.array]:
    return random_arrays((batch, HEADS, queries, DIM), (batch, KV_HEADS, keys, DIM), (batch, KV_HEADS, keys, DIM))


def _calls(call: Any, sets: Sequence[Sequence[Any]]) -> MlxCalls:
    return MlxCalls(*(functools.partial(call, *given) for given in sets))


def _chain(call: Any, sets: Sequence[Sequence[Any]]) -> ChainedCalls:
    def of(k: Any, v: Any) -> Callable[[mx.array], mx.array]:
        return lambda q: call(q, k, v)

    return ChainedCalls(sets[0][0], *(of(k, v) for _, k, v in sets))


def _copy() -> MlxCalls:
    source = random_arrays((2**29,))[0]
    return MlxCalls(lambda: source + 0)


PARTS: Final = {"decode": decode, "prefill": prefill}


def main() -> None:
    """Run the parts; `--json PATH` writes the timings."""
    run_parts(PARTS)


if __name__ == "__main__":
    main()
