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
    names: tuple[str, ...]


class Answer(msgspec.Struct, kw_only=True):
    """Their routes; with neither routes nor problems it tells the device alone."""

    number: int = 0
    device: Device | None = None
    problem: str = ""
    """Why nothing can run here."""
    routes: dict[str, Route] = {}
    problems: dict[str, str] = {}
    """For an implementation without a route, why it has none."""


def answer(question: Question, device: Device) -> Answer:
    """Asks each implementation; one that breaks says so in its own place."""
    from attention import implementations

    made = Answer(number=question.number)
    for name in question.names:
        try:
            made.routes[name] = implementations.get(name).route(question.workload, device)
        except Exception as error:
            made.problems[name] = str(error) or type(error).__name__
    return made


def main() -> None:
    """Answers until the questions end."""
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
    """Tells what the doctor finds, one JSON line each."""
    from fatui.diagnosis import diagnose as look

    for finding in look():
        _say(finding)


def _say(made: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(made) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    diagnose() if sys.argv[1:] == ["diagnose"] else main()
