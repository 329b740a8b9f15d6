"""Quantized caches compute what mlx-lm's dense caches of the same layout do, if those hold the dequantized values."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models import cache as mlx_caches
from mlx_lm.models import gemma2
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)

import attention
from attention.core.errors import UsageError
from attention.core.kv_format import Format, parse_kv_format
from attention.core.route import Route, unsupported
from attention.implementations.bounded.implementation import Practical
from attention.mlx_lm import caches, streaming
from attention.mlx_lm.generation import why_unread
from tests.support.marks import slow, thorough
from tests.support.tiny_models import LAYERS, SIZES, VOCABULARY, built, tiny, tokens

WINDOW = 24
LONGEST = 340
LEFT_PADDING = [5, 0]
LAYOUTS: dict[str, Callable[[], Any]] = {
    "plain": KVCache,
    "rotating": lambda: RotatingKVCache(max_size=WINDOW),
    "rotating, 4 kept": lambda: RotatingKVCache(max_size=WINDOW, keep=4),
    "batch": lambda: BatchKVCache(LEFT_PADDING),
    "rotating batch": lambda: BatchRotatingKVCache(WINDOW, LEFT_PADDING),
}
FORMATS = ["int8:32", "int4:32", "int8:32+int4:32", "mxfp4", "mxfp4+int6:32", "nvfp4"]
TOLERANCE = {mx.float32: 2e-5, mx.bfloat16: 1e-1}
OTHER_NUMBER = 1e-2
"""By how much logits may move if a last bit makes a number in the second layer's cache the next one; a format's own
rounding moves them by 0.02 (int8) to 0.6 (mxfp4)."""
Chunks = list[int]
CHUNKS: Chunks = [29, 11, *[1] * 6, 13, *[1] * 3]
"""Lengths of a model's calls: around the window there are chunks, single tokens, and a chunk after them."""


def rounded(x: mx.array, form: Format) -> mx.array:
    """Quantize and dequantize."""
    numbers, scales, *biases = mx.quantize(x, form.group_size, form.bits, form.mode)
    return mx.dequantize(numbers, scales, *(biases or [None]), form.group_size, form.bits, form.mode, dtype=x.dtype)


def dense(layout: str, kv_format: str) -> Any:
    """Return mlx-lm's dense cache, which gets rounded keys and values."""
    made = LAYOUTS[layout]()
    store, formats = made.update_and_fetch, parse_kv_format(kv_format)
    assert formats is not None
    made.update_and_fetch = lambda k, v: store(rounded(k, formats.key), rounded(v, formats.value))
    return made


def packed(layout: str, kv_format: str) -> Any:
    return caches.to_quantized(LAYOUTS[layout](), kv_format)


def next_logits(model: Any, cache: list[Any], token: int = 0) -> mx.array:
    """Return the logits after one more token."""
    with attention.patch_mlx_lm("practical"):
        out: mx.array = model(tokens(2, LONGEST)[:, token : token + 1], cache=cache)
        mx.eval(out)
    return out


def filled(model: Any, layout: str, kv_format: str, chunks: Chunks | None = None) -> list[Any]:
    cache = [packed(layout, kv_format) for _ in range(LAYERS)]
    with attention.patch_mlx_lm("practical"):
        logits(model, cache, chunks or [29, 1])
    return cache


def logits(model: Any, cache: list[Any], chunks: Chunks) -> np.ndarray:
    """Return the logits of two sequences, without padding positions."""
    ids = tokens(2, LONGEST)
    ends = np.cumsum(chunks).tolist()
    parts = [model(ids[:, end - size : end], cache=cache) for end, size in zip(ends, chunks, strict=True)]
    return np.array(mx.concatenate(parts, axis=1).astype(mx.float32))[:, max(LEFT_PADDING) :]


def assert_close(got: np.ndarray, wanted: np.ndarray) -> None:
    """The logits of two layers agree but for numbers of the second layer's cache that a last bit moved."""
    np.testing.assert_allclose(got, wanted, atol=OTHER_NUMBER)
    assert np.median(np.abs(got - wanted)) <= TOLERANCE[mx.float32]


