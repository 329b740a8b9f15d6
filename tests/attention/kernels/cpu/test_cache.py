"""Compiling, caching and refusing: messages for a missing compiler, a missing folder, a foreign library."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import pytest

from attention.core.workload import Workload
from attention.implementations.fused import Poc
from attention.kernels import cpu
from attention.kernels.common import cache
from attention.kernels.cpu import build, library, selfcheck
from attention.masks import Mask
from attention.measure.device import probe
from fatui import storage
from tests.support.patience import patient

pytestmark = pytest.mark.usefixtures("compiled_kernel")


def record(folder: Path) -> Path:
    return next(folder.glob("*.json"))


def python(code: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.thorough
def test_availability_takes_milliseconds_and_imports_no_mlx():
    code = (
        "import sys, time; from attention.kernels import cpu; cpu.availability(); t = time.process_time();"
        "answer = cpu.availability(); t = time.process_time() - t;"
        "print(answer[0], 'mlx.core' in sys.modules, 'nanobind' in sys.modules, t < 0.05)"
    )
    assert python(code).communicate(timeout=patient(120))[0].split() == ["True", "False", "False", "True"]


def test_a_compiled_kernel_says_so(fresh):
    assert cpu.is_compiled()
    assert cpu.availability() == (True, f"compiled ({cpu.variant()})")


def test_a_later_process_starts_it_in_milliseconds(fresh):
    start = time.process_time()
    cpu.load(pytest.fail)
    assert time.process_time() - start < 0.5  # 50 ms on a quiet machine


@pytest.mark.thorough
def test_the_first_use_says_that_it_compiles(own_folder):
    messages = []
    assert not cpu.is_compiled()
    cpu.load(messages.append)
    assert "ompiling" in messages[0]
    assert messages[1].endswith("and kept for the next time.")
    assert cpu.is_compiled()


def test_the_folder_is_the_users_alone(own_folder):
    own_folder.chmod(0o755)
    cpu.load()
    assert stat.S_IMODE(own_folder.stat().st_mode) == 0o700


def test_a_changed_library_is_rebuilt_and_not_loaded(own_folder):
    cpu.load()
    path = record(own_folder).with_suffix(".so")
    path.unlink()
    path.write_bytes(b"not what was recorded")
    library._loaded = cpu._module = None
    messages = []
    cpu.load(messages.append)
    assert messages[1].endswith("and kept for the next time.")
    assert cache.digest(path) == json.loads(record(own_folder).read_text())["sha256"]


@pytest.mark.thorough
def test_compiling_removes_what_was_long_unused(own_folder):
    long_ago = time.time() - 100 * 86400
    stale, leftover, foreign = own_folder / "0123.so", own_folder / ".building-x", own_folder / "fresh.cubin"
    for path in (stale, leftover / "out.o", foreign):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"code")
    for path in (stale, leftover, *own_folder.glob("*.o")):
        os.utime(path, (long_ago, long_ago))
    cpu.load()
    assert not stale.exists()
    assert not leftover.exists()
    assert foreign.exists()
    assert len(list(own_folder.glob("*.o"))) == len(build._jobs(build.find()))  # used by the link


@pytest.mark.thorough
def test_a_library_in_use_stays_however_old_it_is(own_folder):
    cpu.load()
    for path in own_folder.iterdir():
        os.utime(path, (0, 0))
    library._loaded = cpu._module = None
    cpu.load(pytest.fail)
    cache.write_record("another", {})
    assert {path.suffix for path in own_folder.iterdir() if path.stem != "another"} == {".so", ".json"}


def test_a_lock_that_is_held_stays_however_old_its_file_is(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    with cache.lock("key"):
        pass
    os.utime(tmp_path / "kernels" / "key.lock", (0, 0))
    with cache.lock("key"):
        cache.write_record("another", {})
        assert cache.is_locked("key")
    os.utime(tmp_path / "kernels" / "key.lock", (0, 0))
    cache.write_record("another", {})
    assert not (tmp_path / "kernels" / "key.lock").exists()


@pytest.mark.thorough
def test_two_processes_compiling_at_once_both_get_a_kernel(own_folder):
    code = "from attention.kernels import cpu; cpu.load(); print('ready')"
    both = [python(code, FATUI_CACHE_DIR=str(own_folder.parent)) for _ in range(2)]
    assert [p.communicate(timeout=patient(300))[0].strip() for p in both] == ["ready", "ready"]
    assert len(list(own_folder.glob("*.so"))) == 1
    assert not list(own_folder.glob(".*-*"))


def test_without_a_compiler_it_says_so(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    usable, reason = cpu.availability()
    assert not usable
    assert "no C++ compiler" in reason
    with pytest.raises(cpu.KernelUnavailable, match="no-such-compiler"):
        cpu.load()


def test_without_python_headers_it_says_so(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert "Python.h" in cpu.availability()[1]


def test_without_nanobind_it_says_so(fresh, monkeypatch):
    found = build.package_folder
    monkeypatch.setattr(build, "package_folder", lambda name: None if name == "nanobind" else found(name))
    assert "nanobind" in cpu.availability()[1]


def test_a_folder_that_cannot_be_made_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path / "file"))
    usable, reason = cpu.availability()
    assert not usable
    assert str(tmp_path) in reason


def test_a_folder_on_a_read_only_disk_is_named(fresh, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    (tmp_path / "kernels").mkdir(mode=0o755)
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(Path, "chmod", refuse)
    assert cpu.availability() == (False, f"the cache folder {tmp_path}/kernels cannot be used: Read-only file system")


def test_a_folder_of_another_user_is_refused(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)  # noqa: PTH116
    assert cpu.availability() == (False, f"the cache folder {tmp_path}/kernels belongs to another user")


def test_the_route_names_what_is_missing_and_mlx_attends(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    route = Poc().route(Workload(dtype="float32"), probe())
    assert (route.path, route.fallback) == ("falls back: MLX SDPA", True)
    assert route.reason.startswith("no CPU kernel: no C++ compiler found (no-such-compiler)")
    q = mx.ones((1, 2, 4, 8))
    assert mx.allclose(Poc()(q, q, q, scale=1.0, mask=Mask()), q)


def test_a_different_abi_is_refused_with_both_numbers(own_folder, monkeypatch):
    monkeypatch.setattr(build, "_abi_tag", lambda module: "nanobind_system_v7")
    with pytest.raises(cpu.KernelUnavailable, match=r"ABI is v\d+, MLX was built with nanobind_system_v7"):
        cpu.load()


def test_a_failed_compilation_is_stored_with_its_message(own_folder, monkeypatch):
    monkeypatch.setenv("FATUI_KERNEL_CXXFLAGS", "-fno-such-option")
    with pytest.raises(cpu.KernelUnavailable, match="no-such-option"):
        cpu.load()
    usable, reason = cpu.availability()
    assert not usable
    assert "no-such-option" in reason


@pytest.mark.thorough
def test_a_failure_is_tried_again_a_day_later(own_folder, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(build, "_kernel_command", lambda tools: ("false",))
        key = build.key(build.find())
        killed.setattr(build, "key", lambda tools: key)
        with pytest.raises(cpu.KernelUnavailable, match="exit status 1"):
            cpu.load()
    monkeypatch.setattr(build, "key", lambda tools: key)
    assert not cpu.availability()[0]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86401)
    assert cpu.availability() == (True, f"compiles at first use ({cpu.variant()})")
    cpu.load()
    assert cpu.availability()[0]


@pytest.mark.thorough
def test_a_full_disk_is_a_reason_for_ten_minutes_of_one_process(own_folder, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def nothing_more(*_):
        pytest.fail("it is compiled again")

    messages = []
    with monkeypatch.context() as full:
        full.setattr(tempfile, "mkdtemp", refuse)
        full.setattr(tempfile, "mkstemp", refuse)
        with pytest.raises(cpu.KernelUnavailable, match="No space left"):
            cpu.load(messages.append)
        full.setattr(build, "compile_library", nothing_more)
        with pytest.raises(cpu.KernelUnavailable, match="No space left"):
            cpu.load()
        assert "No space left" in cpu.availability()[1]
    assert not any("kept" in message for message in messages)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    cpu.load()


def test_no_room_is_found_out_before_anything_is_compiled(own_folder, monkeypatch):
    for path in own_folder.glob("*.o"):
        path.unlink()
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "from attention.kernels import cpu\n"
        "from attention.kernels.cpu import build\n"
        "build.run = lambda command: print('failed: it is compiled:', *command)\n"
        "for _ in range(2):\n"
        "  try: cpu.load(print)\n"
        "  except cpu.KernelUnavailable as error: print(error)\n"
    )
    process = python(code, FATUI_CACHE_DIR=str(own_folder.parent))
    lines = process.communicate(timeout=patient(120))[0].splitlines()
    assert [line.partition("failed: ")[2] for line in lines[1:]] == ["[Errno 27] File too large"] * 3
    assert not list(own_folder.glob("*.o"))


@pytest.mark.thorough
def test_a_kernel_that_cannot_be_recorded_is_used_all_the_same(own_folder, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    messages = []
    monkeypatch.setattr(cache, "write_record", refuse)
    cpu.load(messages.append)
    assert "not kept for the next time: [Errno 28] No space left" in messages[1]


@pytest.mark.thorough
def test_a_damaged_object_is_compiled_anew(own_folder, objects, monkeypatch):
    compiled, run = [], build.run

    def copy_or_link(command):
        if "-c" not in command:
            return run(command)
        compiled.append(Path(command[-3]).name)
        return shutil.copy2(next(path for path in objects if path.stem.startswith("append-")), command[-1])

    monkeypatch.setattr(build, "run", copy_or_link)
    for path in own_folder.glob("append-*.o"):
        path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    cpu.load()
    assert compiled == ["append.cpp"]
    (path,) = [path for path in own_folder.glob("append-*.o") if not path.read_bytes().endswith(b"damaged!")]
    assert path.stem.endswith(cache.digest(path)[:24])


def test_objects_are_shared_between_checkouts(tmp_path, monkeypatch):
    tools = build.find()
    names = [build._object_name(*job, tools) for job in build._jobs(tools)]
    shutil.copytree(build.SOURCES, tmp_path / "cpu")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "cpu")
    assert [build._object_name(*job, tools) for job in build._jobs(tools)] == names


@pytest.mark.thorough
def test_what_the_compiler_leaves_open_to_others_is_closed(own_folder):
    before = os.umask(0)
    try:
        cpu.load()
    finally:
        os.umask(before)
    library._loaded = cpu._module = None
    cpu.load(pytest.fail)
    made = [path for path in own_folder.iterdir() if path.suffix in (".so", ".json")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o600}


def planted(folder: Path, key: str) -> Path:
    """A library and a record that agree, as forged by another user."""
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / f"{key}.so").write_bytes(b"code")
    cache.write_record(key, {"sha256": cache.digest(folder / f"{key}.so")})
    assert cache.library(key) == folder / f"{key}.so"
    return folder / f"{key}.so"


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.mark.parametrize("suffix", [".so", ".json"])
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_no_file_that_others_may_write_is_trusted(empty_folder, suffix, mode):
    planted(empty_folder, "key").with_suffix(suffix).chmod(mode)
    assert cache.library("key") is None


@pytest.mark.skipif(os.getuid() != 0, reason="files are given to another user")
@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_no_file_of_another_user_is_trusted(empty_folder, suffix):
    os.chown(planted(empty_folder, "key").with_suffix(suffix), 65534, -1)
    assert cache.library("key") is None


@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_no_symbolic_link_is_followed(empty_folder, tmp_path, suffix):
    path = planted(empty_folder, "key").with_suffix(suffix)
    path.symlink_to(path.rename(tmp_path / "elsewhere"))
    assert cache.library("key") is None


def test_a_lock_that_is_a_link_spoils_nothing(empty_folder, tmp_path):
    empty_folder.mkdir(mode=0o700)
    (tmp_path / "mine").write_text("precious")
    (empty_folder / "key.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(cpu.KernelUnavailable, match="cannot be opened"), cache.lock("key"):
        pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_that_others_may_write_is_not_used_and_named(fresh, empty_folder):
    planted(empty_folder, "key")
    empty_folder.chmod(0o777)
    assert cache.library("key") is None
    reason = f"the cache folder {empty_folder} can be written by other users (mode 0777): remove it, or chmod -R go-w"
    assert cpu.availability() == (False, reason)
    with pytest.raises(cpu.KernelUnavailable, match="mode 0777"):
        cpu.load()


@pytest.mark.thorough
def test_a_record_names_no_file(own_folder, tmp_path):
    cpu.load()
    path = record(own_folder)
    forged = {**json.loads(path.read_text()), "library": "/tmp/../elsewhere.so"}
    path.write_text(json.dumps(forged))
    library._loaded = cpu._module = None
    cpu.load(pytest.fail)
    assert Path(library._loaded.__spec__.origin) == path.with_suffix(".so")


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize(
    "text",
    [
        b'{"failure": "x", "time": null}',
        b'{"failure": ["x"], "time": 1}',
        b'{"checked": 1}',
        b'{"checked": {"here": 1}}',
        b'{"sha256": null}',
        b'{"time": 1e999}',
        b'{"x": ' + b"[" * 100_000,
        b'{"x": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
        b"\0",
        b'"' + b"x" * (1 << 20) + b'"',
        b"[]",
    ],
    ids=range(11),
)
def test_a_hostile_record_counts_as_none(fresh, empty_folder, text):
    key = build.key(build.find())
    empty_folder.mkdir(mode=0o700)
    (empty_folder / f"{key}.json").write_bytes(text)
    assert cache.read_record(key) == {}
    assert list(cache.records("")) == []
    assert cpu.availability() == (True, f"compiles at first use ({cpu.variant()})")


@pytest.mark.parametrize("when", [-1e300, 1e300, 2e9 + 1e9])
def test_a_failure_of_another_time_is_none(empty_folder, when):
    cache.write_record("key", {"failure": "x", "time": when})
    assert cache.failure("key") is None


def test_the_reason_of_a_failure_is_one_short_printable_line(empty_folder):
    cache.write_failure("key", "\x1b[31mred\nand\0more" + "x" * 1000)
    reason = cache.failure("key")
    assert reason.isprintable()
    assert len(reason) <= 300


def test_a_fifo_in_the_place_of_a_record_does_not_hang(empty_folder):
    empty_folder.mkdir(mode=0o700)
    os.mkfifo(empty_folder / "key.json", 0o600)
    assert cache.read_record("key") == {}


@pytest.mark.thorough
def test_a_library_that_was_removed_is_not_called_compiled(own_folder):
    cpu.load()
    next(own_folder.glob("*.so")).unlink()
    library._loaded = None
    assert cpu.availability() == (True, f"compiles at first use ({cpu.variant()})")
    assert not cpu.is_compiled()


def test_a_kernel_that_disagrees_with_the_reference_is_not_used(own_folder, monkeypatch):
    right = selfcheck.results
    monkeypatch.setattr(selfcheck, "results", lambda *inputs: [1.01 * each for each in right(*inputs)])
    with pytest.raises(cpu.KernelUnavailable, match=r"disagrees with the reference by 0\.0"):
        cpu.load()
    assert "disagrees" in cpu.availability()[1]


@pytest.mark.parametrize("variable", ["FATUI_CACHE_DIR", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", ["~nouser/x", ""])
def test_a_cache_folder_of_nobody_is_ignored(variable, value, monkeypatch):
    for name in ("FATUI_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    usual = cache.folder()
    monkeypatch.setenv(variable, value)
    assert cache.folder() == usual
    assert cache.folder().is_absolute()
    assert storage.cache_dir() == usual.parent


def test_a_folder_named_mlx_is_not_taken_for_the_package(monkeypatch, tmp_path):
    (tmp_path / "mlx").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert any(build.package_folder("mlx").glob("core.*.so"))
