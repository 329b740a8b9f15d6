"""Plans of a stream's steps: the new rows are written, and the query attends to all slots, as one MLX primitive."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import mlx.core as mx
import numpy as np

from attention.core.errors import KernelUnavailable
from attention.core.kv_format import KVFormat
from attention.kernels.common.selfcheck import exact
from attention.kernels.cuda import attend
from attention.kernels.cuda.quantized import launch as packed_launch
from attention.kernels.cuda.quantized.formats import SCALE_BYTES, PackedKV
from attention.kernels.cuda.runtime import launcher, selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.gpu import gpu
from attention.kernels.cuda.runtime.launch import Stage, dtype_of, make_plan, prepare
from attention.kernels.cuda.runtime.program import Program
from attention.kernels.cuda.sm90.decode import MAX_ROWS
from attention.kernels.cuda.sm90.launch import (
    PARTS,
    KeySplit,
    decode,
    decode_stages,
    make_key_split,
    same_kernel,
    scratch_of,
    unwritten,
)
from attention.masks import dtype_name
from attention.quantized_kv import arrays_of, quantized

VERSIONS: Final = 3
"""Of a query with rotary positions: for the lap of the newest token, the lap before, and the first tokens."""
THREADS: Final = 128
BEFORE: Final = "before"
"""Name of the output of the step before: MLX runs launches side by side that do not read what another one writes."""
STARTED_TOGETHER: Final = 8
"""Queued steps after which the GPU starts."""
SLOT, POSITIONS, SPANS = (0,), (1, 2, 3), (4, 5, 6, 7, 8, 9)
"""Indices of the numbers that a step passes: the slot; to which positions the versions of the query are rotated; first
and last slot of the run that each version sees."""


@dataclass(frozen=True)
class StepKind:
    """What the plan of a step depends on, beside the shape."""

    shape: CallShape
    """Of the call over all slots, with one query."""
    call: CallParams
    rope_dims: int = 0
    """Values of a head that are rotated; 0 without rotary positions."""
    adjacent: bool = False
    packed: PackedKV | None = None

    @property
    def quantizes(self) -> bool:
        """Whether the kernel quantizes the new rows."""
        return self.packed is not None and all(form.mode == "affine" for form, _ in self.packed.parts)

    @property
    def parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the new rows of keys and values, and of their slots."""
        dense = ("k", "v")
        slots = dense if self.packed is None else packed_launch.inputs(self.packed)[1:]
        return tuple(f"new_{name}" for name in (dense if self.quantizes else slots)), slots


def refusal(kind: StepKind) -> str | None:
    """Return why no plan computes a step, or None."""
    rows = kind.shape.group * (VERSIONS if kind.rope_dims else 1)
    if rows > MAX_ROWS:
        return f"the kernel for few queries takes up to {MAX_ROWS} rows, not {rows}"
    if kind.packed is not None:
        return packed_launch.refusal(kind.shape, kind.call)
    return None


