"""Mask strings: what they accept, how they are spelled, and the exact number of visible pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attention.core.errors import UsageError
from attention.core.mask_text import BLOCK, MaskSpec, chosen_blocks, draw_blocks, parse_mask, visible_pairs
from attention.core.workload import Workload

parts = st.fixed_dictionaries(
    {},
    optional={
        "causal": st.booleans(),
        "window": st.integers(1, 40),
        "documents": st.integers(1, 40),
        "strided": st.tuples(st.integers(1, 9), st.integers(1, 9)),
        "prefix": st.integers(1, 40),
    },
)


def brute(spec: MaskSpec, seq: int, kv_seq: int, head: int = 0) -> NDArray[np.bool_]:
    """Return the visible pairs of one head as an array, by the definition of each part."""
    p, k = np.arange(seq)[:, None] + kv_seq - seq, np.arange(kv_seq)[None]
    seen = np.full((seq, kv_seq), spec == MaskSpec())
    if spec.causal:
        seen |= k <= p
    if spec.window:
        seen |= (k <= p) & (k > p - spec.window)
    if spec.documents:
        seen |= (k <= p) & (k // spec.documents == p // spec.documents)
    if spec.strided:
        count, stride = spec.strided
        seen |= np.isin(p - k, np.arange(count) * stride)
    if spec.prefix:
        seen |= k < spec.prefix
    if spec.blocks:
        tiles = np.zeros((-(-seq // BLOCK), -(-kv_seq // BLOCK)), dtype=np.bool_)
        for row, keys in enumerate(draw_blocks(spec.blocks, seq, kv_seq, head + 1)[head]):
            tiles[row, list(keys)] = True
        seen |= tiles.repeat(BLOCK, 0).repeat(BLOCK, 1)[:seq, :kv_seq]
    return seen


@given(parts, st.integers(1, 70), st.integers(1, 70))
def test_pairs_of_positional_masks_are_exact(given_parts: dict[str, object], seq: int, kv_seq: int) -> None:
    spec = parse_mask(MaskSpec(**given_parts).text)  # type: ignore[arg-type]
    assert visible_pairs(spec, seq, kv_seq, 3) == 3 * brute(MaskSpec(**given_parts), seq, kv_seq).sum()  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["blocks:0.3", "prefix:70+window:150+blocks:0.2", "strided:40,3+blocks:0.5"])
@pytest.mark.parametrize(("seq", "kv_seq"), [(512, 512), (130, 300), (300, 130), (1, 700)])
def test_pairs_of_random_blocks_are_exact(text: str, seq: int, kv_seq: int) -> None:
    spec = parse_mask(text)
    assert visible_pairs(spec, seq, kv_seq, 2) == sum(brute(spec, seq, kv_seq, head).sum() for head in range(2))


def test_pairs_take_no_time_at_any_length() -> None:
    texts = (
        "documents:1",
        "documents:7+prefix:9999999",
        "window:5+strided:1000,7",
        "documents:1000+window:3",
        "causal",
    )
    for text in texts:
        assert visible_pairs(parse_mask(text), 16_000_000, 16_000_001, 1) > 0


def test_random_blocks_are_as_many_in_each_row_and_differ_by_head() -> None:
    first, second = draw_blocks(0.25, 1024, 2048, 2)
    assert first != second
    assert {len(keys) for keys in first} == {chosen_blocks(0.25, 2048)} == {4}
    assert draw_blocks(0.01, 128, 1024, 1) == draw_blocks(0.01, 128, 1024, 1)
    assert len(draw_blocks(0.01, 128, 1024, 1)[0][0]) == 1


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("window:064", "window:64"),
        ("window:8 + prefix:4", "prefix:4+window:8"),
        ("window:8+causal", "causal"),
        ("strided:4,2+documents:8+causal+prefix:3", "prefix:3+causal"),
        ("documents:8+window:8", "window:8"),
        ("window:8+documents:9", "documents:9+window:8"),
        ("blocks:1e-1", "blocks:0.1"),
        ("strided:4, 2", "strided:4,2"),
    ],
)
def test_masks_have_one_spelling(text: str, canonical: str) -> None:
    assert Workload(mask=text).mask == canonical
    assert Workload(mask=canonical) == Workload(mask=text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("windw:4", "it takes none, causal, window:N, .* or several joined by [+] .did you mean 'window:N'"),
        ("window:0", "window takes whole numbers from 1 to 16,777,216"),
        ("window", "it takes none, causal, window:N"),
        ("causal:3", "it takes none, causal, window:N"),
        ("strided:4", "strided takes two numbers: strided:N,S is N keys, S apart"),
        ("strided:4,x", "strided takes whole numbers"),
        ("blocks:0", "blocks takes a density above 0 and at most 1, as in blocks:0.1"),
        ("blocks:nan", "blocks takes a density"),
        ("window:4+window:8", "window is there twice"),
        ("none+causal", "none shows every key"),
        ("", "it takes none, causal"),
    ],
)
def test_a_bad_mask_names_what_is_wrong(text: str, what: str) -> None:
    with pytest.raises(UsageError, match=f"mask: got '{text.replace('+', '[+]')}'; .*{what}"):
        Workload(mask=text)


def test_structured_masks_have_no_bounds() -> None:
    structured = Workload(mask="prefix:4+window:8", seq=16, heads=2)
    assert (structured.structured, structured.causal, structured.window) == (True, False, None)
    window = Workload(mask="window:8", seq=16)
    assert (window.structured, window.causal, window.window) == (False, True, 8)
    assert structured.flops == 2 * structured.pairs * 128
    assert structured.density == structured.pairs / (2 * 16 * 16)
