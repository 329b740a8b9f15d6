"""A workload with quantized keys and values: its bytes, its label, and what it refuses."""

import pytest

from attention.core.errors import UsageError
from attention.core.workload import Workload

DECODE = {"pass_": "decode", "kv_seq": 2048, "heads": 32, "kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize(
    ("kv_format", "bits"),
    [
        *(("none", 16), ("int8", 8 + 2 * 16 / 64), ("int4", 4 + 2 * 16 / 64), ("int4:32", 4 + 2 * 16 / 32)),
        *(("mxfp8", 8 + 8 / 32), ("mxfp4", 4 + 8 / 32), ("nvfp4", 4 + 8 / 16)),
    ],
)
def test_the_bytes_of_keys_and_values_are_those_of_the_format(kv_format: str, bits: float) -> None:
    case = Workload(**DECODE, kv_format=kv_format)  # type: ignore[arg-type]
    assert case.kv_token_bytes == 8 * 2 * 128 * bits / 8
    assert case.key_value_bytes == 2048 * case.kv_token_bytes
    assert case.bytes_moved == case.key_value_bytes + 2 * 32 * 128 * 2


def test_keys_and_values_may_differ_in_format() -> None:
    case = Workload(**DECODE, kv_format="int8+int4:32")  # type: ignore[arg-type]
    assert case.kv_token_bytes == 8 * (128 + 2 * 2 * 2 + 64 + 4 * 2 * 2)
    assert "K/V int8+int4:32" in case.label
    assert Workload(**DECODE, kv_format="int4+int4").kv_format == "int4"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kv_format": "int7"}, "kv_format: got 'int7'; it takes int8, int6,"),
        ({"kv_format": 4}, "kv_format: got '4'; it takes int8, int6,"),
        ({"kv_format": "int4:48"}, "kv_format: group size: got '48' in 'int4:48'; it takes 32, 64, 128"),
        ({"kv_format": "int4", "head_dim": 80}, "head_dim: got 80; int4 takes multiples of its group size, 64"),
        (
            {"kv_format": "int4", "head_dim": 32},
            "head_dim: got 32; int4 takes multiples of its group size, 64; int4:32 takes 32",
        ),
        ({"kv_format": "int8:32+int4", "value_dim": 96}, "value_dim: got 96; int4 takes multiples of its group size"),
        ({"kv_format": "int4", "pass_": "training"}, "kv_format: got int4 in a training pass, which has"),
    ],
)
def test_a_format_that_cannot_be_is_one_line(fields: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError) as raised:
        Workload(**fields)  # type: ignore[arg-type]
    assert [text[: len(problem)] for text in raised.value.problems] == [problem]
