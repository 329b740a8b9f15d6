"""A kernel that brings its own benchmark along."""

import mlx.core as mx

from attention import benchmark


@benchmark({"seq": 128, "mask": "causal"}, against=["baseline", "practical"], seconds=0.5)
def kernel(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: object) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


if __name__ == "__main__":
    print(kernel.bench())  # or with other options: kernel.bench(cases={"pass": "decode", "seq": 4096}, seconds=5)
