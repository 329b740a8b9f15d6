"""Rows that the predictions of other chips are calibrated with and checked against.

    python -m benchmarks.chips measure cuda FOLDER --limit 240     # on a GPU: the grids of that backend, a file each
    python -m benchmarks.chips measure cpu FOLDER --passes 5 --limit 600   # files cpu-GRID-PASS.json
    python -m benchmarks.chips calibrate                           # writes attention/chips/calibration.json
    python -m benchmarks.chips check [--markdown docs/chips.md]    # predicted against measured

Each file is a run, as `fatui bench --json` writes it. Samples are few: the model needs many shapes rather than narrow
intervals. A grid that would begin after the limit is left out, and said so; of further passes also one that would end
after it, by the time that it took before. The kept files' names begin with `cpu` and a GPU's with its own.

`check` calibrates on the H200's rows in docs/results/chips and tests/data alone, and predicts the H100's rows; then it
calibrates on half of the CPU's shapes, and predicts the other half.
"""

import argparse
import itertools
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
from msgspec import structs

from attention import bench
from attention.chips.calibration import FIXED, MIN_ROWS, Calibration, Measured, calibrate, rows_of
from attention.chips.cost import Path as PathKind
from attention.chips.prediction import LIMITS, Prediction, hosts_of, predict
from attention.chips.table import Chip, chip_of_device, chips
from attention.core.plan import expand
from attention.core.results import Report, digest_of
from attention.core.workload import Workload
from attention.implementations.fused import Poc

Grid = tuple[str, Sequence[Workload], list[str] | dict[str, str], float]
"""Name, cases, implementations, and the seconds of the rounds of a case."""
ALL: Final = ["baseline", "mlx", "practical", "poc", "torch"]


class General(Poc):
    """`poc` with the general CUDA kernels alone, which are what it has on GPUs other than Hopper's."""

    name = "general"

    def __init__(self) -> None:
        """Leave the specialised kernels out of this process."""
        super().__init__()
        from attention.kernels.cuda.choice import set_portable_only

        set_portable_only(True)


def _cases(**fields: Any) -> tuple[Workload, ...]:
    """Return every combination of the fields' values."""
    return expand({}, {name: value if isinstance(value, list) else [value] for name, value in fields.items()})


def cuda_grids() -> Iterator[Grid]:
    """Yield the grids of a GPU, the most important first."""
    both = ["causal", "none"]
    wide = {"heads": 16, "dtype": "bfloat16"}
    training = {"mask": "causal", "pass_": "training"}
    study = [
        *_cases(seq=[64, 128], head_dim=[32, 64]),
        *_cases(batch=2, seq=128, head_dim=32),
        *_cases(batch=4, seq=256, head_dim=[32, 64]),
        *_cases(seq=512, head_dim=128, dtype="bfloat16"),
        *_cases(seq=1024, heads=4, head_dim=[64, 256], dtype="bfloat16"),
        *_cases(batch=4, seq=512, head_dim=64, mask="causal"),
    ]
    yield "study", study, ALL, 0.4
    prefill = [
        *_cases(seq=[2048, 8192], head_dim=[64, 128, 256], mask=both, **wide),
        *_cases(seq=[1024, 4096, 16384], head_dim=[128, 256], mask="causal", **wide),
        *_cases(batch=4, seq=[1024, 4096], head_dim=[64, 128], mask=both, **wide),
        *_cases(seq=[512, 4096], heads=32, kv_heads=8, head_dim=128, mask="causal"),
        *_cases(batch=8, seq=[512, 2048], heads=8, head_dim=[64, 128], mask="causal"),
    ]
    yield "prefill", prefill, ALL, 0.4
    trained = [
        *_cases(seq=[1024, 4096], head_dim=[64, 128, 256], **wide, **training),
        *_cases(seq=[2048, 8192], head_dim=128, mask=both, pass_="training", **wide),
        *_cases(batch=4, seq=[256, 1024], heads=8, head_dim=64, dtype="float16", **training),
    ]
    yield "training", trained, ALL, 0.4
    shared = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    decode = [
        *_cases(batch=[1, 16], kv_seq=[512, 2048, 8192, 32768], pass_="decode", **shared),
        *_cases(batch=[1, 8], kv_seq=[1024, 4096], head_dim=[64, 256], pass_="decode", **wide),
    ]
    yield "decode", decode, ALL, 0.3
    general = [
        *_cases(seq=[512, 2048, 8192], head_dim=[64, 128], mask=both, **wide),
        *_cases(seq=2048, head_dim=256, mask="causal", **wide),
        *_cases(seq=[1024, 4096], head_dim=128, **wide, **training),
    ]
    yield "general", general, {"general": "benchmarks.chips:General"}, 0.2
    yield "float32", _cases(seq=[512, 2048], heads=16, head_dim=[64, 128], dtype="float32", mask=both), ALL, 0.3
    yield "long", _cases(seq=32768, heads=8, head_dim=[64, 128], dtype="bfloat16", mask="causal"), ALL, 0.3


