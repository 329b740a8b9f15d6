"""ALiBi in the CUDA kernels: launches on a simulated GPU, and results on a real one against float64."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from attention import attention, masks
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.implementations import load_implementation
from attention.implementations.calls import take_path
from attention.kernels import cuda
from attention.kernels.cuda import gradients as cuda_gradients
from attention.kernels.cuda import path
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from tests.support import kernel_oracle
from tests.support.cuda_planted import parameter_kinds, planted, signature

PATTERN = masks.prefix(40) | masks.window(70)
KINDS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": 100},
    "softcap": {"causal": True, "softcap": 2.0},
    "lists": {"pattern": PATTERN},
    "bool mask": {"mask": "bool"},
    "added mask": {"mask": "float16", "causal": True},
    "added mask and softcap": {"mask": "float32", "softcap": 2.0},
    "mask and lists": {"mask": "bfloat16", "pattern": PATTERN},
}


@pytest.fixture
def recorder(monkeypatch):
    for on in planted(monkeypatch):
        yield on("H100").recorder


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("queries", "dim"), [(300, 64), (300, 128), (3, 128), (300, 256), (1, 64)])
def test_a_call_with_slopes_gets_kernels_that_take_them(recorder, queries, dim, kind):
    keywords = dict(KINDS[kind])
    q, k = mx.zeros((1, 4, queries, dim), mx.bfloat16), mx.zeros((1, 2, 300, dim), mx.bfloat16)
    if "mask" in keywords:
        keywords["mask"] = mx.zeros((queries, 300), getattr(mx, keywords["mask"].replace("bool", "bool_")))
    slopes = mx.zeros(4)
    output = cuda.flash_attention(q, k, k, scale=0.125, alibi=slopes, **keywords)
    outputs = [output, mx.zeros((1, 4, queries)), mx.zeros((1, 4, queries, 2))]
    primals = [q, k, k, *([keywords["mask"]] if "mask" in keywords else []), slopes]
    made = recorder.gradient(recorder.plans[-1].label, primals, [output], outputs)
    assert [x.shape for x in made] == [x.shape for x in primals]
    for plan in recorder.plans:
        for _, program, *_, arguments in plan.steps:
            assert parameter_kinds(arguments) == signature(program), program.name
            if "rows" not in program.name and "finish" not in program.name and "join" not in program.name:
                assert dict(program.constants)["ALIBI"] == 1, program.name


def test_calls_without_slopes_get_kernels_without_them(recorder):
    q = mx.zeros((1, 4, 300, 64), mx.bfloat16)
    cuda.flash_attention(q, q, q, scale=0.125)
    assert all(dict(program.constants)["ALIBI"] == 0 for _, program, *_ in recorder.plans[-1].steps)


def test_poc_takes_alibi_through_the_kernels(recorder):
    assert "alibi" in path.TAKES
    workload = Workload(heads=4, seq=300, head_dim=64, dtype="bfloat16", mask="causal")
    for needs in (Needs(alibi=True), Needs(alibi=True, softcap=True), Needs(alibi=True, logsumexp=True)):
        found = path.route(workload, needs)
        assert (found.supported, found.path) == (True, path.NAMES["forward"]), found.reason


def test_gradients_of_a_softcap_with_slopes_are_general(recorder):
    shape, call = CallShape(1, 4, 2, 300, 300, 64, "bf16"), CallParams(0.1, True, None, 2.0, alibi=True)
    assert "softcap" in cuda_gradients._refusal_of_own(shape, call)
    assert cuda_gradients.refusal(shape, call) is None


def test_mapped_slopes_are_one_call_after_the_other(recorder):
    q = mx.zeros((1, 4, 300, 64), mx.bfloat16)
    cuda.flash_attention(q, q, q, scale=0.125, alibi=mx.zeros(4))
    label = recorder.plans[-1].label
    output, logsumexp, _ = recorder.batched(label, [q, q, q, mx.zeros((5, 4))], [-1, -1, -1, 0])
    assert (output.shape, logsumexp.shape) == ((5, 1, 4, 300, 64), (5, 1, 4, 300))
    assert recorder.plans[-1].shapes[0] == [1, 4, 300, 64]
    wide = mx.zeros((5, 1, 4, 300, 64), mx.bfloat16)
    recorder.batched(label, [wide, q, q, mx.zeros(4)], [0, -1, -1, -1])
    assert recorder.plans[-1].shapes[0] == [5, 4, 300, 64]


@pytest.mark.parametrize(
    ("slopes", "words"), [((3,), "float32"), ((4,), "float16"), ((4, 1), "float32")], ids=["heads", "dtype", "axes"]
)
def test_slopes_of_another_shape_or_type_are_named(recorder, slopes, words):
    q = mx.zeros((1, 4, 30, 64), mx.bfloat16)
    with pytest.raises(ValueError, match=r"alibi takes slopes \(4,\) in float32; got"):
        cuda.flash_attention(q, q, q, scale=0.125, alibi=mx.zeros(slopes, getattr(mx, words)))


# ---- on a GPU ----------------------------------------------------------------------------------------------------

SIZES = {  # batch, heads, kv_heads, queries, keys
    "square": (2, 4, 2, 300, 300),
    "more keys": (1, 3, 1, 217, 433),
    "more rows": (1, 2, 2, 130, 100),
    "few rows": (2, 8, 2, 3, 900),
    "one row": (1, 8, 8, 1, 2000),
}


class Example:
    """Random arrays with slopes of either sign, and the exact results."""

    def __init__(self, size, dims, dtype, kind, seed=3):
        self.random = np.random.default_rng(seed)
        batch, heads, kv_heads, queries, keys = size
        self.dtype = kernel_oracle.DTYPES[dtype]
        shapes = [
            (heads, queries, dims[0]),
            (kv_heads, keys, dims[0]),
            (kv_heads, keys, dims[1]),
            (heads, queries, dims[1]),
        ]
        self.arrays = [
            mx.array(self.random.standard_normal((batch, *shape), np.float32)).astype(self.dtype) for shape in shapes
        ]
        slopes = np.array([0.5, 0.03, -0.25, 1.0, 0.0, 0.125, -0.01, 0.002][:heads], np.float32)
        self.slopes = mx.array(slopes)
        self.keywords = {"scale": dims[0] ** -0.5, "alibi": self.slopes, **kind}
        shape = (batch, heads, queries, keys)
        added = np.zeros(shape)
        if "mask" in kind:
            hidden = self.random.random((1, heads, queries, keys)) < 0.3
            numbers = np.where(hidden, -np.inf, self.random.standard_normal(hidden.shape)).astype(np.float32)
            given = (
                mx.array(~hidden)
                if kind["mask"] == "bool"
                else mx.array(numbers).astype(kernel_oracle.DTYPES[kind["mask"]])
            )
            self.keywords["mask"] = given
            added = added + (np.where(hidden, -np.inf, 0) if kind["mask"] == "bool" else kernel_oracle.numbers(given))
        if "pattern" in kind:
            added = np.where(np.array(kind["pattern"].dense(shape)), added, -np.inf)
        distance = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
        added = added + slopes.astype(np.float64)[:, None, None] * distance
        named = {name: kind.get(name) for name in ("window", "softcap")}
        causal = kind.get("causal", False) or "window" in kind
        self.options = kernel_oracle.Options(dims[0] ** -0.5, mask=added, causal=causal, **named)
        self.numbers = [kernel_oracle.numbers(x) for x in self.arrays]

    def attend(self, q, k, v):
        return cuda.flash_attention_with_logsumexp(q, k, v, **self.keywords)

    def check(self, what):
        (output, logsumexp), made = mx.vjp(
            self.attend, self.arrays[:3], [self.arrays[3], mx.zeros(self.arrays[0].shape[:3])]
        )
        mx.eval(output, logsumexp, made)
        exact, right, _ = kernel_oracle.attention(*self.numbers[:3], self.options)
        plain = kernel_oracle.plain_attention(*self.numbers[:3], self.options, self.dtype)
        kernel_oracle.assert_near(output, exact, plain, self.dtype, 2, f"{what}: output")
        found = kernel_oracle.numbers(logsumexp)
        assert np.array_equal(np.isneginf(found), np.isneginf(right)), what
        with np.errstate(invalid="ignore"):
            assert np.nanmax(np.abs(found - right) / np.maximum(1, np.abs(right)), initial=0) < 1e-3, what
        exact = kernel_oracle.gradients(*self.numbers, self.options)
        plain = kernel_oracle.plain_gradients(*self.numbers, self.options, self.dtype)
        for name, one, wanted, rounded in zip(("dQ", "dK", "dV"), made, exact, plain, strict=True):
            kernel_oracle.assert_near(one, wanted, rounded, self.dtype, 3, f"{what}: {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dims", [(64, 64), (128, 128), (192, 192), (256, 256), (80, 80), (128, 64)], ids=lambda dims: f"{dims[0]}x{dims[1]}"
)
def test_slopes_are_added_forward_and_backward(dims, kind, size):
    dtype = "float16" if 64 in dims else "bfloat16"
    Example(SIZES[size], dims, dtype, KINDS[kind]).check(f"{dtype} {kind} {size}")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["causal", "lists", "softcap"])
def test_poc_computes_alibi_by_the_kernel(kind):
    made = Example(SIZES["square"], (64, 64), "bfloat16", KINDS[kind])
    mask = PATTERN if kind == "lists" else "causal"
    softcap = KINDS[kind].get("softcap")
    given = {"mask": mask, "softcap": softcap, "score_mod": masks.alibi(made.slopes)}
    found = attention(*made.arrays[:3], **given, implementation="poc")
    assert "CUDA kernel" in take_path()
    wanted = attention(*made.arrays[:3], **given, implementation="practical")
    assert mx.abs(found - wanted).max() < 0.05
    mapped = mx.vmap(
        lambda slopes: load_implementation("poc")(
            *made.arrays[:3], scale=0.125, mask=masks.Mask(causal=True, alibi=slopes)
        )
    )(mx.stack([made.slopes, 2 * made.slopes]))
    assert mapped.shape == (2, *found.shape)
