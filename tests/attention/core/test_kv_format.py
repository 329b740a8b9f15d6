"""Formats of quantized keys and values: their texts, their bytes, and what is no format."""

import re
from pathlib import Path

import mlx.core as mx
import pytest

from attention import UsageError
from attention.core.kv_format import FORMAT_NAMES, Format, KVFormat, parse_format, parse_kv_format
from tests.support.quantized_values import FORMATS

PAGE = Path(__file__).parents[3] / "docs" / "quantized.md"


@pytest.mark.parametrize("text", FORMATS)
def test_a_format_is_that_of_its_text(text):
    form = parse_format(text)
    assert parse_format(form.text) == form
    assert form.text == text.removesuffix(":64")


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_row_takes_the_bytes_of_its_parts(text, dtype):
    form = parse_format(text)
    parts = mx.quantize(mx.zeros((1, 256), dtype), form.group_size, form.bits, form.mode)
    assert form.row_bytes(256, dtype.size) == sum(part.nbytes for part in parts)


def test_the_sizes_on_the_page_are_right():
    rows = re.findall(
        r"^\| `(\S+)` \| (\d+).*? \| (\d+) \| ([\d.]+) \| ([\d,]+) \| 1/([\d.]+) \|$", PAGE.read_text(), re.M
    )
    assert {name for name, *_ in rows} >= set(FORMAT_NAMES)
    for name, bits, group, value_bits, token, share in rows:
        form = parse_format(name)
        row = form.row_bytes(128, 2)
        assert (form.bits, form.group_size) == (int(bits), int(group))
        assert (row * 8 / 128, 2 * 8 * row) == (float(value_bits), int(token.replace(",", "")))
        assert f"{256 / row:.2f}" == share


def test_keys_and_values_may_differ():
    assert parse_kv_format("int8+mxfp4") == KVFormat(parse_format("int8"), parse_format("mxfp4"))
    assert parse_kv_format("int8+mxfp4").text == "int8+mxfp4"
    assert parse_kv_format("int8:64+int8").text == "int8"
    assert parse_kv_format("int8:32").text == "int8:32"
    assert parse_kv_format("none") is None


def test_names_are_the_formats_of_default_groups():
    assert {parse_format(text).text for text in FORMATS if ":" not in parse_format(text).text} <= set(FORMAT_NAMES)
    assert [parse_format(name).text for name in FORMAT_NAMES] == list(FORMAT_NAMES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int7", "got 'int7'; it takes int8, int6"),
        ("int4:48", "got '48' in 'int4:48'; it takes 32, 64, 128"),
        ("int4:", "got '' in 'int4:'; it takes 32, 64, 128"),
        ("int4:３２", "got '３２' in"),
        ("mxfp4:32", "got 'mxfp4:32'; it takes"),
        ("int4+", "got ''; it takes"),
        ("int4+int8+int4", "got 'int8+int4'; it takes"),
        ("INT4", "got 'INT4'; it takes"),
        ("int4+none", "got 'none'; it takes"),
        ("", "got ''; it takes"),
    ],
)
def test_what_is_no_format_is_named(text, words):
    with pytest.raises(UsageError) as error:
        parse_kv_format(text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("affine", 7, 64), "bits: got 7; it takes 8, 6, 5, 4, 3, 2"),
        (("affine", 4, 16), "group_size: got 16; it takes 32, 64, 128"),
        (("mxfp4", 4, 64), "mode mxfp4: got 4 bits in groups of 64; it takes 4 bits in groups of 32"),
        (("fp8", 8, 32), "mode: got 'fp8'; it takes affine, mxfp8, mxfp4, nvfp4"),
    ],
)
def test_a_format_that_mlx_lacks_is_named(fields, words):
    with pytest.raises(UsageError) as error:
        Format(*fields)
    assert str(error.value) == words
