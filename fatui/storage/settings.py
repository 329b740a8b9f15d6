"""The config file, and the state that the app remembers between starts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from attention.core.errors import suggestion
from attention.core.files import make_folder, parse_toml, read_bounded
from attention.core.results import Peaks
from fatui import storage
from fatui.draft import Draft

CONFIG_NAME: Final = "config.toml"
STATE_NAME: Final = "app.json"
MAX_FILE_BYTES: Final = 2**20
KEYS: Final = ("theme", "ascii", "keys")
KEY: Final = re.compile(r"[A-Za-z0-9_+-]{1,40}|[!-~]")
"""A key as named by Textual, or a single character."""
DEFAULT_THEME: Final = "textual-dark"


class Settings(msgspec.Struct, kw_only=True):
    """The settings of the config file; a mistake affects only its own setting."""

    theme: str | None = None
    ascii: bool = False
    keys: dict[str, str] = {}
    """The key or keys of each action, separated by commas."""
    problems: list[str] = []


class RunSpeed(msgspec.Struct, kw_only=True):
    """Timings of complete runs on this machine, from which the time of the next one is estimated."""

    device: str = ""
    set_up_s: float = 0.0
    """Seconds per case and implementation outside the rounds."""
    calls: dict[str, list[tuple[float, float]]] = {}
    """(FLOPs, seconds) of calls by implementation, dtype and pass: "poc float16 forward"."""
    width_1s: float = 0.0
    """Relative half width of the latest run's widest speedup, times the root of the seconds of its rounds."""


class SavedState(msgspec.Struct, kw_only=True):
    """The state restored at the next start."""

    theme: str = DEFAULT_THEME
    draft: Draft = msgspec.field(default_factory=Draft)
    tab: str = "setup"
    hidden: list[str] = []
    """The panes that are hidden."""
    sort: str = ""
    """The column that the comparison is sorted by; empty for the plan's own order."""
    descending: bool = True
    view: str = "common"
    """How the Live pane draws the trends."""
    peaks: Peaks = msgspec.field(default_factory=Peaks)
    """The best rates that the latest run measured."""
    peaks_of: str = ""
    """The device that they belong to."""
    export_folder: str = ""
    pace: RunSpeed = msgspec.field(default_factory=RunSpeed)
    cores: int = 0
    """Of a CPU: the cores that could be used when `peaks` and `pace` were measured; 0 before they were kept."""


def config_path() -> Path:
    """Return the path of the config file."""
    return storage.config_dir() / CONFIG_NAME


def state_path() -> Path:
    """Return the path of the remembered state."""
    return storage.data_dir() / STATE_NAME


def read_settings(actions: Mapping[str, str], themes: tuple[str, ...]) -> Settings:
    """Read the config file; mistakes are listed in `problems`, and valid settings still apply.

    Args:
        actions: the screen of each action, or an empty string for actions available on all.
        themes: the available themes.
    """
    path = config_path()
    content, problem = read_config()
    settings = Settings(problems=[f"{problem}; the defaults are used"] if problem else [])
    for key, value in content.items():
        mistakes = _take(settings, key, value, actions, themes)
        settings.problems.extend(f"{path}: {each}; ignored" for each in mistakes)
    return settings


def read_config() -> tuple[dict[str, Any], str | None]:
    """Parse the config file; return an empty table if there is none, and an error message if it cannot be read."""
    path = config_path()
    try:
        return parse_toml(read_bounded(path, MAX_FILE_BYTES).decode()), None
    except FileNotFoundError:
        return {}, None
    except UnicodeDecodeError:
        return {}, f"{path}: it is not UTF-8 text"
    except (OSError, ValueError) as error:
        return {}, f"{path}: {(error.strerror if isinstance(error, OSError) else None) or error}"


def unknown(key: str) -> str:
    """Format the problem of an unknown setting."""
    return f"{key}: no such setting{suggestion(key, KEYS)}"


def _take(settings: Settings, key: str, value: Any, actions: Mapping[str, str], themes: tuple[str, ...]) -> list[str]:
    if key == "theme":
        if value not in themes:
            return [f"theme: got {value!r}; it takes {', '.join(themes)}{suggestion(str(value), themes)}"]
        settings.theme = value
    elif key == "ascii":
        if not isinstance(value, bool):
            return [f"ascii: got {value!r}; it takes true or false"]
        settings.ascii = value
    elif key == "keys":
        return _take_keys(settings, value, actions)
    else:
        return [unknown(key)]
    return []


def _take_keys(settings: Settings, table: Any, actions: Mapping[str, str]) -> list[str]:
    if not isinstance(table, dict):
        return [f"keys: got {table!r}; it takes a table such as [keys] with run = 'f5'"]
    problems = []
    for action, key in table.items():
        if action not in actions:
            problems.append(f"keys.{action}: no such action{suggestion(action, tuple(actions))}")
        elif not isinstance(key, str) or not all(KEY.fullmatch(each.strip()) for each in key.split(",")):
            problems.append(f"keys.{action}: got {key!r}; it takes the name of a key, such as 'r' or 'f5'")
        elif other := _clash(settings, action, key, actions):
            problems.append(f"keys.{action}: '{key}' is also the key of {other}")
        else:
            settings.keys[action] = key
    return problems


def _clash(settings: Settings, action: str, key: str, actions: Mapping[str, str]) -> str | None:
    """Return an action of the same screen, or of all, that has the same key."""
    for other, taken in settings.keys.items():
        together = actions[other] == actions[action] or not (actions[other] and actions[action])
        if taken == key and together:
            return other
    return None


def read_state() -> tuple[SavedState, str | None]:
    """Read the state of the last start, or the defaults, with an error message if it cannot be read."""
    path = state_path()
    try:
        return msgspec.json.decode(read_bounded(path, MAX_FILE_BYTES), type=SavedState), None
    except FileNotFoundError:
        return SavedState(), None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return SavedState(), f"{path}: {why}; the app starts with its defaults"


def write_state(remembered: SavedState) -> None:
    """Save the state for the next start.

    Raises:
        OSError: it could not be written; the old file is unchanged.
    """
    path = state_path()
    make_folder(path.parent)
    storage.write_atomically(path, msgspec.json.format(msgspec.json.encode(remembered), indent=2).decode())
