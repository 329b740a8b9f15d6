"""The import contract of layers.toml: imports go down, no circles, and the engine does not know its face."""

import ast
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTRACT = tomllib.loads((Path(__file__).parent / "layers.toml").read_text())
PACKAGES = ("attention", "benchmarks", "fatui")


@dataclass(frozen=True, order=True)
class Import:
    importer: str
    imported: str
    """A module of ours, or the first name of another package."""
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(root: Path) -> dict[str, Path]:
    found = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {module_name(path, root): path for path in found}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, those inside others too: a tenth of the nodes that `ast.walk` gives."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        for node in getattr(tree, name, ()):
            yield node
            yield from statements(node)


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """All imports of a module: at its top, inside functions, and for type checkers."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name if alias.name in modules else alias.name.partition(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]) if base else ".".join(above)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                ours = whole if whole in modules else base if base in modules else base.partition(".")[0]
                yield Import(name, ours, node.lineno)


@cache
def all_imports(root: Path = ROOT) -> list[Import]:
    modules = sources(root)
    return [each for name, path in modules.items() for each in imports_of(name, path, modules) if each.imported != name]


def is_inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def floor_of(name: str, floors: list[list[str]]) -> int | None:
    fits = [(len(prefix), number) for number, floor in enumerate(floors) for prefix in floor if is_inside(name, prefix)]
    return max(fits)[1] if fits else None


def upward(imports: list[Import]) -> list[Import]:
    wrong = []
    for each in imports:
        floors = CONTRACT["floors"][each.importer.partition(".")[0]]
        here, there = floor_of(each.importer, floors), floor_of(each.imported, floors)
        if here is not None and there is not None and there > here and not is_inside(each.importer, each.imported):
            wrong.append(each)
    return wrong


def circles(imports: list[Import]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm."""
    graph: dict[str, set[str]] = {}
    for each in imports:
        graph.setdefault(each.importer, set()).add(each.imported)
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in number:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], number[other])
        if low[name] == number[name]:
            group = [stack.pop()]
            while group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(graph):
        if name not in number:
            visit(name)
    return found


def forbidden(imports: list[Import]) -> list[str]:
    """What a package imports that it must never import."""
    wrong = []
    for package, never in CONTRACT["never"].items():
        inside = [each for each in imports if is_inside(each.importer, package)]
        wrong += [str(each) for each in inside if each.imported.partition(".")[0] in never]
    return wrong


def names_of_the_face(root: Path = ROOT) -> list[str]:
    """Lines of the engine with the word in them, but for names of environment variables."""
    lines = []
    for path in sorted((root / "attention").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if re.search(r"\bfatui\b", line):
                lines.append(f"{path.relative_to(root)}:{number}: {line.strip()}")
    return lines


def test_imports_go_down() -> None:
    assert [str(each) for each in upward(all_imports())] == []


def test_no_modules_import_each_other() -> None:
    assert circles(all_imports()) == []


def test_packages_never_import_what_is_above_or_heavy() -> None:
    assert forbidden(all_imports()) == []


def test_the_engine_hardly_names_its_face() -> None:
    found = names_of_the_face()
    assert len(found) <= CONTRACT["names"]["fatui"], "\n".join(found)


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    texts = {
        "attention/core/plan.py": "import mlx.core as mx\n",
        "attention/masks/__init__.py": "def f():\n    from attention.engine import worker\n",
        "attention/engine/worker.py": "if TYPE_CHECKING:\n    from attention import masks\n",
        "fatui/tui/view_models/lines.py": "from fatui.tui.widgets.table import Column\n",
        "fatui/tui/widgets/table.py": '"""fatui"""\n',
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_planted_violations_are_found(planted: Path) -> None:
    found = all_imports(planted)
    assert [(each.importer, each.imported) for each in upward(found)] == [
        ("attention.masks", "attention.engine.worker"),
        ("fatui.tui.view_models.lines", "fatui.tui.widgets.table"),
    ]
    assert circles(found) == [["attention.engine.worker", "attention.masks"]]
    assert forbidden(found) == ["attention.core.plan:1 imports mlx"]


if __name__ == "__main__":
    found = all_imports()
    print(*(f"upward: {each}" for each in upward(found)), sep="\n")
    print(*(f"circle: {' <-> '.join(each)}" for each in circles(found)), sep="\n")
    print(*(f"never: {each}" for each in forbidden(found)), sep="\n")
    print(*(f"names fatui: {each}" for each in names_of_the_face()), sep="\n")
