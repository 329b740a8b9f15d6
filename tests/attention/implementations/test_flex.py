"""torch's FlexAttention: which calls it takes, its block masks, and, slowly, its results."""

import mlx.core as mx
import numpy as np
import pytest
from msgspec import structs

from attention.core.errors import KernelUnavailable, UnsupportedError
from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import Workload
from attention.implementations import flex
from attention.implementations.calls import make_inputs
from attention.implementations.flex import Compiled, Flex, FlexCall, block_mask
from attention.masks import Mask, of_workload
from attention.measure.accuracy import AccuracyChecker
from attention.measure.device import Device
from attention.measure.reference import visible
from tests.support.attention_examples import CPU
from tests.support.marks import slow

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit:DeprecationWarning")  # its compiler's own
MASKS = ("prefix:40+documents:70", "strided:30,3", "blocks:0.4", "causal", "window:50+blocks:0.2")


def call_of(workload: Workload, mask: object = None) -> FlexCall:
    """Return the call of a workload, of its mask string or of a pattern."""
    made = flex._call_of(workload, "cpu")
    return made if mask is None else structs.replace(made, mask=mask)


def shown(call: FlexCall) -> np.ndarray:
    """Return the pairs (B, H, Lq, Lk) of a block mask: all of its full tiles, and its function's in partial ones."""
    (batch, heads, seq, _), (_, _, kv_seq, _) = call.shapes[:2]
    made = block_mask(call)
    index = [
        torch.arange(length).reshape([-1 if axis == at else 1 for axis in range(4)])
        for at, length in enumerate((batch, heads, seq, kv_seq))
    ]
    function = made.mask_mod(*index).expand(batch, heads, seq, kv_seq).numpy()
    tiles = []
    for counts, keys in ((made.kv_num_blocks, made.kv_indices), (made.full_kv_num_blocks, made.full_kv_indices)):
        chosen = torch.zeros(*keys.shape[:3], keys.shape[3] + 1, dtype=torch.bool)
        listed = torch.where(torch.arange(keys.shape[3]) < counts[..., None], keys, keys.shape[3])
        chosen.scatter_(3, listed.long(), True)
        whole = chosen[..., :-1].repeat_interleave(flex.BLOCK, 2).repeat_interleave(flex.BLOCK, 3)
        tiles.append(whole[:, :, :seq, :kv_seq].expand(batch, heads, seq, kv_seq).numpy())
    partial, full = tiles
    return full | (partial & function)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("seq", "kv_seq"), [slow(256, 256), (130, 300)])
def test_a_block_mask_shows_what_the_mask_shows(mask: str, seq: int, kv_seq: int) -> None:
    workload = Workload(mask=mask, batch=2, heads=2, seq=seq, kv_seq=kv_seq)
    wanted = np.stack([visible(workload.mask_spec, np.arange(seq), seq, kv_seq, head) for head in range(2)])
    assert (shown(call_of(workload)) == wanted).all()
    pattern = of_workload(workload).pattern
    if pattern is not None:
        assert (shown(call_of(workload, pattern)) == wanted).all()


def test_a_block_mask_allocates_nothing_of_the_scores_size() -> None:
    made = block_mask(call_of(Workload(mask="window:300", heads=1, seq=32_768)))
    assert made.kv_indices.numel() == (32_768 // flex.BLOCK) ** 2


def test_a_scale_of_zero_is_not_the_default() -> None:
    assert flex._call_of(Workload(), "cpu", 0.0).scale == 0
    assert flex._call_of(Workload(), "cpu").scale == Workload().scale


def test_routes_say_what_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    route = Flex().route
    assert route(Workload(mask="blocks:0.1"), CPU, NO_NEEDS).supported
    assert "backward" in route(Workload(pass_="training"), CPU).reason
    assert "a softcap" in route(Workload(), CPU, Needs(softcap=True)).reason
    assert "an array mask" in route(Workload(), CPU, Needs(array_mask=True)).reason
    metal = Device(backend="metal", name="M", memory_bytes=1, available_bytes=1, cores=1)
    assert "Metal" in route(Workload(), metal).reason
    monkeypatch.setattr(flex.shutil, "which", lambda name: None)
    assert "C++ compiler" in route(Workload(), CPU).reason
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in route(Workload(), CPU).reason


def test_a_failed_compilation_is_the_reason_and_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **options: object) -> object:
        assert options == {"fullgraph": True, "dynamic": False}
        raise RuntimeError("no compiler\nand much advice")

    monkeypatch.setattr(torch, "compile", refuse)
    own, workload = Flex(), Workload(seq=16, heads=1, head_dim=16, dtype="float32")
    own.build_for(workload, lambda line: None)
    assert not own.needs_building(workload, CPU)
    with pytest.raises(KernelUnavailable, match=r"FlexAttention could not be compiled: RuntimeError: no compiler$"):
        own.runner(workload, make_inputs(workload, 0), 1.0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_an_uncompiled_flex_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    made = Compiled(call_of(Workload(seq=16, heads=1, head_dim=16, dtype="float32")))
    assert "torch.compile is switched off" in (made.failure or "")


@pytest.mark.slow
def test_masks_of_the_same_graph_are_compiled_one_after_another() -> None:
    """torch finds the second one's graph in its cache, and compiles nothing."""
    for mask in ("blocks:0.5", "blocks:0.25", "blocks:0.75"):
        made = Compiled(call_of(Workload(mask=mask, seq=512, heads=1, head_dim=16, dtype="float32")))
        assert made.failure is None, mask


@pytest.mark.slow
def test_whether_torch_compiles_is_found_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(flex._compiles() for _ in range(20))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert not flex._compiles()


def test_a_call_with_an_array_mask_is_refused() -> None:
    q = mx.zeros((1, 1, 8, 16))
    with pytest.raises(UnsupportedError, match=r"flex: .* an array mask"):
        Flex()(q, q, q, scale=1.0, mask=Mask(array=mx.ones((8, 8), mx.bool_)))


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["none", "prefix:40+documents:70", "blocks:0.4"])
def test_results_are_those_of_float64(mask: str) -> None:
    workload = Workload(mask=mask, heads=4, kv_heads=2, seq=130, kv_seq=300, dtype="float32")
    inputs = make_inputs(workload, 0)
    checker = AccuracyChecker(workload, inputs)
    own = Flex()
    for results in (
        own.runner(workload, inputs, workload.scale).results(),
        [own(*inputs, scale=workload.scale, mask=of_workload(workload))],
    ):
        judged = checker.check(results)
        assert judged.accurate, judged.detail


@pytest.mark.slow
def test_calls_are_not_refused_beyond_torchs_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts the calls of one function; those in another grad mode would be other ones."""
    config = pytest.importorskip("torch._dynamo.config")
    monkeypatch.setattr(config, "recompile_limit", 1)
    for mask in ("causal", "window:50"):
        workload = Workload(mask=mask, heads=1, seq=130, head_dim=16, dtype="float32")
        made = Compiled(call_of(workload)).checked()
        inputs = [torch.zeros(1, 1, 130, 16) for _ in range(3)]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert made.attend(inputs, 0.25).shape == (1, 1, 130, 16)
        in_another_layout = [torch.zeros(1, 1, 16, 130).transpose(2, 3) for _ in range(3)]
        assert made.attend(in_another_layout, 0.25).shape == (1, 1, 130, 16)
