"""Metal kernels on the CPU, with detection of races, missing barriers, out-of-bounds and uninitialised reads."""

from tests.support.metal.verifier.running import Counts, Finding, Launched, verify
from tests.support.metal.verifier.source import generated_text
from tests.support.metal.verifier.spaces import address_spaces

__all__ = ["Counts", "Finding", "Launched", "address_spaces", "generated_text", "verify"]
