# ruff: noqa: E501  one fault a line, as in a table
"""Faults planted in the kernels' texts; each must be found by the verifier or by the numbers."""

from dataclasses import dataclass
from typing import Final

from kernels_case import KINDS

from attention.kernels.metal.call import Call, Shape

BARRIER: Final = "threadgroup_barrier(mem_flags::mem_threadgroup);  // "
MANY: Final = Shape(1, 2, 1, 45, 70, 64, "float16")
FEW: Final = Shape(1, 4, 2, 3, 600, 64, "float16")
CHUNKED: Final = Shape(1, 1, 1, 20, 25, 256, "float32")


@dataclass(frozen=True)
class Mutant:
    """One fault: where, what stands there, and what is put in its place."""

    name: str
    kernel: str
    old: str
    new: str
    kind: str = "causal"
    shape: Shape = MANY

    @property
    def call(self) -> Call:
        return KINDS[self.kind].call(self.shape.head_dim)

    def edit(self, kernel: str, text: str) -> str:
        """The text with the fault in it."""
        if kernel != self.kernel:
            return text
        assert self.old in text, self.old
        return text.replace(self.old, self.new)


def no_barrier(kernel: str, mark: str, shape: Shape = MANY) -> Mutant:
    return Mutant(f"{kernel}: no barrier {mark}", kernel, f"{BARRIER}{mark}:", f"// {mark}:", shape=shape)


