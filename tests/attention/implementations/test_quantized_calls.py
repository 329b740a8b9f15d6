"""Calls with quantized keys and values: every implementation against float64 over their values, and its routes."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

import attention as package
from attention import UnsupportedError, attention, masks, quantized
from attention.core.kv_format import parse_format
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.implementations import fused, load_implementation
from attention.implementations.autotune.implementation import Demo
from attention.implementations.autotune.store import Store
from attention.implementations.autotune.trial import CompiledSdpa, candidates, fitting_candidates
from attention.implementations.baseline import Baseline
from attention.implementations.bounded.explain import explain
from attention.implementations.bounded.implementation import Practical
from attention.implementations.bounded.policy import quantized_strategy
from attention.implementations.calls import MlxRunner, call_signature, make_inputs, runner_for, take_path
from attention.implementations.mlx_sdpa import MlxSdpa
from attention.kernels.cpu import path as cpu_path
from attention.masks import Mask
from attention.measure.accuracy import AccuracyChecker
from attention.measure.device import probe
from attention.quantized_kv import QuantizedArray
from tests.support import kernel_oracle, quantized_values
from tests.support.quantized_values import FORMATS

SMALL = Practical(1 << 19)
"""Of a budget that gives several tiles."""
BY = {"baseline": "baseline", "practical": "practical", "in tiles": SMALL, "poc": "poc", "mlx": "mlx"}


@pytest.fixture
def plant(monkeypatch):
    """Return a function that sets whether MLX has a fused kernel."""

    def planted(refusal):
        monkeypatch.setattr("attention.implementations.bounded.policy.why_unfused", lambda *requested: refusal)
        quantized_strategy.cache_clear()

    yield planted
    quantized_strategy.cache_clear()


SINKS = mx.array([0.5, -1.0, 2.0, 0.0])


def arrays(seq=40, keys=90, dtype=mx.float32, form="int8:32+int4", heads=4, kv_heads=2, dim=64):
    key_form, _, value_form = form.partition("+")
    q = mx.random.normal((2, heads, seq, dim), key=mx.random.key(seq)).astype(dtype)
    k = quantized_values.normal(1, (2, kv_heads, keys, dim), dtype, key_form)
    return q, k, quantized_values.normal(2, (2, kv_heads, keys, dim), dtype, value_form or key_form)


def exact(x):
    return quantized_values.exact(x) if isinstance(x, QuantizedArray) else kernel_oracle.numbers(x)


def near(one, other, off=2e-5):
    """Return whether two arrays differ by a few roundings of the largest number of the second."""
    return bool(mx.abs(one - other).max() <= off * mx.abs(other).max())


def assert_right(out, q, k, v, options):
    given = [exact(x) for x in (q, k, v)]
    wanted = kernel_oracle.attention(*given, options)[0]
    plain = kernel_oracle.plain_attention(*given, options, q.dtype)
    kernel_oracle.assert_near(out, wanted, plain, q.dtype, 2, "output", 4e-6 * np.abs(given[2]).max())


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_every_implementation_is_right(data):
    """Formats of K and V, shapes, groups of heads, layouts, masks and dtypes vary independently."""
    forms = [data.draw(st.sampled_from(FORMATS)) for _ in range(2)]
    groups = [parse_format(form).group_size for form in forms]
    dim, value_dim = (data.draw(st.sampled_from([n for n in (32, 64, 96, 128, 256) if n % g == 0])) for g in groups)
    kv_heads, share = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4, 5]))
    seq, keys = data.draw(st.sampled_from([1, 2, 3, 7, 33, 50])), data.draw(st.integers(1, 120))
    dtype = data.draw(st.sampled_from([mx.float32, mx.float16, mx.bfloat16]))
    mask = data.draw(st.sampled_from(["none", "causal", "window", "bool", "added"]))
    options = {"softcap": data.draw(st.sampled_from([None, None, 5.0])), "causal": mask == "causal"}
    options |= {"window": data.draw(st.integers(1, 40)) if mask == "window" else None}
    random = np.random.default_rng(keys)
    if mask in ("bool", "added"):
        shape = (1, kv_heads * share, seq, keys)
        options["mask"] = random.random(shape) < 0.6 if mask == "bool" else random.standard_normal(shape) * 2
        options["mask"] = options["mask"] if mask == "bool" else options["mask"].astype(np.float32)
    q = mx.array(random.standard_normal((2, kv_heads * share, seq, dim)).astype(np.float32)).astype(dtype)
    layouts = data.draw(st.sampled_from([0, 1, 2, 3])), data.draw(st.sampled_from([0, 1, 2, 3]))
    k, v = (
        quantized_values.laid_out(quantized_values.normal(n, (2, kv_heads, keys, width), of, form), layout)
        for n, (form, width, layout) in enumerate(zip(forms, (dim, value_dim), layouts, strict=True))
        for of in [data.draw(st.sampled_from([dtype, mx.float32, mx.bfloat16]))]
    )
    oracle = kernel_oracle.Options(scale=dim**-0.5, **options)
    given_mask = "causal" if mask == "causal" else None if "mask" not in options else mx.array(options["mask"])
    for name, implementation in BY.items():
        if name == "mlx" and (dtype != mx.float32 or oracle.softcap):
            continue  # MLX's products on the CPU add in half precision
        out = attention(
            q, k, v, mask=given_mask, window=oracle.window, softcap=oracle.softcap, implementation=implementation
        )
        assert out.dtype == dtype
        assert_right(out, q, k, v, oracle)


@pytest.mark.parametrize("name", ["baseline", "practical", "in tiles", "poc"])
def test_patterns_alibi_and_the_logsumexp_are_right(name):
    q, k, v = arrays()
    mask = (masks.causal() & masks.window(50)) | masks.prefix(3)
    slopes = [0.5, 0.25, 0.125, 0.0]
    out, logsumexp = attention(
        q, k, v, mask=mask, score_mod=masks.alibi(slopes), softcap=4.0, return_lse=True, implementation=BY[name]
    )
    seen = np.broadcast_to(np.array(mask.dense((2, 4, 40, 90))), (2, 4, 40, 90))
    distance = np.arange(90) - (np.arange(40)[:, None] + 50)
    added = np.where(seen, np.array(slopes)[:, None, None] * distance, -np.inf)
    options = kernel_oracle.Options(scale=1 / 8, softcap=4.0, mask=added)
    assert_right(out, q, k, v, options)
    wanted = kernel_oracle.attention(exact(q), exact(k), exact(v), options)[1]
    np.testing.assert_allclose(np.array(logsumexp), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 40])
@pytest.mark.parametrize("form", ["int8:32+int4", "mxfp4"])
@pytest.mark.parametrize("name", ["practical", "poc"])
def test_sinks_are_an_extra_weight(name, form, seq):
    q, k, v = arrays(seq, form=form)
    out = load_implementation(name)(q, k, v, scale=1 / 8, mask=Mask(causal=True), sinks=SINKS)
    dense = [mx.array(exact(x).astype(np.float32)) for x in (k, v)]
    wanted = load_implementation("practical")(q, *dense, scale=1 / 8, mask=Mask(causal=True), sinks=SINKS)
    assert near(out, wanted)


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("name", ["baseline", "practical", "in tiles", "mlx"])
@pytest.mark.parametrize(("seq", "form"), [(1, "int8:32+int4"), (40, "int8:32+int4"), (40, "mxfp8"), (1, "nvfp4")])
def test_gradients_of_the_query_and_of_the_mask_are_right(name, seq, form):
    q, k, v = arrays(seq, form=form)
    dense = [mx.array(exact(x).astype(np.float32)) for x in (k, v)]
    added = mx.random.normal((4, seq, 90), key=mx.random.key(5))

    def loss(q, added, k, v, by):
        return (attention(q, k, v, mask=added, implementation=by) ** 2).sum()

    found = mx.grad(loss, argnums=(0, 1))(q, added, k, v, BY[name])
    wanted = mx.grad(loss, argnums=(0, 1))(q, added, *dense, "baseline")
    for one, other in zip(found, wanted, strict=True):
        assert near(one, other)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("name", ["baseline", "practical", "in tiles", "mlx"])
def test_gradients_of_scales_and_biases_are_right(name):
    q, k, v = arrays()

    def loss(scales, biases, by):
        moved = k.with_arrays([k.numbers, scales, biases])
        return (attention(q, moved, v, mask="causal", implementation=by) ** 2).sum()

    def of_values(values):
        dense = mx.array(exact(v).astype(np.float32))
        return (attention(q, values, dense, mask="causal", implementation="baseline") ** 2).sum()

    by_value = mx.grad(of_values)(mx.array(exact(k).astype(np.float32))).reshape(*k.scales.shape, 32)
    codes = (exact(k).reshape(*k.scales.shape, 32) - np.array(k.biases)[..., None]) / np.array(k.scales)[..., None]
    d_scales, d_biases = mx.grad(loss, argnums=(0, 1))(k.scales, k.biases, BY[name])
    assert near(d_biases, by_value.sum(-1))
    assert near(d_scales, (by_value * mx.array(codes.astype(np.float32))).sum(-1))


@pytest.mark.parametrize("name", ["baseline", "practical", "in tiles", "mlx"])
@pytest.mark.parametrize(("seq", "form"), [(1, "mxfp8"), (40, "nvfp4"), (40, "int4")])
def test_integers_have_gradients_of_0(name, seq, form):
    q, k, v = arrays(seq, form=form)
    integers = [part for part in k.arrays if part.dtype in (mx.uint32, mx.uint8)]

    def loss(*given):
        return attention(q, k.with_arrays([*given, *k.arrays[len(given) :]]), v, implementation=BY[name]).sum()

    for found in mx.grad(lambda given: loss(*given))(integers):
        assert found.max() == 0


def test_a_kernel_has_no_gradient_and_says_so():
    q, k, v = arrays()
    with pytest.raises((ValueError, RuntimeError), match="no gradient for quantized keys and values") as error:
        mx.eval(mx.grad(lambda q: attention(q, k, v, implementation="poc").sum())(q))
    assert "\n" not in str(error.value)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("name", ["baseline", "practical", "in tiles", "poc"])
def test_calls_are_mapped(name):
    q, k, v = arrays()
    pairs = [mx.stack([q, 0.5 * q]), *(mx.stack([part, part]) for part in k.arrays)]

    def attend(q, *parts):
        return attention(q, k.with_arrays(parts), v, mask="causal", implementation=BY[name])

    wanted = [attend(each, *k.arrays) for each in pairs[0]]
    assert near(mx.vmap(attend)(*pairs), mx.stack(wanted))
    alone = mx.vmap(attend, in_axes=(0, None, None, None))(pairs[0], *k.arrays)
    assert near(alone, mx.stack(wanted))


@pytest.mark.parametrize("name", ["practical", "mlx"])
def test_few_rows_that_mlx_cannot_map_are_refused(name):
    """MLX's quantized_matmul has no vmap; `poc` and `baseline` map them."""
    q, k, v = arrays(1)
    with pytest.raises(RuntimeError, match=r"QuantizedMatmul::vmap.*NYI"):
        mx.vmap(lambda q: attention(q, k, v, implementation=name))(q[None])


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("name", BY)
@pytest.mark.parametrize("seq", [1, 40])
def test_a_graph_for_any_shape_is_right_or_refused(name, seq):
    """A function compiled by `mx.compile(shapeless=True)` and called with fewer keys."""
    q, k, v = arrays(seq)
    parts, fewer = [[*x.arrays] for x in (k, v)], [[*x[:, :, :70].arrays] for x in (k, v)]

    def attend(q, key, value):
        return attention(q, k.with_arrays(key), v.with_arrays(value), implementation=BY[name])

    compiled = mx.compile(attend, shapeless=True)
    try:
        assert near(compiled(q, *parts), attend(q, *parts))
        found = compiled(q, *fewer)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert near(found, attend(q, *fewer))