def assert_same(model: Any, layout: str, kv_format: str, chunks: Chunks, implementation: str = "practical") -> None:
    """The logits are those of mlx-lm's own dense cache of rounded values, exactly if there is one layer."""
    layers = len(model.layers)
    wanted = logits(model, [dense(layout, kv_format) for _ in range(layers)], chunks)
    with attention.patch_mlx_lm(implementation) as patch:
        got = logits(model, [packed(layout, kv_format) for _ in range(layers)], chunks)
    assert patch.calls_taken == len(chunks) * layers
    if layers == 1:
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE[model.model.embed_tokens.weight.dtype])
    else:
        assert_close(got, wanted)


@pytest.mark.parametrize(
    ("layout", "kv_format"),
    [
        *(thorough(*each) if number % 2 else each for number, each in enumerate(zip(LAYOUTS, FORMATS, strict=False))),
        thorough("rotating", "nvfp4"),
        slow("batch", "int3:32"),
    ],
)
def test_logits_are_those_of_the_dequantized_cache(layout: str, kv_format: str) -> None:
    assert_same(tiny("qwen2", num_hidden_layers=1), layout, kv_format, CHUNKS)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_logits_of_two_layers_agree(model: str) -> None:
    assert_same(tiny(model), "rotating, 4 kept", "int8:32+int4:32", CHUNKS)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kv_format", "model"), [*zip(FORMATS, ["llama", "qwen2"] * 3, strict=True)])
def test_logits_agree_over_300_steps(model: str, layout: str, kv_format: str) -> None:
    assert_same(tiny(model, num_hidden_layers=1), layout, kv_format, [40, *[1] * 300])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["poc", "baseline", "demo", "mlx"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_format", FORMATS)
def test_every_implementation_reads_the_caches(implementation: str, layout: str, kv_format: str) -> None:
    assert_same(tiny("qwen2", num_hidden_layers=1), layout, kv_format, CHUNKS, implementation)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_agree_in_bfloat16(layout: str) -> None:
    assert_same(tiny("llama", mx.bfloat16, num_hidden_layers=1), layout, "int8:32+int4:32", CHUNKS)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mlx_lms_own_attention_reads_one_affine_format(layout: str) -> None:
    model = tiny("llama", num_hidden_layers=1)
    wanted = logits(model, [dense(layout, "int6:32")], CHUNKS)
    np.testing.assert_allclose(logits(model, [packed(layout, "int6:32")], CHUNKS), wanted, atol=TOLERANCE[mx.float32])


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(("window", "keep", "chunk"), [(8, 0, 25), (8, 4, 25), (24, 4, 24), (5, 4, 1), (1, 0, 7)])
def test_a_window_may_be_smaller_than_a_chunk(
    window: int, keep: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYOUTS, "small", lambda: RotatingKVCache(window, keep))
    assert_same(tiny("qwen2", num_hidden_layers=1), "small", "int8:32", [chunk, chunk, *[1] * 10, chunk])


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("chunks", [[8, 1], [7, 1, 1], [11, 5, 1], [16, 1], [1] * 9], ids=str)
def test_chunks_may_end_where_the_buffer_does(chunks: Chunks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "step", 8)
    assert_same(tiny("qwen2", num_hidden_layers=1), "plain", "int8:32", chunks)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("kv_format", ["int8:32", "mxfp4+int8:32"])
def test_a_model_with_sinks_takes_a_quantized_cache(kv_format: str) -> None:
    model, chunks = tiny("gpt_oss"), [29, 11, *[1] * 5]
    wanted = logits(model, [dense(layout, kv_format) for layout in ("rotating", "plain")], chunks)
    with attention.patch_mlx_lm("practical") as patch:
        got = logits(model, caches.make_prompt_cache(model, kv_format=kv_format), chunks)
    assert not patch.handed
    assert_close(got, wanted)


@pytest.mark.slow
def test_sinks_agree_over_300_steps() -> None:
    model, chunks = tiny("gpt_oss"), [40, *[1] * 300]
    wanted = logits(model, [dense(layout, "int4:32") for layout in ("rotating", "plain")], chunks)
    with attention.patch_mlx_lm("practical"):
        got = logits(model, caches.make_prompt_cache(model, kv_format="int4:32"), chunks)
    np.testing.assert_allclose(got, wanted, atol=OTHER_NUMBER)


def test_what_nobody_else_takes_practical_computes() -> None:
    model = tiny("gpt_oss")
    wanted = logits(model, [dense(layout, "mxfp8") for layout in ("rotating", "plain")], [29, 1])
    with attention.patch_mlx_lm("baseline") as patch:  # which takes no sinks
        got = logits(model, caches.make_prompt_cache(model, kv_format="mxfp8"), [29, 1])
    assert patch.calls_handed == 2 * LAYERS
    assert "practical got 4: attention sinks; mlx-lm does not take these quantized K and V" in patch.summary()
    assert_close(got, wanted)


class Refusing(Practical):
    """An implementation that takes nothing."""

    def route(self, *_: Any, **__: Any) -> Route:
        return unsupported("a test")


@pytest.mark.parametrize(("kv_format", "recipient"), [("int8:32", "MLX's own"), ("int8:32+int4:32", "practical")])
def test_mlx_lm_gets_what_it_can_read(kv_format: str, recipient: str) -> None:
    model = tiny("qwen2", num_hidden_layers=1)
    wanted = logits(model, [dense("plain", kv_format)], [29, 1])
    with attention.patch_mlx_lm(Refusing()) as patch:
        got = logits(model, [packed("plain", kv_format)], [29, 1])
    assert f"{recipient} got 2: a test" in patch.summary()
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[mx.float32])


