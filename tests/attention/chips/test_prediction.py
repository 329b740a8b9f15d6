"""Predictions of calls on chips: what costs grow with, the fit, the intervals, and what is refused."""

import math
import random

import pytest
from msgspec import structs

from attention.chips import calibration as fitting
from attention.chips.calibration import Calibration, Family, Measured, calibrate, conformal, rows_of, seconds
from attention.chips.cost import costs, on_host, path_kind, predicted_path
from attention.chips.prediction import WIDENING, calibration, explained, hosts_of, predict, what_if
from attention.chips.table import chips
from attention.core.results import Conditions
from attention.core.workload import Workload
from tests.support.sample_runs import report_of

H200 = chips()["h200"]
PREFILL = Workload(seq=8192, heads=16, head_dim=128, dtype="bfloat16", mask="causal")
DECODE = Workload(batch=16, kv_seq=32768, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", pass_="decode")
TRUE = {"launch": 2e-5, "matrix": 1.4, "vector": 0.03, "memory": 1.1, "cache": 0.02, "power": 2.0}
FAMILY = Family(
    constants=TRUE,
    half_width=0.1,
    median_error=0.03,
    rows=40,
    chip=H200.name,
    vendor=H200.vendor,
    architecture=H200.architecture,
)
KEYS = ("poc, Hopper, forward", "poc, general, forward", "poc, split K, decode", "mlx, fused, forward")
KNOWN = Calibration({f"cuda {key}, 16-bit": FAMILY for key in KEYS})


def at(chip, workload=PREFILL, name="poc"):
    return predict(workload, name, chip, KNOWN)


def test_one_tile_more_than_cores_takes_a_wave_more():
    full = costs(Workload(seq=128, heads=132, head_dim=128, dtype="bfloat16"), H200, "fused")
    more = costs(Workload(seq=128, heads=133, head_dim=128, dtype="bfloat16"), H200, "fused")
    assert more.matrix > 1.5 * full.matrix


@pytest.mark.parametrize("path", ["Hopper", "general", "fused"])
def test_tiles_compute_more_pairs_than_are_visible(path):
    found = costs(PREFILL, H200, path)
    assert found.matrix * H200.matrix16_flops > PREFILL.flops
    dense = costs(Workload(seq=8192, heads=16, head_dim=128, dtype="bfloat16"), H200, path)
    assert 1.7 < dense.matrix / found.matrix < 2.1


def test_arrays_that_fit_in_the_cache_cost_no_memory_traffic():
    small = Workload(kv_seq=2048, heads=8, head_dim=64, pass_="decode")
    assert costs(small, H200, "split K").memory == 0
    assert costs(DECODE, H200, "split K").cache < 0.1 * costs(DECODE, H200, "split K").memory * H200.bytes_per_s / 2e11


@pytest.mark.parametrize(
    ("implementation", "workload", "chip", "path"),
    [
        ("poc", PREFILL, "h100", "Hopper"),
        ("poc", PREFILL, "b200", "general"),
        ("poc", DECODE, "rtx-4090", "split K"),
        ("mlx", PREFILL, "h200", "fused"),
        ("mlx", Workload(seq=64, head_dim=256), "h200", "unfused"),
        ("baseline", PREFILL, "m4-max", "unfused"),
        ("poc", Workload(seq=64), "graviton4", "CPU kernel"),
        ("torch", Workload(seq=64), "graviton4", "torch CPU"),
        ("poc", Workload(seq=64, mask="documents:16"), "h200", None),
        ("flex", PREFILL, "h200", None),
    ],
)
def test_the_path_follows_the_chip(implementation, workload, chip, path):
    assert predicted_path(implementation, workload, chips()[chip]) == path


@pytest.mark.parametrize(
    ("text", "backend", "kind"),
    [
        ("CUDA kernel, Hopper", "cuda", "Hopper"),
        ("CUDA kernel, split K", "cuda", "split K"),
        ("manual, unfused", "cuda", "unfused"),
        ("MLX SDPA, fused", "cuda", "fused"),
        ("CPU kernel amx", "cpu", "CPU kernel"),
        ("torch SDPA, CPU", "cpu", "torch CPU"),
    ],
)
def test_a_rows_path_has_a_kind(text, backend, kind):
    assert path_kind(text, backend) == kind


def test_a_fit_finds_the_constants_that_rows_were_made_with():
    draw = random.Random(3)
    shapes = [
        Workload(batch=batch, seq=seq, heads=heads, head_dim=dim, dtype="bfloat16", mask=mask)
        for batch in (1, 4)
        for seq in (128, 1024, 4096, 16384)
        for heads in (8, 16)
        for dim in (64, 128)
        for mask in ("none", "causal")
    ]
    rows = [
        Measured(shape, "poc", "Hopper", H200, seconds(costs(shape, H200, "Hopper"), TRUE) * draw.uniform(0.98, 1.02))
        for shape in shapes
    ]
    (family,) = calibrate(rows).families.values()
    assert family.rows == len(shapes)
    assert family.median_error < 0.02
    other = Workload(batch=2, seq=6000, heads=12, head_dim=96, dtype="bfloat16")
    expected = seconds(costs(other, H200, "Hopper"), TRUE)
    assert seconds(costs(other, H200, "Hopper"), family.constants) == pytest.approx(expected, rel=0.05)


@pytest.mark.slow
def test_a_fit_finds_a_term_far_from_peak_rates():
    draw = random.Random(5)
    far = {"launch": 8e-6, "start": 4e-6, "matrix": 1.5, "vector": 40.0, "memory": 1.1, "cache": 0.02, "power": 2.0}
    rows = [
        Measured(shape, "mlx", "fused", H200, seconds(costs(shape, H200, "fused"), far) * draw.uniform(0.98, 1.02))
        for shape in (
            Workload(batch=batch, kv_seq=keys, heads=heads, kv_heads=8, head_dim=128, pass_="decode")
            for batch in (1, 16)
            for keys in (512, 4096, 32768)
            for heads in (8, 32)
        )
    ]
    (family,) = calibrate(rows).families.values()
    assert family.constants["vector"] == pytest.approx(far["vector"], rel=0.1)
    assert family.median_error < 0.05


XEON = chips()["xeon-8580"].scaled(cores=4 / 60)
UNFUSED = {"launch": 1e-5, "start": 2e-4, "matrix": 150.0, "vector": 100.0, "cache": 1.0, "power": 1.5}


def unfused_rows(names, lengths):
    """Return rows of MLX's products on a CPU: one case for each length."""
    shapes = [Workload(seq=seq, heads=4, head_dim=64, dtype="float32") for seq in lengths]
    return [
        Measured(shape, name, "unfused", XEON, seconds(costs(shape, XEON, "unfused"), UNFUSED))
        for shape in shapes
        for name in names
    ]


def test_unfused_paths_of_a_cpu_are_calibrated_together():
    rows = [
        *unfused_rows(("baseline",), (64, 160)),
        *unfused_rows(("mlx",), (96, 256)),
        *unfused_rows(("practical",), (128,)),
    ]
    made = calibrate(rows, intervals=False)
    (family,) = made.families.values()
    assert family.rows == 5
    (shown,) = unfused_rows(("baseline",), (192,))
    predicted = predict(shown.workload, "baseline", XEON, made).predicted_s
    assert predicted == pytest.approx(shown.seconds, rel=0.1)


def test_rows_of_one_case_are_left_out_together(monkeypatch):
    rows = unfused_rows(("baseline", "mlx", "practical"), range(64, 128, 8))
    fitted = []

    def fit(kept, near=None):
        fitted.append({row.workload: 0 for row in kept})
        for row in kept:
            fitted[-1][row.workload] += 1
        return UNFUSED

    monkeypatch.setattr(fitting, "_fit", fit)
    calibrate(rows)
    assert [len(kept) for kept in fitted] == [8, *[7] * 8]
    assert all(count == 3 for kept in fitted for count in kept.values())


SMALL = Workload(seq=256, heads=8, head_dim=128, dtype="bfloat16")


@pytest.mark.parametrize(("workload", "factor"), [(SMALL, 0.5), (PREFILL, 1.0)])
def test_a_fast_host_shortens_what_its_launches_limit(workload, factor):
    known = structs.replace(KNOWN, families={key: structs.replace(FAMILY, launch_s=2e-6) for key in KNOWN.families})
    usual = predict(workload, "poc", H200, known)
    fast = predict(workload, "poc", H200, known, launch_s=1e-6)
    assert fast.predicted_s / usual.predicted_s == pytest.approx(factor, rel=0.01)
    assert (usual.host, fast.host) == (None, 0.5)
    assert fast.high_s / fast.low_s <= usual.high_s / usual.low_s
    assert predict(workload, "poc", H200, known, hosts={"MLX": 0.5}).predicted_s == fast.predicted_s
    assert predict(workload, "poc", H200, known, hosts={"torch": 0.5}).predicted_s == usual.predicted_s
    assert predict(workload, "poc", H200, KNOWN, launch_s=1e-6).host is None  # its calibration does not know its host


@pytest.mark.thorough
def test_hosts_with_other_launch_times_give_the_same_constants():
    shapes = [Workload(seq=seq, heads=8, head_dim=64, dtype="bfloat16") for seq in (64, 128, 256, 512, 4096, 8192)]
    rows = []
    for launch_s in (1e-6, 2e-6, 4e-6):
        found = [(shape, costs(shape, H200, "Hopper")) for shape in shapes]
        times = [seconds(on_host(each, launch_s / 2e-6), TRUE) for _, each in found]
        rows += [
            Measured(shape, "poc", "Hopper", H200, s, "", launch_s) for (shape, _), s in zip(found, times, strict=True)
        ]
    (family,) = calibrate(rows).families.values()
    assert (family.launch_s, family.median_error) == (2e-6, pytest.approx(0, abs=0.02))
    assert seconds(costs(SMALL, H200, "Hopper"), family.constants) == pytest.approx(TRUE["launch"], rel=0.05)


def test_a_hosts_launches_follow_from_rows_that_they_limit():
    rows = [Measured(SMALL, name, "fused", H200, 1e-5) for name in ("mlx", "flex")]
    assert hosts_of(rows, KNOWN) == {"MLX": pytest.approx(0.5, rel=0.01)}


def test_a_row_that_falls_back_is_not_one_of_its_kernels():
    report = report_of()
    (case,) = report.cases
    fallen = structs.replace(case.rows[1], path="falls back: MLX SDPA, unfused")
    changed = structs.replace(case, rows=[case.rows[0], fallen, *case.rows[2:]])
    names = [each.implementation for each in rows_of(structs.replace(report, cases=[changed]), H200)]
    assert case.rows[0].implementation in names and fallen.implementation not in names


@pytest.mark.parametrize(("busy", "expected"), [(0.2, "median"), (3.8, "fastest")])
def test_a_disturbed_run_counts_by_its_fastest_samples(busy, expected):
    report = structs.replace(report_of(), conditions=Conditions(other_cores=busy))
    row = report.cases[0].rows[1]
    (found,) = [each for each in rows_of(report, H200) if each.implementation == row.implementation]
    assert found.seconds == {"median": row.call_s.median, "fastest": min(row.samples)}[expected]


def test_an_interval_leaves_a_tenth_of_the_errors_outside():
    errors = [index / 100 for index in range(1, 100)]
    assert conformal(errors) == 0.9
    assert conformal([0.1, 0.2]) == pytest.approx(0.3)  # too few for nine in ten


def test_the_interval_widens_with_distance_from_calibration():
    kept = [at(chips()[key]) for key in ("h200", "h100", "b200", "m4-max")]
    assert [each.like for each in kept] == list(WIDENING)
    widths = [math.log(each.high_s / each.low_s) for each in kept]
    assert widths == sorted(widths) and widths[0] == pytest.approx(0.2, rel=0.02)
    for each in kept:
        assert each.low_s < each.predicted_s < each.high_s
        assert (each.calibrated_on, each.calibrated_rows) == ("NVIDIA H200 SXM", 40)


@pytest.mark.parametrize(
    ("workload", "figure", "helps"),
    [
        (PREFILL, "rate", True),
        (PREFILL, "bandwidth", False),
        (DECODE, "bandwidth", True),
        (DECODE, "rate", False),
        (PREFILL, "cores", True),
    ],
)
def test_a_figure_helps_the_cases_that_it_limits(workload, figure, helps):
    before, after = at(H200, workload), at(what_if(H200, {figure: 2.0}), workload)
    gain = before.predicted_s / after.predicted_s
    assert gain > 1.5 if helps else 0.99 < gain < 1.1
    assert after.like == "the same architecture"  # a chip with other figures is not the one that was measured


def test_less_shared_memory_takes_the_hopper_kernel_away():
    assert at(H200).path == "Hopper"
    assert at(what_if(H200, {"shared": 0.45})).path == "general"
    assert "shared memory" in at(what_if(H200, {"shared": 0.05})).reason


def test_words_name_what_limits_a_call():
    assert at(H200).limit == "matrix products"
    assert at(H200, DECODE).limit == "memory traffic"
    assert explained(at(H200, DECODE)).startswith("limited by memory traffic")


@pytest.mark.parametrize(
    ("workload", "name", "chip", "reason"),
    [
        (Workload(seq=64, mask="documents:16"), "poc", "h200", "masks other than causal"),
        (Workload(kv_seq=512, head_dim=64, kv_format="int8", pass_="decode"), "poc", "h200", "quantized"),
        (Workload(seq=64, ranks=2), "poc", "h200", "several ranks"),
        (PREFILL, "flex", "h200", "flex is not predicted"),
        (PREFILL, "mlx", "m5", "no source states the rate of m5"),
        (Workload(seq=64, dtype="float32"), "mlx", "h200", "no rows of mlx"),
        (Workload(batch=4096, seq=65536, heads=16, dtype="bfloat16"), "mlx", "h200", "do not fit in the memory"),
    ],
)
def test_what_cannot_be_predicted_has_a_reason(workload, name, chip, reason):
    found = at(chips()[chip], workload, name)
    assert found.predicted_s is None and reason in found.reason


def test_demo_is_predicted_as_the_fastest_that_it_tries():
    made = {name: at(H200, name=name) for name in ("demo", "poc", "mlx")}
    assert made["demo"].predicted_s == min(made["poc"].predicted_s, made["mlx"].predicted_s)


def test_demo_is_not_predicted_where_poc_is_not():
    few = Workload(batch=2, seq=64, heads=4, head_dim=128)  # the split-K kernel, which has rows of decoding alone
    assert at(H200, few, "mlx").predicted_s
    for name in ("poc", "demo"):
        assert at(H200, few, name).reason == at(H200, few).reason is not None


def test_the_shipped_calibration_predicts_every_backend():
    families = calibration().families
    assert {key.split()[0] for key in families} == {"cuda", "cpu"}
    for key in ("h100", "b200", "rtx-5090", "m4-max", "graviton4", "xeon-8580"):
        on_cpu = chips()[key].backend == "cpu"
        workload = Workload(seq=512, head_dim=64, dtype="float32" if on_cpu else "bfloat16", mask="causal")
        found = predict(workload, "poc", chips()[key])
        assert found.predicted_s and found.predicted_s > 0, found.reason


@pytest.mark.parametrize("name", ["poc", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cores_gain_no_more_than_work_and_memory_allow(name, dtype):
    # beyond the cores' own caches on 60 cores, within them on 120: what stays in them saves its time in memory at most
    workload = Workload(batch=2, seq=4096, heads=16, kv_heads=4, head_dim=192, dtype=dtype, mask="window:256")
    chip = chips()["xeon-8580"]
    before, after = (predict(workload, name, each).predicted_s for each in (chip, chip.scaled(cores=2.0)))
    assert 1 <= before / after < 3


def test_few_cores_reach_a_part_of_a_cpus_bandwidth():
    large, chip = Workload(kv_seq=65536, heads=60, head_dim=128, pass_="decode"), chips()["xeon-8580"]
    few, all_ = (costs(large, each, "CPU kernel").memory for each in (chip.scaled(cores=2 / 60), chip))
    assert few > 5 * all_
    assert all_ == pytest.approx(costs(large, chip.scaled(cores=1.5), "CPU kernel").memory, rel=0.1)


def test_a_whole_cpu_is_not_the_two_cores_of_the_rows():
    workload = Workload(seq=512, head_dim=64, dtype="float32")
    assert predict(workload, "poc", chips()["xeon-8580"]).like == "the same architecture"


def test_spans_of_keys_end_together_on_a_cpu():
    chip = chips()["xeon-8580"]
    uneven = Workload(kv_seq=3 * 2048, heads=7, head_dim=64, dtype="bfloat16", pass_="decode")
    found = costs(uneven, chip, "CPU kernel")
    moved = (found.memory or 0.0) * chip.bytes_per_s + (found.cache or 0.0) * chip.cycles_per_s
    assert moved == pytest.approx(uneven.bytes_moved)


def flops_of(workload, path):
    """Return the FLOPs that the cost of products stands for."""
    chip = chips()["xeon-8580"].scaled(cores=4 / 60)
    return costs(workload, chip, path).matrix * chip.rate(workload.dtype)


@pytest.mark.parametrize(("seq", "share"), [(256, 1.0), (512, 1.0), (1024, 0.75)])
def test_torch_skips_only_whole_blocks_of_keys_on_a_cpu(seq, share):
    causal, whole = (Workload(seq=seq, heads=8, mask=mask) for mask in ("causal", "none"))
    assert flops_of(causal, "torch CPU") == pytest.approx(share * flops_of(whole, "torch CPU"))


def test_a_cpu_kernel_computes_what_parts_of_a_tile_see():
    causal = Workload(seq=512, heads=8, mask="causal")
    assert flops_of(causal, "CPU kernel") == pytest.approx(causal.flops * (512 + 16) / (512 + 1))


def test_a_cpus_last_round_of_items_counts_whole():
    uneven, even = Workload(seq=64, heads=5), Workload(seq=64, heads=8)
    assert flops_of(uneven, "CPU kernel") == pytest.approx(flops_of(even, "CPU kernel"))


def test_each_query_head_of_torch_reads_its_keys_on_a_cpu():
    chip = chips()["xeon-8580"].scaled(cores=4 / 60)
    small, large = (
        Workload(kv_seq=keys, heads=16, kv_heads=4, head_dim=128, dtype="bfloat16", pass_="decode")
        for keys in (512, 16384)
    )
    assert costs(small, chip, "torch CPU").memory == 0
    assert costs(small, chip, "torch CPU").cache > 3 * costs(small, chip, "CPU kernel").cache
    assert costs(large, chip, "torch CPU").memory > 3 * costs(large, chip, "CPU kernel").memory


def test_what_is_beyond_the_cores_own_caches_is_memory_on_a_cpu():
    chip = chips()["xeon-8580"].scaled(cores=4 / 60)
    large = Workload(kv_seq=65536, heads=8, head_dim=128, dtype="bfloat16", pass_="decode")
    assert large.bytes_moved < chip.cache_bytes
    assert costs(large, chip, "CPU kernel").memory > 0
    assert costs(large, chip.scaled(cores=60), "CPU kernel").memory < costs(large, chip, "CPU kernel").memory


def test_a_cpu_counts_the_blocks_of_its_kernels():
    chip, seen = chips()["xeon-8580"].scaled(cores=4 / 60), {}
    for mask in ("none", "causal"):
        workload = Workload(seq=1024, heads=8, mask=mask)
        seen[mask] = [costs(workload, chip, path).blocks for path in ("CPU kernel", "torch CPU")]
    assert seen == {"none": [8 * 16 * 8 / 4, 8 * 4 * 2 / 4], "causal": [8 * 72 / 4, 8 * (1 + 1 + 2 + 2) / 4]}
