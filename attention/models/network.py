"""A model of mlx-lm's: made with random weights or read from a folder, whole or with its first layers alone."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
from mlx.utils import tree_flatten

from attention.errors import UsageError
from attention.models.configuration import Configuration
from attention.workload import DType

SEED: Final = 0


class Network:
    """A model, its weights still to be made or read.

    Attributes:
        model: mlx-lm's; it keeps no more than the first `layers` layers.
        weights_bytes: of the whole model.
        own_bytes: of what is kept of it.
        layer_bytes: of its first layer.
        made: whether the weights are there.
    """

    def __init__(self, configuration: Configuration, dtype: DType, layers: int | None = None, seed: int = SEED) -> None:
        """Builds the model; nothing of its size is in memory yet.

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
        self._holder = _holder_of_layers(self.model, configuration.name)
        self.layer_bytes = _bytes(self._holder.layers[0])
        if layers is not None:
            self._holder.layers = self._holder.layers[:layers]
        self.own_bytes = _bytes(self.model)
        self.made = False

    @property
    def layers(self) -> int:
        """Layers that are kept."""
        return len(self._holder.layers)

    def make(self) -> None:
        """Makes or reads the weights, a few at a time so that nothing is needed twice."""
        for array in _arrays(self.model):
            mx.eval(array)
        self.made = True

    @contextmanager
    def shortened(self, layers: int) -> Iterator[Any]:
        """The model with its first layers alone, as long as the context lasts."""
        whole = self._holder.layers
        self._holder.layers = whole[:layers]
        try:
            yield self.model
        finally:
            self._holder.layers = whole


def _built(configuration: Configuration) -> Any:
    try:
        if configuration.folder is not None:
            from mlx_lm.utils import load_model

            return load_model(configuration.folder, lazy=True)[0]
        module = importlib.import_module(f"mlx_lm.models.{configuration.fields['model_type']}")
        return module.Model(module.ModelArgs.from_dict(dict(configuration.fields)))
    except (ValueError, OSError, TypeError, ImportError) as error:
        raise UsageError(f"model: mlx-lm cannot build {configuration.name}: {error}") from error


def _holder_of_layers(model: Any, name: str) -> Any:
    """The part of a model that owns the list of its layers."""
    for part in (getattr(model, "model", None), model, getattr(model, "language_model", None)):
        if isinstance(getattr(part, "layers", None), list):
            return part
    raise UsageError(f"model: the layers of {name} cannot be found")


def _bytes(model: Any) -> int:
    return sum(array.nbytes for array in _arrays(model))


def _arrays(model: Any) -> list[mx.array]:
    named: Any = tree_flatten(model.parameters())
    return [array for _, array in named]