def test_dense_copies_for_an_implementation_are_counted() -> None:
    class Dense(Practical):
        takes_quantized = False

    model = tiny("qwen2", num_hidden_layers=1)
    wanted = logits(model, [dense("plain", "nvfp4")], [29, 1])
    with attention.patch_mlx_lm(Dense()) as patch:
        got = logits(model, [packed("plain", "nvfp4")], [29, 1])
    assert patch.taken == {"MLX SDPA, unfused, dequantized K and V": 2}
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE[mx.float32])


SHARING: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        **SIZES,
        "head_dim": 32,
        "global_head_dim": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 1,
        "sliding_window": 12,
        "layer_types": ["full_attention"] * LAYERS,
    },
    "afm7": {
        "vocab_size": VOCABULARY,
        "hidden_dim": 128,
        "num_layers": LAYERS,
        "num_kv_reuse_layers": 1,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "phi": {**SIZES, "num_key_value_heads": 4},
    "plamo2": {**SIZES, "hidden_size_per_head": 32, "mamba_enabled": False},
}
"""Models that read more of keys and values than attention does, share them among layers, or call MLX themselves."""


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("kv_format", ["int8:32", "mxfp8"])
def test_models_may_share_keys_and_read_their_shape(name: str, kv_format: str) -> None:
    model, formats = built(name, **SHARING[name]), parse_kv_format(kv_format)
    assert formats is not None
    made = make_prompt_cache(model)
    for one in made:
        store: Any = one.update_and_fetch
        one.update_and_fetch = lambda k, v, store=store: store(rounded(k, formats.key), rounded(v, formats.value))
    wanted = logits(model, made, CHUNKS)
    for implementation in ("practical", Refusing()):
        with attention.patch_mlx_lm(implementation) as patch:
            got = logits(model, caches.make_prompt_cache(model, kv_format=kv_format), CHUNKS)
        count = patch.calls_taken if implementation == "practical" else patch.calls_handed
        assert count == LAYERS * len(CHUNKS)
        assert_close(got, wanted)


