"""The engine under fatui's name: `import fatui.attention` gives the package `attention` itself, with the same modules.

Where `attention` is another project's package, it raises an ImportError that names the remedy.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from fatui import engine_problem

PREFIX = f"{__name__}."


class _EngineModules(MetaPathFinder, Loader):
    """Find `fatui.attention.X` as the module `attention.X`, not as a second copy of it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a specification for the engine's modules under fatui's name, and for no others."""
        return ModuleSpec(fullname, self) if fullname.startswith(PREFIX) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Import the engine's module."""
        module = importlib.import_module(spec.name.removeprefix("fatui."))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own specification back, which the import machinery has replaced."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


if problem := engine_problem():
    raise ImportError(problem)
sys.meta_path.insert(0, _EngineModules())
sys.modules[__name__] = importlib.import_module("attention")