def cpu_grids() -> Iterator[Grid]:
    """Yield the grids of a CPU: small shapes, which take MLX's products tens of milliseconds, and larger."""
    both, types, fast = ["none", "causal"], ["float32", "bfloat16"], ["poc", "torch"]
    forward = _cases(seq=[192, 256, 384, 512, 768, 1024], head_dim=[64, 128], dtype=types, mask=both)
    yield "forward", forward, fast, 0.2
    small = [
        *_cases(seq=[64, 96, 128, 192], heads=4, head_dim=[32, 64], dtype="float32", mask=both),
        *_cases(batch=2, seq=[80, 160], heads=4, head_dim=64, dtype="float32"),
    ]
    yield "small", small, ALL, 0.2
    shared = {"heads": 16, "kv_heads": 4, "head_dim": 128}
    lengths = [512, 1024, 1536, 2048, 3072, 4096]
    decode = _cases(batch=[1, 4], kv_seq=lengths, dtype=types, pass_="decode", **shared)
    yield "decode", decode, fast, 0.2
    lengths = [128, 192, 256, 320, 384, 512]
    training = _cases(batch=[1, 2], seq=lengths, heads=8, head_dim=64, dtype=types, pass_="training")
    yield "training", training, fast, 0.2


GRIDS: Final = {"cuda": cuda_grids, "cpu": cpu_grids}