SEEN: Final = "key <= position"
MUTANTS: Final = (
    *(no_barrier("forward", mark) for mark in ("B1", "B2", "B3", "B4")),
    *(no_barrier("backward_query", mark) for mark in ("B1", "B2", "B3")),
    *(no_barrier("backward_query", mark, CHUNKED) for mark in ("B4", "B5")),
    *(no_barrier("backward_key", mark) for mark in ("B1", "B2", "B3")),
    *(no_barrier("backward_key", mark, CHUNKED) for mark in ("B4", "B5")),
    Mutant("forward: a barrier of the simdgroup only", "forward", f"{BARRIER}B2", "simdgroup_barrier(mem_flags::mem_threadgroup);  //"),
    Mutant("forward: a barrier without fence", "forward", f"{BARRIER}B4", "threadgroup_barrier(mem_flags::mem_none); //"),
    Mutant("forward: causal off by one", "forward", SEEN, "key < position"),
    Mutant("forward: causal lets one more through", "forward", SEEN, "key <= position + 1"),
    Mutant("forward: tiles end one key early", "forward", "last + keys - queries + 1", "last + keys - queries", shape=Shape(1, 1, 1, 33, 33, 64, "float16")),
    Mutant("forward: tiles start one tile late", "forward", "/ BLOCK * BLOCK", "/ BLOCK * BLOCK + BLOCK", "window"),
    Mutant("forward: window one wider", "forward", "key > position - window", "key >= position - window", "window"),
    Mutant("forward: rows past the end are loaded", "forward", "row < valid ? T(source", "true ? T(source"),
    Mutant("forward: query rows past the end", "forward", "r < rows ? T(q[at])", "true ? T(q[at])"),
    Mutant("forward: rows past the end are written", "forward", "if (is_row) {", "if (computes) {"),
    Mutant("forward: keys past the end are seen", "forward", "key < keys && ", "", "full"),
    Mutant("forward: largest does not cross lanes", "forward", "now = row_max(now);", ""),
    Mutant("forward: sum does not cross lanes", "forward", "row_sum(added)", "added"),
    Mutant("forward: old sums keep their scale", "forward", "sums[d].thread_elements()[1] *= shrink;", ""),
    Mutant("forward: total keeps its scale", "forward", "total * shrink + ", "total + "),
    Mutant("forward: a blind row divides by zero", "forward", "total > 0.0f ? 1.0f / total : 0.0f", "1.0f / total", "bool mask"),
    Mutant("forward: a blind row's base is -inf", "forward", "now == -INFINITY ? 0.0f : now", "now", "bool mask"),
    Mutant("forward: the sink is forgotten", "forward", "SINKS && split == 0", "false", "sinks"),
    Mutant("forward: the sink counts in each span", "forward", "SINKS && split == 0", "SINKS", "sinks", FEW),
    Mutant("forward: softcap after the mask's place", "forward", "softcap * metal::precise::tanh(s / softcap)", "metal::precise::tanh(s / softcap)", "softcap"),
    Mutant("forward: the mask of another head", "forward", "head * mask_strides[1]", "0 * mask_strides[1]", "bool mask"),
    Mutant("forward: the mask's axes are swapped", "forward", "query * mask_strides[2] + key * mask_strides[3]", "key * mask_strides[2] + query * mask_strides[3]", "bool mask"),
    Mutant("forward: keys of another head", "forward", "plane / group", "0", "full", Shape(1, 2, 2, 40, 40, 64, "float16")),
    Mutant("forward: strides are taken for 1", "forward", "(i % D) * q_strides[3]", "(i % D) * 2 * q_strides[3]"),
    Mutant("forward: logsumexp in base 2", "forward", "largest * LN_2", "largest"),
    Mutant("forward: columns of a lane are swapped", "forward", "(lane / 4) & 2) * 2", "(lane / 4) & 2)"),
    Mutant("forward: sums are not cleared", "forward", "clear<DIMS>(sums);", ""),
    Mutant("forward: spans overlap", "forward", "split * span + span)", "split * span + span + 16)", "full", FEW),
    Mutant("forward: a span too far", "forward", "split * span)", "split * span + BLOCK_K)", "full", FEW),
    Mutant("join: parts are not weighed", "join", "sum += weight * ", "sum += ", "full", FEW),
    Mutant("join: one part is left out", "join", "for (int s = 0; s < splits; s++) {\n      const", "for (int s = 1; s < splits; s++) {\n      const", "full", FEW),
    Mutant("dQ: delta is left out", "backward_query", "thread_elements()[e] - mean)", "thread_elements()[e])"),
    Mutant("dQ: delta does not cross lanes", "backward_query", "mean = row_sum(mean);", ""),
    Mutant("dQ: no slope of the softcap", "backward_query", "slope *= 1.0f - squashed * squashed;", "", "softcap"),
    Mutant("dQ: causal off by one", "backward_query", SEEN, "key < position"),
    Mutant("dQ: the scale is forgotten", "backward_query", "float slope = scale;", "float slope = 1.0f;"),
    Mutant("dQ: rows past the end are written", "backward_query", "if (query < queries) {\n    UNROLL", "if (true) {\n    UNROLL"),
    Mutant("dQ: the wrong chunk", "backward_query", "query_tile + own * PITCH + c * CHUNK", "query_tile + own * PITCH", shape=CHUNKED),
    Mutant("dQ: K of the last chunk", "backward_query", "if (CHUNKS > 1) {", "if (false) {", shape=CHUNKED),
    Mutant("dQ: a blind row's base is -inf", "backward_query", "found == -INFINITY ? 0.0f : found * LOG2_E", "found * LOG2_E", "bool mask"),
    Mutant("dK, dV: delta is left out", "backward_key", "thread_elements()[e] - row_means[j * 8 + fragment_c + e]", "thread_elements()[e]"),
    Mutant("dK, dV: delta of another row", "backward_key", "row_means[j * 8 + fragment_c + e]", "row_means[j * 8 + fragment_c]"),
    Mutant("dK, dV: one head of the group", "backward_key", "head < key_head * group + group", "head < key_head * group + 1"),
    Mutant("dK, dV: queries start one tile late", "backward_key", "/ BLOCK_Q * BLOCK_Q : 0", "/ BLOCK_Q * BLOCK_Q + BLOCK_Q : 0"),
    Mutant("dK, dV: queries end too early", "backward_key", "- 1 - shift + window)", "- 2 - shift + window)", "window", Shape(1, 1, 1, 77, 88, 64, "float16")),
    Mutant("dK, dV: roles are swapped at the end", "backward_key", "odd ? d_k : d_v", "odd ? d_v : d_k"),
    Mutant("dK, dV: pairs share their weights", "backward_key", "(pair * QUERIES * 32 + int(lane)) * 2", "int(lane) * 2"),
    Mutant("dK, dV: keys past the end are written", "backward_key", "if (key < keys) {", "if (true) {"),
    Mutant("dK, dV: a barrier not all reach", "backward_key", f"{BARRIER}B3", f"if (odd) {BARRIER}B3"),
    Mutant("dK, dV: too much threadgroup memory", "backward_key", "weights[BLOCK_K * BLOCK_Q]", "weights[BLOCK_K * BLOCK_Q * 8]"),
)  # fmt: skip
