"""The file of trial results: readable TOML, replaced atomically, merged with what other processes wrote."""

import contextlib
import fcntl
import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
from msgspec import Struct, structs

from attention.core import events as on
from attention.core.files import make_folder, parse_toml, read_bounded, replace_file
from attention.core.kv_format import DENSE
from attention.core.route import NO_NEEDS, Needs
from attention.core.workload import MAX_SIZES, Workload
from attention.kernels.common import cache
from attention.kernels.common.cache import code_fingerprint
from attention.measure.device import Device

MAX_BUCKET = 2**40
"""Larger than any call has: streams are batch times heads."""


class WorkloadClass(Struct, frozen=True, kw_only=True, rename={"pass_": "pass"}, forbid_unknown_fields=True):
    """All calls that share one choice. Buckets are powers of two, named by their upper end."""

    device: str
    """Product name, "NVIDIA H200"; for a CPU also the number of cores this process may use."""
    mlx: str
    """MLX's version."""
    dtype: str
    head_dim: int
    value_dim: int
    group: int
    """Query heads that share a key head."""
    mask: str
    """"none", "causal", "window:N", N a bucket, or "pattern 1/N", the share of visible pairs; "+ array" beside one."""
    kv_format: str = DENSE
    """As in `Workload`."""
    softcap: bool = False
    max_error: float = 0.0
    """The error budget of the calls, with which approximate candidates are tried; 0 without one."""
    pass_: str
    """"forward" or "training"; a decode pass is a forward one of seq 1."""
    streams: int
    """Batch x heads, a bucket: the available parallelism."""
    seq: int
    """A bucket."""
    kv_seq: int
    """A bucket."""

    def __post_init__(self) -> None:
        """Raise ValueError for a size that no workload has, or an impossible budget."""
        if not 0 <= self.max_error < math.inf:
            raise ValueError(f"max_error: got {self.max_error}; it takes a finite number from 0")
        for name in ("head_dim", "value_dim", "group", "streams", "seq", "kv_seq"):
            size = getattr(self, name)
            if not 1 <= size <= MAX_BUCKET:
                raise ValueError(f"{name}: got {size}; it takes a whole number from 1 to {MAX_BUCKET:,}")

    @property
    def label(self) -> str:
        """The class in a few words; lengths are the upper ends of their buckets."""
        seq = str(self.seq) if self.seq == self.kv_seq else f"{self.seq}x{self.kv_seq}"
        dim = str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        parts = [f"BH≤{self.streams} L≤{seq} D={dim}", f"GQA {self.group}" if self.group > 1 else "", self.dtype]
        parts += ["" if self.kv_format == DENSE else f"K/V {self.kv_format}"]
        parts += ["" if self.mask == "none" else self.mask, "softcap" if self.softcap else ""]
        parts += [f"error≤{self.max_error:g}" if self.max_error else "", "training" if self.pass_ == "training" else ""]
        return " ".join(part for part in parts if part)

    def next_to(self, other: "WorkloadClass") -> bool:
        """Return whether the lengths are one bucket apart and all else is equal."""
        steps = [max(a, b) / min(a, b) for a, b in ((self.seq, other.seq), (self.kv_seq, other.kv_seq))]
        same = structs.replace(self, seq=other.seq, kv_seq=other.kv_seq) == other
        return same and max(steps) == 2


def bucket(size: int) -> int:
    """Round a size up to a power of two."""
    return 1 << (size - 1).bit_length()


def sparsity(density: float) -> int:
    """Return the power of two nearest to the ratio of all pairs to the visible ones, by its logarithm."""
    return 1 << round(-math.log2(max(density, 2.0**-MAX_SPARSITY)))


def class_of(
    workload: Workload, device: Device, needs: Needs = NO_NEEDS, max_error: float | None = None
) -> WorkloadClass:
    """Return the class of a workload, of calls with an error budget if one is given."""
    mask = workload.mask if workload.window is None else f"window:{bucket(workload.window)}"
    if workload.structured:
        mask = f"pattern 1/{sparsity(workload.density)}"
    if needs.array_mask:
        mask = "array" if mask == "none" else f"{mask} + array"
    return WorkloadClass(
        device=device.name if device.backend != "cpu" else f"{device.name}, {device.cores} cores",
        mlx=device.mlx,
        dtype=workload.dtype,
        head_dim=workload.head_dim,
        value_dim=workload.value_dim,
        group=workload.heads // workload.kv_heads,
        mask=mask,
        kv_format=workload.kv_format,
        softcap=needs.softcap,
        max_error=max_error or 0.0,
        pass_="training" if workload.pass_ == "training" else "forward",
        streams=bucket(workload.batch * workload.heads),
        seq=bucket(workload.seq),
        kv_seq=bucket(workload.kv_seq),
    )


