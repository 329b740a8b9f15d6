"""A dict of bounded size drops its oldest entries."""

from attention.core.bounded_dict import BoundedDict


def test_one_more_than_the_maximum_drops_the_oldest() -> None:
    known = BoundedDict[str, int](2)
    known["a"], known["b"] = 1, 2
    known["a"] = 3
    assert known == {"a": 3, "b": 2}
    known["c"] = 4
    assert known == {"b": 2, "c": 4}
