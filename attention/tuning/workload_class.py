"""The class of workloads that one trial covers: device, dtype, head dims, mask, pass, and lengths in buckets."""

from msgspec import Struct, structs

from attention.device import Device
from attention.route import PLAIN, Needs
from attention.workload import LARGEST, Workload

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
    """"none", "causal" or "window:N", N a bucket; "+ array" where an array is given too."""
    softcap: bool = False
    pass_: str
    """"forward" or "training"; a decode pass is a forward one of seq 1."""
    streams: int
    """Batch x heads, a bucket: the available parallelism."""
    seq: int
    """A bucket."""
    kv_seq: int
    """A bucket."""

    def __post_init__(self) -> None:
        """Raise ValueError for a size that no workload has."""
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
        parts += ["" if self.mask == "none" else self.mask, "softcap" if self.softcap else ""]
        return " ".join(part for part in [*parts, "training" if self.pass_ == "training" else ""] if part)

    def next_to(self, other: "WorkloadClass") -> bool:
        """Return whether the lengths are one bucket apart and all else is equal."""
        steps = [max(a, b) / min(a, b) for a, b in ((self.seq, other.seq), (self.kv_seq, other.kv_seq))]
        same = structs.replace(self, seq=other.seq, kv_seq=other.kv_seq) == other
        return same and max(steps) == 2


def bucket(size: int) -> int:
    """Round a size up to a power of two."""
    return 1 << (size - 1).bit_length()


def class_of(workload: Workload, device: Device, needs: Needs = PLAIN) -> WorkloadClass:
    """Return the class of a workload."""
    mask = workload.mask if workload.window is None else f"window:{bucket(workload.window)}"
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
        softcap=needs.softcap,
        pass_="training" if workload.pass_ == "training" else "forward",
        streams=bucket(workload.batch * workload.heads),
        seq=bucket(workload.seq),
        kv_seq=bucket(workload.kv_seq),
    )


def longest(workload: Workload) -> Workload:
    """Return the workload with its lengths rounded up to their buckets: what fits then fits for the whole class."""
    return structs.replace(
        workload,
        seq=min(bucket(workload.seq), LARGEST["seq"]),
        kv_seq=min(bucket(workload.kv_seq), LARGEST["kv_seq"]),
    )
