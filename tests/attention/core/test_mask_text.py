"""Mask strings: what they accept, how they are spelled, and the exact number of visible pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.core.errors import UsageError
from attention.core.mask_text import MaskSpec, chosen_blocks, draw_blocks, parse_mask, visible_pairs
from attention.core.workload import Workload
from attention.measure.reference import visible

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


def shown(spec: MaskSpec, seq: int, kv_seq: int, head: int = 0) -> int:
    """Return the number of visible pairs of one head, counted one by one."""
    return int(visible(spec, np.arange(seq), seq, kv_seq, head).sum())


@given(parts, st.integers(1, 70), st.integers(1, 70))
def test_pairs_of_positional_masks_are_exact(given_parts: dict[str, object], seq: int, kv_seq: int) -> None:
    spec = parse_mask(MaskSpec(**given_parts).text)  # type: ignore[arg-type]
    assert visible_pairs(spec, seq, kv_seq, 3) == 3 * shown(MaskSpec(**given_parts), seq, kv_seq)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["blocks:0.3", "prefix:70+window:150+blocks:0.2", "strided:40,3+blocks:0.5"])
@pytest.mark.parametrize(("seq", "kv_seq"), [(512, 512), (130, 300), (300, 130), (1, 700)])
def test_pairs_of_random_blocks_are_exact(text: str, seq: int, kv_seq: int) -> None:
    spec = parse_mask(text)
    assert visible_pairs(spec, seq, kv_seq, 2) == sum(shown(spec, seq, kv_seq, head) for head in range(2))


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


def test_random_blocks_differ_by_head_and_are_as_many_in_a_row() -> None:
    first, second = (draw_blocks(0.25, 1024, 2048, head) for head in range(2))
    assert first != second
    assert {len(set(keys)) for keys in first} == {chosen_blocks(0.25, 2048)} == {4}
    assert [len(keys) for keys in draw_blocks(0.01, 128, 1024, 0)] == [1]


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
        ("none+causal", "nothing can be joined to none"),
        ("pattern:2", "pattern takes a density from 0 to 1"),
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


def test_a_program_s_own_mask_keeps_its_density_alone() -> None:
    own = Workload(mask="pattern:0.25", seq=64, heads=2)
    assert (own.structured, own.pairs) == (True, 2048)
