"""The case of a stream, and what follows from the blocks of its tokens."""

import pytest

from attention.core.errors import UsageError
from attention.core.stream import (
    MAX_BLOCKS,
    Stream,
    bin_of,
    bin_top_s,
    block_of,
    fitted_line,
    mean_loss,
    quantile_s,
    slow_steps,
    spread,
    tenths,
)


@pytest.mark.parametrize(
    ("field", "value", "takes"),
    [
        ("window", 0, "1 to 1,048,576"),
        ("first", 2000, "0 to the window, which is 1,024"),
        ("first", -1, "0 to the window"),
        ("tokens", 0, "1 to 1,000,000,000"),
        ("chunk", 200_000, "1 to 65,536"),
        ("head_dim", 0, "1 to 4,096"),
        ("kv_heads", 3, "divide heads"),
        ("kv_format", "int9", "int8"),
    ],
)
def test_an_invalid_size_is_one_line_with_what_it_takes(field: str, value: object, takes: str) -> None:
    with pytest.raises(UsageError) as caught:
        Stream(**{field: value})  # type: ignore[arg-type]
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{field}: got")
    assert takes in caught.value.problems[0]


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 1), (499, 1), (1_000_000, 1), (100_001, 64)])
def test_blocks_hold_whole_chunks_and_are_limited(tokens: int, chunk: int) -> None:
    case = Stream(tokens=tokens, chunk=chunk)
    assert case.block_tokens % chunk == 0
    assert -(-tokens // case.block_tokens) <= MAX_BLOCKS


def test_the_window_and_the_first_tokens_are_kept() -> None:
    assert Stream(window=100, first=4).workload.kv_seq == 104


def test_spread_counts_from_the_first_tenth_with_a_full_window() -> None:
    assert spread([1.0, 2.0, 2.1, 1.9], 1000, 100) == pytest.approx(0.05)
    assert spread([1.0, 2.0], 1000, 100) is None


def test_an_interrupted_stream_has_the_tenths_it_came_to() -> None:
    blocks = [block_of(end, [end / 1e6]) for end in range(50, 301, 50)]
    assert tenths(blocks, 1000) == pytest.approx([75e-6, 175e-6, 275e-6])


def test_a_quantile_is_exact_to_a_bin() -> None:
    bins = {bin_of(1e-4): 98, bin_of(1e-3): 2}
    assert quantile_s(bins, 0.5) == pytest.approx(1e-4, rel=0.021)
    assert quantile_s(bins, 0.99) == pytest.approx(1e-3, rel=0.021)
    assert quantile_s({}, 0.5) is None


def test_slow_steps_take_over_five_times_the_median() -> None:
    assert slow_steps({bin_of(1e-4): 10, bin_of(4.9e-4): 3, bin_of(5.3e-4): 2}, 1e-4) == 2


def test_a_bin_holds_the_times_up_to_its_top() -> None:
    assert bin_top_s(bin_of(3e-5)) >= 3e-5 > bin_top_s(bin_of(3e-5) - 1)


def test_full_attention_is_extrapolated_on_a_straight_line() -> None:
    blocks = [block_of(keys, [1e-5 + 2e-9 * keys]) for keys in range(1000, 13_000, 1000)]
    blocks[9] = block_of(blocks[9].end, [3 * blocks[9].seconds])  # a slow moment
    line = fitted_line(blocks)
    assert line is not None
    assert line.at(1_000_000) == pytest.approx(1e-5 + 2e-3, rel=0.01)
    assert fitted_line(blocks[:2]) is None


def test_a_mean_loss_weighs_blocks_by_their_tokens() -> None:
    blocks = [block_of(3, [1.0], loss=1.0, losses=3), block_of(4, [1.0], loss=5.0, losses=1), block_of(5, [1.0])]
    assert mean_loss(blocks) == 2.0
    assert mean_loss(blocks[2:]) is None
