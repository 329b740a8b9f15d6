"""Runs Metal kernels on the CPU; finds races, missing barriers, out-of-bounds and uninitialised reads."""

from verifier.running import Finding, Launch, verify
from verifier.source import generated_text
from verifier.spaces import address_spaces

__all__ = ["Finding", "Launch", "address_spaces", "generated_text", "verify"]
