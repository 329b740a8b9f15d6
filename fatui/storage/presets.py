"""Presets: their format, read with all mistakes at once, and those on this machine, bundled and the user's own."""

import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from attention.core.errors import UsageError, suggestion
from attention.core.files import expand_home, make_folder, parse_toml, read_bounded
from attention.core.kv_format import DENSE
from attention.core.plan import BLAS, DEFAULTS, MAX_CASES, Blas, Plan, RunOptions, expand
from attention.core.workload import DEFAULTS_FROM, MAX_SIZES, Workload
from attention.implementations import check_name
from fatui import storage
from fatui.quantities import parse_size, size_text
from fatui.untrusted_text import one_line

SCHEMA: Final = 1
FIELDS: Final = (*MAX_SIZES, "dtype", "kv_format", "mask", "pass")
KEYS: Final = (
    *("schema", "title", "summary", "implementations", "seconds", "precision", "memory_limit", "seed"),
    *("blas", "hosts", "hostfile"),
    *("workload", "sweep", "case"),
)
MAX_SECONDS: Final = 3_600.0
MIN_SECONDS: Final = 0.05
Table = Mapping[str, Any]


class Preset(RunOptions, frozen=True, kw_only=True):
    """A named plan: what to measure, and its purpose."""

    name: str
    title: str = ""
    summary: str = ""
    source: Path | None = None
    """The file it was read from."""
    bundled: bool = False
    """Whether it is bundled with fatui."""
    cases: tuple[Workload, ...]

    def plan(self) -> Plan:
        """Return the plan of this preset."""
        return Plan(cases=self.cases, **self.options())


def parse(text: str, source: Path | None, *, bundled: bool = False) -> Preset:
    """Parse a preset.

    Args:
        text: its TOML.
        source: its file, for its name and for messages.
        bundled: whether it is bundled with fatui.

    Raises:
        UsageError: with all mistakes, each naming the file and the key.
    """
    reader = _Reader(_document(text, source))
    preset = reader.preset(source, bundled)
    if reader.problems:
        raise UsageError(*(f"{source or 'preset'}: {problem}" for problem in reader.problems))
    return preset


def _document(text: str, source: Path | None) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except ValueError as error:
        raise UsageError(f"{source or 'preset'}: {error}") from error


