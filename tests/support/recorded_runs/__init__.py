"""Events of real runs, with the seconds at which they came; samples and texts are left out.

The first line of a file is the plan, the second the times known before the run.
"""

from pathlib import Path

import msgspec

from attention.core import events as on
from attention.core.plan import KnownTimes, Plan

FOLDER = Path(__file__).parent


def read(path):
    """Return the plan, what was known before, and the (seconds, event) of a run."""
    plan, known, *lines = path.read_bytes().splitlines()
    events = [msgspec.json.decode(line, type=tuple[float, on.AnyEvent]) for line in lines]
    return msgspec.json.decode(plan, type=Plan), msgspec.json.decode(known, type=KnownTimes), events