@pytest.mark.parametrize("form", ["int8", "int4:32", "mxfp8+nvfp4"])
def test_a_call_has_the_format_in_its_workload(form):
    q, k, v = arrays(form=form)
    workload, needs = call_signature(q, k, v, Mask(), None)
    assert (workload.kv_format, needs) == (form, Needs())
    inputs = make_inputs(workload, 0)
    assert [type(x).__name__ for x in inputs] == ["array", "QuantizedArray", "QuantizedArray"]
    assert [x.shape for x in inputs] == [q.shape, k.shape, v.shape]
    assert workload.key_value_bytes == inputs[1].nbytes + inputs[2].nbytes == k.nbytes + v.nbytes
    assert call_signature(*inputs, Mask(), None)[0] == workload


def test_the_path_of_a_call_is_the_path_of_its_route():
    for seq in (1, 40):
        q, k, v = arrays(seq, keys=300)
        workload, needs = call_signature(q, k, v, Mask(causal=True), None)
        for implementation in (Practical(), SMALL, load_implementation("poc")):
            attention(q, k, v, mask="causal", implementation=implementation)
            assert take_path() == implementation.route(workload, probe(), needs).path
    assert Practical().route(workload, probe()).path == "dequantized in blocks"
    assert MlxSdpa().route(workload, probe()).path == "quantized_matmul twice"
    assert Baseline().route(workload, probe()).path == "dequantize, unfused"
    assert not CompiledSdpa().route(workload, probe()).supported


