"""Threads with small stacks, which a walk of a graph as deep as its tiles are many would overflow."""

import threading
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx

SMALL_STACK = 512 * 1024
"""A graph as deep as its tiles are many overflows it, which ends the process."""
R = TypeVar("R")


def on_a_stack(size: int, function: Callable[[], R]) -> R:
    """Call a function on the CPU in a thread with a stack of so many bytes; return its result."""
    results: list[R] = []

    def run() -> None:
        mx.set_default_device(mx.cpu)
        results.append(function())

    before = threading.stack_size(size)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    return results[0]
