"""Former name of the module of `Practical`, from which scripts import it."""

from attention.implementations.bounded.implementation import Practical

__all__ = ["Practical"]
