"""Simulated GPUs, a launcher that only records its calls, and the parameters in a kernel's source."""

import re
from types import SimpleNamespace

import mlx.core as mx

from attention.kernels import cuda
from attention.kernels.cuda import attend, choice, gradients, peers, requirements
from attention.kernels.cuda.portable import gradient as portable_gradient
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.quantized import forward_launch
from attention.kernels.cuda.quantized import launch as packed_launch
from attention.kernels.cuda.runtime import launch, launcher, selfcheck
from attention.kernels.cuda.runtime import program as runtime_program
from attention.kernels.cuda.runtime.gpu import GpuProperties
from attention.kernels.cuda.runtime.launch import LENGTH, MAP, NOTHING, NUMBER, POINTER, SCRATCH, SERIAL, STRIDE
from attention.kernels.cuda.sm90 import gradient
from attention.kernels.cuda.sm90 import launch as sm90_launch

PACKED = (packed_launch, forward_launch)
GPUS = {
    "A100": GpuProperties("Planted A100", (8, 0), 108, 166_912, 13000),
    "RTX 4090": GpuProperties("Planted RTX 4090", (8, 9), 128, 101_376, 13000),
    "H100": GpuProperties("Planted H100", (9, 0), 132, 232_448, 13000),
    "B200": GpuProperties("Planted B200", (10, 0), 148, 232_448, 13000),
}


class Recorder:
    """A fake of the compiled launcher: it records the plans, and answers calls with zeros."""

    def __init__(self):
        self.plans, self.calls = [], {}

    def set_transforms(self, gradient, batched):
        self.gradient, self.batched = gradient, batched

    def keep_call(self, q, k, v, *keywords_and_plan):
        *keywords, plan = keywords_and_plan
        self.calls[q.shape, k.shape, v.shape, *keywords] = plan

    def find_call(self, q, k, v, *keywords):
        plan = self.calls.get((q.shape, k.shape, v.shape, *keywords))
        return plan and plan(q, k, v)[0]

    def keep_packed_call(self, *arrays_keywords_and_plan):
        *given, plan = arrays_keywords_and_plan
        if self._is_as_wide(given):
            self.calls[self._packed((*given[:7], *given[8:]))] = plan

    def find_packed_call(self, *given):
        plan = self.calls.get(self._packed((*given[:7], *given[8:]))) if self._is_as_wide(given) else None
        return plan and plan([x for x in given[:7] if x is not None])[0]

    @staticmethod
    def _is_as_wide(given):
        q, v, v_bits = given[0], given[4], given[7]
        return v.shape[3] * 32 == q.shape[3] * v_bits

    @staticmethod
    def _packed(given):
        return (*(x if x is None else (x.shape, x.dtype) for x in given[:7]), *given[7:])

    def forget_calls(self):
        self.calls.clear()

    def make_plan(self, steps, inputs, shapes, types, constants, label, untraced):
        self.plans.append(SimpleNamespace(steps=steps, label=label, untraced=untraced, shapes=shapes, types=types))
        return lambda *arrays: [mx.zeros(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]


def forget():
    """Clear everything these modules cache about a GPU."""
    cuda.forget_calls()
    for module in (
        attend,
        portable_gradient,
        portable_launch,
        gradient,
        launch,
        runtime_program,
        gradients,
        peers,
        sm90_launch,
        *PACKED,
    ):
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


def planted(monkeypatch):
    """Simulate a GPU by name, for a fixture; faults of its kernels can be planted in `wrong`, by kernel name."""
    found = SimpleNamespace(wrong={}, recorder=Recorder())

    def make(name):
        for module in (sm90_launch, choice, portable_launch, portable_gradient, gradient, peers, requirements, *PACKED):
            monkeypatch.setattr(module, "gpu", lambda: GPUS[name])
        return found

    def verdict(program, *_):
        return found.wrong.get(program.name)

    monkeypatch.setattr(selfcheck, "distrust_reason", verdict)
    monkeypatch.setattr(selfcheck, "check", verdict)
    monkeypatch.setattr(requirements, "describe", lambda: "planted")
    monkeypatch.setattr(runtime_program, "version", lambda: (13, 0))
    monkeypatch.setattr(runtime_program, "targets", lambda: (80, 86, 89, 90, 100))
    monkeypatch.setattr(launch, "machine_code", lambda program: program)
    monkeypatch.setattr(launcher, "unavailable_reason", lambda: None)
    monkeypatch.setattr(launcher, "known_obstacle", lambda: None)
    monkeypatch.setattr(launcher, "module", lambda: found.recorder)
    for lookup in ("_find_call", "_find_packed_call"):  # set to the recorder's by a call that repeats; restored with it
        monkeypatch.setattr(cuda, lookup, cuda._find_nothing)
    forget()
    yield make
    forget()


def parameter_kinds(arguments):
    """Return the kinds of the parameters that get these arguments of a launch, as `signature` returns them."""
    kinds = {NOTHING: POINTER, SCRATCH: POINTER, LENGTH: NUMBER}
    return [kinds.get(argument[0], argument[0]) for argument in arguments]


def signature(program):
    """Return the kinds of a kernel's parameters, in order."""
    text, constants = program.source, dict(program.constants)
    parameters = re.search(r"KERNEL_NAME\((.*?)\)\s*\{", text, re.DOTALL)[1]
    conditions = {
        name: constants.get(name)
        for name in ("MASK", "LISTS", "ALIBI", "ROPE", "SPANS", "QUANTIZED", "QUANTIZES", "PARTS", "GATHERED")
    }
    conditions |= {f"PARTS > {count}": constants.get("PARTS", 0) > count for count in (2, 4)}
    conditions["!SPLIT"] = not constants.get("SPLIT")
    for condition, holds in conditions.items():
        block = rf"#if {condition}\n(.*?)#endif\n"
        parameters = re.sub(block, r"\1" if holds else "", parameters, flags=re.DOTALL)
    return [_kind(each) for each in parameters.split(",")]


def _kind(parameter):
    kinds = {
        "TensorMap": MAP,
        "*": POINTER,
        "Step": STRIDE,
        "long long": STRIDE,
        "i64": STRIDE,
        "_stride": STRIDE,
        "u64 serial": SERIAL,
    }
    return next((kind for mark, kind in kinds.items() if mark in parameter), NUMBER)
