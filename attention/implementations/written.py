"""Arrays that tiles are written into, one after the other."""

from typing import Final

import mlx.core as mx

from attention.implementations.chain import Chain

VIEWS: Final = 12
"""Pairs of views that are as long as a tile: each is two nodes of a graph."""
TILES: Final = 8
"""Tiles after which the views get an anchor."""


class Written:
    """An array that blocks are written into, in place, as long as nothing else holds it: not even a chain may.

    MLX orders a graph by its breadth, seen from the end: writes, which only wait for one another, would all come last,
    when every block is there at once. Views between two writes make that way as long as the way through the tiles.
    """

    def __init__(self, zeros: mx.array, chain: Chain) -> None:
        """Takes the array, filled with what stands where nothing is written."""
        self.array = zeros
        self._chain = chain

    def write(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """Writes a part that took some tiles to compute; returns it in the array's type, for a chain to hold."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array[place] = part
        self.array = self._chain.anchor(self.array)
        return part

    def add(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """The same, added to what stands there."""
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
