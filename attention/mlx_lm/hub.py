"""Models of the Hugging Face hub by name, "org/name": in its cache, or downloaded by mlx-lm's own function.

As a program it downloads one: a process of its own can be ended if the hub does not answer.
"""

import os
import re
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from attention.core.errors import UsageError, error_line, truncated
from attention.core.files import expand_home

NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LOOK_UP_S: Final = 20.0
"""Seconds that the hub may take to say whether it has a model; a download may then take any time."""
NEEDED: Final = ("*.json", "model*.safetensors")
"""Files without which a model in the cache is not whole."""
CONFIGURATION: Final = ("config.json",)
FOUND: Final = "found"


def is_hub_name(model: str) -> bool:
    """Return whether a text has the form of a name on the hub, and is no folder."""
    return bool(NAME.fullmatch(model)) and not expand_home(model).exists()


def cached_folder(name: str, files: tuple[str, ...] = NEEDED) -> Path | None:
    """Return the folder of a model in the hub's cache, without a network; None if it is not there as a whole."""
    with suppress(ImportError, OSError, ValueError):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True, allow_patterns=list(files)))
    return None


def download(name: str, *, only_configuration: bool = False, look_up_s: float = LOOK_UP_S) -> Path:
    """Download a model into the hub's cache, with the hub's progress on stderr; return its folder.

    Args:
        name: "org/name".
        only_configuration: its config.json alone, for shapes without weights.
        look_up_s: seconds after which a hub that has not answered counts as unreachable.

    Raises:
        UsageError: there is no such model, or the hub cannot be reached.
    """
    command = [sys.executable, "-m", "attention.mlx_lm.hub", name, *(CONFIGURATION if only_configuration else ())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if not select.select([process.stdout], [], [], look_up_s)[0]:
                raise _unavailable(name, f"has not answered for {look_up_s:g} s")
            answer = process.stdout.readline().strip()
            if answer == FOUND:
                answer = process.stdout.readline().strip()
            if process.wait() == 0 and answer:
                return Path(answer)
            raise _unavailable(name, answer or "cannot be reached")
        finally:
            process.kill()


def _unavailable(name: str, why: str) -> UsageError:
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rpartition("//")[2]
    return UsageError(
        f"model: '{name}' is neither a folder nor in the hub's cache, and {hub} {why}; "
        "bundled names, folders and models downloaded before need no network"
    )


def main(name: str, *files: str) -> int:
    """Print FOUND once the hub has the model, and its folder when it is downloaded; on failure the reason, in a line.

    Args:
        name: "org/name".
        files: the files to download; by default what mlx-lm downloads.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=LOOK_UP_S)
        print(FOUND, flush=True)
        if files:
            print(snapshot_download(name, allow_patterns=list(files)))
            return 0
        from mlx_lm import utils

        library: Any = utils
        print(library._download(name))  # with mlx-lm's own choice of files
    except GatedRepoError:
        print(f"gives it once its terms are accepted there, after `hf auth login`: {name}")
    except RepositoryNotFoundError:
        print("has no such model, or a private one, which `hf auth login` opens")
    except Exception as error:  # of the network, the hub's library or the disk
        print(f"cannot be reached: {truncated(error_line(error))}")
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
