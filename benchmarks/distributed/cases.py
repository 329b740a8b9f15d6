"""The calls that the benchmark of several devices measures, with their target shares of ideal."""

from typing import Any, Final

from msgspec import Struct

from attention.core.workload import Workload

ON_GPU: Final = {"heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
ON_CPU: Final = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "float32"}


class Case(Struct, frozen=True):
    """A workload, and the share of ideal that two GPUs of one host are to reach: one GPU's time / (ranks * time)."""

    part: str
    workload: Workload
    target: float | None = None


def _made(part: str, target: float | None, shape: dict[str, Any], **fields: Any) -> Case:
    return Case(part, Workload(**(shape | fields)), target)


def cases(parts: list[str], on_gpu: bool) -> list[Case]:
    """Return the cases of some parts, all if none are named."""
    shape: dict[str, Any] = dict(ON_GPU if on_gpu else ON_CPU)
    if on_gpu:
        made = [
            _made("forward", 0.85, shape, seq=16384, mask="causal"),
            _made("forward", 0.93, shape, seq=32768, mask="causal"),
            _made("forward", 0.97, shape, seq=65536, mask="causal"),
            _made("forward", None, shape, seq=32768),
            _made("backward", 0.90, shape, seq=32768, mask="causal", pass_="training"),
            _made("decode", 0.80, shape, kv_seq=131072, pass_="decode"),
            _made("decode", 0.95, shape, kv_seq=1 << 20, pass_="decode"),
            _made("window", 0.95, shape, seq=131072, mask="window:4096"),
            _made("documents", None, shape, seq=65536, mask="documents:3000"),
        ]
    else:
        made = [
            _made("forward", None, shape, seq=2048, mask="causal"),
            _made("backward", None, shape, seq=1024, mask="causal", pass_="training"),
            _made("decode", None, shape, kv_seq=32768, pass_="decode"),
            _made("window", None, shape, seq=8192, mask="window:256"),
            _made("documents", None, shape, seq=4096, mask="documents:300"),
        ]
    return [case for case in made if not parts or case.part in parts]


PARTS: Final = ("forward", "backward", "decode", "window", "documents", "link")
