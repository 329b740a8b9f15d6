"""Former name of `attention.core.route`, from which implementations in files of their own import."""

from attention.core.route import NO_NEEDS as PLAIN
from attention.core.route import Needs, Route

__all__ = ["PLAIN", "Needs", "Route"]
