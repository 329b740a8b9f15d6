"""A stand-in for the Metal device alone: it takes what the launcher hands to MLX, and runs the text in the verifier."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dev_verifier
import mlx.core as mx
import pytest

from attention.kernels.metal import attend, gradient, launch, machine, trust

Finding = dev_verifier.Finding
MARK = "Planted GPU, applegpu_x, macOS 15.0, MLX 0"


@dataclass
class Launched:
    """One launch, as the verifier saw it."""

    kernel: str
    keywords: dict[str, Any]
    text: str
    reads: dict[str, int]
    writes: dict[str, int]
    products: int
    threadgroup_bytes: int


@dataclass
class Device:
    """How the texts are run, and what was."""

    reversed_schedule: bool = False
    misaligned: bool = False
    edit: Callable[[str, str], str] = lambda kernel, text: text
    """Changes a kernel's text, to plant a fault: gets the kernel's name ("forward") and the text."""
    launches: list[Launched] = field(default_factory=list)

    def metal_kernel(self, *, name: str, **made: Any) -> Callable[..., list[mx.array]]:
        """What mx.fast.metal_kernel is to the launcher."""
        kernel = mx.fast.metal_kernel(name=name, **made)
        short = name.removeprefix("fatui_").partition("_float")[0].partition("_bfloat")[0]

        def call(*, inputs: Sequence[mx.array], **keywords: Any) -> list[mx.array]:
            outputs, seen = dev_verifier.verify(
                kernel,
                made["input_names"],
                list(inputs),
                output_names=made["output_names"],
                order=int(self.reversed_schedule),
                misalign=self.misaligned,
                edit=lambda text: self.edit(short, text),
                **keywords,
            )
            self.launches.append(
                Launched(
                    short,
                    keywords,
                    seen["text"],
                    seen["reads"],
                    seen["writes"],
                    seen["products"],
                    seen["tg"],
                )
            )
            return outputs

        return call


@contextmanager
def on_a_mac(device: Device) -> Iterator[Device]:
    """Everything as on a Mac, but for the GPU."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "metal_kernel", device.metal_kernel)
        patch.setattr(machine, "look", lambda: MARK)
        for module in (machine, trust):
            patch.setattr(module, "mark", lambda: MARK)
        yield device
    forget()


def forget() -> None:
    """As in a new process."""
    trust.forget()
    launch._kernel.cache_clear()
    attend._function.cache_clear()
    gradient._taken.cache_clear()
