import pytest

from attention.core.errors import NoBackendError, Remedy
from attention.core.results import Peaks
from attention.measure import device
from fatui import diagnosis, storage
from fatui.cli.main import main
from fatui.storage import settings


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Skip measuring the peaks."""
    monkeypatch.setattr(diagnosis, "measure_peaks", lambda device: Peaks(matmul_flops_per_s=1e9))


def test_without_a_backend_it_says_what_to_install(capsys, monkeypatch):
    def none() -> device.Device:
        raise NoBackendError("MLX has no backend", remedy=Remedy.INSTALL_BACKEND)

    monkeypatch.setattr(diagnosis, "probe", none)
    assert main(["doctor"]) == 3
    assert "fatui[cpu]" in capsys.readouterr().out


def test_two_backends_at_once_are_warned_of(capsys, monkeypatch):
    versions = {"mlx": "0.32.4", "mlx-cpu": "0.32.4", "mlx-cuda-12": "0.32.4"}
    monkeypatch.setattr(diagnosis, "installed_version", versions.get)
    main(["doctor", "--no-measure"])
    out = " ".join(capsys.readouterr().out.split())
    assert "two backends overwrite each other's library: pip uninstall mlx-cpu mlx-cuda-12 mlx" in out


def test_a_distribution_that_shares_the_engines_folder_is_named(capsys, monkeypatch):
    versions = {"mlx": "0.32.4", "mlx-cpu": "0.32.4", "attention": "5.0.0"}
    monkeypatch.setattr(diagnosis, "installed_version", versions.get)
    main(["doctor", "--no-measure"])
    out = " ".join(capsys.readouterr().out.split())
    assert "another project's distribution of this name is installed, 5.0.0" in out
    assert "pip uninstall attention, then pip install --force-reinstall --no-deps fatui" in out


def test_a_slow_blas_is_reported_with_its_cost_and_the_way_out(monkeypatch):
    rates = iter([3e9, 60e9])
    monkeypatch.setattr(diagnosis, "_rate", lambda product: next(rates))
    monkeypatch.setattr(diagnosis.sys, "platform", "linux")
    finding = diagnosis._blas()
    assert "3.00 GFLOP/s in MLX, 60.0 GFLOP/s in numpy" in finding.text
    assert finding.advice and "1/20" in finding.advice and "LD_PRELOAD" in finding.advice


def test_a_good_blas_needs_no_advice(monkeypatch):
    monkeypatch.setattr(diagnosis, "_rate", lambda product: 60e9)
    assert diagnosis._blas().advice is None


def test_it_names_every_implementation_and_folder(capsys):
    assert main(["doctor", "--no-measure"]) in (0, 3)
    out = capsys.readouterr().out
    for topic in ("MLX", "device", "memory", "baseline", "torch", "compiler", "config", "data", "cache"):
        assert f"\n{topic}" in f"\n{out}"


def test_a_workload_is_explained_for_each_implementation(capsys):
    assert main(["explain", "--seq", "4096", "--heads", "8", "--kv-heads", "2"]) == 0
    out = capsys.readouterr().out
    assert "B=1 L=4096" in out and "GFLOP" in out
    for name in ("baseline", "poc", "practical", "demo", "mlx", "torch"):
        assert f"\n{name} " in out


def test_what_practical_chose_and_why_is_explained(capsys):
    assert main(["explain", "--seq", "4096", "--heads", "8", "--pass", "training", "--mask", "causal"]) == 0
    chosen = capsys.readouterr().out.partition("what practical chose\n")[2]
    reported = [line.split()[0] for line in chosen.splitlines() if line[:1].strip()]
    assert reported[:3] == ["budget", "unfused", "way"]
    assert {"heads", "rows", "keys", "skipped"} <= {*reported}
    assert "what the mask rules out" in " ".join(chosen.split())


def test_explaining_nothing_legal_is_reported(capsys):
    assert main(["explain", "--heads", "8", "--kv-heads", "3"]) == 2
    assert "must divide" in capsys.readouterr().err


def test_a_bug_reports_file_names_no_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path / "cache"))
    assert main(["doctor", "--no-measure", "--report", str(tmp_path / "report.md")]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "- backend: " in text
    assert "## Metal kernels" in text
    assert "Never measured" in text
    assert str(tmp_path) not in text
    assert not capsys.readouterr().out


def test_a_report_goes_to_a_folder_that_exists(capsys, tmp_path):
    assert main(["doctor", "--report", str(tmp_path / "none" / "report.md")]) == 2
    assert "--report" in capsys.readouterr().err


def advised(topic):
    return [finding for finding in diagnosis.diagnose(measure=False) if finding.topic == topic and finding.advice]


@pytest.mark.parametrize("content", ['theme = "', "colour = 1", "x = " + "[" * 5000])
def test_a_broken_config_file_is_found(content):
    settings.config_path().parent.mkdir(parents=True)
    settings.config_path().write_text(content)
    (finding,) = advised("config")
    assert str(settings.config_path()) in finding.text


def test_a_broken_preset_is_found():
    storage.own_presets().mkdir(parents=True)
    (storage.own_presets() / "mine.toml").write_text("schema = 1")
    (finding,) = advised("presets")
    assert "mine.toml: nothing to measure" in finding.text


def test_a_data_folder_that_is_a_file_is_found():
    storage.data_dir().parent.mkdir(parents=True, exist_ok=True)
    storage.data_dir().write_text("")
    assert "is not a folder" in advised("data")[0].text
    assert "Not a directory" in advised("history")[0].text


def test_a_home_that_does_not_exist_is_found_and_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    for name in ("CONFIG", "DATA", "CACHE"):
        monkeypatch.delenv(f"XDG_{name}_HOME")
    assert "set HOME" in (advised("data")[0].advice or "")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("target", ["", "-", "."])
def test_a_report_goes_to_a_file(target, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "--no-measure", "--report", target]) == 2
    assert capsys.readouterr().err.strip().endswith(f"--report: got '{target}'; it takes a file")
    assert list(tmp_path.iterdir()) == []
