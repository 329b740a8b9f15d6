"""Saved states: a safetensors file whose metadata describe the state, with a digest of every array."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx
import msgspec
import numpy as np

from attention.core.errors import UsageError, error_line
from attention.core.files import checked_path
from attention.streaming.slots import HeadKind

SCHEMA: Final = 1
KEY: Final = "streaming_kv"
"""Name of the metadata entry."""


class Description(msgspec.Struct, forbid_unknown_fields=True):
    """What a state is, beside its arrays."""

    first: int
    window: int
    spare: int
    format: str
    heads: str | list[str]
    rope: dict[str, int | float | bool] | None
    """Fields of a `Rope` but for its frequencies, which are an array."""
    rows: list[tuple[int, int]]
    """Tokens seen by each row of the batch, and the position of the oldest in its ring."""
    dtypes: list[str]
    """Of keys and values as they came."""
    kept: list[tuple[HeadKind, list[int]]]
    """Kinds of heads, and which these are; each has its arrays "KIND.keys.0" and so on."""
    schema: int = SCHEMA


def digest(arrays: dict[str, mx.array], description: str) -> str:
    """Return the digest of all arrays and of the text that describes them."""
    sha = hashlib.sha256(description.encode())
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"\0{name} {array.dtype} {tuple(array.shape)}\0".encode())
        sha.update(cast("Any", np.array(mx.contiguous(array).view(mx.uint8))))
    return sha.hexdigest()


def save(path: str | os.PathLike[str], arrays: dict[str, mx.array], description: Description) -> None:
    """Write a file as a whole: an earlier one stays until the new one is complete.

    Raises:
        UsageError: the path is none.
        OSError: it cannot be written.
    """
    target = checked_path(path)
    text = msgspec.json.encode(description).decode()
    metadata = {KEY: text, "sha256": digest(arrays, text)}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as room:
        fresh = Path(room) / "state.safetensors"
        try:
            mx.save_safetensors(str(fresh), arrays, metadata)
        except RuntimeError as error:  # MLX does not say which of the system's errors it was
            raise OSError(errno.EIO, f"{error_line(error)} (is the disk full?)", os.fspath(target)) from error
        fresh.replace(target)


def load(path: str | os.PathLike[str]) -> tuple[dict[str, mx.array], Description]:
    """Return the arrays of a file and what they are.

    Raises:
        UsageError: the path is none, or the file is not a saved state, or was damaged: one line.
        OSError: it cannot be read.
    """
    with checked_path(path).open("rb"):  # raises what is usual of missing files
        pass
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        text = metadata[KEY]
        mx.eval(arrays)
        problem = "" if digest(arrays, text) == metadata["sha256"] else "its digest differs"
        description = msgspec.json.decode(text, type=Description)
    except Exception as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error_line(error).partition(": ")[2]
        raise UsageError(f"{path}: not a saved StreamingKV, or damaged: {reason or type(error).__name__}") from error
    if not problem and description.schema != SCHEMA:
        problem = f"it has schema {description.schema}; this version reads {SCHEMA}"
    if problem:
        raise UsageError(f"{path}: not a saved StreamingKV, or damaged: {problem}")
    return arrays, description
