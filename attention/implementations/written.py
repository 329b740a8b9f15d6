"""Output arrays that tiles are written into one after another."""

from typing import Final

import mlx.core as mx

from attention.implementations.chain import Chain

VIEWS: Final = 12
"""Pairs of views that equal the depth of a tile's graph; each pair is two nodes."""
TILES: Final = 8
"""Number of tiles after which the views get an anchor."""


class Written:
    """An array that blocks are written into in place, which requires that nothing else references it, not even a chain.

    MLX evaluates a graph breadth-first from its outputs: writes, which depend only on one another, would all come last,
    when every block is in memory. Views between two writes make their path as deep as the path through the tiles.
    """

    def __init__(self, zeros: mx.array, chain: Chain) -> None:
        """Create it with the initial array."""
        self.array = zeros
        self._chain = chain

    def write(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """Write a part computed from `tiles` tiles; return it in the array's dtype, for a chain to hold."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array[place] = part
        self.array = self._chain.anchor(self.array)
        return part

    def add(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """Add a part to the current contents; arguments as in `write`."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array = self._chain.anchor(self.array.at[place].add(part))
        return part

    def _wait(self, tiles: int) -> None:
        for tile in range(1, tiles + 1):
            for _ in range(VIEWS):
                self.array = self.array[None].squeeze(0)
            if tile % TILES == 0:
                self.array = self._chain.anchor(self.array)
