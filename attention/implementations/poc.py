"""fatui's own kernel, where there is one."""

import importlib
import importlib.util
from typing import Any, Final, Protocol, cast

import mlx.core as mx

from attention.device import Backend, Device
from attention.errors import UnsupportedError
from attention.implementations.asked import asked_for, here
from attention.implementations.mlx_sdpa import NO_SOFTCAP, MlxSdpa
from attention.implementations.practical import Practical
from attention.masks import Mask
from attention.route import PLAIN, Needs, Route
from attention.workload import Workload

BACKEND_NAMES: Final[dict[Backend, str]] = {"cpu": "the CPU", "metal": "Metal", "cuda": "CUDA"}


class Kernel(Protocol):
    """What a backend's kernel module offers."""

    def takes(self, workload: Workload, needs: Needs) -> str | None:
        """The reason why the kernel does not take a workload, or None if it does."""
        ...

    def route(self, workload: Workload, needs: Needs) -> Route:
        """The path inside the kernel, for a workload that it takes."""
        ...

    def attend(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, softcap: float | None
    ) -> mx.array:
        """Attends; shapes as in the implementations' protocol."""
        ...