def test_poc_says_that_a_kernel_takes_no_quantized_ones(monkeypatch):
    monkeypatch.setattr(cpu_path, "TAKES", frozenset({"pattern"}))
    poc = fused.Poc()
    q, k, v = arrays()
    route = poc.route(call_signature(q, k, v, Mask(), None)[0], probe())
    assert (route.path, route.fallback) == ("falls back: practical", True)
    assert route.reason.startswith("the kernel for cpu takes no quantized keys and values; keys and values are")
    out = attention(q, k, v, implementation=poc)
    assert take_path() == "falls back: practical"
    assert_right(out, q, k, v, kernel_oracle.Options(scale=1 / 8))


@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("seq", [1, 100])
def test_practical_stays_within_its_budget(seq):
    workload = Workload(seq=seq, kv_seq=3000, heads=4, kv_heads=2, head_dim=128, dtype="bfloat16", kv_format="int4")
    inputs = make_inputs(workload, 0)
    for implementation in (Practical(1 << 22), Practical(1 << 23)):
        runner = MlxRunner(implementation, workload, inputs, workload.scale)
        peak = (runner.peak_bytes() or 0) - workload.output_bytes
        assert peak <= implementation.budget_bytes
        predicted = implementation.route(workload, probe()).predicted_bytes
        assert predicted is not None
        assert peak <= predicted


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("mask", ["none", "causal", "bool"])
@pytest.mark.parametrize("form", ["int4+int8", "mxfp8"])
def test_slices_for_a_gpu_are_right(plant, monkeypatch, form, mask):
    """With a planted fused kernel of MLX's, on the CPU; in a budget for one head at a time, and for all."""
    plant(None)
    monkeypatch.setattr("attention.implementations.bounded.implementation.current_backend", lambda: "metal")
    q, k, v = arrays(seq=70, form=form)
    seen = np.random.default_rng(0).random((4, 70, 90)) < 0.7 if mask == "bool" else None
    options = kernel_oracle.Options(scale=1 / 8, causal=mask == "causal", mask=seen)
    given_mask = mx.array(seen) if mask == "bool" else None if mask == "none" else mask
    for budget in (1 << 23, 1 << 28):
        practical = Practical(budget)
        out = attention(q, k, v, mask=given_mask, implementation=practical)
        assert take_path() == "dequantized in slices"
        assert_right(out, q, k, v, options)
    gradient = mx.grad(lambda q: (attention(q, k, v, mask=given_mask, implementation=practical) ** 2).sum())(q)
    wanted = mx.grad(lambda q: (attention(q, k, v, mask=given_mask, implementation="baseline") ** 2).sum())(q)
    assert near(gradient, wanted)
    attention(q, k, v, mask=mx.zeros((70, 90)), implementation=practical)
    assert take_path() == "dequantized in blocks"  # whose additive mask has a gradient


