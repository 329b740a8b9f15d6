"""The first-use check in general: what is stored, and for which machine; nothing is compiled."""

import pytest

from attention.kernels.common import cache
from attention.kernels.common.first_use import MAX_ERROR_LENGTH, SelfChecks

KEY, NAME = "planted-0", "planted"


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FATUI_CACHE_DIR", str(tmp_path))


def here():
    """The state of a new process on one machine, or another."""
    return SelfChecks(lambda: "here")


def there():
    return SelfChecks(lambda: "there")


def interrupted():
    raise KeyboardInterrupt


def test_an_interrupted_check_is_no_verdict_on_the_kernel():
    there().check(KEY, NAME, lambda: "off by 3")
    with pytest.raises(KeyboardInterrupt):
        here().check(KEY, NAME, interrupted)
    assert here().distrust_reason(KEY) is None
    assert there().distrust_reason(KEY) == "off by 3"
    (record,) = cache.records("planted")
    assert record["checked"] == {"there": "off by 3"}  # what a report shows
    assert here().check(KEY, NAME, lambda: None) is None


def stopped():
    raise SystemExit


def test_a_check_whose_process_was_stopped_is_made_once_more():
    with pytest.raises(SystemExit):
        here().check(KEY, NAME, stopped)
    assert here().distrust_reason(KEY) is None
    assert here().check(KEY, NAME, lambda: None) is None
    assert here().verdict(KEY) == "passed"


def test_a_stopped_then_interrupted_check_has_not_failed():
    with pytest.raises(SystemExit):
        here().check(KEY, NAME, stopped)
    with pytest.raises(KeyboardInterrupt):
        here().check(KEY, NAME, interrupted)
    assert here().distrust_reason(KEY) is None


@pytest.mark.parametrize(
    "error",
    [
        "cudaMallocAsync(&buf, size, stream) failed: out of memory",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError)",
        "[malloc] Unable to allocate 4096 bytes.",
    ],
)
def test_no_memory_for_a_check_counts_for_this_process_only(error):
    def starve():
        raise RuntimeError(error)

    this = here()
    assert this.check(KEY, NAME, starve) == this.distrust_reason(KEY) == error
    assert here().check(KEY, NAME, lambda: None) is None


def test_interrupted_while_compiling_it_leaves_the_record_alone():
    cache.write_code(KEY, b"older code")
    before = cache.read_record(KEY)
    with pytest.raises(KeyboardInterrupt):
        here().check(KEY, NAME, lambda: None, prepare=interrupted)
    assert cache.read_record(KEY) == before


def test_each_machine_has_its_verdict_in_the_same_record():
    there().check(KEY, NAME, lambda: "off by 3")
    here().check(KEY, NAME, lambda: None)
    (record,) = cache.records("planted")
    assert record["checked"] == {"there": "off by 3", "here": "passed"}


def test_an_unrecorded_verdict_holds_for_this_process(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "replace_file", refuse)
    this = here()
    assert this.check(KEY, NAME, lambda: "off by 3") == this.distrust_reason(KEY) == "off by 3"
    assert here().verdict(KEY) is None


def test_an_error_is_stored_whole_and_shown_in_its_main_line():
    error = "cannot build\nprogram_source:3:1: error: nonsense\n" + "note\n" * 500

    def compile_nonsense():
        raise RuntimeError(error)

    assert here().check(KEY, NAME, compile_nonsense) == "program_source:3:1: error: nonsense"
    assert len(error) < MAX_ERROR_LENGTH
    assert here().verdict(KEY) == error
