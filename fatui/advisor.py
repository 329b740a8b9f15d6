"""Advisor process: reads questions (workloads) as JSON lines, and writes the route of each implementation.

It is separate from the app, so that importing MLX does not delay the screen, and a crash does not end the app.
Run as `python -m fatui.advisor`: one JSON line in per question, one out per answer, the device first;
as `python -m fatui.advisor diagnose`: one JSON line per finding of the doctor.
"""

import sys

import msgspec

from attention.device import Device
from attention.route import Route
from attention.workload import Workload


class Question(msgspec.Struct, kw_only=True):
    """A request for the routes of some implementations on a workload."""

    number: int
    workload: Workload
    """The case whose paths are shown."""
    names: tuple[str, ...]
    others: tuple[Workload, ...] = ()
    """Further cases of the plan, for the memory that they need."""


class Answer(msgspec.Struct, kw_only=True):
    """The routes; with neither routes nor problems, only the device."""

    number: int = 0
    device: Device | None = None
    problem: str = ""
    """Why nothing can run here."""
    routes: dict[str, Route] = {}
    problems: dict[str, str] = {}
    """Error message of each implementation that has no route."""
    needs: dict[str, tuple[int, ...]] = {}
    """Bytes that each case would need, inputs included; only cases that the implementation supports and predicts."""
    largest: dict[str, int] = {}
    """The largest number of bytes above the inputs that each implementation is predicted to need in any case."""


def answer(question: Question, device: Device) -> Answer:
    """Route each implementation; an exception becomes its entry in `problems`."""
    from attention import implementations

    made = Answer(number=question.number)
    for name in question.names:
        try:
            implementation = implementations.get(name)
            made.routes[name] = implementation.route(question.workload, device)
            cases = [(case, implementation.route(case, device)) for case in question.others]
        except Exception as error:
            made.problems[name] = str(error) or type(error).__name__
            continue
        known = [
            (case.input_bytes, route.predicted_bytes)
            for case, route in [(question.workload, made.routes[name]), *cases]
            if route.supported and route.predicted_bytes is not None
        ]
        if known:
            made.largest[name] = max(predicted for _, predicted in known)
            made.needs[name] = tuple(inputs + predicted for inputs, predicted in known)
    return made


def main() -> None:
    """Answer questions until stdin ends."""
    try:
        from attention.device import probe

        device = probe()
    except Exception as error:
        _say(Answer(problem=str(error) or type(error).__name__))
        return
    _say(Answer(device=device))
    decoder = msgspec.json.Decoder(Question)
    for line in sys.stdin.buffer:
        _say(answer(decoder.decode(line), device))


def diagnose() -> None:
    """Print the doctor's findings, one JSON line each."""
    from fatui.diagnosis import diagnose as look

    for finding in look():
        _say(finding)


def _say(made: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(made) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    diagnose() if sys.argv[1:] == ["diagnose"] else main()
