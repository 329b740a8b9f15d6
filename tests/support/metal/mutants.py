# ruff: noqa: E501  one fault a line, as in a table
"""Faults planted in the kernels' sources, and how each must be found: by a finding of the verifier, or a wrong result."""

from dataclasses import dataclass, replace
from typing import Final

from attention.core.kv_format import parse_kv_format
from attention.kernels.metal.call import CallShape

MANY: Final = CallShape(1, 2, 1, 45, 70, 64, "float16")
FEW: Final = CallShape(1, 4, 2, 3, 600, 64, "float16")
LONG: Final = CallShape(1, 1, 1, 64, 128, 64, "float16")
SPLIT: Final = CallShape(1, 4, 2, 3, 523, 64, "float32")
"""Keys split into parts of unequal lengths."""
TILES: Final = CallShape(2, 2, 1, 150, 230, 64, "float16")
"""Several listed tiles along both axes."""
KEY_HEADS: Final = CallShape(1, 2, 2, 100, 150, 64, "float16")
WIDE_TILES: Final = CallShape(1, 2, 1, 150, 230, 128, "float16")
"""With blocks of fewer than 32 keys."""
WIDE: Final = CallShape(1, 1, 1, 20, 25, 256, "float32")
"""So wide that the backward kernels load tiles in chunks, and that float32 is summed in parts."""


@dataclass(frozen=True)
class Mutant:
    """One fault: the file, the original text, its replacement, and how it must be found.

    `found_by` is the start of a finding ("race: key_tile") or of a wrong result ("dQ"); `kind` is one of `KINDS`.
    """

    name: str
    kernel: str
    old: str
    new: str
    found_by: str
    kind: str = "causal"
    shape: CallShape = MANY

    def edit(self, kernel: str, text: str) -> str:
        """Return the source with the fault."""
        if kernel != self.kernel:
            return text
        assert self.old in text, self.old
        return text.replace(self.old, self.new)


BARRIER: Final = "threadgroup_barrier(mem_flags::mem_threadgroup);  // "


def no_barrier(kernel: str, mark: str, tile: str, shape: CallShape = MANY) -> Mutant:
    """A missing barrier, so that accesses to a tile are unordered."""
    return Mutant(
        f"{kernel}: no barrier {mark}", kernel, f"{BARRIER}{mark}:", f"// {mark}:", f"race: {tile}", shape=shape
    )


