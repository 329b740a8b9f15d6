"""fatui: a terminal lab for attention kernels on MLX."""

__version__ = "0.1.0"

ENGINE_TITLE = '"""The attention engine'
REINSTALL_ENGINE = "pip uninstall attention, then pip install --force-reinstall --no-deps fatui"


def engine_problem() -> str | None:
    """Return why `import attention` does not give fatui's engine, and the remedy; None if it does.

    PyPI has another project of that name, which installs into the same folder. The package is not imported for this.
    """
    import importlib.util

    spec = importlib.util.find_spec("attention")
    if spec is None or spec.origin is None:
        return f"the engine, the package `attention`, is missing: {REINSTALL_ENGINE}"
    # --help must not wait for pathlib
    with open(spec.origin, encoding="utf-8", errors="replace") as source:  # noqa: PTH123
        if source.read(len(ENGINE_TITLE)) == ENGINE_TITLE:
            return None
    from pathlib import Path

    return f"the package `attention` at {Path(spec.origin).parent} is another project's: {REINSTALL_ENGINE}"