class _Reader:
    """Reader of a document, key by key, which collects its problems."""

    def __init__(self, document: Table) -> None:
        self.document = document
        self.problems: list[str] = []

    def preset(self, source: Path | None, bundled: bool) -> Preset:
        self._schema()
        self._unknown(self.document, KEYS, "")
        return Preset(
            name=source.stem if source else "preset",
            title=self._text("title"),
            summary=self._text("summary"),
            source=source,
            bundled=bundled,
            implementations=self._implementations(),
            seconds=self._number("seconds", DEFAULTS.seconds, MIN_SECONDS, MAX_SECONDS),
            precision=self._number("precision", DEFAULTS.precision, 1e-6, 1.0),
            memory_limit_bytes=self._memory_limit(),
            seed=self._seed(),
            blas=self._blas(),
            hosts=self._hosts(),
            hostfile=self._text("hostfile") or None,
            cases=self._cases(),
        )

    def _schema(self) -> None:
        got = self.document.get("schema")
        if got is None:
            self.problems.append(f"schema: missing; the file must say schema = {SCHEMA}")
        elif type(got) is int and got > SCHEMA:
            self.problems.append(f"schema: got {got}, of a newer fatui; this one reads schema = {SCHEMA}")
        elif type(got) is not int or got != SCHEMA:
            self.problems.append(f"schema: got {got!r}; it takes {SCHEMA}")

    def _unknown(self, table: Table, known: tuple[str, ...], where: str) -> None:
        for key in table:
            if key not in known:
                self.problems.append(
                    f"{where}{key}: unknown key{suggestion(key, known) or '; known: ' + ', '.join(known)}"
                )

    def _text(self, key: str) -> str:
        got = self.document.get(key, "")
        if isinstance(got, str):
            return got
        self.problems.append(f"{key}: got {got!r}; it takes a quoted string")
        return ""

    def _number(self, key: str, default: float, least: float, most: float) -> float:
        got = self.document.get(key, default)
        try:
            return number_between(got, key, least, most)
        except UsageError as error:
            self.problems.extend(error.problems)
            return default

    def _seed(self) -> int:
        got = self.document.get("seed", DEFAULTS.seed)
        if type(got) is int and 0 <= got < 2**63:
            return got
        self.problems.append(f"seed: got {got!r}; it takes a whole number from 0")
        return DEFAULTS.seed

    def _blas(self) -> Blas:
        try:
            return check_blas(self.document.get("blas", DEFAULTS.blas), "blas")
        except UsageError as error:
            self.problems.extend(error.problems)
            return DEFAULTS.blas

    def _memory_limit(self) -> int | None:
        if "memory_limit" not in self.document:
            return None
        try:
            return parse_size(self.document["memory_limit"], "memory_limit")
        except UsageError as error:
            self.problems.extend(error.problems)
            return None

    def _hosts(self) -> tuple[str, ...]:
        got = self.document.get("hosts", [])
        if isinstance(got, list) and all(isinstance(name, str) and name for name in got):
            return tuple(got)
        self.problems.append(f"hosts: got {got!r}; it takes a list of names, such as ['mac-a', 'mac-b']")
        return ()

    def _implementations(self) -> tuple[str, ...]:
        got = self.document.get("implementations", list(DEFAULTS.implementations))
        if not isinstance(got, list) or not got or not all(isinstance(name, str) for name in got):
            self.problems.append(f"implementations: got {got!r}; it takes a list of names, such as ['baseline', 'poc']")
            return DEFAULTS.implementations
        try:
            return check_names(got)
        except UsageError as error:
            self.problems.extend(error.problems)
            return DEFAULTS.implementations

    def _table(self, key: str) -> Table:
        got = self.document.get(key, {})
        if not isinstance(got, dict):
            self.problems.append(f"{key}: got {got!r}; it takes a table, [{key}]")
            return {}
        self._unknown(got, FIELDS, f"[{key}] ")
        return {field: value for field, value in got.items() if field in FIELDS}

    def _cases(self) -> tuple[Workload, ...]:
        shared, sweep = self._table("workload"), self._table("sweep")
        for field, value in shared.items():
            if isinstance(value, list):
                self.problems.append(f"[workload] {field}: got a list; several values belong in [sweep] or [[case]]")
        for field, value in sweep.items():
            if not isinstance(value, list):
                self.problems.append(f"[sweep] {field}: got {value!r}; it takes a list of values")
        if not any(key in self.document for key in ("workload", "sweep", "case")):
            self.problems.append("nothing to measure: it takes a [workload], a [sweep] or [[case]] tables")
        groups = [*([("[sweep] ", sweep)] if sweep else []), *self._explicit()]
        cases = [case for where, table in groups or [("", {})] for case in self._group(shared, table, where)]
        return tuple(dict.fromkeys(cases))

    def _explicit(self) -> list[tuple[str, Table]]:
        got = self.document.get("case", [])
        if not isinstance(got, list) or not all(isinstance(table, dict) for table in got):
            self.problems.append("case: it takes tables, each starting with [[case]]")
            return []
        groups: list[tuple[str, Table]] = []
        for number, table in enumerate(got, start=1):
            where = f"[[case]] {number} "
            self._unknown(table, FIELDS, where)
            groups.append((where, {field: value for field, value in table.items() if field in FIELDS}))
        return groups

    def _group(self, shared: Table, table: Table, where: str) -> tuple[Workload, ...]:
        given = {**shared, **table}
        empty = [field for field, value in given.items() if value == []]
        named = [field for field in empty if field in table]
        self.problems.extend(f"{where}{field}: got an empty list; it takes at least one value" for field in named)
        axes = {field: value for field, value in given.items() if isinstance(value, list) and value}
        count = math.prod(len(values) for values in axes.values())
        sweeps = [axes]
        if count > MAX_CASES:
            self.problems.append(f"{where}makes {count:,} cases; at most {MAX_CASES:,} are taken")
            firsts = {field: values[:1] for field, values in axes.items()}
            sweeps = [{**firsts, field: values[:MAX_CASES]} for field, values in axes.items()]
        fixed = {field: value for field, value in given.items() if field not in axes}
        cases: list[Workload] = []
        for sweep in sweeps:
            try:
                cases.extend(workloads(fixed, sweep))
            except UsageError as error:
                self._locate(error, table, where, empty)
        return tuple(cases)

    def _locate(self, error: UsageError, table: Table, where: str, reported: Sequence[str]) -> None:
        """Add problems of cases, with the table that each field stands in; leave out fields reported already."""
        for problem in error.problems:
            field = problem.partition(":")[0]
            located = f"{where if field in table else '[workload] '}{problem}"
            if field not in reported and located not in self.problems:
                self.problems.append(located)


def workloads(shared: Table, axes: Mapping[str, Sequence[Any]]) -> tuple[Workload, ...]:
    """Build the cases of a sweep; in a decode pass kv_seq alone may give the length of the cache.

    Raises:
        UsageError: with the mistakes of all combinations, each once.
    """
    given = {*shared, *axes}
    if shared.get("pass") == "decode" and "kv_seq" in given and "seq" not in given:
        shared = {**shared, "seq": 1}
    return expand(shared, axes)


