"""The machine: its backend, its memory, and what is installed on it."""

from typing import Literal

from msgspec import Struct

Backend = Literal["cpu", "metal", "cuda"]


class Device(Struct, frozen=True, kw_only=True):
    """What a route needs to know about where it would run."""

    backend: Backend
    name: str
    """As people know it: "Apple M3 Max", "NVIDIA H200", "AMD EPYC 9R14"."""
    cores: int
    """CPU cores that this process may use."""
    memory_bytes: int
    """All memory that the backend computes in."""
    available_bytes: int
    """What a run may take of it now."""
    architecture: str = ""
    """MLX's own name for it: "x86_64", "applegpu_g15s", "sm_90a"."""
    mlx: str = ""
    """MLX's version."""