def measure(backend: str, folder: Path, limit_s: float, only: str | None, passes: int = 1) -> int:
    """Measure the grids of a backend into a folder; return the number of those that were left out.

    Several passes go through all grids one after the other, so that a row's times are of different processes and
    minutes; how far they differ says what no prediction can be better than. A file that is there is not measured again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started, left_out, lasted = time.monotonic(), 0, dict[str, float]()
    for number, (name, cases, implementations, seconds) in itertools.product(range(1, passes + 1), GRIDS[backend]()):
        if only not in (None, name):
            continue
        own = f"{backend}-{name}-{number}" if backend == "cpu" else f"{name}-{number}" if passes > 1 else name
        if backend == "cpu" and (folder / f"{own}.json").exists():
            continue
        spent = time.monotonic() - started
        if spent + lasted.get(name, 0.0) > limit_s:
            print(f"{own}: left out, {spent:.0f} s are over", flush=True)
            left_out += number == 1
            continue
        result = bench(cases, implementations, seconds=seconds)
        result.save(folder / f"{own}.json")
        ok = sum(row.status == "ok" for _, row in result)
        took = lasted[name] = time.monotonic() - started - spent
        print(f"{own}: {len(cases)} cases, {ok} of {len(result)} rows, {took:.0f} s", flush=True)
    return left_out


ROOT: Final = Path(__file__).parents[1]
CALIBRATION: Final = ROOT / "attention/chips/calibration.json"
CALIBRATED_ON: Final = ROOT / "docs/results/chips"
CHECKED: Final = ROOT / "tests/data"


def _two_cores_of(key: str, name: str) -> Chip:
    """Return two cores of a CPU as a chip of its own: their intervals are not those of the whole one."""
    whole = chips()[key]
    return structs.replace(whole.scaled(cores=2 / (whole.cores or 2)), name=name, changed=())


_XEON: Final = _two_cores_of("xeon-8580", "two cores of an Intel Xeon Platinum 8580")
CPU_CHIPS: Final = {
    "Intel(R) Xeon(R) Processor": _XEON,
    "Intel(R) Xeon(R) Processor (family 6, model 207)": _XEON,
    "AMD EPYC (family 25, model 1)": _two_cores_of("epyc-7763", "two cores of an AMD EPYC 7763"),
}
"""What rows of a CPU are measured on, by the name that their runs have for it; the kept ones have the first."""
UNCHANGED: Final = ("baseline", "mlx", "torch")
"""Implementations whose rows in tests/data are of the same code on an H100 and on an H200."""
TARGET: Final = 0.08
"""Of the median error."""
MARK: Final = "<!-- python -m benchmarks.chips check --markdown docs/chips.md writes what follows -->"
WORST: Final = 8
"""Rows of each check that are named as the worst."""


def read_passes(folder: Path, pattern: str, chip: Chip | None = None) -> list[list[Measured]]:
    """Return the measured rows of runs kept in a folder, those of one call together."""
    found: dict[tuple[str, Workload, str, str], list[Measured]] = {}
    for path in sorted(folder.glob(pattern)):
        report = msgspec.json.decode(path.read_bytes(), type=Report)
        own = chip or chip_of_device(report.environment.device) or CPU_CHIPS.get(report.environment.device or "")
        assert own is not None, f"{path}: {report.environment.device} is not in the table of chips"
        for row in rows_of(report, own, path.name):
            found.setdefault((own.key, row.workload, row.implementation, row.path), []).append(row)
    return list(found.values())


def read_rows(folder: Path, pattern: str, chip: Chip | None = None) -> list[Measured]:
    """Return the measured rows of runs kept in a folder; of a call that was measured several times the fastest.

    Predictions are of a machine that does nothing else, and other work only ever makes a pass slower.
    """
    return [min(rows, key=lambda row: row.seconds) for rows in read_passes(folder, pattern, chip)]


def repeatability(passes: Sequence[Sequence[Measured]]) -> float | None:
    """Return by how much the first two times of a call differ, the median over the calls; None without two."""
    both = [rows for rows in passes if len(rows) > 1]
    return median(abs(rows[1].seconds / rows[0].seconds - 1) for rows in both) if both else None


def calibration_rows() -> list[Measured]:
    """Return the rows that the shipped calibration is made of."""
    kept = [row for row in read_rows(CHECKED, "h200-*.json") if row.implementation in UNCHANGED]
    return [*read_rows(CALIBRATED_ON, "h200-*.json"), *kept, *read_rows(CALIBRATED_ON, "cpu-*.json")]


def write_calibration() -> None:
    """Calibrate on all kept rows, and write the constants that the package ships."""
    files = {
        path.name: digest_of(msgspec.json.decode(path.read_bytes())) for path in sorted(CALIBRATED_ON.glob("*.json"))
    }
    made = calibrate(calibration_rows(), files)
    CALIBRATION.write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1) + b"\n")
    for key, family in made.families.items():
        width = math.exp(family.half_width)
        print(f"{key}: {family.rows} rows, {family.median_error:.1%} left out, interval x{width:.2f}")


DECODE_RATES: Final = {
    (1, 32768): {"poc": 2679e9, "mlx": 2688e9},
    (1, 131072): {"poc": 2847e9, "mlx": 2901e9},
    (16, 8192): {"poc": 2904e9, "mlx": 2877e9},
}
"""Bytes of keys and values a second in decoding on an H100, of which no run is kept: docs/experiments/cuda-hopper.md.

