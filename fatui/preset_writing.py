"""A preset as TOML: shared fields in one table, the rest as a sweep if it is one, else as a list of cases."""

import math
from collections.abc import Sequence
from typing import Any, Final

from msgspec import structs

from attention.errors import UsageError
from attention.workload import DEFAULT_FROM, Workload
from fatui.preset_format import FIELDS, SCHEMA, Preset, workloads
from fatui.sizes import size_text

Fields = dict[str, Any]
WIDEST_ARRAY: Final = 100


def to_toml(preset: Preset) -> str:
    """Write a preset as TOML that parses to the same cases in the same order."""
    document: Fields = {"schema": SCHEMA}
    document.update({key: text for key in ("title", "summary") if (text := getattr(preset, key))})
    document["implementations"] = list(preset.implementations)
    document["seconds"] = preset.seconds
    if preset.precision != _default_of("precision"):
        document["precision"] = preset.precision
    if preset.memory_limit_bytes is not None:
        document["memory_limit"] = size_text(preset.memory_limit_bytes)
    if preset.seed:
        document["seed"] = preset.seed
    document.update(_tables(preset.cases))
    return _dumps(document)


def _default_of(key: str) -> Any:
    """Return the default value of a key of a preset."""
    return next(field.default for field in structs.fields(Preset) if field.name == key)


def given_fields(workload: Workload) -> Fields:
    """Return the fields that define a workload, without those that follow from another field."""
    fields = {name: getattr(workload, "pass_" if name == "pass" else name) for name in FIELDS}
    if workload.pass_ == "decode":
        del fields["seq"]
    return {
        name: value
        for name, value in fields.items()
        if name not in DEFAULT_FROM or fields.get(DEFAULT_FROM[name]) != value
    }


def as_product(cases: Sequence[Workload]) -> tuple[Fields, dict[str, list[Any]]] | None:
    """Split cases into shared fields and axes whose product they are; return None if they are not a product."""
    given = [given_fields(case) for case in cases]
    shared = _shared(given)
    varying = [name for name in FIELDS if any(name in fields for fields in given) and name not in shared]
    if any(name not in fields for fields in given for name in varying):
        return None
    axes = {name: list(dict.fromkeys(fields[name] for fields in given)) for name in varying}
    if math.prod(len(values) for values in axes.values()) != len(cases):
        return None
    try:
        return (shared, axes) if workloads(shared, axes) == tuple(cases) else None
    except UsageError:  # some combination is invalid, so that the cases are not all of them
        return None


def _shared(given: Sequence[Fields]) -> Fields:
    first = given[0]
    return {name: value for name, value in first.items() if all(fields.get(name) == value for fields in given)}


def _tables(cases: Sequence[Workload]) -> Fields:
    product = as_product(cases)
    if product:
        shared, axes = product
        return {"workload": shared, **({"sweep": axes} if axes else {})}
    given = [given_fields(case) for case in cases]
    shared = _shared(given)
    own = [{name: value for name, value in fields.items() if name not in shared} for fields in given]
    return {"workload": shared, "case": own}


def _dumps(document: Fields) -> str:
    import tomli_w

    return _short_arrays_on_one_line(tomli_w.dumps(document))


def _short_arrays_on_one_line(text: str) -> str:
    lines: list[str] = []
    array: list[str] = []
    for line in text.rstrip("\n").split("\n"):  # not splitlines, which also splits inside quoted texts
        if array:
            array.append(line.strip())
            if line == "]":
                lines.extend(_joined(array))
                array = []
        elif line.endswith(" = ["):
            array = [line]
        else:
            lines.append(line)
    return "\n".join([*lines, *array]) + "\n"


def _joined(array: list[str]) -> list[str]:
    head, *items, end = array
    line = head + " ".join(items).removesuffix(",") + end
    return [line] if len(line) <= WIDEST_ARRAY else [head, *(f"    {item}" for item in items), end]
