"""Peer copies: keys and values of other GPUs of a host, by copy engines (`runtime/launcher_peers.hpp`).

NCCL's gather is a kernel, and waits for multiprocessors, which an attention kernel occupies all. Each rank allocates
slots of device memory, which the other processes map by CUDA IPC, and all ranks share flags in /dev/shm. Before the
first use a random array is gathered and compared with the group's own all_gather.
"""

import contextlib
import ctypes
import mmap
import os
import platform
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np

from attention.core.errors import KernelUnavailable, error_line

SLOT_BYTES: Final = 64 << 20
"""What moves at once; also the largest plane (a batch and a head) of a rank's contribution."""
SLOTS: Final = 4
HANDLE_BYTES: Final = 64
NAME_BYTES: Final = 64
FLAG_BYTES: Final = 64
ENCODER_MEMBERS: Final = "  Device& device_;\n  CudaStream stream_;\n"
"""Where launcher_peers.hpp finds the stream of MLX's command encoder."""
MIN_BYTES: Final = 1 << 20
"""Bytes of a part below which the group's own gather has the lower latency."""

Run = tuple[int, int, int, int]
"""Rows of a rank: rank, first row, its place, count."""


class RowPlan(NamedTuple):
    """Which rows of (B, heads, rows, width) are moved, and where to."""

    sent: tuple[Run, ...]
    """This rank's rows, and their places in its contribution."""
    needed: tuple[Run, ...]
    """Rows of the contributions, or of this rank's own rows, and their places in the output."""
    contributed: tuple[int, ...]
    """Rows of each rank's contribution."""
    rows: int
    """Rows of the output."""


Gather = Callable[[mx.array, RowPlan], mx.array]
"""Takes a rank's rows (B, heads, rows, width) and a plan; returns (B, heads, plan.rows, width)."""


class _Handle(ctypes.Structure):
    """A CUipcMemHandle, which is passed by value."""

    _fields_ = (("data", ctypes.c_byte * HANDLE_BYTES),)


def set_up(
    group: mx.distributed.Group, stream: mx.Stream, copies: Callable[[], mx.Stream]
) -> tuple[Gather | None, str]:
    """Return the gather of a group, or None and the reason; every rank gets the same answer.

    Args:
        group: the ranks, of which each has called this.
        stream: of the group's collectives.
        copies: returns the calling thread's stream for copies.
    """
    rank, ranks = group.rank(), group.size()

    def agreed(problem: str | None) -> bool:
        worst = mx.distributed.all_max(mx.array([problem is not None], mx.int32), group=group, stream=stream)
        return not worst.item()

    def exchanged(data: bytes, size: int) -> list[bytes]:
        own = mx.array(np.frombuffer(data.ljust(size, b"\0"), np.uint8).astype(np.int32))[None]
        every = mx.distributed.all_gather(own, group=group, stream=stream)
        return [row.astype(np.uint8).tobytes() for row in np.array(every)]

    problem, made = None, None
    try:
        _check_machine()
        made = _Memory()
    except Exception as error:  # whatever the driver or the compiler says, the group's own gather works
        problem = error_line(error)
    if not agreed(problem):
        return None, problem or "another rank has no peer copies"
    assert made is not None
    hosts = exchanged(_host(), NAME_BYTES)
    if len(set(hosts)) > 1:
        return None, "the ranks are on several hosts"
    path = Path("/dev/shm") / f"attention-{secrets.token_hex(8)}"
    path = Path(exchanged(str(path).encode(), NAME_BYTES)[0].rstrip(b"\0").decode())
    handles = exchanged(bytes(made.handle), HANDLE_BYTES)
    if rank == 0:
        path.write_bytes(bytes(max(mmap.PAGESIZE, FLAG_BYTES * ranks * (ranks + 1))))
    agreed(None)  # the file is there
    gather: Gather | None = None
    try:
        gather = made.opened(rank, handles, path, copies)
    except Exception as error:
        problem = error_line(error)
    works = agreed(problem)
    if rank == 0:
        with contextlib.suppress(OSError):
            path.unlink()
    if not works or gather is None:
        return None, problem or "another rank cannot map this rank's memory"
    sample = mx.random.normal((1, 3, 128, 64), key=mx.random.key(rank))
    whole = RowPlan(
        ((rank, 0, 0, 128),), tuple((each, 0, 128 * each, 128) for each in range(ranks)), (128,) * ranks, 128 * ranks
    )
    found = gather(sample, whole)
    expected = mx.distributed.all_gather(sample, group=group, stream=stream)
    expected = expected.swapaxes(0, 1).reshape(found.shape)
    if not agreed(None if mx.array_equal(found, expected).item() else "wrong"):
        return None, "the first gather had wrong values"
    return gather, "copy engines between the GPUs of this host"


def _check_machine() -> None:
    """Raise KernelUnavailable unless MLX is the CUDA build whose streams launcher_peers.hpp knows."""
    header = Path(mx.__file__).parent / "include" / "mlx" / "backend" / "cuda" / "device.h"
    if not header.exists() or ENCODER_MEMBERS not in header.read_text():
        raise KernelUnavailable("this MLX's command encoder is not as expected")
    if not Path("/dev/shm").is_dir():
        raise KernelUnavailable("there is no /dev/shm")


def _host() -> bytes:
    """Return what identifies this host."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text().strip() if boot.exists() else ""
    return f"{platform.node()[:24]} {text}".encode()[:NAME_BYTES]


class _Memory:
    """This rank's slots, and the driver calls that share them. They live as long as the process."""

    def __init__(self) -> None:
        from attention.kernels.cuda.runtime import launcher

        self._launcher = launcher.module()
        self._cuda = ctypes.CDLL("libcuda.so.1")
        mx.eval(mx.zeros(1) + 1)  # MLX makes the context
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            raise KernelUnavailable("this thread has no CUDA context")
        slots = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(slots), ctypes.c_size_t(SLOT_BYTES * SLOTS))
        self._slots = slots.value
        self.handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(self.handle), slots)

    def opened(self, rank: int, handles: list[bytes], path: Path, copies: Callable[[], mx.Stream]) -> Gather:
        """Map the slots of all ranks and the flags; return the gather."""
        slots = []
        for other, handle in enumerate(handles):
            if other == rank:
                slots.append(self._slots)
                continue
            mapped = ctypes.c_uint64()
            lazily = ctypes.c_uint(1)  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(mapped), _Handle.from_buffer_copy(handle), lazily)
            slots.append(mapped.value)
        file = os.open(path, os.O_RDWR)
        self._flags = mmap.mmap(file, 0)
        os.close(file)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._flags))
        mapped = ctypes.c_uint64()
        device_mapped = ctypes.c_uint(2)  # CU_MEMHOSTREGISTER_DEVICEMAP
        self._call("cuMemHostRegister_v2", ctypes.c_void_p(start), ctypes.c_size_t(len(self._flags)), device_mapped)
        self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(mapped), ctypes.c_void_p(start), ctypes.c_uint(0))
        self._peers: Any = self._launcher.make_peers(rank, slots, mapped.value, SLOT_BYTES, SLOTS)
        _kept.append(self)

        def gather(part: mx.array, plan: RowPlan) -> mx.array:
            made: mx.array = self._peers.gather(mx.contiguous(part), *plan, copies())
            return made

        return gather

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise KernelUnavailable(f"{name} failed: CUDA error {status}")


_kept: list[_Memory] = []