def number_between(value: object, name: str, least: float, most: float) -> float:
    """Return a finite number within limits.

    Raises:
        UsageError: naming the option, the value and the accepted range.
    """
    if type(value) in (int, float) and least <= value <= most:  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    raise UsageError(f"{name}: got {value!r}; it takes a number from {least:g} to {most:g}")


def check_blas(value: object, name: str) -> Blas:
    """Return the name of a BLAS.

    Raises:
        UsageError: naming the option, the value and what is accepted.
    """
    for known in BLAS:
        if value == known:
            return known
    shown = value[:40] if isinstance(value, str) else value
    raise UsageError(f"{name}: got {shown!r}; it takes {' or '.join(BLAS)}")


def check_names(names: list[str]) -> tuple[str, ...]:
    """Return the implementations' names without duplicates.

    Raises:
        UsageError: with one problem for each unknown name.
    """
    problems: list[str] = []
    for name in dict.fromkeys(names):
        try:
            check_name(name)
        except UsageError as error:
            problems.extend(problem.replace("implementation:", "implementations:", 1) for problem in error.problems)
    if problems:
        raise UsageError(*problems)
    return tuple(dict.fromkeys(names))


Fields = dict[str, Any]
MAX_ARRAY_WIDTH: Final = 100


def to_toml(preset: Preset) -> str:
    """Write a preset as TOML that parses to the same cases in the same order."""
    document: Fields = {"schema": SCHEMA}
    document.update({key: text for key in ("title", "summary") if (text := getattr(preset, key))})
    document["implementations"] = list(preset.implementations)
    document["seconds"] = preset.seconds
    if preset.precision != DEFAULTS.precision:
        document["precision"] = preset.precision
    if preset.memory_limit_bytes is not None:
        document["memory_limit"] = size_text(preset.memory_limit_bytes)
    if preset.seed:
        document["seed"] = preset.seed
    if preset.blas != DEFAULTS.blas:
        document["blas"] = preset.blas
    if preset.hosts:
        document["hosts"] = list(preset.hosts)
    if preset.hostfile:
        document["hostfile"] = preset.hostfile
    document.update(_tables(preset.cases))
    return _dumps(document)


def given_fields(workload: Workload) -> Fields:
    """Return the fields that define a workload, without those that follow from another field."""
    fields = {name: getattr(workload, "pass_" if name == "pass" else name) for name in FIELDS}
    if workload.pass_ == "decode":
        del fields["seq"]
    return {
        name: value
        for name, value in fields.items()
        if name not in DEFAULTS_FROM or fields.get(DEFAULTS_FROM[name]) != value
    }


def factor_cases(cases: Sequence[Workload]) -> tuple[Fields, dict[str, list[Any]]] | None:
    """Split cases into shared fields and axes whose product they are; return None if they are not a product.

    Keys and values that are not quantized have no field, unless other cases' are; so has a single rank.
    """
    given = [given_fields(case) for case in cases]
    shared = _shared(given)
    varying = [name for name in FIELDS if any(name in fields for fields in given) and name not in shared]
    if any(name not in fields for fields in given for name in varying):
        return None
    axes = {name: list(dict.fromkeys(fields[name] for fields in given)) for name in varying}
    if math.prod(len(values) for values in axes.values()) != len(cases):
        return None
    try:
        return (_without_default(shared), axes) if workloads(shared, axes) == tuple(cases) else None
    except UsageError:  # some combination is invalid, so that the cases are not all of them
        return None


def _without_default(shared: Fields) -> Fields:
    return {name: value for name, value in shared.items() if (name, value) not in (("kv_format", DENSE), ("ranks", 1))}


def _shared(given: Sequence[Fields]) -> Fields:
    first = given[0]
    return {name: value for name, value in first.items() if all(fields.get(name) == value for fields in given)}


def _tables(cases: Sequence[Workload]) -> Fields:
    product = factor_cases(cases)
    if product:
        shared, axes = product
        return {"workload": shared, **({"sweep": axes} if axes else {})}
    given = [given_fields(case) for case in cases]
    shared = _shared(given)
    own = [{name: value for name, value in fields.items() if name not in shared} for fields in given]
    return {"workload": _without_default(shared), "case": own}


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
    return [line] if len(line) <= MAX_ARRAY_WIDTH else [head, *(f"    {item}" for item in items), end]


MAX_FILE_BYTES: Final = 2**20
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
BACKUP_SUFFIX: Final = ".deleted"


