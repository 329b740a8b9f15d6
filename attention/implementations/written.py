"""Arrays that tiles are written into, one after the other."""

from typing import Final

import mlx.core as mx

VIEWS: Final = 12
"""Pairs of views that are as long as a tile: each is two nodes of a graph."""


class Written:
    """An array that blocks are written into, in place, as long as nothing else holds it: not even a chain may.

    MLX orders a graph by its breadth, seen from the end: writes, which only wait for one another, would all come last,
    when every block is there at once. Views between two writes make that way as long as the way through the tiles.
    """

    def __init__(self, zeros: mx.array) -> None:
        """Takes the array, filled with what stands where nothing is written."""
        self.array = zeros

    def write(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """Writes a part that took some tiles to compute; returns it in the array's type, for a chain to hold."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array[place] = part
        return part

    def add(self, place: tuple[slice, ...], part: mx.array, tiles: int) -> mx.array:
        """The same, added to what stands there."""
        part = part.astype(self.array.dtype)
        self._wait(tiles)
        self.array = self.array.at[place].add(part)
        return part

    def _wait(self, tiles: int) -> None:
        for _ in range(VIEWS * tiles):
            self.array = self.array[None].squeeze(0)
