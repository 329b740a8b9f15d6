"""Attention over sequences without an end: the first tokens and a ring of the latest, in constant time and memory."""

from attention.streaming.rope import Rope
from attention.streaming.state import StreamingKV

__all__ = ["Rope", "StreamingKV"]