Only those lengths whose keys and values do not stay in the cache, since the inputs there change from call to call. They
are slices of a larger cache, which MLX may compute by another kernel than whole arrays.
"""


def decode_rows_of_docs() -> list[Measured]:
    """Return the rows of the documentation's table of decoding on an H100: 32 and 8 heads of 128 in bfloat16."""
    rows = []
    for (batch, keys), rates in DECODE_RATES.items():
        workload = Workload(
            batch=batch, kv_seq=keys, heads=32, kv_heads=8, head_dim=128, dtype="bfloat16", pass_="decode"
        )
        for name, rate in rates.items():
            kind: PathKind = "split K" if name == "poc" else "fused"
            seconds = workload.key_value_bytes / rate
            rows.append(Measured(workload, name, kind, chips()["h100"], seconds, "docs/experiments/cuda-hopper.md"))
    return rows


Checked = tuple[Measured, Prediction]


def check_other_gpu() -> list[Checked]:
    """Predict the H100's rows from the H200's.

    The H100's runs do not say how fast its host launches calls: that is taken from the rows of their smallest case,
    which are not among those checked.
    """
    made = calibrate(row for row in calibration_rows() if row.chip.backend == "cuda")
    rows = read_rows(CHECKED, "h100-*.json")
    least = min(rows, key=lambda row: row.workload.flops).workload
    hosts = hosts_of([row for row in rows if row.workload == least], made)
    print("launches of the H100's host over the calibration's:", {name: round(each, 3) for name, each in hosts.items()})
    return _checked([*(row for row in rows if row.workload != least), *decode_rows_of_docs()], made, hosts)


SEEDS: Final = range(5)
"""Of divisions of the CPU's shapes: the first is the one that is shown, the others say how far it is by chance."""


def check_half_of_cpu(seed: int = 0, intervals: bool = True) -> list[Checked]:
    """Predict each half of the CPU's shapes from the rows of the other half.

    They are divided at random, those of each pass and dtype for themselves, so that no family is on one side alone.
    """
    rows = read_rows(CALIBRATED_ON, "cpu-*.json")
    half = half_of({row.workload for row in rows}, seed)
    parts = [[row for row in rows if (row.workload in half) is inside] for inside in (True, False)]
    made = [calibrate(part, intervals=intervals) for part in parts]
    return [*_checked(parts[0], made[1]), *_checked(parts[1], made[0])]