SEEN: Final = "key <= position"
BARRIERS: Final = (
    *(no_barrier("forward", mark, "key_tile") for mark in ("B1", "B2", "B3", "B4")),
    no_barrier("backward_query", "B1", "upstream_tile"),
    no_barrier("backward_query", "B2", "value_tile"),
    no_barrier("backward_query", "B3", "key_tile"),
    *(no_barrier("backward_query", mark, "key_tile", WIDE) for mark in ("B4", "B5")),
    no_barrier("backward_key", "B1", "query_tile"),
    no_barrier("backward_key", "B2", "upstream_tile"),
    no_barrier("backward_key", "B3", "weights"),
    *(no_barrier("backward_key", mark, "upstream_tile", WIDE) for mark in ("B4", "B5")),
    Mutant("forward: a barrier of the simdgroup only", "forward", f"{BARRIER}B2", "simdgroup_barrier(mem_flags::mem_threadgroup);  //", "race: key_tile"),
    Mutant("forward: a barrier without fence", "forward", f"{BARRIER}B4", "threadgroup_barrier(mem_flags::mem_none);  //", "race: key_tile"),
    Mutant("dK, dV: a barrier that half of the simdgroups pass by", "backward_key", f"{BARRIER}B3", f"if (odd) {BARRIER}B3", "divergence: threads meet at different barriers"),
)  # fmt: skip
FORWARD: Final = (
    Mutant("forward: causal off by one", "forward", SEEN, "key < position", "output"),
    Mutant("forward: causal lets one more through", "forward", SEEN, "key <= position + 1", "output"),
    Mutant("forward: tiles end one key early", "forward", "last + keys - queries + 1", "last + keys - queries", "output", shape=CallShape(1, 1, 1, 33, 33, 64, "float16")),
    Mutant("forward: tiles start one tile late", "forward", "/ BLOCK * BLOCK", "/ BLOCK * BLOCK + BLOCK", "output", "window"),
    Mutant("forward: window one wider", "forward", "key > position - window", "key >= position - window", "output", "window"),
    Mutant("forward: rows past the end are loaded", "forward", "if (row < valid) {", "if (true) {", "out-of-bounds: k "),
    Mutant("forward: rows past the end are loaded one by one", "forward", "row < valid ? T(source", "true ? T(source", "out-of-bounds: v "),
    Mutant("forward: packed rows past the end", "forward", "r < rows ? T(q[at])", "true ? T(q[at])", "out-of-bounds: q ", shape=FEW),
    Mutant("forward: a tile of which the first query sees but a part is whole", "forward", "is_seen<CAUSAL, WINDOW>(first_query, last_key, queries, keys, window)", "true", "output"),
    Mutant("forward: a tile of which the last query sees but a part is whole", "forward", "&& is_seen<CAUSAL, WINDOW>(last_query, first_key, queries, keys, window)", "", "output", "window", LONG),
    Mutant("forward: rows past the end are written", "forward", "if (is_row) {", "if (computes) {", "race: o["),
    Mutant("forward: keys past the end are seen", "forward", "key < keys && ", "", "output", "full"),
    Mutant("forward: largest does not cross lanes", "forward", "now = row_max(now);", "", "output"),
    Mutant("forward: sum does not cross lanes", "forward", "row_sum(added)", "added", "output"),
    Mutant("forward: old sums keep their scale", "forward", "sums[d].thread_elements()[1] *= shrink;", "", "output"),
    Mutant("forward: total keeps its scale", "forward", "total * shrink + ", "total + ", "output"),
    Mutant("forward: a blind row divides by zero", "forward", "total > 0.0f ? 1.0f / total : 0.0f", "1.0f / total", "output: nan", "bool mask"),
    Mutant("forward: a blind row's base is -inf", "forward", "now == -INFINITY ? 0.0f : now", "now", "output: nan", "bool mask"),
    Mutant("forward: the sink is forgotten", "forward", "SINKS && split == 0", "false", "output", "sinks"),
    Mutant("forward: the sink counts in each span", "forward", "SINKS && split == 0", "SINKS", "logsumexp", "sinks", FEW),
    Mutant("forward: softcap without its outer factor", "forward", "softcap * metal::precise::tanh(s / softcap)", "metal::precise::tanh(s / softcap)", "output", "softcap"),
    Mutant("forward: the mask of another head", "forward", "head * mask_strides[1]", "0 * mask_strides[1]", "output", "bool mask"),
    Mutant("forward: the mask's axes are swapped", "forward", "query * mask_strides[2] + key * mask_strides[3]", "key * mask_strides[2] + query * mask_strides[3]", "out-of-bounds: mask", "bool mask"),
    Mutant("forward: an additive mask is not added", "forward", "MASK == 2 ? masked(s, float(mask[at]))", "MASK == 2 ? s", "output", "additive mask"),
    Mutant("forward: keys of another head", "forward", "plane / group", "0", "output", "full", CallShape(1, 2, 2, 40, 40, 64, "float16")),
    Mutant("forward: columns twice as far apart", "forward", "(i % D) * q_strides[3]", "(i % D) * 2 * q_strides[3]", "out-of-bounds: q ", shape=FEW),
    Mutant("forward: logsumexp in base 2", "forward", "= metal::precise::log(total)", "= metal::precise::log2(total)", "logsumexp"),
    Mutant("forward: columns of a lane are swapped", "forward", "(lane / 4) & 2) * 2", "(lane / 4) & 2)", "uninitialised read: output o"),
    Mutant("forward: sums are not cleared", "forward", "clear<DIMS>(sums);", "", "output: nan"),
    Mutant("forward: the last part alone", "forward", "fragments[i].thread_elements()[0] += ", "fragments[i].thread_elements()[0] = ", "output", shape=WIDE),
    Mutant("forward: spans overlap", "forward", "split * span + span)", "split * span + span + 16)", "output", "full", FEW),
    Mutant("forward: a span begins too late", "forward", "split * span)", "split * span + BLOCK_K)", "output", "full", FEW),
    Mutant("join: parts are not weighed", "join", "sum += weight * ", "sum += ", "output", "full", FEW),
    Mutant("join: the rests of the logsumexps are forgotten", "join", "above + rests[s * rests_strides[0] + line * rests_strides[1]]", "above", "output", "additive mask", SPLIT),
    Mutant("forward: no rest of the logsumexp", "forward", "total > 0.0f ? rest_of(made, largest, log_total) : 0.0f", "0.0f", "output", "additive mask", SPLIT),
    Mutant("forward: a finite mask is -inf", "forward", "mask == -INFINITY ? mask", "mask < -1e4f ? -INFINITY", "output", "additive mask"),
    Mutant("join: one part is left out", "join", "for (int s = 0; s < splits; s++) {\n      const", "for (int s = 1; s < splits; s++) {\n      const", "output", "full", FEW),
)  # fmt: skip
BACKWARD: Final = (
    Mutant("dQ: delta is left out", "backward_query", "thread_elements()[e] - mean)", "thread_elements()[e])", "dQ"),
    Mutant("dQ: delta does not cross lanes", "backward_query", "mean = row_sum(mean);", "", "dQ"),
    Mutant("dQ: delta beside the diagonal", "backward_query", "fragment_c + e == fragment_r", "fragment_c + e == (fragment_r ^ 1)", "dQ"),
    Mutant("dQ: delta of the last part alone", "backward_query", "add<1>(&outputs, &part);", "outputs = part;", "dQ", shape=WIDE),
    Mutant("dQ: rows of O past the end", "backward_query", "is_row ? float(o[", "true ? float(o[", "out-of-bounds: o "),
    Mutant("dQ: the logsumexp's cotangent is forgotten", "backward_query", "if (LOGSUMEXP) {", "if (false) {", "dQ", "all at once"),
    Mutant("dQ: no slope of the softcap", "backward_query", "slope *= 1.0f - squashed * squashed;", "", "dQ", "softcap"),
    Mutant("dQ: causal off by one", "backward_query", SEEN, "key < position", "dQ"),
    Mutant("dQ: the scale is forgotten", "backward_query", "float slope = scale;", "float slope = 1.0f;", "dQ"),
    Mutant("dQ: rows past the end are written", "backward_query", "if (query < queries) {\n    UNROLL", "if (true) {\n    UNROLL", "out-of-bounds: d_q"),
    Mutant("dQ: a tile of which the first query sees but a part is whole", "backward_query", "is_seen<CAUSAL, WINDOW>(first_query, last_key, queries, keys, window)", "true", "dQ"),
    Mutant("dQ: the wrong chunk", "backward_query", "query_tile + own * PITCH + c * CHUNK", "query_tile + own * PITCH", "dQ", shape=WIDE),
    Mutant("dQ: K of the last chunk", "backward_query", "if (c < CHUNKS - 1) {", "if (false) {", "dQ", shape=WIDE),
    Mutant("dQ: the rest of the logsumexp is forgotten", "backward_query", "s - base - beyond", "s - base", "dQ", "additive mask"),
    Mutant("dQ: a blind row's base is -inf", "backward_query", "found == -INFINITY ? 0.0f : found", "found", "dQ: nan", "bool mask"),
    Mutant("dK, dV: delta is left out", "backward_key", "thread_elements()[e] - row_means[j * 8 + fragment_c + e]", "thread_elements()[e]", "dK"),
    Mutant("dK, dV: delta of another row", "backward_key", "row_means[j * 8 + fragment_c + e]", "row_means[j * 8 + fragment_c]", "dK"),
    Mutant("dK, dV: one head of the group", "backward_key", "head < key_head * group + group", "head < key_head * group + 1", "dV"),
    Mutant("dK, dV: queries start one tile late", "backward_key", "/ BLOCK_Q * BLOCK_Q : 0", "/ BLOCK_Q * BLOCK_Q + BLOCK_Q : 0", "dV"),
    Mutant("dK, dV: queries end too early", "backward_key", "- 1 - shift + window)", "- 2 - shift + window)", "dV", "window", CallShape(1, 1, 1, 77, 88, 64, "float16")),
    Mutant("dK, dV: roles are swapped at the end", "backward_key", "odd ? d_k : d_v", "odd ? d_v : d_k", "dV"),
    Mutant("dK, dV: roles are swapped at the start", "backward_key", "odd ? value_tile : key_tile", "odd ? key_tile : value_tile", "dV"),
    Mutant("dK, dV: no slope of the softcap", "backward_key", "slope *= 1.0f - squashed * squashed;", "", "dK", "softcap"),
    Mutant("dK, dV: the mask of another head", "backward_key", "head * mask_strides[1]", "0 * mask_strides[1]", "dV", "bool mask"),
    Mutant("dK, dV: a tile that the last query sees is whole", "backward_key", "query0, query0 + BLOCK_Q - 1, key0", "query0 + BLOCK_Q - 1, query0 + BLOCK_Q - 1, key0", "dV"),
    Mutant("dK, dV: the wrong chunk", "backward_key", "sums + c * (CHUNK / 8)", "sums", "dV", shape=WIDE),
    Mutant("dK, dV: Q of the last chunk", "backward_key", "if (c < CHUNKS - 1) {", "if (false) {", "dV", shape=WIDE),
    Mutant("dK, dV: the rest of the logsumexp is forgotten", "backward_key", "s - row_bases[at_row] - row_rests[at_row]", "s - row_bases[at_row]", "dV", "additive mask"),
    Mutant("dK, dV: a blind row's base is -inf", "backward_key", "found == -INFINITY ? 0.0f : found", "found", "dV: nan", "bool mask"),
    Mutant("dK, dV: pairs share their weights", "backward_key", "pair * QUERIES * 32 + int(lane)", "int(lane)", "race: weights"),
    Mutant("dK, dV: keys past the end are written", "backward_key", "if (key < keys) {", "if (true) {", "out-of-bounds: d_v"),
    Mutant("dK, dV: too much threadgroup memory", "backward_key", "weights[BLOCK_K * BLOCK_Q / 2]", "weights[BLOCK_K * BLOCK_Q * 4]", "limit: threadgroup memory of 51200 bytes"),
)  # fmt: skip
MUTANTS: Final = (*BARRIERS, *FORWARD, *BACKWARD)
OF_ROWS: Final = "own.batch * lists_shape[1] + own.head"
OF_QUERIES: Final = "listed.batch * lists_shape[1] + listed.head"
WHOLE_BY_BITS: Final = "simd_and(seen) == all_bits<BLOCK_K>()"
LISTED: Final = (
    Mutant("forward, lists: the first entry is skipped", "forward", "LISTS ? lists[list] : 0", "LISTS ? lists[list] + 1 : 0", "output", "lists", TILES),
    Mutant("forward, lists: the entry before the first is added", "forward", "LISTS ? lists[list] : 0", "LISTS ? lists[list] - 1 : 0", "out-of-bounds: entries", "lists", TILES),
    Mutant("forward, lists: the last entry is skipped", "forward", "(lists[list + 1] - entry0)", "(lists[list + 1] - entry0 - 1)", "output", "lists", TILES),
    Mutant("forward, lists: the entry after the last is added", "forward", "(lists[list + 1] - entry0)", "(lists[list + 1] - entry0 + 1)", "output", "lists", TILES),
    Mutant("forward, lists: the lists of the first head", "forward", OF_ROWS, "own.batch * lists_shape[1]", "output", "lists of heads", TILES),
    Mutant("forward, lists: the lists of the first batch", "forward", OF_ROWS, "own.head", "output", "lists of batches", TILES),
    Mutant("forward, lists: the head of the list is not added", "forward", "plane += own.head;", "", "race: o[", "lists of heads", TILES),
    Mutant("forward, lists: shared lists are one head", "forward", "plane += own.head;", "plane = own.head;", "race: o[", "lists", TILES),
    Mutant("forward, lists: the batch of the list is not added", "forward", "batch * lists_shape[0] + own.batch", "batch * lists_shape[0]", "race: o[", "lists of batches", TILES),
    Mutant("forward, lists: shared lists are one batch", "forward", "batch * lists_shape[0] + own.batch", "own.batch", "race: o[", "lists", TILES),
    Mutant("forward, lists: the tile is the head", "forward", "lists[at * LIST_RECORD + 4]", "lists[at * LIST_RECORD + 3]", "race: o[", "lists", TILES),
    Mutant("forward, lists: tiles in order, not in that of the schedule", "forward", "own.tile * LIST_Q + first_row % LIST_Q", "first_row", "uninitialised read: output o", "lists of heads", TILES),
    Mutant("forward, lists: blocks of a tile are one", "forward", "own.tile * LIST_Q + first_row % LIST_Q", "own.tile * LIST_Q", "race: o[", "lists", TILES),
    Mutant("forward, lists: a record per block", "forward", "scheduled(lists, first_row / LIST_Q)", "scheduled(lists, first_row / BLOCK_Q)", "out-of-bounds: lists", "lists", TILES),
    Mutant("forward, lists: the first block of a tile for all", "forward", "entries[entry] * LIST_K + step % LIST_K", "entries[entry] * LIST_K", "output", "lists", TILES),
    Mutant("forward, lists: one block of a tile", "forward", "step += BLOCK_K", "step += LIST_K", "output", "lists", TILES),
    Mutant("forward, lists: an entry per block", "forward", "(entry0 + step / LIST_K)", "(entry0 + step / BLOCK_K)", "output", "lists", TILES),
    Mutant("forward, lists: a full tile has bits", "forward", "if (tile < 0) {", "if (false) {", "out-of-bounds: bits", "lists", TILES),
    Mutant("forward, lists: partial tiles are full", "forward", "if (tile < 0) {", "if (true) {", "output", "lists", TILES),
    Mutant("forward, lists: the bits of the next tile", "forward", "int64_t(tile) * LIST_Q", "int64_t(tile + 1) * LIST_Q", "output", "lists", TILES),
    Mutant("forward, lists: tiles of bits as tall as a block", "forward", "int64_t(tile) * LIST_Q", "int64_t(tile) * ROWS", "output", "lists", TILES),
    Mutant("forward, lists: bits of a tile's first rows", "forward", "+ row + int(lane % ROWS)", "+ int(lane % ROWS)", "output", "lists", TILES),
    Mutant("forward, lists: bits of the next row", "forward", "int(lane % ROWS)", "int((lane + 1) % ROWS)", "output", "lists", TILES),
    Mutant("forward, lists: the first word of a row", "forward", "(LIST_K / 32) + key / 32", "(LIST_K / 32)", "output", "lists", TILES),
    Mutant("forward, lists: bits are not shifted", "forward", ">> (key % 32)", ">> 0", "output", "lists", WIDE_TILES),
    Mutant("forward, lists: bits of other lanes' rows", "forward", "ushort(simdgroup_at * 8 + fragment_r)", "ushort(fragment_r)", "output", "lists", TILES),
    Mutant("forward, lists: bits of one column of two", "forward", "has_bit(own_seen, j * 8 + fragment_c + e)", "has_bit(own_seen, j * 8 + fragment_c)", "output", "lists", TILES),
    Mutant("forward, lists: a block with a hidden pair is skipped", "forward", "simd_or(seen) == 0", "simd_and(seen) == 0", "output", "lists", TILES),
    Mutant("forward, lists: each lane skips by its own row", "forward", "simd_or(seen) == 0", "seen == 0", "divergence", "lists", TILES),
    Mutant("forward, lists: a block with a visible pair in each column is whole", "forward", WHOLE_BY_BITS, "simd_or(seen) == all_bits<BLOCK_K>()", "output", "lists", TILES),
    Mutant("forward, lists: keys past the end are seen", "forward", "key < keys && ", "", "output", "lists", TILES),
    Mutant("forward, lists: no barrier B1", "forward", f"{BARRIER}B1:", "// B1:", "race: key_tile", "lists", TILES),
    Mutant("forward, lists: no barrier B2", "forward", f"{BARRIER}B2:", "// B2:", "race: key_tile", "lists", TILES),
    Mutant("forward, alibi: by rows, not positions", "forward", "key - (query + keys - queries)", "key - query", "logsumexp", "lists of heads", TILES),
    Mutant("forward, alibi: the slope of the first head", "forward", "slopes[head]", "slopes[0]", "output", "lists of heads", TILES),
    Mutant("forward, alibi: as for powers of 2", "forward", "metal::fma(slope,", "metal::fma(slope * LOG2_E,", "output", "lists of heads", TILES),
    Mutant("dQ, lists: the first entry is skipped", "backward_query", "LISTS ? lists[list] : 0", "LISTS ? lists[list] + 1 : 0", "dQ", "lists", TILES),
    Mutant("dQ, lists: the last entry is skipped", "backward_query", "(lists[list + 1] - entry0)", "(lists[list + 1] - entry0 - 1)", "dQ", "lists", TILES),
    Mutant("dQ, lists: the lists of the first head", "backward_query", OF_QUERIES, "listed.batch * lists_shape[1]", "dQ", "lists of heads", TILES),
    Mutant("dQ, lists: the head of the list is not added", "backward_query", "head += listed.head;", "", "race: d", "lists of heads", TILES),
    Mutant("dQ, lists: the batch of the list is not added", "backward_query", "batch * lists_shape[0] + listed.batch", "batch * lists_shape[0]", "race: d", "lists of batches", TILES),
    Mutant("dQ, lists: bits of a tile's first rows", "backward_query", "first_query % LIST_Q, step", "0, step", "dQ", "lists", TILES),
    Mutant("dQ, lists: bits of other lanes' rows", "backward_query", "ushort(own + fragment_r)", "ushort(fragment_r)", "dQ", "lists", TILES),
    Mutant("dQ, lists: bits are not looked at", "backward_query", "(LISTS && !has_bit(", "(false && !has_bit(", "dQ", "lists", TILES),
    Mutant("dQ, lists: each lane skips by its own row", "backward_query", "simd_or(seen) == 0", "seen == 0", "divergence", "lists", TILES),
    Mutant("dQ, lists: no barrier B2", "backward_query", f"{BARRIER}B2:", "// B2:", "race: ", "lists", TILES),
    Mutant("dQ, alibi: none", "backward_query", "if (ALIBI) {", "if (false) {", "dQ", "lists of heads", TILES),
    Mutant("dK, dV, lists: the first entry is skipped", "backward_key", "entry0 = lists[list];", "entry0 = lists[list] + 1;", "dV", "lists", TILES),
    Mutant("dK, dV, lists: the last entry is skipped", "backward_key", "(lists[list + 1] - entry0)", "(lists[list + 1] - entry0 - 1)", "dV", "lists", TILES),
    Mutant("dK, dV, lists: the lists of the first head", "backward_key", "list0 + head * lists_per_head", "list0", "dV", "lists of heads", TILES),
    Mutant("dK, dV, lists: the lists of the group's first head", "backward_key", "list0 + head * lists_per_head", "list0 + key_head * group * lists_per_head", "dV", "lists of heads", TILES),
    Mutant("dK, dV, lists: shared lists differ between heads", "backward_key", "lists_shape[1] > 1 ? lists_shape[2] * LIST_RECORD : 0", "lists_shape[2] * LIST_RECORD", "out-of-bounds: lists", "lists", TILES),
    Mutant("dK, dV, lists: the key head of the list is not added", "backward_key", "key_head += listed.head;", "", "race: d_", "lists of heads", KEY_HEADS),
    Mutant("dK, dV, lists: the batch of the list is not added", "backward_key", "batch * lists_shape[0] + listed.batch", "batch * lists_shape[0]", "race: d_", "lists of batches", TILES),
    Mutant("dK, dV, lists: the lists of the first batch", "backward_key", "listed.batch * lists_shape[1] * lists_shape[2]", "0", "dV", "lists of batches", TILES),
    Mutant("dK, dV, lists: the first block of a tile for all", "backward_key", "entries[entry] * LIST_Q + step % LIST_Q", "entries[entry] * LIST_Q", "dV", "lists", TILES),
    Mutant("dK, dV, lists: one block of a tile", "backward_key", "step += BLOCK_Q", "step += LIST_Q", "dV", "lists", TILES),
    Mutant("dK, dV, lists: bits transposed", "backward_key", "step % LIST_Q, key0 % LIST_K, lane", "key0 % LIST_K, step % LIST_Q, lane", "dV", "lists", TILES),
    Mutant("dK, dV, lists: bits of the rows' first lane", "backward_key", "ushort(j * 8 + fragment_c + e)", "ushort(j * 8 + fragment_c)", "dV", "lists", TILES),
    Mutant("dK, dV, lists: bits of the first keys", "backward_key", "has_bit(row_seen, pair * 8 + fragment_r)", "has_bit(row_seen, fragment_r)", "dV", "lists", TILES),
    Mutant("dK, dV, lists: bits are not looked at", "backward_key", "(LISTS && !has_bit(", "(false && !has_bit(", "dV", "lists", TILES),
    Mutant("dK, dV, lists: a block with a visible pair in each column is whole", "backward_key", WHOLE_BY_BITS, "simd_or(seen) == all_bits<BLOCK_K>()", "dV", "lists", TILES),
    Mutant("dK, dV, lists: a block with a hidden pair is skipped", "backward_key", "simd_or(seen) == 0", "simd_and(seen) == 0", "dV", "lists", TILES),
    Mutant("dK, dV, lists: each lane skips by its own row", "backward_key", "simd_or(seen) == 0", "seen == 0", "divergence", "lists", TILES),
    Mutant("dK, dV, lists: no barrier B1", "backward_key", f"{BARRIER}B1:", "// B1:", "race: ", "lists", TILES),
    Mutant("dK, dV, lists: no barrier B3", "backward_key", f"{BARRIER}B3:", "// B3:", "race: weights", "lists", TILES),
    Mutant("dK, dV, alibi: the slope of the first head", "backward_key", "slopes[head]", "slopes[0]", "dV", "lists of heads", TILES),
)  # fmt: skip
"""Faults in the iteration over block lists, and in alibi."""


