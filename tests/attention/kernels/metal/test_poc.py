"""`poc` on a Mac: it supports what the kernels do, sinks included, and follows the autotuner where MLX is fused too."""

from datetime import UTC, datetime

import mlx.core as mx
import numpy as np
import pytest

from attention import implementations, masks
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.implementations import fused, mlx_sdpa
from attention.implementations.autotune.store import Store, TrialResult, candidate_fingerprint, class_of
from attention.implementations.autotune.trial import candidates, fitting_candidates
from attention.masks import Mask
from attention.measure.device import Device as Machine
from attention.mlx_lm import patch
from attention.mlx_lm.patch import ArgumentAdapter, ModelCall
from tests.support.metal.device import Device, needs_verifier, on_a_mac

MAC = Machine(backend="metal", name="Planted GPU", cores=8, memory_bytes=2**34, available_bytes=2**33)
WORKLOAD = Workload(seq=40, heads=2, head_dim=32, dtype="float32", mask="causal")
SINKS = Needs(sinks=True)


@pytest.fixture(autouse=True)
def a_mac(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(fused, "current_backend", lambda: "metal")
    monkeypatch.setattr(fused, "_device", lambda: MAC)


def arrays():
    mx.random.seed(1)
    return [mx.random.normal((1, 2, 40, 32)) for _ in range(3)]


def close(a, b):
    return np.allclose(np.array(a), np.array(b), atol=1e-5)


def tried(tmp_path, winner, call_s, made_with=None):
    """The stored result of a trial of the workload, for these kernels unless others are named."""
    store = Store(tmp_path / "tuning.toml")
    found = TrialResult(
        winner=winner,
        tuned=datetime.now(UTC),
        call_s=call_s,
        made_with=made_with or candidate_fingerprint(),
        workload=class_of(WORKLOAD, MAC),
    )
    store.put(found)
    return store


def mlx_is_fused(monkeypatch):
    monkeypatch.setattr(mlx_sdpa, "why_unfused", lambda *_: None)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize(
    ("workload", "needs"),
    [
        (Workload(seq=512, head_dim=256, mask="causal"), Needs()),
        (Workload(seq=512, head_dim=192, dtype="float32"), Needs()),
        (Workload(seq=512, head_dim=64, mask="window:100"), Needs()),
        (Workload(seq=512, head_dim=80), Needs(array_mask=True)),
        (Workload(seq=512, head_dim=128), Needs(softcap=True)),
        (Workload(seq=512, head_dim=64, mask="causal"), SINKS),
        (Workload(seq=1, kv_seq=4096, head_dim=128, heads=32, kv_heads=8), Needs()),
        (Workload(seq=300, kv_seq=512, head_dim=96, dtype="float16", mask="causal"), Needs()),
        (Workload(seq=512, head_dim=64, pass_="training"), Needs()),
    ],
    ids=str,
)
def test_the_kernel_is_used_and_tried_where_mlx_fuses_none(workload, needs):
    with on_a_mac(Device()):
        route = fused.TunedPoc().route(workload, MAC, needs)
        assert route.fused
        assert not route.fallback
        assert "never measured" in route.reason
        assert "poc" in fitting_candidates(candidates(), workload, MAC, needs)


@pytest.mark.parametrize(
    ("winner", "path"),
    [("mlx", "falls back: MLX SDPA"), ("mlx compiled", "falls back: MLX SDPA"), ("poc", "Metal kernel")],
)
def test_where_mlx_is_fused_too_a_trial_decides(monkeypatch, tmp_path, winner, path):
    mlx_is_fused(monkeypatch)
    by_trial = fused.TunedPoc(tried(tmp_path, winner, {winner: 1e-4, "baseline": 2e-4}))
    with on_a_mac(Device()) as device:
        route = by_trial.route(WORKLOAD, MAC)
        assert route.path == path
        assert route.fallback == (winner != "poc")
        q, k, v = arrays()
        found = by_trial(q, k, v, scale=0.2, mask=Mask(causal=True))
        assert close(found, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal"))
        assert bool(device.launches) == (winner == "poc")
        if winner != "poc":
            assert (
                f"MLX has a fused kernel for this shape too, and `{winner}` was the fastest in a trial" in route.reason
            )


def test_before_a_trial_the_kernel_is_used_where_mlx_fuses_too(monkeypatch, tmp_path):
    mlx_is_fused(monkeypatch)
    with on_a_mac(Device()):
        assert fused.TunedPoc(Store(tmp_path / "tuning.toml")).route(WORKLOAD, MAC).path == "Metal kernel"


def test_a_trial_of_other_kernels_than_todays_decides_nothing(monkeypatch, tmp_path):
    mlx_is_fused(monkeypatch)
    by_trial = fused.TunedPoc(tried(tmp_path, "mlx", {"mlx": 1e-4}, made_with="older kernels"))
    with on_a_mac(Device()):
        assert by_trial.route(WORKLOAD, MAC).path == "Metal kernel"


def test_where_mlx_is_not_fused_no_trial_takes_the_kernel_away(tmp_path):
    by_trial = fused.TunedPoc(tried(tmp_path, "practical", {"practical": 1e-4}))
    with on_a_mac(Device()):
        assert by_trial.route(WORKLOAD, MAC).path == "Metal kernel"


def test_demos_candidate_ignores_trials_and_can_be_retried(monkeypatch, tmp_path):
    mlx_is_fused(monkeypatch)
    tried(tmp_path, "mlx", {"mlx": 1e-4})  # at the path of the user's own file
    with on_a_mac(Device()):
        assert candidates()["poc"].route(WORKLOAD, MAC).path == "Metal kernel"
        implementations._load.cache_clear()
        assert implementations.load_implementation("poc").route(WORKLOAD, MAC).path == "falls back: MLX SDPA"
    implementations._load.cache_clear()


@pytest.mark.thorough
def test_sinks_are_taken_and_get_a_gradient():
    q, k, v = arrays()
    sinks = mx.array([0.5, -1.0])

    def ours(q, sinks):
        return fused.TunedPoc()(q, k, v, scale=0.2, mask=Mask(causal=True), sinks=sinks)

    def plainly(q, sinks):
        scores = mx.where(mx.tri(40, 40).astype(mx.bool_), 0.2 * q @ k.swapaxes(-1, -2), -mx.inf)
        column = mx.broadcast_to(sinks[None, :, None, None], (1, 2, 40, 1))
        return mx.softmax(mx.concatenate([scores, column], axis=-1), axis=-1)[..., :40] @ v

    with on_a_mac(Device()) as device:
        assert "kernel" in fused.TunedPoc().route(WORKLOAD, MAC, SINKS).path
        assert close(ours(q, sinks), plainly(q, sinks))
        found, right = (mx.grad(lambda *a, f=f: (f(*a) * v).sum(), argnums=(0, 1))(q, sinks) for f in (ours, plainly))
        assert close(found[0], right[0])
        assert close(found[1], right[1])
        assert {one.kernel for one in device.launches} == {"forward", "backward_query", "backward_key"}


@pytest.mark.slow
def test_patterns_alibi_and_the_logsumexp_are_the_kernels():
    q, k, v = arrays()
    slopes, pattern = mx.array([0.5, 0.1]), masks.documents([25, 15]) & masks.causal() | masks.prefix(2)
    mask = Mask(pattern=pattern, alibi=slopes)
    bias = slopes[:, None, None] * (mx.arange(40) - mx.arange(40)[:, None])
    scores = mx.where(pattern.dense((1, 2, 40, 40)), 0.2 * q @ k.swapaxes(-1, -2) + bias, -mx.inf)
    needs = Needs(pattern=True, alibi=True, logsumexp=True)
    with on_a_mac(Device()) as device:
        assert fused.TunedPoc().route(WORKLOAD, MAC, needs).path == "Metal kernel, lists"
        found, logsumexp = fused.TunedPoc().with_logsumexp(q, k, v, scale=0.2, mask=mask)
        assert close(found, mx.softmax(scores, axis=-1) @ v)
        assert close(logsumexp, mx.logsumexp(scores, axis=-1))
        assert np.array_equal(np.array(fused.TunedPoc()(q, k, v, scale=0.2, mask=mask)), np.array(found))
        assert {one.kernel for one in device.launches} == {"forward"}


def test_a_row_with_a_nan_is_no_empty_one():
    q, k, v = arrays()
    q[0, 0, 5, 0] = np.nan
    with on_a_mac(Device()) as device:
        found, logsumexp = fused.TunedPoc().with_logsumexp(q, k, v, scale=0.2, mask=Mask(causal=True))
        assert mx.isnan(found[0, 0, 5]).all()
        assert mx.isnan(logsumexp[0, 0, 5])
        assert mx.isfinite(logsumexp).sum() == 79
        assert {one.kernel for one in device.launches} == {"forward"}


@needs_verifier
def test_where_the_kernel_is_wrong_sinks_are_left_to_practical():
    def wrong(kernel, text):
        return text.replace("SINKS && split == 0", "false")

    q, k, v = arrays()
    sinks = mx.array([0.5, -1.0])
    with on_a_mac(Device(edit=wrong)):
        found = fused.TunedPoc()(q, k, v, scale=0.2, mask=Mask(causal=True), sinks=sinks)
        assert close(found, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal", sinks=sinks))
        route = fused.TunedPoc().route(WORKLOAD, MAC, SINKS)
        assert route.path == "falls back: practical"
        assert "forward float32 D=32 causal sinks: its output disagrees" in route.reason


def test_models_with_sinks_are_offered_to_it_on_metal_alone(monkeypatch):
    monkeypatch.setattr(patch, "device", lambda: MAC)
    q, k, v = arrays()
    call = ModelCall(q, k, v, 0.2, "causal", mx.zeros(2))
    with on_a_mac(Device()):
        assert ArgumentAdapter(fused.TunedPoc()).adapt(call).path == "Metal kernel"
    monkeypatch.setattr(fused, "current_backend", lambda: "cpu")
    assert not fused.TunedPoc().takes_sinks


def test_where_the_kernel_takes_no_sinks_practical_does(monkeypatch):
    monkeypatch.setattr(fused, "current_backend", lambda: "cpu")
    q, k, v = arrays()
    sinks = mx.array([0.5, -1.0])
    found = fused.TunedPoc()(q, k, v, scale=0.2, mask=Mask(causal=True), sinks=sinks)
    assert close(found, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.2, mask="causal", sinks=sinks))