def half_of(shapes: Set[Workload], seed: int) -> set[Workload]:
    """Return half of the shapes of each pass and dtype, at random."""
    draw, groups = random.Random(seed), dict[tuple[str, str], list[Workload]]()
    for shape in sorted(shapes, key=lambda each: each.label):
        groups.setdefault((shape.pass_, shape.dtype), []).append(shape)
    return {shape for group in groups.values() for shape in draw.sample(group, len(group) // 2)}


def _checked(rows: Sequence[Measured], made: Calibration, hosts: Mapping[str, float] | None = None) -> list[Checked]:
    predicted = [(row, predict(row.workload, row.implementation, row.chip, made, hosts=hosts)) for row in rows]
    return [(row, each) for row, each in predicted if each.predicted_s is not None]


def error_of(checked: Checked) -> float:
    """Return predicted over measured, less 1."""
    row, prediction = checked
    return (prediction.predicted_s or math.nan) / row.seconds - 1


def inside(checked: Checked) -> bool:
    """Return whether the measured time is inside the stated interval."""
    row, prediction = checked
    return (prediction.low_s or 0.0) <= row.seconds <= (prediction.high_s or 0.0)


def summary_lines(title: str, found: Sequence[Checked]) -> list[str]:
    """Return the figures of a check, by implementation too, and its worst rows."""

    def figures(name: str, rows: Sequence[Checked]) -> str:
        errors = [abs(error_of(each)) for each in rows]
        share = sum(map(inside, rows)) / len(rows)
        return f"| {name} | {len(rows)} | {median(errors):.1%} | {share:.0%} |"

    names = sorted({row.implementation for row, _ in found})
    worst = sorted(found, key=lambda each: -abs(math.log(1 + error_of(each))))[:WORST]
    met = median(abs(error_of(each)) for each in found) <= TARGET and sum(map(inside, found)) >= 0.9 * len(found)
    return [
        f"### {title}",
        "",
        f"Median error at most {TARGET:.0%} and 90 % of rows inside the interval: {'met' if met else 'not met'}.",
        "",
        "| rows of | rows | median error | inside the 90 % interval |",
        "| --- | ---: | ---: | ---: |",
        figures("all", found),
        *(figures(name, rows) for name, rows in by_limit(found).items() if rows),
        *(figures(name, [each for each in found if each[0].implementation == name]) for name in names),
        "",
        "Worst: " + "; ".join(_named(each) for each in worst) + ".",
        "",
    ]


def by_limit(found: Sequence[Checked]) -> dict[str, list[Checked]]:
    """Return the rows that are predicted to take the time of a launch, which is the host's, and the others."""
    fixed = {LIMITS[name] for name in FIXED}
    return {
        "limited by launch and start": [each for each in found if each[1].limit in fixed],
        "limited by the chip": [each for each in found if each[1].limit not in fixed],
    }


def _named(checked: Checked) -> str:
    row, _ = checked
    return f"{row.implementation} {row.workload.label} {error_of(checked):+.0%}"


def table_lines(found: Sequence[Checked]) -> list[str]:
    """Return the table of predicted against measured."""
    lines = [
        "| case | implementation | path | predicted µs | interval | measured µs | error | |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for checked in found:
        row, prediction = checked
        low, high = prediction.low_s or 0.0, prediction.high_s or 0.0
        lines.append(
            f"| {row.workload.label} | {row.implementation} | {row.path} "
            f"| {(prediction.predicted_s or 0) * 1e6:,.1f} | "
            f"{low * 1e6:,.1f} to {high * 1e6:,.1f} | {row.seconds * 1e6:,.1f} | {error_of(checked):+.1%} | "
            f"{'' if inside(checked) else 'outside'} |"
        )
    return lines


def check(markdown: Path | None) -> int:
    """Print predicted against measured; return 1 if a target is not met."""
    gpu, cpu = check_other_gpu(), check_half_of_cpu()
    errors = [median(abs(error_of(each)) for each in check_half_of_cpu(seed, intervals=False)) for seed in SEEDS[1:]]
    others = ", ".join(f"{error:.1%}" for error in errors)
    lines = summary_lines("H100, calibrated on the H200's rows alone", gpu)
    lines += ["These rows were known while the model was developed: this is no blind test.", "", *table_lines(gpu), ""]
    lines += summary_lines("CPU, calibrated on half of the shapes", cpu)
    lines += [f"Median errors of four other divisions of the shapes: {others}."]
    left_out = len(read_rows(CALIBRATED_ON, "cpu-*.json")) - len(cpu)
    if left_out:
        lines += [f"{left_out} rows are not predicted: the other half has fewer than {MIN_ROWS} of their family."]
    between = repeatability(read_passes(CALIBRATED_ON, "cpu-*.json"))
    if between is not None:
        lines += [f"Between two passes over all shapes, in other processes, times differ by {between:.1%} (median)."]
    lines += ["", *table_lines(cpu), ""]
    print("\n".join(lines))
    if markdown:
        before = markdown.read_text().partition(MARK)[0] if markdown.exists() else ""
        markdown.write_text("\n".join([f"{before}{MARK}", "", *lines]))
    return int(any(" not met." in line for line in lines))


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chips", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="measure the grids of a backend")
    measuring.add_argument("backend", choices=GRIDS)
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--limit", type=float, default=600.0, help="seconds after which no grid begins")
    measuring.add_argument("--only", help="the one grid to measure")
    measuring.add_argument("--passes", type=int, default=1, help="times that all grids are measured (1)")
    commands.add_parser("calibrate", help="write the constants that the package ships")
    checking = commands.add_parser("check", help="print predicted against measured")
    checking.add_argument("--markdown", type=Path, help="a file in which the tables replace those of an earlier check")
    options = parser.parse_args()
    if options.command == "calibrate":
        write_calibration()
        return 0
    if options.command == "check":
        return check(options.markdown)
    return 1 if measure(options.backend, options.folder, options.limit, options.only, options.passes) else 0


if __name__ == "__main__":
    sys.exit(main())
