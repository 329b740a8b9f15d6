"""The catalogue of implementations by name. Importing it imports none of them, and no MLX."""

import contextlib
import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final, cast

from msgspec import Struct

from attention.core.errors import UsageError, error_line, suggestion
from attention.core.numbers import shown_value
from attention.implementations.protocol import Implementation


class CatalogueEntry(Struct, frozen=True):
    """One entry of the catalogue."""

    name: str
    title: str
    summary: str
    """Description in one line."""
    location: str
    """module:Class"""


CATALOGUE: Final = (
    CatalogueEntry(
        "baseline",
        "Baseline, manual",
        "matmul, scale, mask, softmax, matmul: five steps that build the whole score matrix",
        "attention.implementations.baseline:Baseline",
    ),
    CatalogueEntry(
        "poc",
        "PoC, custom kernel",
        "the custom fused kernel if there is one for the device, otherwise MLX's SDPA",
        "attention.implementations.fused:TunedPoc",
    ),
    CatalogueEntry(
        "practical",
        "Practical, bounded memory",
        "MLX's SDPA where that is lean, blocks or slices where it would build large scores",
        "attention.implementations.bounded.implementation:Practical",
    ),
    CatalogueEntry(
        "demo",
        "Demo, tuned",
        "tries the others on first use of a shape and keeps the fastest",
        "attention.implementations.autotune.implementation:Demo",
    ),
    CatalogueEntry(
        "poc-fp8",
        "PoC, 8-bit arithmetic",
        "the custom kernel with Q, K, V and weights in fp8, for prefill on Hopper; approximate",
        "attention.implementations.fp8:PocFp8",
    ),
    CatalogueEntry(
        "mlx",
        "MLX SDPA",
        "mx.fast.scaled_dot_product_attention as it is",
        "attention.implementations.mlx_sdpa:MlxSdpa",
    ),
    CatalogueEntry(
        "torch",
        "torch SDPA",
        "torch.nn.functional.scaled_dot_product_attention, if torch is installed",
        "attention.implementations.torch_sdpa:TorchSdpa",
    ),
    CatalogueEntry(
        "flex",
        "torch FlexAttention",
        "torch's flex_attention, compiled by torch.compile for each shape and mask",
        "attention.implementations.flex:Flex",
    ),
)
NAMES: Final = tuple(entry.name for entry in CATALOGUE)
NUMBERED: Final = re.compile(r" as \d+$")
"""The end of the name of a further instance; a location ends with an identifier."""


def check_name(name: str) -> None:
    """Raise UsageError unless the name is in the catalogue or has the form of a plugin."""
    if not name.isprintable():
        raise UsageError(f"implementation: got {name!r}; a name has no control characters")
    if name not in NAMES and ":" not in name:
        raise UsageError(
            f"implementation: got '{name}'; it takes {', '.join(NAMES)}, or FILE.py:CLASS{suggestion(name, NAMES)}"
        )


_given: dict[str, Implementation] = {}
"""Implementations of the caller, by name."""


@contextlib.contextmanager
def given_implementations(named: Mapping[str, Implementation]) -> Iterator[None]:
    """Let `load_implementation` find implementations of the caller by their names, while the context is open."""
    before = dict(_given)
    _given.update(named)
    try:
        yield
    finally:
        _given.clear()
        _given.update(before)


def load_implementation(name: str) -> Implementation:
    """Return an implementation; one instance per process.

    Args:
        name: a name in the catalogue or of `given_implementations`, "package.module:NAME", or "path/to/file.py:NAME":
            a class that is constructed without arguments, or a function of q, k and v.

    Raises:
        UsageError: the name does not exist, or the object is not an implementation.
    """
    return _given.get(name) or _load(name)


def found_implementation(given: object) -> Implementation:
    """Return the implementation with a name, or the given implementation itself.

    Raises:
        UsageError: the argument is neither.
    """
    if isinstance(given, str):
        return load_implementation(given)
    if isinstance(given, type) or not _is_implementation(given):
        raise UsageError(
            f"implementation: got {shown_value(given)}; it takes a name, or an object with a name, a route and a call"
        )
    return cast("Implementation", given)


def _is_implementation(given: object) -> bool:
    """Return whether an object satisfies the protocol; ten times as fast as `isinstance`."""
    return callable(given) and hasattr(given, "name") and hasattr(given, "route")


def numbered(name: str, number: int) -> str:
    """Return the name of a further instance of an implementation, for plans that measure it several times."""
    return f"{name} as {number}"


@cache
def _load(name: str) -> Implementation:
    name = NUMBERED.sub("", name)
    check_name(name)
    location = next((entry.location for entry in CATALOGUE if entry.name == name), name)
    module_name, _, attribute = location.rpartition(":")
    try:
        module = _module_at(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        made = _made(getattr(module, attribute), attribute)
    except (ImportError, OSError, AttributeError, TypeError) as error:
        if name in NAMES:
            raise
        raise UsageError(f"implementation: '{name}' cannot be loaded: {error}") from error
    except BaseException as error:  # a plugin may raise anything, even SystemExit
        if name in NAMES or isinstance(error, KeyboardInterrupt):
            raise
        raise UsageError(f"implementation: '{name}' cannot be loaded: {error_line(error)}") from error
    if not isinstance(made, Implementation):
        raise UsageError(f"implementation: '{name}' needs a name, a route method and a call method")
    return made


def _made(found: Any, attribute: str) -> object:
    """Return the instance of a class, or an implementation that calls a function."""
    if isinstance(found, type):
        return found()
    from attention.implementations.functions import FunctionImplementation, computes_attention

    return FunctionImplementation(found, attribute) if computes_attention(found) else found()


def _module_at(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ImportError(f"no Python file at {path.absolute()}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
