"""A fake of the Metal device only: it takes what the launcher passes to MLX, and runs the kernel in the verifier."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from attention.kernels.common.first_use import SelfChecks
from attention.kernels.metal import attend, gradients, launch
from attention.kernels.metal import trust as metal_trust

ON_A_GPU = mx.metal.is_available()
"""Whether the kernels run on a Mac's GPU, which has no counts and no findings."""
needs_verifier = pytest.mark.skipif(ON_A_GPU, reason="a GPU does not say what it found or counted")
MARK = "Planted GPU, applegpu_x, macOS 15.0, MLX 0"


@dataclass
class Launched:
    """One launch, with the verifier's counts."""

    kernel: str
    keywords: dict[str, Any]
    text: str = ""
    counts: Any = None


@dataclass
class Device:
    """How the kernels are run, and the launches."""

    is_reversed: bool = False
    is_misaligned: bool = False
    edit: Callable[[str, str], str] = lambda kernel, text: text
    """Edits a kernel's source, to plant a fault; called with the kernel's name ("forward") and the source."""
    launches: list[Launched] = field(default_factory=list)

    def metal_kernel(self, *, name: str, **made: Any) -> Callable[..., list[mx.array]]:
        """A fake of mx.fast.metal_kernel for the launcher."""
        kernel = mx.fast.metal_kernel(name=name, **made)
        short = name.removeprefix("fatui_")

        def call(*, inputs: Sequence[mx.array], **keywords: Any) -> list[mx.array]:
            if ON_A_GPU:
                self.launches.append(Launched(short, keywords))
                made_there: list[mx.array] = kernel(inputs=list(inputs), **keywords)
                return made_there
            from tests.support.metal.needs_verifier import verify  # skips the test where there is none

            if not _are_known(inputs):  # mx.vmap traces the call, and then takes what the rule of vmap gives instead
                sizes = zip(keywords["output_shapes"], keywords["output_dtypes"], strict=True)
                return [mx.zeros(shape, dtype) for shape, dtype in sizes]

            outputs, text, counts = verify(
                kernel,
                made["input_names"],
                list(inputs),
                output_names=made["output_names"],
                is_reversed=self.is_reversed,
                is_misaligned=self.is_misaligned,
                edit=lambda text: self.edit(short, text),
                **keywords,
            )
            self.launches.append(Launched(short, keywords, text, counts))
            return outputs

        return call


def _are_known(inputs: Sequence[mx.array]) -> bool:
    """Whether arrays can be evaluated, and are not traced."""
    try:
        mx.eval(*inputs)
    except ValueError as error:
        if "function transformations" not in str(error) and "without a primitive" not in str(error):
            raise
        return False
    return True


@contextmanager
def on_a_mac(device: Device) -> Iterator[Device]:
    """Set up everything as on a Mac, except the GPU."""
    forget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "metal_kernel", device.metal_kernel)
        patch.setattr(metal_trust, "describe", lambda: MARK)
        patch.setattr(metal_trust, "machine_fingerprint", lambda: MARK)
        patch.setattr(metal_trust, "checks", SelfChecks(metal_trust.machine_fingerprint))
        yield device
    forget()


def forget() -> None:
    """Reset the state as in a new process."""
    metal_trust.checks.forget()
    launch._kernel.cache_clear()
    attend._function.cache_clear()
    gradients._taken.cache_clear()
