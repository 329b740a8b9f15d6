"""What a person set in the config file, and what the app remembers from its last start."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from attention.errors import suggestion
from attention.files import make_folder, parse_toml, read_bounded
from fatui import paths
from fatui.draft import Draft

CONFIG_NAME: Final = "config.toml"
STATE_NAME: Final = "app.json"
MAX_FILE_BYTES: Final = 2**20
KEYS: Final = ("theme", "ascii", "keys")
KEY: Final = re.compile(r"[A-Za-z0-9_+-]{1,40}|[!-~]")
"""A key as Textual names it, or its one character."""
DEFAULT_THEME: Final = "textual-dark"


class Settings(msgspec.Struct, kw_only=True):
    """The config file, read; a mistake in it costs only the setting that it is in."""

    theme: str | None = None
    ascii: bool = False
    keys: dict[str, str] = {}
    """For each action its key or keys, with commas between."""
    problems: list[str] = []


class Pace(msgspec.Struct, kw_only=True):
    """How fast complete runs went here, from which the next one's time is estimated."""

    device: str = ""
    set_up_s: float = 0.0
    """Seconds of a case and implementation outside the rounds."""
    calls: dict[str, list[tuple[float, float]]] = {}
    """FLOPs and seconds of calls by implementation, dtype and pass: "poc float16 forward"."""


class Remembered(msgspec.Struct, kw_only=True):
    """What comes back at the next start."""

    theme: str = DEFAULT_THEME
    draft: Draft = msgspec.field(default_factory=Draft)
    tab: str = "setup"
    hidden: list[str] = []
    """Panes that are put away."""
    sort: str = ""
    """Column that the comparison is sorted by; the plan's own order when empty."""
    descending: bool = True
    export_folder: str = ""
    pace: Pace = msgspec.field(default_factory=Pace)


def config_path() -> Path:
    """Where the config file is looked for."""
    return paths.config_dir() / CONFIG_NAME


def state_path() -> Path:
    """Where the app keeps what it remembers."""
    return paths.data_dir() / STATE_NAME


def read_settings(actions: Mapping[str, str], themes: tuple[str, ...]) -> Settings:
    """Read the config file; every mistake is told in `problems`, and what is right still counts.

    Args:
        actions: for every action the screen that its key is for, or an empty string where it is for all.
        themes: the themes that there are.
    """
    path = config_path()
    content, problem = read_config()
    settings = Settings(problems=[f"{problem}; the defaults are used"] if problem else [])
    for key, value in content.items():
        mistakes = _take(settings, key, value, actions, themes)
        settings.problems.extend(f"{path}: {each}; left as it was" for each in mistakes)
    return settings


def read_config() -> tuple[dict[str, Any], str | None]:
    """The config file as it is, empty where there is none; the second value says why it cannot be read."""
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
    """What is wrong with a setting that there is not."""
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
    """The action of the same screen, or of all, that was given the same key."""
    for other, taken in settings.keys.items():
        together = actions[other] == actions[action] or not (actions[other] and actions[action])
        if taken == key and together:
            return other
    return None


def read_remembered() -> tuple[Remembered, str | None]:
    """Read what the last start left, or begin afresh; the second value says in words why it had to."""
    path = state_path()
    try:
        return msgspec.json.decode(read_bounded(path, MAX_FILE_BYTES), type=Remembered), None
    except FileNotFoundError:
        return Remembered(), None
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        return Remembered(), f"{path}: {why}; the app starts with its defaults"


def write_remembered(remembered: Remembered) -> None:
    """Keep it for the next start.

    Raises:
        OSError: it could not be written; what was there is untouched.
    """
    path = state_path()
    make_folder(path.parent)
    paths.write_atomically(path, msgspec.json.format(msgspec.json.encode(remembered), indent=2).decode())