@pytest.mark.parametrize("name", ["gemma4_text", "qwen2"])
def test_kv_bits_in_mid_generation_are_read_packed(name: str) -> None:
    """mlx-lm quantizes its caches after some steps; layers that share them attend without."""
    model = built(name, **SHARING[name]) if name in SHARING else tiny(name)
    options: dict[str, Any] = {"max_tokens": 6, "kv_bits": 8, "kv_group_size": 32}
    with attention.patch_mlx_lm("practical") as patch:
        for start in (0, 32):
            list(generate_step(tokens(30), model, quantized_kv_start=start, **options))
    assert patch.calls_handed == 0
    assert patch.taken["packed keys and values"] > LAYERS * 6


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("model_name", ["qwen2", "gpt_oss"])
def test_generate_quantizes_rotating_caches_in_the_patch(model_name: str) -> None:
    model, prompt = tiny(model_name), tokens(40)
    options: dict[str, Any] = {"max_tokens": 3, "kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 20}
    made = make_prompt_cache(model, WINDOW)
    with attention.patch_mlx_lm("practical"):
        list(generate_step(prompt, model, prompt_cache=made, prefill_step_size=16, **options))
    rotating = [one for one in made if getattr(one, "layout", "") == "RotatingKVCache"]
    assert len(rotating) == (LAYERS if model_name == "qwen2" else 1)
    assert all(one.offset == 40 + 3 and one.bits == 8 for one in rotating)
    with pytest.raises(NotImplementedError):
        RotatingKVCache(WINDOW).to_quantized()


PROMPTS = [3, 30, 17, 40, 1]
"""Lengths of the prompts of a batch."""


def batched_tokens(model: Any, make: Callable[[], list[Any]]) -> tuple[list[list[int]], list[list[Any]]]:
    """Return what mlx-lm's BatchGenerator makes of uneven prompts, two of five at a time, and their caches."""
    generator = BatchGenerator(model, max_tokens=6, completion_batch_size=2, prefill_batch_size=2, prefill_step_size=16)
    ids = tokens(40).tolist()
    uids = generator.insert([ids[:length] for length in PROMPTS], caches=[make() for _ in PROMPTS])
    made: dict[int, list[int]] = {uid: [] for uid in uids}
    left: dict[int, list[Any]] = {}
    while len(left) < len(uids):
        for response in generator.next()[1]:
            made[response.uid].append(response.token)
            if response.finish_reason:
                left[response.uid] = response.prompt_cache
    return [made[uid] for uid in uids], [left[uid] for uid in uids]


@pytest.mark.parametrize(("model_name", "max_kv_size"), [("qwen2", WINDOW), thorough("gpt_oss", None)])
def test_batches_of_uneven_prompts_agree(model_name: str, max_kv_size: int | None) -> None:
    model, form = tiny(model_name), Format("affine", 8, 32)
    with attention.patch_mlx_lm("practical"):
        with pytest.MonkeyPatch.context() as patched:
            for kind in (KVCache, RotatingKVCache, BatchKVCache, BatchRotatingKVCache):
                store: Any = kind.update_and_fetch
                rounding = lambda self, k, v, store=store: store(self, rounded(k, form), rounded(v, form))  # noqa: E731
                patched.setattr(kind, "update_and_fetch", rounding)
            wanted, _ = batched_tokens(model, lambda: make_prompt_cache(model, max_kv_size))
        got, left = batched_tokens(model, lambda: caches.make_prompt_cache(model, max_kv_size, "int8:32"))
    assert got == wanted
    assert [[one.offset for one in each] for each in left] == [[length + 6] * LAYERS for length in PROMPTS]


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_order_of_operations_leaves_the_same_rows(layout: str) -> None:
    kv_format, random = "int8:32+nvfp4", np.random.default_rng(11)
    formats = parse_kv_format(kv_format)
    assert formats is not None

    def store(both: list[Any], length: int) -> None:
        k, v = (mx.array(random.standard_normal((batch, 2, length, 32)).astype(np.float32)) for _ in range(2))
        both[0].update_and_fetch(rounded(k, formats.key), rounded(v, formats.value))
        both[1].update_and_fetch(k, v)

    def rows(x: tuple[mx.array, ...], form: Format) -> mx.array:
        made: mx.array = caches.quantized(x, form).dequantized(mx.float32)
        return made

    batch = 2
    both = [LAYOUTS[layout](), packed(layout, kv_format)]
    if "batch" in layout:
        for one in both:
            one.prepare(left_padding=[1, 2])
    store(both, 7)
    for _ in range(40):
        choice = random.integers(7)
        if choice == 0 and both[0].is_trimmable() and np.array(both[0].offset).min() >= 3:
            assert both[0].trim(3) == both[1].trim(3)
        elif choice == 1:
            both = copy.deepcopy(both)
        elif choice == 2:
            both = [both[0], type(both[1]).from_state(both[1].state)]
        elif choice == 3 and "batch" in layout:
            keep = random.permutation(batch)[: max(1, batch - 1)].tolist()
            batch = len(keep)
            for one in both:
                one.filter(keep)
        elif choice == 4 and "batch" in layout:
            further = [LAYOUTS[layout](), packed(layout, kv_format)]
            own, batch = batch, 2
            store(further, int(random.integers(1, 30)))
            batch = own + 2
            for one, other in zip(both, further, strict=True):
                one.extend(other)
        elif choice == 5 and "batch" in layout:
            padding = random.integers(0, 4, batch).tolist()
            for one in both:
                one.prepare(lengths=[5 - pad for pad in padding], right_padding=padding)
            store(both, 5)
            for one in both:
                one.finalize()
        else:
            store(both, int(random.choice([1, 1, 1, 2, 17])))
        wanted, got = both
        assert np.array_equal(wanted.offset, got.offset)
        assert wanted.size() == got.size()
        assert mx.array_equal(wanted.keys, rows(got.keys, formats.key))
        assert mx.array_equal(wanted.values, rows(got.values, formats.value))
        masks = [one.make_mask(3, return_array=True, window_size=None) for one in both]
        assert mx.array_equal(*masks)


@pytest.mark.parametrize("layout", ["plain", "rotating"])
@pytest.mark.parametrize("kv_format", ["int8:32+mxfp8", "nvfp4+int4:32"])
def test_a_batch_keeps_the_dtype_of_each_part(kv_format: str, layout: str) -> None:
    """mlx-lm makes keys and values of a batch in the dtype of keys; here one has bytes for scales, one floats."""
    formats = parse_kv_format(kv_format)
    assert formats is not None
    given: list[list[mx.array]] = []
    single: list[Any] = []
    for length in (5, 0, 3):
        given.append([mx.random.normal((1, 2, length, 32), key=mx.random.key(9 * length + i)) for i in range(2)])
        single.append(packed(layout, kv_format))
        if length:
            single[-1].update_and_fetch(*given[-1])
    batch, further = (single[0].merge(some) for some in (single[:2], single[2:]))
    empty = single[0].merge([packed(layout, kv_format)])
    further.extend(empty)
    empty = single[0].merge([packed(layout, kv_format)])
    empty.extend(batch)
    empty.extend(further)
    k, v = (mx.random.normal((5, 2, 1, 32), key=mx.random.key(i)) for i in range(2))
    found = empty.update_and_fetch(k, v)
    forms = formats.key, formats.value
    for one, new, whole, form in zip(found, (k, v), zip(*given, strict=True), forms, strict=True):
        rows = caches.quantized(one, form).dequantized(mx.float32)
        for row, old in {1: whole[0], 3: whole[2]}.items():
            wanted = rounded(mx.concatenate([old, new[row : row + 1]], axis=2), form)
            assert mx.array_equal(rows[row, :, -wanted.shape[2] :], wanted[0])


def test_a_batch_takes_one_format() -> None:
    caches_of_two = [caches.to_quantized(KVCache(), kv_format) for kv_format in ("int8", "mxfp8")]
    with pytest.raises(UsageError, match="got int8 in a KVCache, mxfp8 in a KVCache; a batch takes caches of one kind"):
        caches_of_two[0].merge(caches_of_two)
    with pytest.raises(UsageError, match="got int8 in a KVCache, KVCache; a batch"):
        caches_of_two[0].merge([caches_of_two[0], KVCache()])


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_and_copies_continue_where_the_cache_was(layout: str, tmp_path: Path) -> None:
    model = tiny("qwen2")
    cache = filled(model, layout, "mxfp4+int8:32")
    copied = copy.deepcopy(cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert sum(one.nbytes for one in loaded) == sum(one.nbytes for one in cache)
    wanted = [next_logits(model, cache) for _ in range(3)][-1]
    assert mx.array_equal(wanted, [next_logits(model, copied) for _ in range(3)][-1])
    assert mx.array_equal(wanted, [next_logits(model, loaded) for _ in range(3)][-1])


def test_mlx_lm_reads_our_files_and_we_read_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny("qwen2"), str(tmp_path / "cache.safetensors")
    ours = filled(model, "plain", "int8:32")
    save_prompt_cache(path, ours)
    monkeypatch.delattr(mlx_caches, "PackedKVCache")  # as in a process without this package
    theirs = load_prompt_cache(path)
    assert all(type(one) is QuantizedKVCache and (one.bits, one.group_size) == (8, 32) for one in theirs)
    save_prompt_cache(path, theirs)
    back = caches.quantize_prompt_cache(load_prompt_cache(path), "int8:32")
    wanted = model(tokens(2, 1), cache=ours)
    np.testing.assert_allclose(model(tokens(2, 1), cache=theirs), wanted, atol=TOLERANCE[mx.float32])
    np.testing.assert_allclose(model(tokens(2, 1), cache=back), wanted, atol=TOLERANCE[mx.float32])


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, [packed("rotating", "mxfp4")])
    (loaded,) = load_prompt_cache(path)
    assert (loaded.empty(), loaded.nbytes, loaded.offset, loaded.keys) == (True, 0, 0, None)


TEXT = {name: mx.array([ord(letter) for letter in name]) for name in ("mxfp8", "int4", "int9", "Other")}
DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "another width of numbers": (
        {"0.2": TEXT["mxfp8"]},
        "mxfp8 takes .*; the file is damaged, or",
    ),
    "another number of arrays": ({"0.2": TEXT["int4"]}, "got 2 of 3 arrays"),
    "an unknown format": ({"0.2": TEXT["int9"]}, "its state is not one of a PackedKVCache; the file is damaged"),
    "an unknown layout": ({"0.1": TEXT["Other"]}, "its state is not one of a PackedKVCache"),
    "other lengths": ({"0.0.0.2": mx.array(7)}, "got 7 tokens in 256 rows"),
    "more tokens than rows": ({f"0.0.{i}.2": mx.array(999) for i in range(2)}, "got 999 tokens in 256 rows"),
    "half a token": ({f"0.0.{i}.2": mx.array(2.5) for i in range(2)}, "got 2.5 tokens"),
    "scales of another dtype": ({"0.0.1.0": mx.zeros((2, 2, 256, 1))}, "scales: got mlx.core.float32"),
    "fewer scales": ({"0.0.1.1": mx.zeros((2, 2, 9, 1), mx.uint8)}, r"scales: got shape \(2, 2, 9, 1\)"),
}


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_one_clear_line(damage: str, tmp_path: Path) -> None:
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, filled(tiny("qwen2"), "plain", "mxfp4"))
    arrays, metadata = mx.load(path, return_metadata=True)
    replaced, line = DAMAGES[damage]
    mx.save_safetensors(path, {name: mx.array(array) for name, array in arrays.items()} | replaced, metadata)
    with pytest.raises(UsageError, match=line) as caught:
        load_prompt_cache(path)
    assert len(str(caught.value).splitlines()) == 1


