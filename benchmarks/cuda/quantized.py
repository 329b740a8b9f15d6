"""Benchmark of quantized keys and values, on a GPU: `python -m benchmarks.cuda.quantized`.

Parts are decode and prefill; `--json PATH` writes the timings. Arms of a row share its rounds: this package's kernels
on bfloat16 and on each format, MLX's SDPA on bfloat16, and for decoding mlx-lm's path for quantized caches (two
quantized products). Each part ends with its target figures and whether they are met.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import mlx.core as mx

from attention.core.kv_format import parse_format
from attention.kernels.cuda import flash_attention, flash_attention_quantized
from attention.measure.rounds import TimedCall
from attention.quantized_kv import QuantizedArray, quantized
from benchmarks.cuda.harness import check_target, peak_beyond_output, random_arrays, run_parts
from benchmarks.rounds import MlxCalls, medians

Rows = list[dict[str, Any]]
FORMATS: Final = ("int8", "int4", "mxfp8", "mxfp4", "nvfp4")
HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE: Final = DIM**-0.5
SIZES: Final = ((1, 8192, 8), (1, 32768, 4), (1, 131072, 3), (16, 8192, 3))
"""Batch, keys, and sets of inputs that calls cycle through, so that these are read from memory."""


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
    found = {}
    copied = medians({"copy": _copy()})  # not in the rounds: its outputs displace the memory that short calls reuse
    mx.clear_cache()
    for batch, keys, count in SIZES:
        dense = [_inputs(batch, 1, keys) for _ in range(count)]
        runs: dict[str, TimedCall] = {
            "bf16": _calls(functools.partial(flash_attention, scale=SCALE), dense),
            "mlx": _calls(functools.partial(mx.fast.scaled_dot_product_attention, scale=SCALE), dense),
        }
        sizes = dict.fromkeys(runs, dense[0][1].nbytes + dense[0][2].nbytes)
        for form in FORMATS:
            packed = [(q, quantized(k, form), quantized(v, form)) for q, k, v in dense]
            mx.eval([part.arrays for _, k, v in packed for part in (k, v)])
            runs[form] = _calls(_ours, packed)
            sizes[form] = packed[0][1].nbytes + packed[0][2].nbytes
            if form == "int4":
                runs["mlx-lm int4"] = _calls(like_mlx_lm, packed)
                sizes["mlx-lm int4"] = sizes[form]
        seconds = medians(runs) | copied
        rate = 2 * 2**30 / seconds["copy"]
        for name in runs:
            own = sizes[name] / seconds[name]
            print(
                f"{batch} x {keys:6} {name:12} {seconds[name] * 1e6:8.1f} us {own / 1e9:6.0f} GB/s, "
                f"{own / rate:4.0%} of the copy; bf16 takes {seconds['bf16'] / seconds[name]:.2f} times as long",
                flush=True,
            )
        found[batch, keys] = seconds
        rows.append({"label": f"decode {batch} x {keys}", "seconds": seconds, "bytes": sizes})
        mx.clear_cache()
    return rows + _decode_targets(found, rows)


def _decode_targets(found: dict[tuple[int, int], dict[str, float]], rows: Rows) -> Rows:
    def over(batch: int, keys: int, fast: str, slow: str = "bf16") -> float:
        return found[batch, keys][slow] / found[batch, keys][fast]

    long = rows[2]
    rate = long["bytes"]["int4"] / long["seconds"]["int4"] / (2 * 2**30 / long["seconds"]["copy"])
    return [
        check_target("int4, 1 x 8192, 12 us over", 1.0, 12e-6 / found[1, 8192]["int4"]),
        check_target("int4, 1 x 32768, 17 us over", 1.0, 17e-6 / found[1, 32768]["int4"]),
        check_target("int4, 1 x 32768, over bf16", 2.3, over(1, 32768, "int4")),
        check_target("int4, 1 x 32768, over mlx-lm's path", 12.0, over(1, 32768, "int4", "mlx-lm int4")),
        check_target("int4, 1 x 131072, over bf16", 3.0, over(1, 131072, "int4")),
        check_target("int4, 16 x 8192, over bf16", 2.8, over(16, 8192, "int4")),
        check_target("int8, 1 x 131072, over bf16", 1.7, over(1, 131072, "int8")),
        check_target("mxfp4 beside int4, 1 x 131072", 0.9, over(1, 131072, "mxfp4", "int4")),
        check_target("mxfp8 beside int8, 1 x 131072", 0.9, over(1, 131072, "mxfp8", "int8")),
        check_target("int4, 1 x 131072, share of the copy", 0.75, rate),
        check_target("bf16, 1 x 8192, 15 us over", 1.0, 15e-6 / found[1, 8192]["bf16"]),
        check_target("bf16, 1 x 32768, over MLX's SDPA", 1.0, over(1, 32768, "bf16", "mlx")),
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


def _ours(q: mx.array, k: QuantizedArray, v: QuantizedArray) -> mx.array:
    return flash_attention_quantized(q, k, v, scale=SCALE)[0]


def _inputs(batch: int, queries: int, keys: int) -> list[mx.array]:
    return random_arrays((batch, HEADS, queries, DIM), (batch, KV_HEADS, keys, DIM), (batch, KV_HEADS, keys, DIM))


def _calls(call: Any, sets: Sequence[Sequence[Any]]) -> MlxCalls:
    return MlxCalls(*(functools.partial(call, *given) for given in sets))


def _copy() -> MlxCalls:
    source = random_arrays((2**29,))[0]
    return MlxCalls(lambda: source + 0)


PARTS: Final = {"decode": decode, "prefill": prefill}


def main() -> None:
    """Run the parts; `--json PATH` writes the timings."""
    run_parts(PARTS)


if __name__ == "__main__":
    main()