@pytest.mark.parametrize(
    ("backend", "seq", "fused", "path"),
    [
        ("cuda", 1, True, "dequantized in slices"),
        ("cuda", 2048, True, "dequantized in slices"),
        ("cuda", 1, False, "dequantized in blocks"),
        ("metal", 1, True, "packed keys and values"),
        ("metal", 2048, True, "dequantized in slices"),
        ("cpu", 1, False, "packed keys and values"),
        ("cpu", 2048, True, "dequantized in blocks"),
    ],
)
def test_backends_have_their_own_ways(plant, backend, seq, fused, path):
    """On CUDA nothing is read packed by MLX, which compiles for half a minute for each kind of call."""
    plant(None if fused else "no fused kernel")
    workload = Workload(seq=seq, kv_seq=8192, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", kv_format="int4")
    route = Practical().route(workload, structs.replace(probe(), backend=backend))
    assert route.path == path
    if path == "dequantized in slices":
        assert route.predicted_bytes - workload.output_bytes <= 256 << 20
        assert route.reason.startswith("keys and values of 1 x ")
    softcapped = Practical().route(workload, structs.replace(probe(), backend=backend), Needs(softcap=True))
    assert softcapped.path != "dequantized in slices"


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["int4", "mxfp8"])
def test_unfused_paths_predict_what_they_need(form, dtype):
    workload = Workload(seq=2, kv_seq=1000, heads=4, kv_heads=2, head_dim=128, dtype=dtype, kv_format=form)
    for implementation in (Baseline(), MlxSdpa()):
        peak = MlxRunner(implementation, workload, make_inputs(workload, 0), workload.scale).peak_bytes()
        predicted = implementation.route(workload, probe()).predicted_bytes
        assert 0.5 * predicted <= peak <= 1.05 * predicted