def test_what_mlx_lm_cannot_read_names_the_patch() -> None:
    model = tiny("qwen2")
    with pytest.raises(UsageError, match=r"cannot read int8:32\+mxfp4; .* inside attention.patch_mlx_lm"):
        logits(model, [packed("plain", "int8:32+mxfp4") for _ in range(LAYERS)], [3])


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("make", [lambda: RotatingKVCache(WINDOW, keep=4), lambda: QuantizedKVCache(32, 8)])
def test_a_quantized_copy_leaves_the_cache_alone(make: Callable[[], Any]) -> None:
    model = tiny("qwen2")
    cache = [make() for _ in range(LAYERS)]
    logits(model, cache, [29, 1])
    untouched = copy.deepcopy(cache)
    made = caches.quantize_prompt_cache(cache, "int8:32")
    assert [one.offset for one in made] == [30] * LAYERS
    expected = copy.deepcopy(made)
    np.testing.assert_allclose(next_logits(model, made), next_logits(model, copy.deepcopy(cache)), atol=0.05)
    # Each writes a token of its own behind the 30.
    np.testing.assert_array_equal(next_logits(model, cache, token=1), next_logits(model, untouched, token=1))
    next_logits(model, expected)
    np.testing.assert_array_equal(next_logits(model, made), next_logits(model, expected))


