"""The public function: what `attention()` accepts, and how it reports what it does not."""

import pydoc
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import attention as package
from attention import UnsupportedError, UsageError, attention
from attention.implementations import NAMES
from attention.implementations.baseline import Baseline

Q, K, V = mx.ones((2, 4, 5, 8)), mx.ones((2, 2, 7, 8)), mx.ones((2, 2, 7, 3))


def test_importing_attention_imports_no_mlx_numpy_or_textual() -> None:
    heavy = ("mlx", "mlx.core", "numpy", "textual", "torch")
    code = f"import attention, sys; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_modules_are_attributes_without_an_import() -> None:
    code = (
        "import attention, sys; assert {'bench', 'masks'} <= {*dir(attention)}; assert 'numpy' not in sys.modules; "
        "print(attention.masks.causal(), attention.distributed.__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["causal()", "attention.distributed"]


@pytest.mark.parametrize(
    "name", ["attention", *(f"attention.{name}" for name in ("masks", "streaming", "distributed"))]
)
def test_help_describes_a_module(name: str) -> None:
    """`help` evaluates the types of fields, also those of MLX, which modules import late."""
    assert name in pydoc.plain(pydoc.render_doc(name)).splitlines()[0]


def test_values_have_a_repr_of_one_line() -> None:
    numbers = package.quantized(mx.zeros((1, 2, 8, 64)), "int4:32")
    assert repr(numbers) == "QuantizedArray((1, 2, 8, 64), int4:32, float32)"
    state = package.StreamingKV(4, 16, "int8")
    state.update(mx.zeros((1, 2, 3, 64)), mx.zeros((1, 2, 3, 64)))
    assert repr(state) == "StreamingKV(first=4, window=16, int8, position 3)"


def test_the_implementations_are_named() -> None:
    assert NAMES == ("baseline", "poc", "practical", "demo", "poc-fp8", "mlx", "torch", "flex")


def test_former_names_of_modules_still_import() -> None:
    """As in implementations in files of their own, and in scripts, that were written for an earlier layout."""
    from attention.core.route import Route
    from attention.implementations import practical
    from attention.route import Route as FormerRoute

    assert FormerRoute is Route
    assert practical.Practical.name == "practical"


def test_the_shape_follows_q_and_v_and_the_type_follows_q() -> None:
    out = attention(Q.astype(mx.bfloat16), K.astype(mx.bfloat16), V.astype(mx.bfloat16))
    assert (out.shape, out.dtype) == ((2, 4, 5, 3), mx.bfloat16)


def test_an_implementation_may_be_given_as_an_object() -> None:
    assert mx.allclose(attention(Q, K, V, implementation=Baseline()), attention(Q, K, V))


def test_a_window_implies_causal() -> None:
    q, k, v = (mx.random.normal(x.shape) for x in (Q, K, V))
    assert mx.array_equal(attention(q, k, v, window=3), attention(q, k, v, mask="causal", window=3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": mx.ones((4, 5, 8))}, "q: got shape (4, 5, 8); it takes (batch, heads, length, width)"),
        ({"q": [1.0]}, "q: got list; it takes an mlx.core.array"),
        ({"q": Q.astype(mx.int32)}, "q: got int32; it takes float32, float16, bfloat16"),
        ({"k": K.astype(mx.float16)}, "k: got float16; it takes q's type, float32"),
        ({"k": K[:1], "v": V[:1]}, "k: got batch 1; it takes q's batch, 2"),
        ({"k": mx.ones((2, 3, 7, 8)), "v": mx.ones((2, 3, 7, 3))}, "k: got 3 heads; it takes a divisor of q's 4 heads"),
        ({"k": mx.ones((2, 2, 7, 9))}, "k: got width 9; it takes q's width, 8"),
        ({"v": V[:, :, :6]}, "v: got batch, heads and length (2, 2, 6); it takes k's, (2, 2, 7)"),
        ({"v": V[:, :, :0]}, "v: got shape (2, 2, 0, 3)"),
        *(({"return_lse": each}, f"return_lse: got {each!r}; it takes True or False") for each in (1, "no", None)),
        ({"scale": float("nan")}, "scale: got nan; it takes a number from -1e+38 to 1e+38"),
        ({"scale": "big"}, "scale: got 'big'"),
        ({"softcap": 0}, "softcap: got 0; it takes a number from 1e-30 to 1e+30, or None"),
        ({"softcap": True}, "softcap: got True"),
        ({"window": 0}, "window: got 0; it takes a whole number from 1"),
        ({"window": 2.5}, "window: got 2.5"),
        (
            {"mask": "casual"},
            "mask: got 'casual'; it takes None, 'causal', a mask of attention.masks or an array (did you mean",
        ),
        ({"mask": "\x1b[2J"}, "mask: got '\\x1b[2J'; it takes None"),
        ({"group": mx.array(3)}, "group: got array(3, dtype=int32); it takes a group"),
        ({"mask": 3}, "mask: got int; it takes None, 'causal', a mask of attention.masks or an mlx.core.array"),
        ({"mask": mx.ones((5, 6))}, "mask: got shape (5, 6); it takes one that broadcasts"),
        ({"mask": mx.ones((5, 7), mx.int8)}, "mask: got an array of int8; it takes bool"),
        ({"implementation": "practicle"}, "implementation: got 'practicle'; it takes baseline,"),
        ({"implementation": "practicle"}, "(did you mean 'practical'?)"),
        ({"implementation": Baseline}, "implementation: got <class"),
        ({"implementation": None}, "implementation: got None"),
    ],
)
def test_an_error_names_the_argument_its_value_and_the_valid(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as error:
        attention(**{"q": Q, "k": K, "v": V, **change})
    assert words in str(error.value)
    assert all("\n" not in problem for problem in error.value.problems)


def test_two_mistakes_are_both_reported() -> None:
    with pytest.raises(UsageError) as error:
        attention(Q, mx.ones((3, 3, 7, 8)), V)
    assert len(error.value.problems) == 3


def test_what_an_implementation_does_not_take_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no softcap"):
        attention(Q, K, V, softcap=3.0, implementation="mlx")


@pytest.mark.parametrize(
    ("hidden", "name", "error"),
    [
        ("html", "bench", "ImportError: cannot import name 'escape'"),
        *(
            ("mlx", name, "NoBackendError: MLX cannot be imported: No module named 'mlx.core'")
            for name in ("StreamingKV", "monitor()", "patch_mlx_lm()")
        ),
    ],
)
def test_what_cannot_be_imported_is_named(hidden: str, name: str, error: str, tmp_path: Path) -> None:
    (tmp_path / f"{hidden}.py").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import attention; attention.{name}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert error in done.stderr.splitlines()[-1]
