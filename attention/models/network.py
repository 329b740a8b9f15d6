"""An mlx-lm model with random weights or loaded from a folder, whole or with its first layers only."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache

from attention.errors import UsageError
from attention.models.configuration import Configuration
from attention.workload import DType

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
            dtype: type of the weights; those of a folder that are quantised stay as they are.
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

    def cache(self) -> list[Any]:
        """Return an empty cache for each layer, as mlx-lm makes them for this model.

        Gemma 3 builds its masks from the cache of its first full-attention layer, even if no such layer runs.
        """
        made: list[Any] = make_prompt_cache(self.model)
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
