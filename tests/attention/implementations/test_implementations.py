"""Every implementation against float64: either a correct result, or a route that declines."""

import importlib.metadata
import importlib.util
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from attention.core.errors import KernelUnavailable, UnsupportedError
from attention.core.route import Needs, Route, unsupported
from attention.core.workload import Workload
from attention.implementations import load_implementation
from attention.implementations.autotune.implementation import Demo
from attention.implementations.bounded.blocks import Blocks
from attention.implementations.bounded.blockwise_gradient import Attend
from attention.implementations.bounded.implementation import Practical
from attention.implementations.bounded.policy import Method, Strategy
from attention.implementations.calls import call_signature, current_backend, take_path
from attention.implementations.fused import Poc
from attention.implementations.protocol import Implementation
from attention.implementations.torch_sdpa import TorchSdpa
from attention.masks import Mask
from attention.measure.device import Backend, probe
from tests.support.attention_examples import CPU, EXAMPLES, INSTALLED, TOLERANCE, Example, to_numpy


class InBlocks(Practical):
    """Practical, forced to cut everything into small tiles."""

    def __init__(self, keys: int, sums_queries: bool = False) -> None:
        super().__init__(budget_bytes=1)
        self._tile = Blocks(batches=1, kv_heads=1, rows=16, keys=keys, sums_queries=sums_queries)

    def _strategy(self, *requested: Any) -> Strategy:
        return structs.replace(super()._strategy(*requested), blocks=self._tile, backward_blocks=self._tile)


class InSlices(Practical):
    """Practical, forced to use slices as on a GPU, each optionally waiting for the previous one."""

    def __init__(self, forward: Method, backward: Method, waits: bool = False) -> None:
        super().__init__()
        self._methods, self._waits = (forward, backward), waits
        self._slice = Blocks(batches=1, kv_heads=1, rows=16, keys=1)

    def _strategy(self, workload: Workload, backend: Backend, needs: Needs, *more: Any) -> Strategy:
        made = super()._strategy(workload, backend, needs, *more)
        if needs.softcap:
            return made
        forward, backward = self._methods
        return structs.replace(
            made,
            forward=forward,
            backward=backward,
            slices=self._slice,
            backward_slices=self._slice if backward is Method.SLICES else None,
            waits=self._waits,
        )

    def _in_slices(self, choice: Strategy, backend: Backend, scale: float, mask: Mask, dtype: mx.Dtype) -> Attend:
        return super()._in_slices(choice, "cuda", scale, mask, dtype)  # waits, where it waits, as there


IMPLEMENTATIONS: dict[str, Implementation] = {
    **{name: load_implementation(name) for name in INSTALLED},
    "demo": Demo(budget_s=0.02),  # a trial for each kind of call
    "blocks of all keys": InBlocks(1000),
    "blocks of few keys": InBlocks(12),
    "blocks of few keys, seen once": InBlocks(12, sums_queries=True),
    "slices": InSlices(Method.SLICES, Method.SLICES),
    "slices that wait": InSlices(Method.SLICES, Method.SLICES, waits=True),
    "slices behind": InSlices(Method.WHOLE, Method.SLICES),
    "slices, blocks behind": InSlices(Method.SLICES, Method.BLOCKS),
}
DIFFERENTIABLE = [name for name in IMPLEMENTATIONS if name != "torch"]
LARGE_GRAPHS = (
    *("blocks of all keys", "blocks of few keys", "blocks of few keys, seen once", "slices, blocks behind"),
    "baseline",
)
"""Implementations whose graphs take the C++ compiler seconds: blocks, and the unfused baseline."""


COMPILED = ("causal, more keys", "additive array", "half")
"""Examples for which demo's trials compile: of each the C++ compiler takes a second."""


def labels(example: object) -> str:
    return example.label if isinstance(example, Example) else str(example)


SHARED = (
    ("blocks of all keys", "blocks of few keys, seen once"),
    ("slices that wait", "slices behind", "slices, blocks behind"),
)
"""Forms of `practical` that share the examples among them; "blocks of few keys" and "slices" take all."""


def calls_of(names: Iterable[str]) -> list[Any]:
    """Return each implementation with its examples."""
    made = []
    for name in names:
        forms = next((forms for forms in SHARED if name in forms), (name,))
        examples = EXAMPLES[forms.index(name) :: len(forms)]
        made += [pytest.param(name, example, id=f"{name}-{example.label}") for example in examples]
    return made


@pytest.mark.sampled(0.25)
@pytest.mark.parametrize(("name", "example"), calls_of(IMPLEMENTATIONS))
def test_the_output_is_float64s_or_the_route_refuses(name: str, example: Example) -> None:
    check_output(name, example)


