"""The presets on this machine: the bundled ones, and the user's own."""

import re
import shutil
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

from attention.core.errors import UsageError, suggestion
from attention.core.files import expand_home, make_folder, read_bounded
from fatui.storage import paths
from fatui.storage.preset_format import Preset, parse, to_toml

__all__ = ["Preset", "PresetEntry", "delete", "list_presets", "load", "parse", "rename", "restore", "save", "to_toml"]

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
    found = {path.stem: (path, True) for path in _files(paths.bundled_presets())}
    found.update({path.stem: (path, False) for path in _files(paths.own_presets())})
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
    for folder, bundled in ((paths.own_presets(), False), (paths.bundled_presets(), True)):
        path = folder / f"{text}.toml"
        if path in _files(folder):
            return _read(path, bundled)
    names = sorted({path.stem for folder in (paths.own_presets(), paths.bundled_presets()) for path in _files(folder)})
    hint = suggestion(text, names) or f"; there are {', '.join(names)}"
    raise UsageError(f"preset: there is none named '{text}'{hint}")


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
    paths.write_atomically(target, to_toml(preset))
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
    return paths.own_presets() / f"{name}.toml"


def _existing(name: str) -> Path:
    path = _own(name)
    if not path.is_file():
        bundled = (paths.bundled_presets() / path.name).is_file()
        why = "is bundled and cannot be changed; save it under another name" if bundled else "is not one of your own"
        raise UsageError(f"preset: '{name}' {why}")
    return path


def _backup_path(name: str) -> Path:
    folder = paths.own_presets() / BACKUP_SUFFIX
    make_folder(folder)
    return folder / f"{name}.{time.time_ns()}.toml"
