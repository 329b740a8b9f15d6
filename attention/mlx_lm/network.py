"""An mlx-lm model with random weights or loaded from a folder, whole or with its first layers only."""

import copy
import hashlib
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache

from attention.core.errors import UsageError
from attention.core.kv_format import DENSE
from attention.core.workload import DType
from attention.mlx_lm.caches import make_prompt_cache
from attention.mlx_lm.configuration import Configuration

SEED: Final = 0


class Network:
    """A model whose weights are made or loaded on demand.

    Attributes:
        model: the mlx-lm model, reduced to its first `layers` layers.
        weights_bytes: size of the whole model.
        own_bytes: size of the kept part.
        layer_bytes: size of its first layer.
        made: whether the weights are in memory.
    """

    def __init__(self, configuration: Configuration, dtype: DType, layers: int | None = None, seed: int = SEED) -> None:
        """Build the model without allocating its weights.

        Args:
            configuration: what to build.
            dtype: type of the weights; those of a folder that are quantized stay as they are.
            layers: how many to keep; None is all.
            seed: of random weights.

        Raises:
            UsageError: mlx-lm does not know the model, or its layers cannot be cut short.
        """
        mx.random.seed(seed)
        self.model = _built(configuration)
        self.model.set_dtype(getattr(mx, dtype))
        self.model.eval()
        self.weights_bytes = _bytes(self.model)
        self._holder, self._key = _holder_of_layers(self.model, configuration.name)
        self.layer_bytes = _bytes(self._holder[self._key][0])
        if layers is not None:
            self._holder[self._key] = self._holder[self._key][:layers]
        self.own_bytes = _bytes(self.model)
        self.made = False

    @property
    def layers(self) -> int:
        """Number of kept layers."""
        return len(self._holder[self._key])

    def cache(self, kv_format: str = DENSE) -> list[Any]:
        """Return an empty cache for each layer, as mlx-lm makes them for this model, or with quantized keys and values.

        Gemma 3 builds its masks from the cache of its first full-attention layer, even if no such layer runs.
        """
        made = make_prompt_cache(self.model, kv_format=kv_format)
        missing = getattr(self._holder, "sliding_window_pattern", 0) - len(made)
        return [*made, *(KVCache() for _ in range(missing))]  # type: ignore[no-untyped-call]

    def make(self) -> None:
        """Make or load the weights, a few at a time to avoid a second copy in memory."""
        for array in _arrays(self.model):
            mx.eval(array)
        self.made = True

    @contextmanager
    def shortened(self, layers: int) -> Iterator[Any]:
        """Reduce the model to its first layers within the context."""
        whole = self._holder[self._key]
        self._holder[self._key] = whole[:layers]
        try:
            yield self.model
        finally:
            self._holder[self._key] = whole


def _built(configuration: Configuration) -> Any:
    try:
        if configuration.folder is not None:
            from mlx_lm.utils import load_model

            return load_model(configuration.folder, lazy=True)[0]
        module = importlib.import_module(f"mlx_lm.models.{configuration.fields['model_type']}")
        return module.Model(module.ModelArgs.from_dict(dict(configuration.fields)))
    except (ValueError, OSError, TypeError, ImportError) as error:
        raise UsageError(f"model: mlx-lm cannot build {configuration.name}: {error}") from error


def _holder_of_layers(model: Any, name: str) -> tuple[Any, str]:
    """Return the module that owns the list of layers, and the attribute's name."""
    layers = list(getattr(model, "layers", ()))
    for _, part in model.named_modules():
        for key, value in part.items():
            if layers and isinstance(value, list) and [*map(id, value)] == [*map(id, layers)]:
                return part, key
    raise UsageError(f"model: the layers of {name} cannot be found")


def _bytes(model: Any) -> int:
    return sum(array.nbytes for array in _arrays(model))


def _arrays(model: Any) -> list[mx.array]:
    named: Any = tree_flatten(model.parameters())
    return [array for _, array in named]


WORDS: Final = {8: mx.uint32, 4: mx.uint32, 2: mx.uint16, 1: mx.uint8}
"""Dtype used to sum an array's bits, by item size in bytes."""


class StateChanged(Exception):
    """A run would start from another state than the first one."""


def copy_caches(cache: Any) -> Any:
    """Return an evaluated copy of mlx-lm's caches that shares no memory with them, bit for bit.

    MLX writes into a buffer that nothing else refers to and copies one that is shared: with the arrays themselves
    copied here, a run pays for no copy inside its clock.
    """
    held = {id(value): value for _, value in _leaves(cache, "") if isinstance(value, mx.array)}
    # An operation whose output is never its input's memory, and which keeps every bit.
    fresh = {key: mx.where(mx.array(True), array, array) for key, array in held.items()}
    mx.eval(list(fresh.values()))
    return copy.deepcopy(cache, dict[int, Any](fresh))  # looks up what is copied already by its id


def digest_of_caches(caches: Any) -> str:
    """Return a digest of mlx-lm's caches: their arrays, lengths and positions."""
    return digest(_leaves(caches, ""))


def bytes_of_caches(caches: Any) -> int:
    """Return the bytes of the arrays in mlx-lm's caches, unused rows included."""
    return sum(value.nbytes for _, value in _leaves(caches, "") if isinstance(value, mx.array))


def digest_of_weights(model: Any) -> str:
    """Return a digest of a model's parameters and their names."""
    named: Any = tree_flatten(model.parameters())
    return digest(named)


def _leaves(value: Any, name: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{name}.{index}")
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _leaves(each, f"{name}.{key}")
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _leaves(vars(value), f"{name}.{type(value).__name__}")
    else:
        yield name, value


def digest(named: Iterable[tuple[str, object]]) -> str:
    """Return a digest of named arrays and plain values.

    The bits of an array are summed along its last axis, and the sums weighted by their position: one pass over the
    memory on the device that holds it, exact, and not moved by a row that went elsewhere.
    """
    hasher = hashlib.blake2b(digest_size=16)
    sums: list[mx.array] = []
    for name, value in named:
        if isinstance(value, mx.array):
            hasher.update(f"{name} {value.shape} {value.dtype};".encode())
            sums += [_bit_sum(value)] if value.size else []
        else:
            hasher.update(f"{name} {value!r};".encode())
    mx.eval(sums)
    hasher.update(repr([each.item() for each in sums]).encode())
    return hasher.hexdigest()


def _bit_sum(array: mx.array) -> mx.array:
    words = (array.reshape(-1, 1) if array.ndim < 2 else array).view(WORDS[array.dtype.size])
    rows = mx.sum(words, axis=-1).flatten().astype(mx.uint32)
    return mx.sum(rows * (2 * mx.arange(rows.size, dtype=mx.uint32) + 1))
