"""CUDA kernels with quantized keys and values against float64 over their exact values; most need a CUDA device."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs

mx = pytest.importorskip("mlx.core")

from attention import masks
from attention.core.errors import KernelUnavailable
from attention.core.kv_format import parse_kv_format
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.kernels import cuda
from attention.kernels.cuda import packed_choice, path
from attention.kernels.cuda.portable.forward import PortableForward, tiles_for
from attention.kernels.cuda.quantized import forward_launch
from attention.kernels.cuda.quantized.decode import QuantizedDecode
from attention.kernels.cuda.quantized.formats import PackedKV
from attention.kernels.cuda.quantized.forward import Dequantize, QuantizedGeneral
from attention.kernels.cuda.quantized.forward_launch import Heads, divided_heads
from attention.kernels.cuda.quantized.launch import alone_on_multiprocessor, fill, inputs, make_key_split
from attention.kernels.cuda.runtime import launcher
from attention.kernels.cuda.runtime.call import CallShape, normalize
from attention.kernels.cuda.runtime.launch import Launch, Stage, TensorBox
from attention.quantized_kv import quantized
from tests.support import kernel_oracle
from tests.support.cuda_compiled import needs_nvrtc, report
from tests.support.cuda_planted import GPUS, parameter_kinds, planted, signature
from tests.support.quantized_values import FORMATS, exact, laid_out, normal

needs_gpu = pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])
KINDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 37},
    "softcap": {"softcap": 1.5},
    "all": {"causal": True, "window": 150, "softcap": 1.5},
}


class Case:
    """Random queries, quantized keys and values, and what the kernel makes of them.

    `added` is what `extra`, keywords of the kernel, adds to the scores after the softcap.
    """

    def __init__(self, size, dim, formats, dtype="bfloat16", scales=None, layout=0, seed=0, value_dim=0, **keywords):
        batch, heads, kv_heads, queries, keys = size
        self.extra, self.added = {}, None
        self.dtype = kernel_oracle.DTYPES[dtype]
        of_kv = kernel_oracle.DTYPES[scales or dtype]
        random = np.random.default_rng(seed)
        self.q = mx.array(random.standard_normal((batch, heads, queries, dim), np.float32)).astype(self.dtype)
        self.kv = [
            laid_out(normal(seed + i, (batch, kv_heads, keys, width), of_kv, form.text), layout)
            for i, (form, width) in enumerate(zip(as_pair(formats), (dim, value_dim or dim), strict=True), 1)
        ]
        self.keywords = {"scale": dim**-0.5, **keywords}

    def found(self):
        made = cuda.flash_attention_quantized(self.q, *self.kv, logsumexp=True, **self.keywords, **self.extra)
        kernel_oracle.poison()
        mx.eval(made)
        return made

    def check(self, what):
        output, logsumexp = self.found()
        numbers = [kernel_oracle.numbers(self.q), *map(exact, self.kv)]
        options = kernel_oracle.Options(**self.keywords, mask=self.added)
        right, sums, _ = kernel_oracle.attention(*numbers, options)
        plain = kernel_oracle.plain_attention(*numbers, options, self.dtype)
        kernel_oracle.assert_near(output, right, plain, self.dtype, 2, f"{what}: output")
        found = kernel_oracle.numbers(logsumexp)
        assert np.array_equal(np.isneginf(found), np.isneginf(sums)), what
        rounding = 2e-2 if self.dtype == mx.bfloat16 else 2e-3  # of keys; the split-K kernel rounds them to float16
        with np.errstate(invalid="ignore"):
            assert np.nanmax(np.abs(found - sums) - 1e-4 * np.abs(sums), initial=0) < rounding, f"{what}: logsumexp"


def as_pair(text):
    found = parse_kv_format(text)
    return found.key, found.value


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("formats", [*FORMATS, "int8+int4", "int4:32+mxfp8", "mxfp4+int2", "nvfp4+int3:128"])
def test_every_format_meets_flash_attention_3s_error_bound(formats):
    for seed, dtype in enumerate(("bfloat16", "float16")):
        Case((2, 8, 2, 1, 1000), 128, formats, dtype, seed=seed).check(f"{formats} {dtype}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 4, 1, 2, 700), (2, 8, 2, 5, 333), (1, 16, 1, 4, 90), (1, 2, 2, 9, 5)])
def test_masks_of_several_queries(size, kind):
    Case(size, 128, "int4", "float16", **KINDS[kind]).check(kind)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("formats", [*FORMATS, "int6+int3", "int2:128", "mxfp8+int4:32"])
def test_many_queries(formats):
    for size, dim, dtype, kind in (
        ((1, 4, 2, 300, 300), 128, "bfloat16", "causal"),
        ((2, 8, 2, 150, 500), 128, "float16", "window"),
        ((1, 3, 1, 200, 333), 64, "float16", "all"),
        ((1, 2, 2, 130, 120), 128, "bfloat16", "full"),
        ((1, 2, 1, 140, 70), 128, "bfloat16", "causal"),  # queries that see nothing
    ):
        if dim % max(form.group_size for form in as_pair(formats)) == 0:
            Case(size, dim, formats, dtype, **KINDS[kind]).check(f"{formats} {size} {dim} {dtype} {kind}")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("queries", [1, 90])
@pytest.mark.parametrize("what", ["bool", "added", "pattern", "alibi", "alibi and pattern", "softcap and mask"])
def test_masks_beyond_bounds(what, queries):
    shape, random = (2, 4, queries, 300), np.random.default_rng(8)
    case = Case((2, 4, 2, queries, 300), 128, "int4+int8", softcap=2.0 if "softcap" in what else None)
    distances = np.arange(300) - (np.arange(queries)[:, None] + 300 - queries)
    added = np.zeros(shape)
    if what == "bool":
        seen = random.random((1, 4, queries, 300)) < 0.7
        case.extra["mask"], added = mx.array(seen), added + np.where(seen, 0, -np.inf)
    if what in ("added", "softcap and mask"):
        bias = random.standard_normal((2, 1, queries, 300)).astype(np.float32)
        case.extra["mask"], added = mx.array(bias), added + bias
    if "alibi" in what:
        slopes = np.array([0.25, -0.5, 0.03125, 0], np.float32)
        case.extra["alibi"], added = mx.array(slopes), added + slopes[:, None, None] * distances
    if "pattern" in what:
        pattern = masks.causal() & masks.documents([100, 200])
        case.extra["pattern"] = pattern
        added = np.where(np.array(pattern.dense(shape)), added, -np.inf)
    case.added = np.broadcast_to(added, shape)
    case.check(what)


@pytest.mark.gpu
@needs_gpu
def test_values_of_another_width_than_keys():
    for queries in (1, 200):
        Case((1, 4, 2, queries, 300), 192, "int8+int4", "float16", causal=True, value_dim=128).check(
            f"{queries} queries"
        )


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 192, 256])
def test_head_dims(dim):
    for formats in ("nvfp4",) if dim % 32 else ("int4:32", "int8:32", "mxfp8", "nvfp4", "int3:32"):
        Case((1, 8, 2, 1, 500), dim, formats, "float16").check(f"{dim} {formats}")
        Case((1, 8, 2, 3, 260), dim, formats, "bfloat16", causal=True).check(f"{dim} {formats}, 3 queries")
        Case((1, 8, 2, 70, 260), dim, formats, "bfloat16", causal=True).check(f"{dim} {formats}, 70 queries")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("layout", [1, 2, 3])
@pytest.mark.parametrize("formats", ["int4", "int6+int3:32", "mxfp8", "int8"])
def test_parts_are_read_in_any_layout(formats, layout):
    Case((2, 8, 2, 1, 300), 64, formats, layout=layout).check(f"{formats}, layout {layout}")
    Case((2, 8, 2, 140, 300), 64, formats, layout=layout).check(f"{formats}, layout {layout}, 140 queries")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("scales", ["float32", "float16", "bfloat16"])
def test_scales_of_another_dtype_than_the_queries(scales):
    for dtype in ("bfloat16", "float16"):
        Case((1, 8, 2, 1, 700), 128, "int4", dtype, scales).check(f"{dtype}, scales in {scales}")
        Case((1, 4, 2, 200, 250), 128, "int8:32+int4", dtype, scales).check(f"{dtype}, scales in {scales}, 200 queries")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
@pytest.mark.parametrize("formats", ["int4", "int8", "mxfp4", "mxfp8", "nvfp4"])
def test_values_of_any_size(formats, size):
    """Scales that grow along the keys, so that the factors of a warp have to follow."""
    if formats == "nvfp4" and size != 1.0:
        pytest.skip("its scales have the range of e4m3")
    random = np.random.default_rng(5)
    growth = np.exp2(np.linspace(-6, 6, 900))[:, None]
    q, k = (random.standard_normal((1, 2, rows, 64)).astype(np.float32) for rows in (1, 900))
    v = random.standard_normal((1, 2, 900, 64)) * growth * size
    case = Case((1, 2, 2, 1, 900), 64, formats)
    case.q = mx.array(q).astype(mx.bfloat16)
    case.kv = [quantized(mx.array(x.astype(np.float32)).astype(mx.bfloat16), formats) for x in (k * growth, v)]
    case.check(f"{formats}, {size}")


@pytest.mark.gpu
@needs_gpu
def test_groups_without_spread_are_their_bias():
    case = Case((1, 4, 1, 1, 200), 64, "int4")
    case.kv = [quantized(mx.full((1, 1, 200, 64), value, mx.bfloat16), "int4") for value in (0.0, 5.0)]
    assert mx.allclose(case.found()[0], mx.full((1, 4, 1, 64), 5.0), atol=0.05).item()


@pytest.mark.gpu
@needs_gpu
def test_the_same_input_gives_the_same_bits():
    case = Case((1, 32, 8, 1, 8192), 128, "int4")
    first = case.found()[0]
    assert all(mx.array_equal(first, case.found()[0]).item() for _ in range(5))


@pytest.mark.gpu
@needs_gpu
def test_calls_queued_together_are_those_evaluated_alone():
    """Their parts are in a few buffers of the launcher, which calls of several sizes take in turn."""
    calls = []
    for keys in (900, 5000, 1500, 3000):
        q, k = (mx.random.normal((1, heads, n, 128)).astype(mx.bfloat16) for heads, n in ((8, 1), (2, keys)))
        packed = quantized(k, "int4")
        mx.eval(q, k, packed.arrays)
        calls.append(functools.partial(cuda.flash_attention, q, k, k, scale=0.1))
        calls.append(lambda q=q, kv=packed: cuda.flash_attention_quantized(q, kv, kv, scale=0.1)[0])
    alone = []
    for call in calls:
        alone.append(call())
        mx.eval(alone[-1])
    together = [call() for _ in range(20) for call in calls]
    mx.eval(together)
    for i, output in enumerate(together):
        assert mx.array_equal(output, alone[i % len(calls)]).item(), i


@pytest.mark.gpu
@needs_gpu
def test_vmap_folds_the_axis_into_the_batch():
    case = Case((3, 8, 2, 1, 200), 64, "int4:32")
    k, v = case.kv

    def attend(q, *parts):
        return cuda.flash_attention_quantized(q, k.with_arrays(parts[:3]), v.with_arrays(parts[3:]), **case.keywords)[0]

    parts = [x[:, None] for x in (case.q, *k.arrays, *v.arrays)]
    assert mx.array_equal(mx.vmap(attend)(*parts)[:, 0], attend(case.q, *k.arrays, *v.arrays)).item()


@pytest.mark.gpu
@needs_gpu
def test_a_gradient_is_refused_in_one_line():
    case = Case((1, 4, 2, 1, 100), 64, "int8")
    with pytest.raises(ValueError, match="no gradients with quantized keys and values"):
        mx.eval(mx.grad(lambda q: cuda.flash_attention_quantized(q, *case.kv, scale=0.1)[0].sum())(case.q))


def paths(shape, **keywords):
    return list(packed_choice.candidates(shape, normalize(0.1, False, None, None, shape.keys, **keywords)))


def test_a_call_takes_the_fastest_kernel_that_supports_it():
    few, many = (CallShape(1, 8, 2, queries, 100, 64, "bf16") for queries in (1, 100))
    assert paths(few) == ["decode", "general"]
    assert paths(few, alibi=True) == paths(few, mask="bool") == paths(replace(few, value_dim=128)) == ["general"]
    assert paths(many) == paths(many, alibi=True, mask="bool") == ["workspace", "general"]
    assert paths(replace(many, value_dim=128), pattern=masks.causal()) == ["workspace", "general"]
    assert paths(replace(many, keys=2**19)) == ["general"]  # 128 MiB a head
    assert paths(replace(many, keys=2**18)) == ["workspace", "general"]
    assert paths(replace(many, keys=2**18), pattern=masks.causal()) == ["general"]  # more than one group of heads


def test_a_route_considers_the_kernel_of_every_group_of_heads(monkeypatch):
    """The last group of heads is larger here; a call would not take the workspace without a kernel for it."""
    shape = CallShape(1, 22, 11, 100, 8192, 128, "bf16")
    first, last = (own.heads for own in divided_heads(shape))
    assert first != last

    def for_the_first(part, call):
        if part.kv_heads == last:
            raise KernelUnavailable("the kernel failed its self-check")
        return "hopper", []

    monkeypatch.setattr(packed_choice, "program_of", lambda *given: SimpleNamespace(name=given[-1]))
    monkeypatch.setattr(packed_choice.selfcheck, "distrust_reason", lambda program: None)
    monkeypatch.setattr(packed_choice.choice, "path_of", for_the_first)
    call = normalize(0.1, False, None, None, shape.keys)
    path, reasons = packed_choice.path_of(shape, call, PackedKV.of_text("int4", "bfloat16"))
    assert path == "general"
    assert reasons == ["workspace: the kernel failed its self-check"]


@pytest.mark.parametrize("size", [(1, 8, 8192), (3, 8, 8192), (5, 2, 4096), (2, 7, 30_000), (1, 3, 10**6)])
def test_the_workspace_holds_every_head_once(size):
    batch, kv_heads, keys = size
    shape = CallShape(batch, 2 * kv_heads, kv_heads, 100, keys, 128, "bf16")
    groups = divided_heads(shape)
    found = [(own.batch + b, own.head + h) for own in groups for b in range(own.batches) for h in range(own.heads)]
    assert found == [(b, h) for b in range(batch) for h in range(kv_heads)]
    for own in groups:
        assert own.batches * own.heads * 512 * keys <= 32 << 20 or own.batches * own.heads == 1
        assert own.batches == 1 or own.heads == kv_heads
    assert len(divided_heads(CallShape(1, 32, 8, 8192, 8192, 128, "bf16"))) == 1


def test_launches_of_a_group_of_heads_begin_at_its_rows(monkeypatch):
    monkeypatch.setattr(forward_launch, "gpu", lambda: GPUS["H100"])
    monkeypatch.setattr(forward_launch, "prepare", fake_launch)
    shape = CallShape(2, 8, 4, 100, 50, 64, "bf16")
    groups = divided_heads(shape, 2 * 2 * 50 * 128)
    assert groups[1] == Heads(0, 1, 2, 2)

    def dense(part):
        sizes = ((part.batch, part.heads, 100, 64), (3, 4), (part.heads, 5))
        made = fake_launch(None, 1, [(size, mx.bfloat16) for size in sizes], [])
        return [Stage(made, ("q", "k", "v"), ("output", "sums", "parts"), maps={"k": TensorBox(64)})]

    packed = PackedKV.of_text("int4+mxfp8", "bfloat16")
    made = forward_launch.workspace_stages(shape, packed, dense, groups)
    unpacked, attended = made[2:4]
    assert unpacked.first["v_scales"] == (0, 2)
    assert unpacked.outputs["dense keys"] == ((1, 2, 50, 64), mx.bfloat16)
    assert attended.first["q"] == attended.first["output"] == (0, 4)
    assert attended.outputs["output"][0] == (2, 8, 100, 64)
    assert "sums 1" in attended.outputs
    assert attended.outputs["parts"] == ((4, 5), mx.bfloat16)
    assert attended.reads == ("q", "dense keys", "dense values")
    assert attended.updates == {"dense keys", "dense values"}  # the next group is dequantized after it
    assert "dense keys" in attended.maps


def fake_launch(program, blocks, outputs, scalars):
    shapes, dtypes = zip(*outputs, strict=True)
    return Launch((), {"output_shapes": shapes, "output_dtypes": dtypes})


@pytest.fixture
def on(monkeypatch):
    yield from planted(monkeypatch)


@pytest.mark.parametrize(
    ("fields", "needs", "reported"),
    [
        ({"pass_": "decode"}, {}, "unpacks int8 in registers"),
        ({}, {}, "reads a workspace"),
        ({"head_dim": 192, "value_dim": 128, "mask": "causal"}, {"array_mask": True, "softcap": True}, "a workspace"),
        ({"pass_": "decode"}, {"alibi": True, "logsumexp": True}, "dequantizes int8 in shared memory"),
        ({"pass_": "decode", "mask": "documents:100"}, {}, "dequantizes int8 in shared memory"),
        ({"kv_seq": 2**19, "heads": 1}, {}, "dequantizes int8 in shared memory"),
    ],
)
@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_a_route_tells_where_keys_and_values_are_dequantized(on, gpu, fields, needs, reported):
    on(gpu)
    case = Workload(**{"dtype": "bfloat16", "seq": 512, "head_dim": 64, "kv_format": "int8", **fields})
    found = path.route(case, Needs(**needs))
    assert (found.path, found.fused) == ("CUDA, quantized K/V", True)
    assert reported in found.reason


def test_sinks_are_taken_with_quantized_keys_and_values_only(on):
    on("H100")
    case = Workload(dtype="bfloat16", pass_="decode", head_dim=64, kv_format="int8")
    assert path.route(case, Needs(sinks=True)).fused
    dense = path.route(structs.replace(case, kv_format="none"), Needs(sinks=True))
    assert not dense.supported
    assert "with quantized keys and values only" in dense.reason


def test_sinks_are_an_extra_logit(monkeypatch):
    """The weights of keys without a sink and the logsumexp give those with one."""
    scores = mx.random.normal((2, 4, 3, 20), key=mx.random.key(0)) * 3
    values, sinks = mx.random.normal((2, 4, 20, 8), key=mx.random.key(1)), mx.array([-2.0, 0.0, 3.0, 50.0])
    found = mx.softmax(scores, -1) @ values, mx.logsumexp(scores, -1)
    monkeypatch.setattr(path, "with_logsumexp", lambda *_, **__: found)
    made = path.attend_with_sinks(None, None, None, scale=1, mask=None, softcap=None, sinks=sinks)
    extra = mx.broadcast_to(sinks[:, None, None], (2, 4, 3, 1))
    wanted = mx.softmax(mx.concatenate([scores, extra], -1), -1)[..., :20] @ values
    assert mx.allclose(made, wanted, atol=1e-6).item()


def test_long_keys_have_a_multiprocessor_to_themselves(on):
    on("H100")
    shape = CallShape(1, 32, 8, 1, 131_072, 128, "bf16")
    call = normalize(0.1, False, None, None, shape.keys)
    found = {
        form: make_key_split(shape, call, PackedKV.of_text(form, "bfloat16")).kernel.resident_blocks
        for form in ("int4", "int8", "int4+int8", "int4:32")
    }
    assert found == {"int4": 2, "int8": 1, "int4+int8": 1, "int4:32": 1}


def test_a_workspace_is_counted(on):
    on("H100")
    case = Workload(dtype="bfloat16", batch=4, heads=32, kv_heads=8, seq=8192, head_dim=128, kv_format="int4")
    found = path.route(case, Needs()).predicted_bytes - case.output_bytes
    assert 32 << 20 <= found < 64 << 20


def test_a_failed_check_leads_to_the_general_kernel(on):
    on("H100").wrong["dequantize"] = "off by 3"
    case = Workload(dtype="bfloat16", seq=512, head_dim=64, kv_format="int8")
    reason = path.route(case, Needs()).reason
    assert "in shared memory" in reason
    assert "dequantize: off by 3" in reason


@pytest.mark.parametrize("what", ["plain", "mask", "alibi", "pattern"])
@pytest.mark.parametrize("queries", [1, 200])
def test_every_kernel_gets_the_parameters_of_its_signature(on, what, queries):
    recorder = on("H100").recorder
    q, kv = mx.zeros((2, 4, queries, 64), mx.bfloat16), quantized(mx.zeros((2, 2, 300, 64), mx.bfloat16), "int4")
    extra = {
        "plain": {},
        "mask": {"mask": mx.zeros((1, 4, queries, 300))},
        "alibi": {"alibi": mx.zeros(4)},
        "pattern": {"pattern": masks.causal()},
    }[what]
    cuda.flash_attention_quantized(q, kv, kv, scale=0.1, **extra)
    for _, program, *_, arguments in recorder.plans[-1].steps:
        assert parameter_kinds(arguments) == signature(program), program.name


@pytest.mark.parametrize("first", [0, 1])
def test_values_with_parts_of_one_shape_and_two_widths(on, monkeypatch, first):
    on("H100")
    monkeypatch.setattr(launcher, "is_plan", lambda _: True)
    q, k = mx.zeros((1, 4, 1, 128), mx.bfloat16), quantized(mx.zeros((1, 2, 300, 128), mx.bfloat16), "int8")
    values = [
        quantized(mx.zeros((1, 2, 300, width), mx.bfloat16), text) for width, text in ((128, "int4"), (64, "int8:32"))
    ]
    assert [part.shape for part in values[0].arrays] == [part.shape for part in values[1].arrays]
    for v in (values[first], values[1 - first], values[first]):
        assert cuda.flash_attention_quantized(q, k, v, scale=0.1)[0].shape == (1, 4, 1, v.shape[3])


def test_parts_that_a_format_lacks_are_no_inputs():
    packed = PackedKV.of_text("int4+mxfp8", "bfloat16")
    assert inputs(packed) == ("q", "k", "k_scales", "k_biases", "v", "v_scales")
    alignments = packed.alignments(128)
    assert [alignments[name] for name in ("k", "k_scales", "v", "v_scales")] == [8, 4, 16, 4]
    assert packed.alignments(64, 128)["v_scales"] == 4
    assert PackedKV.of_texts(*packed.texts) == packed


@pytest.mark.parametrize("limit", [101_376, 166_912, 232_448])
@pytest.mark.parametrize("formats", ["int4", "int8:32", "mxfp4", "int8:32+int5:32"])
def test_buffers_fit_in_shared_memory(formats, limit):
    architecture = "sm_90a" if limit > 200_000 else "sm_80"
    for dim, tiles, alone in ((64, 1, True), (128, 1, True), (128, 1, False), (128, 2, False), (256, 1, True)):
        packed = PackedKV.of_text(formats, "float32")
        whole = QuantizedDecode(dim, tiles, False, "f16", False, False, architecture, packed, shared_memory_limit=limit)
        kernel = fill(whole, alone)
        for made in (kernel, alone_on_multiprocessor(kernel)) if kernel.resident_blocks > 1 else (kernel,):
            assert made.shared_memory * made.resident_blocks <= limit
            assert made.stages >= 2


@needs_nvrtc
@pytest.mark.slow  # a second each
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("formats", ["int4", "int8", "int5", "mxfp4", "mxfp8", "nvfp4", "int4:32+int2"])
def test_kernels_compile_without_spills(formats, architecture):
    packed = PackedKV.of_text(formats, "bfloat16")
    limit = 166_912 if architecture == "sm_80" else 232_448
    for tiles, masked in ((1, False), (1, True), (2, True)):
        whole = QuantizedDecode(
            128, tiles, masked, "bf16", masked, True, architecture, packed, shared_memory_limit=limit
        )
        kernel = fill(whole, not masked)
        for made in {kernel, alone_on_multiprocessor(kernel) if kernel.resident_blocks > 1 else kernel}:
            assert report(made.program).spilled == 0
            assert made.shared_memory * made.resident_blocks <= limit
    tiles = tiles_for(128, 128, 300, False, 101_376)
    options = {"packed": False, "split": False, "narrow_steps": False, "tiles": tiles, "architecture": architecture}
    dense = PortableForward(128, 128, True, True, True, None, "bf16", lists=False, alibi=False, **options)
    assert report(QuantizedGeneral(dense, packed).program).spilled == 0
    assert report(Dequantize("bf16", packed, architecture).program).spilled == 0