class PresetEntry(Struct, frozen=True, kw_only=True):
    """A preset in the list, including one with mistakes."""

    name: str
    source: Path
    bundled: bool
    preset: Preset | None = None
    """None if the file has mistakes."""
    problems: tuple[str, ...] = ()


def list_presets() -> list[PresetEntry]:
    """Return all presets sorted by name; one of the user's own hides a bundled one of the same name."""
    found = {path.stem: (path, True) for path in _files(storage.bundled_presets())}
    found.update({path.stem: (path, False) for path in _files(storage.own_presets())})
    return [_listed(*found[name]) for name in sorted(found)]


def _files(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix == ".toml" and not path.name.startswith(".")]
    except OSError:
        return []


def _listed(path: Path, bundled: bool) -> PresetEntry:
    try:
        preset = _read(path, bundled)
    except UsageError as error:
        return PresetEntry(name=path.stem, source=path, bundled=bundled, problems=error.problems)
    return PresetEntry(name=path.stem, source=path, bundled=bundled, preset=preset)


def load(name_or_path: str | Path) -> Preset:
    """Load a preset by name, or from a file if a path is given ("./mine.toml", "folder/mine.toml").

    Raises:
        UsageError: there is no such preset, or it has mistakes.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or text.endswith(".toml"):
        return _read(expand_home(name_or_path), bundled=False)
    for folder, bundled in ((storage.own_presets(), False), (storage.bundled_presets(), True)):
        path = folder / f"{text}.toml"
        if path in _files(folder):
            return _read(path, bundled)
    names = sorted(
        {path.stem for folder in (storage.own_presets(), storage.bundled_presets()) for path in _files(folder)}
    )
    hint = suggestion(text, names) or f"; there are {', '.join(names)}"
    raise UsageError(f"preset: there is none named '{one_line(text, 80)}'{hint}")


def _read(path: Path, bundled: bool) -> Preset:
    try:
        text = read_bounded(path, MAX_FILE_BYTES).decode()
    except UnicodeDecodeError:
        problem = "not TOML: it is not UTF-8 text"
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except ValueError:  # a null character
        problem = "not the name of a file"
    else:
        return parse(text, path, bundled=bundled)
    raise UsageError(f"{path}: {problem}")


def save(preset: Preset, name: str, overwrite: bool = False) -> Path:
    """Write one of the user's own presets and return its file; a replaced file is kept aside.

    Raises:
        UsageError: the name is invalid, or taken and `overwrite` is false.
        OSError: the file could not be written; the old one is unchanged.
    """
    target = _own(name)
    if target.exists() and not overwrite:
        raise UsageError(f"preset: there is one named '{name}' already")
    make_folder(target.parent)
    if target.exists():
        shutil.copy2(target, _backup_path(name))
    storage.write_atomically(target, to_toml(preset))
    return target


def rename(old: str, new: str) -> Path:
    """Rename one of the user's own presets, and return its new file.

    Raises:
        UsageError: there is no such preset of the user's own, or the new name is taken or is none.
        OSError: the folder cannot be written.
    """
    source, target = _existing(old), _own(new)
    if target.exists():
        raise UsageError(f"preset: there is one named '{new}' already")
    return source.rename(target)


def delete(name: str) -> Path:
    """Move one of the user's own presets aside, and return where; restore() brings it back.

    Raises:
        UsageError: there is no such preset of the user's own.
        OSError: the folder cannot be written.
    """
    return _existing(name).rename(_backup_path(name))


def restore(path: Path) -> Path:
    """Restore a preset that delete() moved aside, and return its file.

    Raises:
        UsageError: a preset of that name exists again, or the file is gone.
        OSError: the folder cannot be written.
    """
    name = path.name.rsplit(".", 2)[0]
    target = _own(name)
    if target.exists():
        raise UsageError(f"preset: there is one named '{name}' already")
    if not path.is_file():
        raise UsageError(f"preset: {path} is gone")
    return path.rename(target)


def _own(name: str) -> Path:
    if not NAME.fullmatch(name) or name.endswith(".toml"):
        raise UsageError(f"preset: got the name '{name}'; it takes letters, digits, '.', '_' and '-', at most 64")
    return storage.own_presets() / f"{name}.toml"


def _existing(name: str) -> Path:
    path = _own(name)
    if not path.is_file():
        bundled = (storage.bundled_presets() / path.name).is_file()
        why = "is bundled and cannot be changed; save it under another name" if bundled else "is not one of your own"
        raise UsageError(f"preset: '{name}' {why}")
    return path


def _backup_path(name: str) -> Path:
    folder = storage.own_presets() / BACKUP_SUFFIX
    make_folder(folder)
    return folder / f"{name}.{time.time_ns()}.toml"
