"""Cases of the fuzz tests that failed on a GPU, by what was wrong."""

import mlx.core as mx
import pytest

from tests.fuzz import test_fuzz

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not mx.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def on_the_gpu():
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(before)


@pytest.mark.parametrize(
    "case",
    [
        ("broad", 32, 192),
        ("broad", 33, 87),
        ("broad", 37, 12),
        ("broad", 32, 11),
        ("broad", 36, 196),
        ("broad", 39, 126),
        ("broad", 54, 11),
        ("broad", 61, 379),
        ("broad", 61, 418),
    ],
    ids=str,
)
def test_scores_of_half_precision_in_blocks_are_not_rounded(case):
    assert failures(*case) == []


@pytest.mark.parametrize("case", [("broad", 61, 97), ("broad", 61, 139), ("broad", 61, 337)], ids=str)
def test_float32_in_blocks_is_not_rounded(case, monkeypatch):
    monkeypatch.setattr("tests.fuzz.reference.multiplies_in_tf32", lambda problem: False)
    assert failures(*case) == []


@pytest.mark.parametrize("case", [("edges", 61, 32), ("edges", 66, 54)], ids=str)
def test_large_scores_in_float16_are_right(case):
    assert failures(*case) == []


@pytest.mark.parametrize("case", [("broad", 1401, 56), ("broad", 1401, 219)], ids=str)
def test_large_scores_in_float16_are_off_by_no_more_than_tf32(case):
    assert failures(*case) == []


@pytest.mark.parametrize("case", [("edges", 61, 48), ("edges", 61, 72), ("edges", 61, 88)], ids=str)
def test_slices_are_mapped(case):
    assert failures(*case) == []


@pytest.mark.parametrize("number", [5, 52], ids=str)
def test_slices_with_a_bool_mask_and_a_window_are_mapped(number):
    assert failures("broad", 1412, number, "gradient") == []


@pytest.mark.parametrize("number", [6, 42], ids=str)
def test_gradients_of_large_scores_cancel_in_any_tile(number):
    assert failures("broad", 1412, number, "gradient") == []


@pytest.mark.parametrize("number", [11, 21, 57, 146], ids=str)
def test_gradients_of_outputs_in_tf32_cancel(number):
    assert failures("edges", 72, number, "gradient") == []


@pytest.mark.parametrize("case", [("broad", 72, 280), ("edges", 72, 21), ("edges", 72, 153)], ids=str)
def test_gradients_of_large_float16_scores_are_finite(case):
    assert failures(*case, "gradient") == []


@pytest.mark.parametrize("case", [("edges", 71, 696), ("edges", 71, 736), ("edges", 71, 879)], ids=str)
def test_rows_at_the_lowest_bfloat16_are_ordinary(case):
    assert failures(*case) == []


@pytest.mark.parametrize("case", [("edges", 62, 0), ("edges", 62, 33), ("edges", 62, 54)], ids=str)
def test_gradients_are_right(case):
    assert failures(*case, "gradient") == []


def failures(family: str, seed: int, number: int, mode: str = "forward") -> list[str]:
    return test_fuzz.failures(family, mode, number, seed)
