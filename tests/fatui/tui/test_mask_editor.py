"""Kinds of masks with their parameters, and the picture of their tiles."""

import pytest

from attention.core.mask_text import parse_mask
from attention.core.workload import Workload
from fatui.tui.view_models.mask_editor import KINDS, kind_of, mask_lines, options, say_mask, sliders, with_values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_reads_and_writes_its_parameters(kind):
    assert kind_of(kind.mask) is kind
    spec = parse_mask(kind.mask)
    assert spec.text == kind.mask
    for parameter in kind.parameters:
        changed = parameter.write(spec, 32)
        assert parameter.read(changed) == 32
        assert kind_of(changed.text) is kind
        assert all(each.read(changed) == each.read(spec) for each in kind.parameters if each is not parameter)


def test_a_chosen_mask_stands_for_its_kind():
    assert options(("window:7", "prefix:3+causal"))[:3] == ("none", "causal", "window:7")
    assert say_mask("window:7") == "window"
    assert say_mask("prefix:3+causal") == "prefix:3+causal"
    assert sliders(("prefix:3+causal",)) == []
    assert sliders(("window:7", "causal")) == []


def test_a_slider_has_the_values_of_all_chosen_masks():
    masks = ("prefix:4+window:8", "prefix:4+window:16")
    (prefix, prefixes), (window, windows) = sliders(masks)
    assert (prefixes, windows) == ((4,), (8, 16))
    assert with_values(masks, prefix, (5,)) == ("prefix:5+window:8", "prefix:5+window:16")
    assert with_values(masks, window, (9,)) == ("prefix:4+window:9",)
    assert sliders((*masks, "prefix:5+window:8")) == []


def test_the_picture_has_two_rows_of_tiles_a_line():
    lines = mask_lines(Workload(seq=512, mask="documents:128", heads=1))
    assert [line[:16] for line in lines[:4]] == [
        "▒▄··············",
        "██▒▄············",
        "····▒▄··········",
        "····██▒▄········",
    ]
    assert "13 % of pairs" in lines[0]
    assert mask_lines(Workload(seq=512)) == []
    assert mask_lines(Workload(seq=100_000, mask="window:9"))[1] == "no picture beyond 32,768 keys"


@pytest.mark.parametrize("seq", [1, 31, 100, 512, 1000, 2048, 30_000])
@pytest.mark.parametrize("mask", [kind.mask for kind in KINDS[1:]])
def test_a_picture_fits_the_pane(seq, mask):
    lines = mask_lines(Workload(seq=seq, mask=mask, heads=1))
    assert 1 <= len(lines) <= 8
    assert max(map(len, lines)) <= 16 + 2 + 16