def packed(kv_format: str, shape: CallShape = MANY) -> CallShape:
    """The shape with quantized keys and values."""
    return replace(shape, kv_format=parse_kv_format(kv_format))


PACKED: Final = "forward_quantized"
QUANTIZED: Final = (
    Mutant("quantized: the scale of the first group", PACKED, "column / GROUP", "0", "output", shape=packed("int4:32")),
    Mutant("quantized: the bias of the first group", PACKED, "group * rows.bias_column", "0", "output", shape=packed("int4:32")),
    Mutant("quantized: no bias", PACKED, "MODE == AFFINE ? float(rows.biases", "false ? float(rows.biases", "output", shape=packed("int8")),
    Mutant("quantized: the first word twice", PACKED, "words[rows.number_column]", "words[0]", "output", shape=packed("int8")),
    Mutant("quantized: the second word is not read", PACKED, "shift + 8 * BITS > 32", "8 * BITS > 32", "output", shape=packed("int3")),
    Mutant("quantized: bits of the second word are lost", PACKED, "low = low >> shift | high << (32 - shift);", "low = low >> shift;", "output", shape=packed("int3")),
    Mutant("quantized: the second word is not shifted", PACKED, "high >>= shift;", "", "output", shape=packed("int5")),
    Mutant("quantized: a number across two words", PACKED, "low >> place | high << (32 - place) % 32", "low >> place", "output", shape=packed("int6")),
    Mutant("quantized: neighbours in a number", PACKED, "bits & LOWEST", "bits", "output", shape=packed("int4")),
    Mutant("quantized: rows past the end are loaded", PACKED, "if (from + row < end) {", "if (true) {", "out-of-bounds: k ", shape=packed("int4")),
    Mutant("quantized: half of a thread's values", PACKED, "column + 4) = moved[1]", "column) = moved[1]", "uninitialised read: key_tile", shape=packed("int4")),
    Mutant("quantized: half of e4m3", PACKED, "* 256.0f", "* 128.0f", "output", shape=packed("mxfp8")),
    Mutant("quantized: e4m3 has no sign", PACKED, "(bits & 128) != 0 ? -size : size", "size", "output", shape=packed("mxfp8")),
    Mutant("quantized: e2m1 has no sign", PACKED, "(bits & 8) != 0 ? -size : size", "size", "output", shape=packed("mxfp4")),
    Mutant("quantized: e8m0 is one off", PACKED, "bits << 23", "(bits + 1) << 23", "output", shape=packed("mxfp4")),
    Mutant("quantized: nvfp4 has scales of powers of two", PACKED, "MODE == NVFP4 ? from_e4m3(uint(scale)) : ", "", "output", shape=packed("nvfp4")),
    Mutant("quantized: values in the keys' format", PACKED, "packed_rows<VALUE_MODE, VALUE_BITS, VALUE_GROUP>", "packed_rows<KEY_MODE, KEY_BITS, KEY_GROUP>", "output", shape=packed("int4+int4:32")),
    Mutant("quantized: numbers of the first head", PACKED, "head * number_strides[1]", "0", "output", "full", packed("int8", FEW)),
    Mutant("quantized: scales of the first head", PACKED, "head * scale_strides[1]", "0", "output", "full", packed("int8", FEW)),
    Mutant("quantized: biases of the first head", PACKED, "head * bias_strides[1]", "0", "output", "full", packed("int8", FEW)),
    Mutant("quantized: no barrier B2", PACKED, f"{BARRIER}B2:", "// B2:", "race: key_tile", shape=packed("int4")),
    Mutant("quantized: spans overlap", PACKED, "split * span + span)", "split * span + span + 16)", "output", "full", packed("int4", FEW)),
)  # fmt: skip
"""Faults in the loading of quantized keys and values."""
