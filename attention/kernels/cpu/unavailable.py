"""The error that says why there is no kernel here."""

from attention.errors import KernelUnavailable

__all__ = ["KernelUnavailable"]