@pytest.mark.parametrize("backend", ["cpu", "cuda", "metal"])
@pytest.mark.parametrize("seq", [1, 512])
def test_what_practical_chose_is_explained(seq, backend):
    workload = Workload(seq=seq, kv_seq=4096, heads=8, kv_heads=2, head_dim=128, dtype="bfloat16", kv_format="int4")
    found = {one.what: one for one in explain(Practical(), workload, structs.replace(probe(), backend=backend))}
    packed = seq == 1 and backend != "cuda"
    assert found["way"].value == ("packed" if packed else "blocks")
    assert ("tile" in found) != packed


@pytest.mark.thorough
def test_demo_tries_candidates_that_read_quantized_ones(tmp_path: Path):
    store = Store(tmp_path / "tuning.toml")
    among = {"practical": Practical(), "mlx": MlxSdpa(), "baseline": Baseline()}
    demo = Demo(store=store, among=among, budget_s=0.05)
    q, k, v = arrays(form="int8")
    assert_right(attention(q, k, v, implementation=demo), q, k, v, kernel_oracle.Options(scale=1 / 8))
    assert_right(attention(q, k, v, implementation=demo), q, k, v, kernel_oracle.Options(scale=1 / 8))
    (entry,) = store.entries()
    assert entry.workload.kv_format == "int8"
    assert {*entry.call_s, *entry.untried} == set(among)
    dense = [x.dequantized() for x in (k, v)]
    attention(q, *dense, implementation=demo)
    assert [entry.workload.kv_format for entry in store.entries()] == ["int8", "none"]
    assert "K/V int8" in entry.workload.label
    assert "K/V" not in store.entries()[1].workload.label