def longest(workload: Workload) -> Workload:
    """Return the workload with its lengths rounded up to their buckets: what fits then fits for the whole class."""
    return structs.replace(
        workload,
        seq=min(bucket(workload.seq), MAX_SIZES["seq"]),
        kv_seq=min(bucket(workload.kv_seq), MAX_SIZES["kv_seq"]),
    )


MAX_SPARSITY: Final = 16
"""Masks with less than 2^-16 of the pairs are one class."""
SCHEMA: Final = 3
OLDER_SCHEMA: Final = frozenset({1, 2})
"""Older schemas whose entries can be read unchanged."""
LOCK_WAIT_S: Final = 2.0
"""Seconds to wait for another process's lock on the file; after that the choice is kept in this process only."""
MAX_FILE_BYTES: Final = 2**24
HEAD: Final = "# What fatui's trials found; `fatui tune --show` prints it, `fatui tune --forget` removes it.\n"

State = Literal["new", "good", "damaged", "newer", "unreadable"]


def candidate_fingerprint() -> str:
    """Return the fingerprint of the candidates' code: choices made with another one are tuned again."""
    return code_fingerprint("implementations", "kernels")


class TrialResult(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one trial."""

    winner: str
    tuned: datetime
    """Time of the trial by the machine's clock, for display only."""
    ratio: float | None = None
    """Speedup of the winner over the runner-up; None without a runner-up."""
    low: float | None = None
    high: float | None = None
    max_error: float | None = None
    """The winner's largest absolute difference from the reference."""
    untried: list[str] = []
    """Candidates for which the time did not suffice, or that failed or were inaccurate."""
    call_s: dict[str, float]
    """Seconds per call of each candidate tried, best first; in a queue of several where calls are short."""
    alone_s: dict[str, float] = {}
    """Seconds of a single call including the wait for it, for candidates timed in queues."""
    made_with: str = ""
    """`candidate_fingerprint` at the time of the trial."""
    workload: WorkloadClass

    def __post_init__(self) -> None:
        """Raise ValueError for values that no trial produces: the file was damaged or edited."""
        if self.tuned.tzinfo is None:
            raise ValueError(f"tuned: got {self.tuned}; it takes a time with its zone")
        for name in ("ratio", "low", "high"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}; it takes a finite number above 0")
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise ValueError(f"max_error: got {self.max_error}; it takes a finite number from 0")
        times = [*self.call_s.values(), *self.alone_s.values()]
        if self.winner not in self.call_s or not all(0 < seconds < math.inf for seconds in times):
            raise ValueError("call_s: it takes a time for each that was tried, the winner among them, all above 0")
        if not self.alone_s.keys() <= self.call_s.keys():
            raise ValueError("alone_s: it takes those that call_s has")

    @property
    def runner_up(self) -> str | None:
        """The second best candidate."""
        return next((name for name in self.call_s if name != self.winner), None)


class _File(Struct, kw_only=True, rename={"entries": "class"}, forbid_unknown_fields=True):
    schema: int
    entries: list[TrialResult] = []


class Store:
    """The stored trials of one file. A problem with the file is reported once; the store then works without it.
    Attributes:
        path: the file.
    """

    def __init__(self, path: Path | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Create it for a file, by default `tuning.toml` in the cache folder; reads nothing yet."""
        self.path = path or cache.folder().parent / "tuning.toml"
        self.now = now
        self._entries: dict[WorkloadClass, TrialResult] = {}
        self._on_file: dict[WorkloadClass, TrialResult] = {}
        """Contents of the file when its mark was `_seen`."""
        self._seen: tuple[int, int, int] | None = None
        self._reported: set[str] = set()
        self._damage = ""
        """The error found in a damaged file."""

    def get(self, workload: WorkloadClass) -> TrialResult | None:
        """Return the entry of a class, stored by this process or another."""
        self._refresh()
        return self._entries.get(workload)

    def entries(self) -> list[TrialResult]:
        """Return all entries, in the file's order."""
        self._refresh()
        return list(self._entries.values())

    def put(self, entry: TrialResult) -> None:
        """Store an entry, replacing an older one of its class; in this process even if the file cannot be written."""
        self._refresh()
        self._entries[entry.workload] = entry
        self._change(lambda entries: {**entries, entry.workload: entry})

    def forget(self, workloads: Iterable[WorkloadClass]) -> bool:
        """Remove some classes; return whether the file could be changed."""
        gone = set(workloads)
        self._entries = {each: entry for each, entry in self._entries.items() if each not in gone}
        return self._change(lambda entries: {each: one for each, one in entries.items() if each not in gone})

    def _refresh(self) -> None:
        """Read the file if it has changed since; entries known only to this process stay."""
        version = self._file_state()
        if version is None or version == self._seen:
            return
        state, entries = self._read()
        if state == "good":
            self._entries |= entries
        elif state == "damaged":
            self._change(lambda kept: kept)

    def _file_state(self) -> tuple[int, int, int] | None:
        """Return what identifies a version of the file; None if it does not exist or cannot be accessed."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[State, dict[WorkloadClass, TrialResult]]:
        """Read the file; if it is unchanged since it was last read or written, do not parse it again."""
        version = self._file_state()
        if self._on_file and version == self._seen:
            return "good", self._on_file
        state, entries = self._parse()
        self._seen, self._on_file = version, entries if state == "good" else {}
        return state, entries

    def _parse(self) -> tuple[State, dict[WorkloadClass, TrialResult]]:
        try:
            document = parse_toml(read_bounded(self.path, MAX_FILE_BYTES).decode())
            schema = document.get("schema")
            if type(schema) is int and schema > SCHEMA:
                self._warn(f"{self.path}: written by a newer fatui (schema {schema}); it is left alone, and not used")
                return "newer", {}
            entries = msgspec.convert(document, _File).entries
            good = type(schema) is int and (schema == SCHEMA or schema in OLDER_SCHEMA)
            self._damage = "" if good else f"schema: got {schema!r}; it takes a whole number from 1 to {SCHEMA}"
            return ("good" if good else "damaged"), {entry.workload: entry for entry in entries}
        except FileNotFoundError:
            return "new", {}
        except OSError as error:
            self._warn(f"{self.path}: cannot be read ({error.strerror}); choices are kept in this process only")
            return "unreadable", {}
        except ValueError as error:  # no UTF-8, no TOML, or not what is written here
            self._damage = next(iter(str(error).splitlines()), "")
            return "damaged", {}

    def _change(self, change: Callable[[dict[WorkloadClass, TrialResult]], dict[WorkloadClass, TrialResult]]) -> bool:
        """Read, change and replace the file under a lock; report the reason if that fails."""
        try:
            make_folder(self.path.parent)
            with _locked(self.path.with_suffix(".lock")):
                state, entries = self._read()
                if state in ("newer", "unreadable"):
                    return False
                if state == "damaged":
                    self._set_aside()
                changed = change(entries)
                replace_file(self.path, _as_text(changed).encode())
                self._seen, self._on_file = self._file_state(), changed
        except TimeoutError:
            self._warn(f"{self.path}: another process holds it; choices are kept in this process only")
            return False
        except OSError as error:
            reason = error.strerror or str(error)
            self._warn(f"{self.path}: cannot be written ({reason}); choices are kept in this process only")
            return False
        return True

    def _set_aside(self) -> None:
        """Rename a damaged file to a free name."""
        stamp = f"{self.now():%Y%m%d-%H%M%S}"
        names = (f"{self.path.stem}.damaged-{stamp}{end}.toml" for end in ("", *(f"-{n}" for n in range(2, 1000))))
        aside = next(path for name in names if not (path := self.path.with_name(name)).exists())
        self.path.rename(aside)
        self._warn(f"{self.path}: damaged; it is kept as {aside.name}, and a new one is begun ({self._damage})")

    def _warn(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            on.emit_tuning(on.Message(level="warning", text=text))


def _as_text(entries: dict[WorkloadClass, TrialResult]) -> str:
    body: dict[str, Any] = msgspec.to_builtins(
        _File(schema=SCHEMA, entries=list(entries.values())), builtin_types=(datetime,)
    )
    import tomli_w

    for entry in body["class"]:
        for name in [name for name, value in entry.items() if value is None]:
            del entry[name]  # TOML has no null
    return HEAD + tomli_w.dumps(body)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file. Raises TimeoutError if another process keeps it locked."""
    with path.open("a") as file:
        until = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise TimeoutError(str(path)) from None
                time.sleep(0.01)
        yield