def _row_bytes(kind: StepKind) -> list[int]:
    """Return the bytes of a row of each array of `StepKind.parts`."""
    if kind.packed is None:
        return [2 * kind.shape.head_dim] * 2
    sizes = []
    for form, scale in kind.packed.parts:
        groups = kind.shape.head_dim // form.group_size
        sizes += [kind.shape.head_dim * form.bits // 8, *[groups * SCALE_BYTES[scale]] * (1 + form.has_biases)]
    return sizes


def _append(kind: StepKind) -> Stage:
    """Return the launch that writes the new rows, quantized if the kernel does that, and rotates key and query."""
    shape, rope = kind.shape, kind.rope_dims > 0
    new, slots = kind.parts
    constants: dict[str, int | bool] = {
        "HEAD_DIM": shape.head_dim,
        "ROPE": rope,
        "ROPE_DIMS": kind.rope_dims,
        "ADJACENT": kind.adjacent,
        "QUANTIZES": kind.quantizes,
        "PARTS": 0 if kind.quantizes else len(slots),
        "BFLOAT16": shape.element == "bf16",
        "THREADS": THREADS,
    }
    if kind.quantizes and kind.packed is not None:
        for name, (form, _) in zip(("KEY", "VALUE"), kind.packed.parts, strict=True):
            constants |= {f"{name}_BITS": form.bits, f"{name}_GROUP": form.group_size}
    else:
        constants |= {f"ROW_{i}": size for i, size in enumerate(_row_bytes(kind))}
    program = Program(
        name="stream_append",
        architecture=gpu().architecture,
        constants=tuple((name, int(value)) for name, value in constants.items()),
        texts=("runtime/common.cuh", "streaming/append.cu"),
        threads=THREADS,
        shared_memory=0,
    )
    planes = shape.batch * shape.kv_heads
    turned = ((shape.batch, shape.heads, VERSIONS, shape.head_dim), dtype_of(shape))
    made = prepare(program, planes + rope * shape.batch * shape.heads, [turned] if rope else [], [planes, shape.keys])
    rows = (*new, *slots) if kind.quantizes else (name for pair in zip(new, slots, strict=True) for name in pair)
    return Stage(
        made,
        (*(("q",) if rope else ()), *rows, *(("radians",) if rope else ())),
        ("turned",) if rope else (),
        updates=frozenset(slots),
        after=(BEFORE,),
        passed=(*SLOT, *(POSITIONS if rope else ())),
    )


def _spans_stages(kind: StepKind, split: KeySplit[Any]) -> list[Stage]:
    """Return the launches over three runs of slots, each with its version of the query, and their join."""
    shape = _with_versions(kind.shape)
    made = decode(shape, kind.call, split)
    reads: tuple[str, ...] = ("turned", "k", "v")
    missing: frozenset[str] = frozenset()
    if kind.packed is not None:
        reads, missing = ("turned", *packed_launch.READS[1:]), kind.packed.missing
    attends = Stage(
        made,
        reads,
        ("versions", "logsumexp", "stats", PARTS[0]),
        strided=reads,
        alignments={} if kind.packed is None else kind.packed.alignments(shape.head_dim),
        omitted=unwritten(made) | missing | {"stats"},
        serial=True,
        passed=SPANS,
        scratch=scratch_of(made),
    )
    program = Program(
        name="stream_join",
        architecture=gpu().architecture,
        constants=(
            ("HEAD_DIM", shape.head_dim),
            ("BFLOAT16", int(shape.element == "bf16")),
            ("THREADS", THREADS),
        ),
        texts=("runtime/common.cuh", "streaming/join.cu"),
        threads=THREADS,
        shared_memory=0,
    )
    output = ((shape.batch, shape.heads, 1, shape.head_dim), dtype_of(shape))
    joins = Stage(prepare(program, shape.batch * shape.heads, [output], []), ("versions", "logsumexp"), ("output",))
    return [attends, joins]


def _with_versions(shape: CallShape) -> CallShape:
    return replace(shape, queries=VERSIONS)


def _spans_split(kind: StepKind) -> KeySplit[Any]:
    shape = _with_versions(kind.shape)
    split: KeySplit[Any] = (
        make_key_split(shape, kind.call)
        if kind.packed is None
        else packed_launch.make_key_split(shape, kind.call, kind.packed)
    )
    return replace(split, kernel=replace(split.kernel, spans=True))


@functools.lru_cache(maxsize=64)
def plan(kind: StepKind) -> "StepPlan":
    """Return the plan of a step.

    Raises:
        KernelUnavailable: no kernel takes it, one failed its self-check, or there is no launcher.
    """
    reason = refusal(kind) or launcher.unavailable_reason()
    if reason:
        raise KernelUnavailable(reason)
    stages = [_append(kind)]
    if kind.rope_dims:
        split = _spans_split(kind)
        reason = selfcheck.check(split.kernel.program, functools.partial(_compare_spans, kind, split))
        if reason:
            raise KernelUnavailable(f"{split.kernel.program.name}: {reason}")
        stages += _spans_stages(kind, split)
    elif kind.packed is not None:
        reason = attend.distrust_of_packed(kind.shape, kind.call, kind.packed)
        if reason:
            raise KernelUnavailable(reason)
        stages += packed_launch.stages(kind.shape, kind.call, kind.packed, False)
    else:
        if (path := attend.first_trusted(kind.shape, kind.call)) != "decode":
            raise KernelUnavailable(f"the call takes the {path} kernel")
        stages += decode_stages(kind.shape, kind.call, make_key_split(kind.shape, kind.call), False)
    new, slots = kind.parts
    inputs = ("q", *new, *slots, *(("radians",) if kind.rope_dims else ()), BEFORE)
    return StepPlan(make_plan(inputs, ("output",), stages), kind.quantizes)


class StepPlan:
    """A step as one MLX primitive, which writes into its slots in place.

    Where steps are queued, some at a time are started, so that the GPU computes while the host queues the rest; not
    within a transformation, which must not evaluate.

    Attributes:
        quantizes: whether it takes new rows as they are and quantizes them.
    """

    def __init__(self, made: object, quantizes: bool = False) -> None:
        self._made = made
        self._run = made.with_numbers  # type: ignore[attr-defined]  # of the launcher
        module = launcher.module()
        self._is_queued, self._is_traced = module.is_queued, module.is_traced
        self._calls = 0
        self.quantizes = quantizes

    def __call__(self, arrays: list[mx.array], numbers: list[int]) -> mx.array:
        """Return the output of q, the new rows, the slots, radians if there are any, and an array computed before."""
        out: mx.array = self._run(arrays, numbers)[0]
        self._calls += 1
        if self._calls % STARTED_TOGETHER == 0 and self._is_queued(arrays[-1]) and not self._is_traced([out]):
            mx.async_eval(out)  # type: ignore[no-untyped-call]
        return out

    def repeated(
        self,
        like: list[mx.array],
        fixed: list[mx.array],
        latest: mx.array,
        ring: tuple[int, int, int],
        seen: int,
        given: tuple[object, object, bool, object],
    ) -> Callable[..., mx.array | None]:
        """Return what makes the steps after one, as long as they are like it, faster than `__call__` is called.

        Args:
            like: query, key and value of the step.
            fixed: its slots, and radians if there are any.
            latest: its output.
            ring: numbers of first tokens, of tokens that are seen in the ring, and of the ring's slots.
            seen: tokens after the step.
            given: scale, softcap, whether query and key are rotated, and implementation, as given.

        Returns:
            A function of query, key, value and the arguments of `given`: the output, or None for another kind of step.
        """
        made: Callable[..., mx.array | None] = launcher.module().make_steps(
            self._made, like, fixed, latest, *ring, seen, *given
        )
        return made


def _compare_spans(kind: StepKind, split: KeySplit[Any]) -> str | None:
    """Run the launches over three runs on small inputs; return an error in their results, or None."""
    shape = replace(kind.shape, batch=1, heads=2 * kind.shape.group, kv_heads=2, keys=523)
    tried = selfcheck.small_call(shape, kind.call)
    small = replace(kind, shape=shape, call=tried)
    own = same_kernel(split, _spans_split(small), shape.keys)
    versions, k, v = selfcheck.inputs(_with_versions(shape))[:3]
    arrays = [k, v]
    if kind.packed is not None:
        packed = [quantized(x, form) for x, (form, _) in zip(arrays, kind.packed.parts, strict=True)]
        arrays, (k, v) = arrays_of(*packed), (x.dequantized(mx.float32) for x in packed)
    spans = [(4, 301), (301, 523), (0, 4)]
    run = make_plan(("turned", *kind.parts[1]), ("output",), _spans_stages(small, own))
    numbers = [0] * 4 + [bound for span in spans for bound in span]
    found = exact(StepPlan(run)([versions, *arrays], numbers))[0, :, 0]
    queries, keys, values = (exact(x)[0] for x in (versions, k, v))
    keys, values = (x.repeat(shape.group, axis=0) for x in (keys, values))
    scores = np.concatenate(
        [
            np.einsum("hd,hkd->hk", queries[:, i], keys[:, begin:end])
            for i, (begin, end) in sorted(enumerate(spans), key=lambda pair: pair[1])
        ],
        axis=1,
    )
    scores *= tried.scale
    if tried.softcap is not None:
        scores = tried.softcap * np.tanh(scores / tried.softcap)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = np.einsum("hk,hkd->hd", weights / weights.sum(-1, keepdims=True), values)
    error = float(np.abs(found - expected).max())
    return None if error <= MAX_ERROR else f"the results over runs of slots differ from float64 by {error:.2g}"


MAX_ERROR: Final = 3e-2
"""Of the self-check, whose outputs are averages of standard normal values in 16 bits."""


def kind_of(
    q: mx.array,
    slots: int,
    kv_heads: int,
    scale: float,
    softcap: float | None,
    rope_dims: int,
    adjacent: bool,
    kv_format: KVFormat | None,
) -> StepKind:
    """Return the kind of a step with queries like q."""
    element = "bf16" if q.dtype == mx.bfloat16 else "f16"
    shape = CallShape(q.shape[0], q.shape[1], kv_heads, 1, slots, q.shape[3], element)  # type: ignore[arg-type]
    call = CallParams(float(scale), False, None, softcap)
    packed = None if kv_format is None else PackedKV.of_text(kv_format.text, dtype_name(q.dtype))
    return StepKind(shape, call, rope_dims, adjacent, packed)