def test_the_end_can_be_trimmed() -> None:
    model = tiny("qwen2")
    cache, shorter = filled(model, "plain", "nvfp4", [29, 5]), filled(model, "plain", "nvfp4", [29])
    assert [one.trim(5) for one in cache] == [5, 5]
    np.testing.assert_allclose(next_logits(model, cache), next_logits(model, shorter), atol=TOLERANCE[mx.float32])
    assert [one.trim(999) for one in cache] == [30, 30]
    assert cache[0].size() == 0
    assert not filled(model, "rotating", "nvfp4")[0].is_trimmable()


def prefill_peak(model: Any, cache: list[Any], length: int, step: int) -> int:
    """Return the peak of MLX's memory above the weights, as `mlx_lm.generate` takes a prompt."""
    prompt = tokens(1, length)
    mx.eval(prompt)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for start in range(0, length, step):
        model(prompt[:, start : start + step], cache=cache)
        mx.eval([one.state for one in cache])
    return mx.get_peak_memory() - before


def assert_small(model: Any, implementation: Any, length: int, step: int, share: float) -> None:
    """A prompt into an int4 cache takes that cache and a share of what mlx-lm takes in bfloat16 today."""
    today = prefill_peak(model, make_prompt_cache(model), length, step)
    cache = caches.make_prompt_cache(model, kv_format="int4:32")
    with attention.patch_mlx_lm(implementation) as patch:
        peak = prefill_peak(model, cache, length, step)
    assert not patch.handed
    rows = -(-length // KVCache.step) * KVCache.step
    assert sum(one.nbytes for one in cache) == LAYERS * 2 * 2 * rows * (32 // 2 + 2 * 2)
    assert peak <= sum(one.nbytes for one in cache) + share * today


@pytest.mark.slow
def test_a_prompt_takes_the_memory_of_cache_and_chunk() -> None:
    model = tiny("llama", mx.bfloat16, hidden_size=64, intermediate_size=128, num_attention_heads=8, head_dim=32)
    assert_small(model, Practical(1 << 20), 1536, 512, 1 / 7)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["poc", "practical"])
def test_a_prompt_of_16384_tokens_takes_little_memory(implementation: Any) -> None:
    assert_small(tiny("qwen2", mx.bfloat16), implementation, 16384, 2048, 1 / 8)


def test_what_mlx_lm_reads_of_a_model_is_known_in_one_line() -> None:
    gemma = gemma2.Model(gemma2.ModelArgs("gemma2", 64, 1, 128, 4, 32, 1e-6, 512, 2))
    assert why_unread(tiny("qwen2"), "int4") == why_unread(gemma, "none") == ""
    assert "of one int format" in why_unread(tiny("qwen2"), "mxfp4")
    assert "attention sinks" in why_unread(tiny("gpt_oss"), "int4")
    assert "Gemma 2" in why_unread(gemma, "int4")


def test_layers_without_keys_keep_their_caches() -> None:
    state = ArraysCache(2)
    (listed,) = caches.quantize_prompt_cache([CacheList(KVCache(), state)], "mxfp8")
    assert listed[0].kv_format.text == "mxfp8"
    assert listed[1] is state


STABLELM = {**SIZES, "rope_theta": 1e4, "use_qkv_bias": False, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}


class Whole(nn.Module):
    """A model with a language model in it."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model
        self.layers = language_model.layers


def test_mistakes_are_one_clear_line() -> None:
    model, stable = tiny("qwen2"), built("stablelm", **STABLELM)
    for line, mistake in {
        "keys: got heads of width 32; int4 takes multiples of its group size, 64; int4:32 takes 32": lambda: logits(
            model, caches.make_prompt_cache(model), [3]
        ),
        "got 'int7'; it takes int8, ": lambda: caches.make_prompt_cache(model, kv_format="int7"),
        "max_kv_size: got 4; it takes a whole number from 5": lambda: caches.make_prompt_cache(model, 4),
        "deepseek_v3 caches latent vectors instead of keys": lambda: caches.make_prompt_cache(tiny("deepseek_v3")),
        "stablelm computes with cached keys outside attention": lambda: caches.make_prompt_cache(stable),
        "model: stablelm computes with cached keys": lambda: streaming.make_prompt_cache(stable),
        "Whole caches latent vectors instead of keys": lambda: caches.make_prompt_cache(Whole(tiny("deepseek_v3"))),
        "got one in int8:32; only a dense one can be quantized": lambda: caches.quantize_prompt_cache(
            filled(model, "plain", "int8:32"), "int4:32"
        ),
        "caches: got none that holds keys and values": lambda: caches.quantize_prompt_cache([ArraysCache(2)]),
        "cache: got int; it takes KVCache, ": lambda: caches.to_quantized(3),
        "kv_format: got 'none'; it takes the name of a": lambda: caches.to_quantized(KVCache(), "none"),
    }.items():
        with pytest.raises(UsageError) as caught:
            mistake()
        assert line in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1


def test_the_smallest_rotating_cache_keeps_four_tokens() -> None:
    (cache,) = caches.make_prompt_cache(tiny("qwen2", num_hidden_layers=1), caches.KEPT + 1, "mxfp8")
    k = mx.arange(9)[None, None, :, None] * mx.ones((1, 1, 1, 32))
    for token in range(9):
        cache.update_and_fetch(k[:, :, token : token + 1], k[:, :, token : token + 1])
    kept = caches.quantized(cache.keys, "mxfp8").dequantized()[0, 0, :, 0]
    assert kept.tolist() == [0, 1, 2, 3, 8]


def test_no_format_gives_mlx_lms_own_caches() -> None:
    assert type(caches.make_prompt_cache(tiny("qwen2"), WINDOW, "none")[0]) is RotatingKVCache