def check_output(name: str, example: Example) -> None:
    implementation, inputs = IMPLEMENTATIONS[name], example.inputs()
    route = implementation.route(example.workload(), CPU, example.needs)

    def call() -> mx.array:
        q, k, v = inputs[:3]
        return implementation(q, k, v, scale=example.scale, mask=example.mask(), softcap=example.softcap)

    if not route.supported:
        with pytest.raises(UnsupportedError):
            call()
        return
    out = call()
    assert out.dtype == inputs[0].dtype
    assert len(route.path) <= 22
    np.testing.assert_allclose(to_numpy(out), example.exact()[0], atol=TOLERANCE[example.dtype])


@pytest.mark.sampled(0.15)
@pytest.mark.parametrize(("name", "example"), calls_of(DIFFERENTIABLE))
def test_gradients_are_float64s(name: str, example: Example) -> None:
    check_gradients(name, example)


def check_gradients(name: str, example: Example) -> None:
    implementation, inputs = IMPLEMENTATIONS[name], example.inputs()
    if not implementation.route(example.workload("training"), CPU, example.needs).supported:
        return
    mask = example.mask()

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return implementation(q, k, v, scale=example.scale, mask=mask, softcap=example.softcap)

    outputs, gradients = mx.vjp(attend, inputs[:3], inputs[3:])
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs[:3]]
    for found, exact in zip([*outputs, *gradients], example.exact(), strict=True):
        np.testing.assert_allclose(to_numpy(found), exact, atol=4 * TOLERANCE[example.dtype])


@pytest.mark.compiles
@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.label in COMPILED], ids=labels)
def test_compiled_candidates_of_demo_are_float64s(example: Example) -> None:
    check_output("demo", example)
    check_gradients("demo", example)


def test_rows_that_see_nothing_are_exactly_zero() -> None:
    example = Example(causal=True, seq=41, kv_seq=20)
    q, k, v, _ = example.inputs()
    for implementation in IMPLEMENTATIONS.values():
        out = implementation(q, k, v, scale=1.0, mask=example.mask())
        assert not np.array(out[:, :, :21]).any()
        assert np.array(out[:, :, 21:]).any(axis=-1).all()


