"""Whether a model fits in memory, and what would fit in its place."""

from typing import Final

from msgspec import Struct

from attention.models.configuration import Configuration
from attention.models.generation import PREFILL_STEP
from attention.models.network import Network
from attention.models.workloads import LEAST, Generation

MOST_ADVISED: Final = 8
"""Layers that are advised at most: more cost time and tell little more."""


class Needed(Struct, frozen=True):
    """Bytes that a run needs."""

    fixed: int
    """Whatever the number of layers: embeddings, one layer's working memory."""
    layer: float
    """Of each layer: its weights, its cache."""
    layers: int

    @staticmethod
    def of(configuration: Configuration, work: Generation, network: Network, attention_bytes: int) -> "Needed":
        """Adds up what a generation needs.

        Args:
            configuration: the model's shapes.
            work: what runs.
            network: the model with the layers that run.
            attention_bytes: what one call of attention needs above its inputs.
        """
        length = work.prompt + (work.generate if work.phase == "decode" else 0)
        weights = network.layer_bytes
        cache = configuration.cache_bytes(1, work.batch, length, work.dtype)
        if work.phase == "decode":
            cache *= 2  # every run works on a copy
        working = configuration.working_bytes(work.batch * min(work.prompt, PREFILL_STEP), work.dtype) + attention_bytes
        return Needed(network.own_bytes - network.layers * weights + working, weights + cache, network.layers)

    @property
    def whole(self) -> float:
        """All of it."""
        return self.fixed + self.layers * self.layer

    def refusal(self, limit: int, work: Generation) -> str:
        """Says what is needed of how much, and what would fit."""
        text = f"needs {self.whole / 2**30:.4g} GiB of {limit / 2**30:.4g}"
        fitting = min(int((limit - self.fixed) // self.layer), MOST_ADVISED, work.layers - 1)
        if fitting >= LEAST["measured_layers"]:
            return f"{text}; --layers {fitting} would fit, and estimate the whole model"
        return f"{text}; not even two layers fit"
