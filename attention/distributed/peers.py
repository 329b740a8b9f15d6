"""Peer copies: keys, values and partial results of other GPUs of a host (`runtime/launcher_peers.hpp`).

NCCL's gather is a kernel, and waits for multiprocessors, which an attention kernel occupies all. Each rank allocates
slots of device memory, which the other processes map by CUDA IPC, and all ranks share flags in /dev/shm. Before the
first use a random array is gathered, and partial results are merged, and compared with the group's own all_gather.
"""

import contextlib
import ctypes
import math
import mmap
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import mlx.core as mx
import numpy as np

from attention.core.errors import KernelUnavailable, error_line
from attention.distributed.merging import merged

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
INBOX_WORDS: Final = 1 << 15
"""Words of partial results that a rank takes from each other at once; each is 8 bytes, and there are two halves."""

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


class _Handle(ctypes.Structure):
    """A CUipcMemHandle, which is passed by value."""

    _fields_ = (("data", ctypes.c_byte * HANDLE_BYTES),)


class PeerCopies:
    """Copies among the GPUs of a group; every rank makes the same calls, and evaluates them in the same order."""

    def __init__(self, peers: Any, rank: int, inboxes: tuple[int, ...], copies: Callable[[], mx.Stream]) -> None:
        """Create it; `peers` is the launcher's, and `inboxes` are each rank's addresses as this process sees them."""
        from attention.kernels.cuda.peers import Inboxes

        self._peers, self._copies, self.inboxes = peers, copies, Inboxes(rank, inboxes, INBOX_WORDS)
        self.run_merge: Callable[[Any, list[mx.array]], list[mx.array]] = peers.merge

    def gather(self, part: mx.array, plan: RowPlan) -> mx.array:
        """Return (B, heads, plan.rows, width) from this rank's rows (B, heads, rows, width) and the others'."""
        made: mx.array = self._peers.gather(mx.contiguous(part), *plan, self._copies())
        return made

    def attend(self, plan: Any, arrays: Sequence[mx.array], planes: Sequence[int], rows: RowPlan) -> list[mx.array]:
        """Run a plan of q, k, v and the other ranks' keys and values, as they arrive; not differentiable.

        Args:
            plan: from `kernels.cuda.peers.attend_plan`.
            arrays: this rank's rows, keys and values.
            planes: planes (batch and head) of keys of each of the plan's launches.
            rows: what is sent, and which of the other ranks' rows are needed.
        """
        q, k, v = arrays
        made: list[mx.array] = self._peers.attend(plan, [q, mx.contiguous(k), mx.contiguous(v)], planes, *rows)
        return made

    def takes_merge(self, shape: tuple[int, ...], dtype: mx.Dtype) -> bool:
        """Return whether partial results of such an output (B, H, rows, Dv) can be merged."""
        fits = math.prod(shape[:3]) * (1 + shape[3] / 2) <= INBOX_WORDS
        return fits and dtype in (mx.bfloat16, mx.float16) and shape[3] % 2 == 0 and 0 not in shape

    def merge(self, out: mx.array, logsumexp: mx.array, with_logsumexp: bool) -> list[mx.array]:
        """Return the merged output (B, H, rows, Dv) of all ranks' and, if wanted, the logsumexp; not differentiable."""
        from attention.kernels.cuda.peers import merge_plan

        return self.run_merge(merge_plan(tuple(out.shape), out.dtype, self.inboxes, with_logsumexp), [out, logsumexp])


