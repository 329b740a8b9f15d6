"""Specialisations of the kernels that dequantize keys and values, to shared memory or to a workspace."""

import functools
from dataclasses import dataclass, replace
from typing import Final

from attention.kernels.cuda.portable.forward import PortableForward
from attention.kernels.cuda.quantized.decode import constants_of
from attention.kernels.cuda.quantized.formats import PackedKV
from attention.kernels.cuda.runtime.program import Element, Program

THREADS: Final = 256
PIECES: Final = 2
"""Pieces of 16 numbers that a thread of dequantize.cu converts."""
CONVERSION: Final = ("quantized/numbers.cuh", "quantized/elements.cuh")


@dataclass(frozen=True)
class QuantizedGeneral:
    """A specialisation of portable/forward.cu that dequantizes keys and values (loader.cuh)."""

    base: PortableForward
    """The dense kernel with the same tiles."""
    packed: PackedKV

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        base = self.base.program
        texts = list(base.texts)
        at = texts.index("portable/forward.cu")
        texts[at:at] = [*CONVERSION, "quantized/loader.cuh"]
        constants = dict(base.constants) | constants_of(self.packed) | {"WHOLE": 0, "QUANTIZED": 1}
        return replace(base, name="flash_general_quantized", constants=tuple(constants.items()), texts=tuple(texts))


@dataclass(frozen=True)
class Dequantize:
    """A specialisation of dequantize.cu."""

    element: Element
    packed: PackedKV
    architecture: str

    @functools.cached_property
    def program(self) -> Program:
        """The source of the kernel."""
        constants = constants_of(self.packed) | {"WHOLE": 0, "BFLOAT16": int(self.element == "bf16")}
        constants |= {"THREADS": THREADS, "PIECES": PIECES}
        return Program(
            name="dequantize",
            architecture=self.architecture,
            constants=tuple(constants.items()),
            texts=("runtime/common.cuh", *CONVERSION, "quantized/dequantize.cu"),
            threads=THREADS,
            shared_memory=0,
        )
