"""Results and storage of the commands that time the CUDA kernels; needs no GPU, since the timings are fabricated."""

import json

import pytest

pytest.importorskip("mlx.core")

from benchmarks.cuda import measure, measure_backward, measure_portable


@pytest.fixture
def measured(monkeypatch):
    """The measurements, in order."""
    made = []

    def part(name):
        return lambda: made.append(name) or [{"label": name}]

    def row(*case):
        made.append(case)
        return {"seconds": {"ours": 1.0, "cudnn": 2.0}}

    for module in (measure, measure_portable):
        monkeypatch.setattr(module, "PARTS", {name: part(name) for name in ("first", "second")})
    monkeypatch.setattr(measure_backward, "measured", row)
    return made


def run(monkeypatch, module, *words):
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, words)])
    module.main()


@pytest.mark.parametrize("module", [measure, measure_portable])
@pytest.mark.parametrize(
    ("words", "parts"),
    [((), ["first", "second"]), (("second", "first"), ["first", "second"]), (("second",), ["second"])],
)
def test_the_parts_named_are_measured_or_all_and_kept(measured, monkeypatch, tmp_path, module, words, parts):
    run(monkeypatch, module, *words)
    assert measured == parts
    run(monkeypatch, module, *words, "--json", tmp_path / "kept.json")
    assert measured == parts * 2
    assert json.loads((tmp_path / "kept.json").read_text()) == [{"label": part} for part in parts]


def test_backward_is_measured_at_the_named_dims_and_lengths(measured, monkeypatch, tmp_path):
    run(monkeypatch, measure_backward, 64, 8192, 2048, "--json", tmp_path / "256")
    assert measured == [(64, length, causal) for causal in (False, True) for length in (2048, 8192)]
    assert len(json.loads((tmp_path / "256").read_text())) == 4


@pytest.mark.parametrize("module", [measure, measure_portable, measure_backward])
def test_a_part_that_there_is_not_is_reported(measured, monkeypatch, capsys, module):
    with pytest.raises(SystemExit):
        run(monkeypatch, module, "third")
    assert "third" in capsys.readouterr().err
    assert not measured