@pytest.mark.parametrize("name", ["baseline", "practical", "blocks of all keys", "blocks of few keys"])
def test_a_hugely_negative_additive_mask_hides_without_blinding(name: str) -> None:
    example = Example(array="additive")
    q, k, v, _ = example.inputs()
    mask = example.mask()
    lowest = mx.full((example.seq, example.kv_seq), float(np.finfo(np.float32).min))
    mask = type(mask)(array=lowest)
    out = IMPLEMENTATIONS[name](q, k, v, scale=0.01, mask=mask)
    assert np.isfinite(np.array(out)).all()
    assert np.array(out).any()


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LARGE_GRAPHS else n for n in DIFFERENTIABLE]
)
@pytest.mark.compiles
def test_works_under_grad_value_and_grad_and_compile(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    example = Example(batch=1, heads=2, kv_heads=1, seq=9, kv_seq=13, causal=True)  # few tiles: each is C++ to compile
    q, k, v, _ = example.inputs()
    mask = example.mask()

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.square(implementation(q, k, v, scale=example.scale, mask=mask)).sum()

    plain = mx.grad(loss, argnums=(0, 1, 2))(q, k, v)
    value, again = mx.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    compiled_value, compiled = mx.compile(mx.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    assert compiled_value.item() == pytest.approx(value.item(), rel=1e-5)
    for one, two, three in zip(plain, again, compiled, strict=True):
        assert mx.allclose(one, two, atol=1e-4)
        assert mx.allclose(one, three, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in INSTALLED if name in ("mlx", "poc", "torch")])
def test_a_softcap_is_taken_or_refused_as_the_route_says(name: str) -> None:
    example = Example(softcap=2.0)
    supported = IMPLEMENTATIONS[name].route(example.workload(), CPU, example.needs).supported
    assert supported == (name == "poc")


def test_every_route_says_why() -> None:
    for implementation in IMPLEMENTATIONS.values():
        for pass_ in ("forward", "training"):
            route = implementation.route(Example().workload(pass_), CPU)
            assert route.reason
            assert route.supported


@pytest.mark.parametrize(("enabled", "named"), [(None, True), ("1", True), ("0", False)])
@pytest.mark.parametrize("name", ["baseline", "practical", "mlx"])
def test_float32_products_in_tf32_are_named(
    monkeypatch: pytest.MonkeyPatch, name: str, enabled: str | None, named: bool
) -> None:
    if enabled is None:
        monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    else:
        monkeypatch.setenv("MLX_ENABLE_TF32", enabled)
    cuda = structs.replace(CPU, backend="cuda")
    for workload in (Workload(seq=64, dtype="float32"), Workload(seq=8192, heads=64, dtype="float32")):
        assert load_implementation(name).route(workload, cuda).path.endswith(", TF32") == named
    assert "TF32" not in load_implementation(name).route(Workload(seq=64, dtype="bfloat16"), cuda).path
    assert "TF32" not in load_implementation(name).route(Workload(seq=64, dtype="float32"), CPU).path


@pytest.mark.parametrize("workload", [Workload(seq=64, dtype="float16"), Workload(seq=8192, heads=64, dtype="float16")])
@pytest.mark.parametrize(("name", "converts"), [("baseline", True), ("practical", True), ("poc", True), ("mlx", False)])
def test_float16_converted_to_float32_is_named_as_tf32(
    monkeypatch: pytest.MonkeyPatch, name: str, converts: bool, workload: Workload
) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    wide = structs.replace(workload, head_dim=512)  # for which neither MLX nor poc has a kernel
    for backend in ("cuda", "cpu"):
        device = structs.replace(CPU, backend=backend)
        named = converts and backend == "cuda"
        assert load_implementation(name).route(wide, device).path.endswith(", TF32") == named


@pytest.mark.parametrize("name", ["poc", "practical"])
def test_float32_in_blocks_is_not_in_tf32(name: str) -> None:
    cuda = structs.replace(CPU, backend="cuda")
    assert (
        "TF32" not in load_implementation(name).route(Workload(seq=64, dtype="float32"), cuda, Needs(softcap=True)).path
    )


def test_poc_says_that_it_falls_back() -> None:
    route = load_implementation("poc").route(Workload(head_dim=513), CPU)
    assert (route.path, route.fallback) == ("falls back: MLX SDPA", True)
    assert "takes head dims to 512, not 513" in route.reason


class KernelOf:
    """A kernel whose path is named as its backend, and otherwise once it is built; it fails once `error` is set."""

    TAKES = frozenset[str]()

    def __init__(self, backend: Backend) -> None:
        self.path, self.error, self.attempts = str(backend), "", 0

    def route(self, workload: Workload, needs: Needs) -> Route:
        if self.attempts and self.error:
            return unsupported(self.error)
        return Route(path=self.path, fused=True, reason="a test")

    def build(self, workload: Workload, on_message: Any) -> None:
        self.path = "as built"

    def attend(self, q: mx.array, *arguments: Any, **more: Any) -> mx.array:
        self.attempts += 1
        if self.error:
            raise KernelUnavailable(self.error)
        return q


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[Backend, KernelOf]:
    made: dict[Backend, KernelOf] = {"cpu": KernelOf("cpu"), "cuda": KernelOf("cuda"), "metal": KernelOf("metal")}
    monkeypatch.setattr("attention.implementations.fused._kernel", made.__getitem__)
    return made


def route_and_call(poc: Poc, lengths: Iterable[int], backend: Backend) -> None:
    """Ask for the routes of some lengths on a backend, then make a call of each on the current one."""
    calls = [mx.zeros((1, 1, length, 8)) for length in lengths]
    for q in calls:
        poc.route(call_signature(q, q, q, Mask(), None)[0], structs.replace(probe(), backend=backend))
    for q in calls:
        poc(q, q, q, scale=1.0, mask=Mask())


def test_a_call_runs_by_the_route_of_its_own_device(kernels: dict[Backend, KernelOf]) -> None:
    other: Backend = "metal" if current_backend() == "cuda" else "cuda"
    route_and_call(Poc(), [3], other)
    assert take_path() == current_backend()


def test_routes_from_before_a_kernel_was_built_are_dropped(kernels: dict[Backend, KernelOf]) -> None:
    poc, q = Poc(), mx.zeros((1, 1, 3, 8))
    workload = call_signature(q, q, q, Mask(), None)[0]
    poc.route(workload, structs.replace(probe(), backend=current_backend()))
    poc.build_for(workload, print)
    poc(q, q, q, scale=1.0, mask=Mask())
    assert take_path() == "as built"


def test_routes_from_before_a_kernel_failed_are_dropped(kernels: dict[Backend, KernelOf]) -> None:
    kernel = kernels[current_backend()]
    kernel.error = "it failed its self-check"
    route_and_call(Poc(), [3, 4], current_backend())
    assert kernel.attempts == 1


def test_torch_says_how_to_get_it_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    route = TorchSdpa().route(Example().workload(), CPU)
    assert not route.supported
    assert "pip install torch" in route.reason


def test_torchs_kernel_is_known_on_a_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    cuda = structs.replace(CPU, backend="cuda")
    for version, fused in (("2.13.0", None), ("2.13.0+cpu", True)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert TorchSdpa().route(Example().workload(), cuda).fused is fused


def test_mlx_gives_its_own_reason_for_not_fusing() -> None:
    route = load_implementation("mlx").route(Example().workload(), CPU)
    assert (route.path, route.fused) == ("MLX SDPA, unfused", False)
    assert "CPU" in route.reason
