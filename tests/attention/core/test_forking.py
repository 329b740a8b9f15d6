"""Calls of a forked child that would wait for MLX's threads, which stayed in the parent: an error at once."""

import subprocess
import sys

from tests.support.patience import patient

PROGRAM = """
import os, signal, mlx.core as mx
mx.set_default_device(mx.cpu)
from attention import ForkedError, StreamingKV, attention, masks, quantized
x = mx.ones((1, 1, 4, 64))
packed, state = quantized(x, "int8"), StreamingKV(1, 2)
mx.eval(attention(x, x, x, implementation="baseline"), packed.arrays)
state.append(x, x)
state.evaluated().save(PATH)
calls = {
    "quantized": lambda: quantized(x, "int8"),
    "dequantized": lambda: packed.dequantized(),
    "append": lambda: state.append(x, x),
    "update": lambda: state.update(x, x),
    "attend": lambda: state.attend(x, x, x),
    "evaluated": lambda: state.evaluated(),
    "save": lambda: state.save(PATH),
    "load": lambda: StreamingKV.load(PATH),
    "dense": lambda: masks.causal().dense((1, 1, 4, 4)),
    "repeated": lambda: repeating.attend(x, x, x),
}
repeating = StreamingKV(1, 2)
repeating._fused.again = lambda *step: print("a step ran")  # as after a step on CUDA
child = os.fork()
if child == 0:
    for name, call in calls.items():
        signal.alarm(ALARM_S)
        try:
            mx.eval(call())
        except ForkedError:
            print(name, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_a_forked_child_says_so_wherever_arrays_are_made(tmp_path):
    alarm_s = int(patient(30))
    program = f"PATH, ALARM_S = {str(tmp_path / 'state')!r}, {alarm_s}\n{PROGRAM}"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=6 * alarm_s)
    names = "quantized dequantized append update attend evaluated save load dense repeated"
    assert done.stdout.split() == names.split()
