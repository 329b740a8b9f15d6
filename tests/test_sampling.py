"""Samples of products of parameters, which the default run takes."""

from itertools import product

from tests.support.sampling import sample, samples


def products(*axes: range) -> dict[str, dict[str, int]]:
    return {f"test[{values}]": dict(zip("abc", values, strict=False)) for values in product(*axes)}


def test_each_value_occurs_in_a_small_sample() -> None:
    everything = products(range(6), range(5))
    chosen = sample(everything, 0.1)
    assert {everything[name]["a"] for name in chosen} == {*range(6)}
    assert {everything[name]["b"] for name in chosen} == {*range(5)}
    assert len(chosen) <= 11


def test_of_one_parameter_a_share_is_taken() -> None:
    assert len(sample(products(range(10)), 0.3)) == 3
    assert len(sample(products(range(3)), 0.5)) == 2


def test_each_test_has_a_sample_of_its_own() -> None:
    two = [
        (name.replace("test", test), 0.25, values)
        for test in ("one", "two")
        for name, values in products(range(8)).items()
    ]
    chosen = samples(two)
    assert sorted(name[:3] for name in chosen) == ["one"] * 2 + ["two"] * 2