@pytest.mark.thorough
def test_a_wrong_candidate_is_out_for_quantized_ones(tmp_path: Path):
    class Wrong(Baseline):
        name = "wrong"

        def __call__(self, q, k, v, **more):
            return mx.zeros_like(q)

    demo = Demo(store=Store(tmp_path / "t.toml"), among={"practical": Practical(), "wrong": Wrong()}, budget_s=0.02)
    q, k, v = arrays()
    for mask in (None, masks.causal() & masks.prefix(3), mx.ones((40, 90), mx.bool_)):
        out = attention(q, k, v, mask=mask, implementation=demo)
        assert mx.abs(out).max() > 0


def test_every_candidate_has_a_route_for_quantized_ones():
    workload = Workload(seq=1, kv_seq=4096, heads=8, kv_heads=2, head_dim=128, kv_format="int4")
    found = fitting_candidates(candidates(), workload, probe(), Needs())
    assert {"poc", "practical", "mlx", "baseline"} <= set(found)
    assert "mlx compiled" not in found
    on_cuda = structs.replace(probe(), backend="cuda", name="a GPU")
    among = {"practical": Practical(), "mlx": MlxSdpa(), "baseline": Baseline()}
    assert fitting_candidates(among, workload, on_cuda, Needs()) == ["practical", "baseline"]
    assert "at the first call" in MlxSdpa().route(workload, on_cuda).reason


def test_the_accuracy_check_is_over_the_values_of_the_parts():
    workload = Workload(seq=30, kv_seq=50, heads=2, head_dim=64, dtype="float32", kv_format="int2")
    inputs = make_inputs(workload, 0)
    checker = AccuracyChecker(workload, inputs)
    right = MlxRunner(Baseline(), workload, inputs, workload.scale).results()
    assert checker.check(right).accurate
    unquantized = make_inputs(Workload(seq=30, kv_seq=50, heads=2, head_dim=64, dtype="float32"), 0)
    assert mx.array_equal(unquantized[0], inputs[0])
    wrong = MlxRunner(Baseline(), workload, unquantized, workload.scale).results()
    assert not checker.check(wrong).accurate


def test_a_monitor_tells_formats_apart():
    q, k, v = arrays(form="int8")
    with package.monitor() as monitor:
        attention(q, k, v)
        attention(q, k, v)
        attention(q, quantized(k.dequantized(), "int4"), v)
    counted = {case.workload.kv_format: case.rows[0].reason.split(" calls")[0] for case in monitor.report().cases}
    assert counted == {"int8": "2", "int4+int8": "1"}


class Plugin:
    name = "plugin"

    def route(self, workload, device, needs=None):
        return load_implementation("baseline").route(workload, device)

    def __call__(self, q, k, v, **more):
        raise AssertionError("it is not called")


def test_a_plugin_that_declares_nothing_gets_none():
    q, k, v = arrays(form="int8")
    with pytest.raises(UnsupportedError, match=r"^plugin: it takes no quantized keys and values; practical does$"):
        attention(q, k, v, implementation=Plugin())
    workload, _ = call_signature(q, k, v, Mask(), None)
    with pytest.raises(UnsupportedError, match=r"^plugin: it takes no quantized keys and values$"):
        runner_for(Plugin(), workload, [q, k, v], 1.0)
    runner_for(Plugin(), structs.replace(workload, kv_format="none"), [q, k, v], 1.0)


def test_a_traced_call_is_tuned_on_packed_inputs(tmp_path: Path):
    demo = Demo(store=Store(tmp_path / "t.toml"), among={"practical": Practical(), "mlx": MlxSdpa()}, budget_s=0.02)
    q, k, v = arrays(form="mxfp8")

    def attend(q, *parts):
        return attention(q, k.with_arrays(parts), v, implementation=demo)

    assert near(mx.compile(attend)(q, *k.arrays), attention(q, k, v, implementation="baseline"))
    assert [entry.workload.kv_format for entry in demo.store.entries()] == ["mxfp8"]
