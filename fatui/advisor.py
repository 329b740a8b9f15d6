"""A process that knows the device: it is asked with workloads, and answers what each implementation would do.

It is apart from the app, so that importing MLX costs the screen nothing and a crash there takes nothing down.
Run as `python -m fatui.advisor`: one JSON line in for each question, one out for each answer, the device first;
as `python -m fatui.advisor diagnose`: one JSON line for each thing that the doctor finds.
"""

import sys

import msgspec

from attention.device import Device
from attention.route import Route
from attention.workload import Workload


class Question(msgspec.Struct, kw_only=True):
    """What would these implementations do?"""

    number: int
    workload: Workload
    """The one whose paths are shown."""
    names: tuple[str, ...]
    others: tuple[Workload, ...] = ()
    """Further cases that would run, for the memory that they need."""


class Answer(msgspec.Struct, kw_only=True):
    """Their routes; with neither routes nor problems it tells the device alone."""

    number: int = 0
    device: Device | None = None
    problem: str = ""
    """Why nothing can run here."""
    routes: dict[str, Route] = {}
    problems: dict[str, str] = {}
    """For an implementation without a route, why it has none."""
    needs: dict[str, tuple[int, ...]] = {}
    """Bytes that each case would need, inputs included, of those that an implementation takes and predicts."""
    largest: dict[str, int] = {}
    """The most bytes above the inputs that an implementation is predicted to need on any case."""


def answer(question: Question, device: Device) -> Answer:
    """Ask each implementation; one that breaks says so in its own place."""
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
    """Answer until the questions end."""
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
    """Tell what the doctor finds, one JSON line each."""
    from fatui.diagnosis import diagnose as look

    for finding in look():
        _say(finding)


def _say(made: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(made) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    diagnose() if sys.argv[1:] == ["diagnose"] else main()
