"""Parts of the kernel: compiled when a call first needs them, and kept together from then on."""

import json

import mlx.core as mx
import pytest

from attention.core.kv_format import parse_kv_format
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.kernels import cpu
from attention.kernels.common import cache
from attention.kernels.cpu import build, library, path, selfcheck
from attention.measure.device import usable_cores
from attention.quantized_kv import quantized
from tests.support.marks import thorough

pytestmark = [
    pytest.mark.usefixtures("compiled_kernel"),
    pytest.mark.skipif(not build.SEPARABLE, reason="libraries have all parts here"),
]


@pytest.fixture(autouse=True)
def on_cpu(kernel):
    """Compute on the CPU."""


def loaded_again(parts=()):
    """Simulate another process that needs some parts; return the parts of its library."""
    library._loaded, library._parts, cpu._module = None, frozenset(), None
    cpu.load(parts=parts)
    return library._parts


def normal(*shape, dtype=mx.float32, seed=0):
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


CALLS = {
    "float32": lambda: cpu.flash_attention(*[normal(1, 4, 80, 32)] * 3, scale=0.2),
    "float16": lambda: cpu.flash_attention(*[normal(1, 4, 80, 32, dtype=mx.float16)] * 3, scale=0.2),
    "bfloat16": lambda: cpu.flash_attention(*[normal(1, 4, 80, 32, dtype=mx.bfloat16)] * 3, scale=0.2, causal=True),
    "few": lambda: cpu.flash_attention(normal(1, 4, 1, 32), *[normal(1, 2, 90, 32)] * 2, scale=0.2),
    "gradients": lambda: mx.grad(lambda q: cpu.flash_attention(q, q, q, scale=0.2).sum())(normal(1, 4, 80, 32)),
    "gradients of the logsumexp": lambda: mx.grad(
        lambda q: cpu.flash_attention_with_logsumexp(q, q, q, scale=0.2)[1].sum()
    )(normal(1, 4, 80, 32)),
    "quantized": lambda: cpu.flash_attention(
        normal(1, 4, 80, 32), *[quantized(normal(1, 2, 90, 32), parse_kv_format("int8:32").key)] * 2, scale=0.2
    ),
}


def test_a_process_that_has_not_called_predicts_the_same_memory():
    case = Workload(seq=128, heads=8, head_dim=32)
    cpu.load()
    called = path.route(case, Needs())
    library._loaded, library._parts, cpu._module = None, frozenset(), None
    assert path.route(case, Needs()) == called


@pytest.mark.thorough
def test_a_damaged_library_leaves_an_upper_bound_of_memory(own_folder, monkeypatch):
    case = Workload(seq=128, heads=8, head_dim=32)
    loaded_again(path._parts(case))
    exact = path.route(case, Needs()).predicted_bytes
    library._loaded, library._parts, cpu._module = None, frozenset(), None
    monkeypatch.setattr(library, "_load_cached", lambda key: None)
    assert path.route(case, Needs()).predicted_bytes > exact
    assert not cpu.is_loaded()


def test_a_kernel_to_be_compiled_has_an_upper_bound(own_folder):
    found = path.route(Workload(seq=512), Needs())
    assert found.at_most and found.scratch_bytes == path.THREAD_BYTES * usable_cores()
    assert cpu._module is None


@pytest.mark.parametrize("call", [name if name == "gradients" else thorough(name) for name in CALLS])
def test_a_call_gets_what_it_needs_and_computes_the_same(own_folder, call):
    cpu.load(parts=())
    assert not library._parts
    found = CALLS[call]()
    mx.eval(found)
    assert {call.partition(" ")[0]} <= library._parts < build.ALL
    cpu.load()
    assert library._parts == build.ALL
    assert mx.array_equal(found, CALLS[call]()).item()


@pytest.mark.sampled(0.1)
@pytest.mark.parametrize("queries", [1, 8, 9, 63, 64, 65, 72, 73, 128, 130, 256, 264, 265])
def test_the_parts_of_a_workload_are_those_of_its_calls(own_folder, queries):
    for pass_ in ("forward", "training"):
        workload = Workload(batch=1, heads=4, seq=queries, kv_seq=300, head_dim=16, dtype="float32", pass_=pass_)
        module = library.load(parts=path._parts(workload))
        q, k = normal(1, 4, queries, 16), normal(1, 4, 300, 16)

        def attend(q, module=module, k=k):
            return module.flash_attention(q, k, k, 0.2, True, 0, 0.0, None)

        mx.eval(attend(q) if pass_ == "forward" else mx.grad(lambda q: attend(q).sum())(q))
        if "few" in library._parts:
            break  # from now on every library has it


@pytest.mark.thorough
def test_a_stream_has_its_kernel_before_its_first_step(own_folder):
    from attention.streaming import attend

    cpu.load(parts={"float16", "few"})
    assert attend.needs_building()
    attend.build(lambda text: None)
    assert not attend.needs_building()
    assert library._parts == {"float16", "few", "streams"}


def test_the_first_library_compiles_little(own_folder):
    cpu.load(parts={"float16"})
    done = {job[1].stem for job in build._jobs(build.find(), library._parts)}
    assert done.isdisjoint(
        {"forward_float32", "backward", "few", "quantized", "integer_products", "streaming", "caches"}
    )


