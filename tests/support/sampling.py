"""A sample of a test's products of parameters."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any


def sample(products: Mapping[str, Mapping[str, Any]], share: float) -> set[str]:
    """Return the names of a share of the products, and of so many more that each value of a parameter occurs.

    It is the same in each process and on each machine: by a hash of the names.

    Args:
        products: the values of the parameters, by the test's name.
        share: of 1 parameter just this share of values.
    """
    chosen: set[str] = set()
    seen: set[tuple[str, str]] = set()
    for name in sorted(products, key=_hash):
        values = {(parameter, repr(value)) for parameter, value in products[name].items()}
        if len(chosen) < share * len(products) or (len(values) > 1 and not values <= seen):
            chosen.add(name)
            seen |= values
    return chosen


def _hash(name: str) -> bytes:
    return hashlib.md5(name.encode()).digest()


def samples(tests: Iterable[tuple[str, float, Mapping[str, Any]]]) -> set[str]:
    """Return the names of the samples of several tests.

    Args:
        tests: name with the parameters in brackets, share, and values of the parameters.
    """
    products: dict[tuple[str, float], dict[str, Mapping[str, Any]]] = {}
    for name, share, values in tests:
        products.setdefault((name.partition("[")[0], share), {})[name] = values
    return {name for (_, share), each in products.items() for name in sample(each, share)}