def set_up(
    group: mx.distributed.Group, stream: mx.Stream, copies: Callable[[], mx.Stream]
) -> tuple[PeerCopies | None, str]:
    """Return the peer copies of a group, or None and the reason; every rank gets the same answer.

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
        made = _Memory(ranks)
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
    peers: PeerCopies | None = None
    try:
        peers = made.opened(rank, handles, path, copies)
    except Exception as error:
        problem = error_line(error)
    works = agreed(problem)
    if rank == 0:
        with contextlib.suppress(OSError):
            path.unlink()
    if not works or peers is None:
        return None, problem or "another rank cannot map this rank's memory"
    if not agreed(_gather_problem(peers, group, stream)):
        return None, "the first gather had wrong values"
    if not agreed(_merge_problem(peers, group, stream)):
        return None, "the first merge had wrong values"
    return peers, "copy engines between the GPUs of this host"


def _gather_problem(peers: PeerCopies, group: mx.distributed.Group, stream: mx.Stream) -> str | None:
    """Gather a random array; return what is wrong, or None."""
    rank, ranks = group.rank(), group.size()
    sample = mx.random.normal((1, 3, 128, 64), key=mx.random.key(rank))
    whole = RowPlan(
        ((rank, 0, 0, 128),), tuple((each, 0, 128 * each, 128) for each in range(ranks)), (128,) * ranks, 128 * ranks
    )
    found = peers.gather(sample, whole)
    expected = _gathered(sample[0], group, stream).swapaxes(0, 1).reshape(found.shape)
    return None if mx.array_equal(found, expected).item() else "wrong"


def _merge_problem(peers: PeerCopies, group: mx.distributed.Group, stream: mx.Stream) -> str | None:
    """Merge random partial results, twice, for both halves of the inboxes; return what is wrong, or None."""
    for turn in range(2):
        out, sums = _partial_results(group.rank(), turn)
        found = [x.astype(mx.float32) for x in peers.merge(out, sums, True)]
        wanted = merged(*(_gathered(x, group, stream) for x in (out, sums)))
        mx.eval(found, wanted)
        if not all(
            mx.allclose(x, y.astype(mx.float32), rtol=1e-2, atol=1e-2) for x, y in zip(found, wanted, strict=True)
        ):
            return "wrong"
    return None


def _partial_results(rank: int, turn: int) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(2 * rank + turn))
    return mx.random.normal((1, 3, 2, 64), key=keys[0]).astype(mx.bfloat16), mx.random.normal((1, 3, 2), key=keys[1])


def _gathered(x: mx.array, group: mx.distributed.Group, stream: mx.Stream) -> mx.array:
    return mx.distributed.all_gather(x[None], group=group, stream=stream)


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

    def __init__(self, ranks: int) -> None:
        from attention.kernels.cuda.runtime import launcher

        self._launcher = launcher.module()
        self._cuda = ctypes.CDLL("libcuda.so.1")
        mx.eval(mx.zeros(1) + 1)  # MLX makes the context
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            raise KernelUnavailable("this thread has no CUDA context")
        slots = ctypes.c_uint64()
        after = 2 * ranks * 8 * INBOX_WORDS
        self._call("cuMemAlloc_v2", ctypes.byref(slots), ctypes.c_size_t(SLOT_BYTES * SLOTS + after))
        self._slots = slots.value
        start = ctypes.c_uint64(self._slots + SLOT_BYTES * SLOTS)
        self._call("cuMemsetD8_v2", start, ctypes.c_ubyte(0), ctypes.c_size_t(after))
        self._call("cuCtxSynchronize")
        self.handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(self.handle), slots)

    def opened(self, rank: int, handles: list[bytes], path: Path, copies: Callable[[], mx.Stream]) -> PeerCopies:
        """Map the slots of all ranks and the flags; return the copies."""
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
        merges = mx.zeros(1) + 0
        mx.eval(merges)
        end = SLOT_BYTES * SLOTS
        peers = self._launcher.make_peers(rank, slots, mapped.value, SLOT_BYTES, SLOTS, merges)
        _kept.append(self)
        copies_of_all = PeerCopies(peers, rank, tuple(slot + end for slot in slots), copies)
        copies_of_all.merge(*_partial_results(rank, 0), True)  # compiles; not evaluated
        return copies_of_all

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            raise KernelUnavailable(f"{name} failed: CUDA error {status}")


_kept: list[_Memory] = []