@pytest.mark.thorough
def test_parts_stay_together_from_process_to_process(own_folder):
    assert loaded_again({"float16"}) == {"float16"}
    assert loaded_again({"gradients"}) == {"float16", "gradients"}
    assert loaded_again({"float16"}) == {"float16", "gradients"}
    assert cpu.is_compiled({"float16"})
    assert not cpu.is_compiled({"float32"})
    assert cpu.availability() == (True, f"loaded ({cpu.variant()})")
    assert loaded_again(build.ALL) == build.ALL
    assert loaded_again() == build.ALL


@pytest.mark.thorough
@pytest.mark.parametrize("parts", [["no such part"], "float16", [1], None, {"float16": 1}])
def test_a_hostile_record_of_parts_counts_as_none(own_folder, parts):
    cpu.load(parts={"float16"})
    (record,) = own_folder.glob("*-parts.json")
    record.write_text(json.dumps({"parts": parts}))
    assert loaded_again({"float32"}) == {"float32"}


def test_a_part_that_does_not_compile_leaves_the_others(own_folder, monkeypatch):
    cpu.load(parts={"float32"})
    key = build.key_with(build.key(build.find()), frozenset({"float32", "gradients"}))
    cache.write_failure(key, "compiling failed: out of memory")
    with pytest.raises(cpu.KernelUnavailable, match="out of memory"):
        CALLS["gradients"]()
    mx.eval(CALLS["float32"]())
    usable, reason = cpu.availability({"gradients"})
    assert (usable, reason) == (False, "compiling failed: out of memory")
    assert cpu.availability({"float32"})[0]


@pytest.mark.thorough
def test_a_part_without_its_functions_is_no_endless_search(own_folder, monkeypatch):
    cpu.load(parts={"float32"})
    monkeypatch.setattr(library, "_parts", build.ALL)
    with pytest.raises(cpu.KernelUnavailable, match="lacks its part few"):
        CALLS["few"]()


@pytest.mark.thorough
@pytest.mark.parametrize("part", ["float16", "bfloat16"])
def test_the_self_check_tries_each_part(own_folder, part, monkeypatch):
    right, seen = selfcheck.results, []
    monkeypatch.setattr(selfcheck, "results", lambda *inputs: seen.append(inputs[0].shape) or right(*inputs))
    cpu.load(parts={part, "few", "quantized"})
    assert len(seen) == 2 + 2 * len(selfcheck._FORMATS)
    monkeypatch.setattr(selfcheck, "results", lambda *inputs: [1.5 * each for each in right(*inputs)])
    with pytest.raises(cpu.KernelUnavailable, match="disagrees"):
        cpu.load(parts={"gradients"})


class Wrong:
    """A loaded kernel of which one function's results are off by one in their last numbers."""

    def __init__(self, module, name):
        self._module, self._name = module, name

    def __getattr__(self, name):
        right = getattr(self._module, name)
        return right if name != self._name else lambda *arguments: self._changed(right(*arguments))

    @staticmethod
    def _changed(made):
        return made + 1 if isinstance(made, mx.array) else [made[0] ^ (1 << 31), *made[1:]]


@pytest.mark.parametrize(
    ("parts", "function"),
    [({"quantized"}, "append_quantized"), ({"float16", "few", "streams"}, "stream_step")],
)
def test_the_self_check_tries_what_is_no_attention(kernel, parts, function):
    module = library.load()
    selfcheck.run(module, frozenset(parts))
    with pytest.raises(cpu.KernelUnavailable, match="disagrees"):
        selfcheck.run(Wrong(module, function), frozenset(parts))


def test_without_nanobinds_backend_it_is_compiled(monkeypatch):
    tools = build.find()
    found = build.package_folder
    monkeypatch.setattr(build, "package_folder", lambda name: None if name == "nanobind_backend" else found(name))
    without = build.find()
    assert without.backend is None
    assert "nb_combined" in {text.stem for _, text in build._jobs(without)}
    if tools.backend is not None:
        assert "nb_combined" not in {text.stem for _, text in build._jobs(tools)}
        assert build.key(tools) != build.key(without)


@pytest.mark.parametrize("tag", ["nanobind_system_libstdcpp_gxx_abi_1xxx_use_cxx11_abi_1_a1_v7", "unknown"])
def test_a_backend_of_another_abi_is_not_used(monkeypatch, tag):
    own = build._abi_tag
    monkeypatch.setattr(build, "_abi_tag", lambda module: tag if "backend" in module.name else own(module))
    assert build.find().backend is None


@pytest.mark.parametrize(
    ("installed", "used"), [("1.0.0", True), ("1.3.2", True), ("2.0.0", False), ("0.9.0", False), ("odd", False)]
)
def test_a_backend_serves_headers_of_its_version(tmp_path, installed, used):
    header = tmp_path / "nb_backend.h"
    header.write_text("#define NB_BACKEND_ABI_MAJOR 1\n#define NB_BACKEND_ABI_MINOR 0\n")
    (tmp_path / f"nanobind_backend-{installed}.dist-info").mkdir()
    assert build._can_call(header, tmp_path / "nanobind_backend") is used
    header.write_text("#define NB_BACKEND_ABI_MAJOR 1\n#define NB_BACKEND_ABI_MINOR 9\n")
    build._can_call.cache_clear()
    assert not build._can_call(header, tmp_path / "nanobind_backend")
