"""Block lists in the CUDA kernels: tables and launches on a simulated GPU, and results on a real one."""

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import itertools

from attention import attention, masks
from attention.core.route import Needs
from attention.core.workload import Workload
from attention.kernels import cuda
from attention.kernels.cuda import choice, path
from attention.kernels.cuda import gradients as cuda_gradients
from attention.kernels.cuda.gradients import plain_attention
from attention.kernels.cuda.portable import launch as portable_launch
from attention.kernels.cuda.runtime import launch, selfcheck
from attention.kernels.cuda.runtime.call import CallParams, CallShape
from attention.kernels.cuda.runtime.launch import list_planes
from attention.kernels.cuda.sm90 import gradient
from attention.kernels.cuda.sm90.backward import SIGHT_BITS
from attention.kernels.cuda.sm90.schedule import NO_WORK, list_schedule, list_work_items
from benchmarks.cuda.measure_portable import portable_only
from tests.support import kernel_oracle
from tests.support.cuda_planted import parameter_kinds, planted, signature

BLOCKS = 132


def patterns(shape):
    """Masks that differ by head or batch, share lists, hide rows, and have long and short lists."""
    random = np.random.default_rng(5)
    cells = random.random((shape.batch, shape.heads, -(-shape.queries // 32), -(-shape.keys // 32))) < 0.3
    cells[:, 0, :2] = False
    first = shape.keys - shape.queries
    lengths = [shape.keys // 3, 1, shape.keys - shape.keys // 3 - 1] if shape.keys > 3 else [shape.keys]
    return {
        "by head": masks.blocks(cells, block=32),
        "documents": masks.causal() & masks.documents(lengths),
        "prefix and window": masks.prefix(40) | masks.window(70),
        "padding": masks.padding([max(0, shape.keys - 150 * i) for i in range(shape.batch)]),
        "first row sees all": masks.where(lambda b, h, q, k: (q == first) | (k == q)),
    }


SHAPES = [  # batch, heads, kv_heads, queries, keys
    (1, 1, 1, 1, 1),
    (2, 4, 2, 300, 300),
    (1, 3, 1, 217, 433),
    (2, 2, 2, 65, 31),
    (3, 6, 2, 130, 100),
    (1, 2, 1, 3, 900),
    (1, 1, 1, 128, 9000),
]
NAMES = list(patterns(CallShape(1, 1, 1, 8, 8, 64, "bf16")))


@pytest.fixture
def recorder(monkeypatch):
    for on in planted(monkeypatch):
        yield on("H100").recorder


# ---- tables ------------------------------------------------------------------------------------------------------


def lists_of(size, name, block_q=128):
    shape = CallShape(*size, 64, "bf16")
    made = patterns(shape)[name].block_list(shape.scores, block_q, 128)
    return shape, made, list_planes(shape, made.batches, made.heads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SHAPES)
def test_every_entry_of_every_plane_is_one_blocks_work(size, name):
    shape, made, planes = lists_of(size, name)
    table, parts = list_work_items(BLOCKS, made.offsets, planes, made.row_tiles, 4 * shape.keys * 64, 4.0)
    assert (table[:, -1, 0] == NO_WORK[0]).all()
    items = table[table[:, :, 0] >= 0]
    covered = {}
    for plane, tile, first, end, word, *_ in items.tolist():
        covered.setdefault((plane, tile), []).append((first, end, word))
    assert covered.keys() == {(plane, tile) for plane in range(len(planes)) for tile in range(made.row_tiles)}
    places = []
    for (plane, tile), pieces in covered.items():
        index = planes[plane] * made.row_tiles + tile
        pieces.sort()
        bounds = [first for first, _, _ in pieces] + [pieces[-1][1]]
        assert bounds == [made.offsets[index], *(end for _, end, _ in pieces[:-1]), made.offsets[index + 1]]
        words = [word for _, _, word in pieces]
        if len(pieces) == 1:
            assert words == [0]
            continue
        assert {(word >> 8, word >> 4 & 15) for word in words} == {(words[0] >> 8, len(pieces))}
        assert sorted(word & 15 for word in words) == list(range(len(pieces)))
        places += [(word >> 8) + (word & 15) for word in words]
    assert sorted(places) == list(range(parts))


def test_long_lists_are_shared_out_and_blocks_end_together():
    offsets = np.cumsum([0, 2000, *[10] * 200])
    table, parts = list_work_items(BLOCKS, offsets, np.zeros(1, int), 201, 1, 4.0)
    loads = (table[:, :, 3] - table[:, :, 2]).sum(axis=1)
    assert parts > 5
    assert loads.max() < 200
    equal, _ = list_work_items(BLOCKS, np.arange(0, 257 * 64, 64), np.zeros(4, int), 256, 1, 4.0)
    loads = (equal[:, :, 3] - equal[:, :, 2]).sum(axis=1)
    assert loads.max() <= 1.1 * loads.mean()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SHAPES)
def test_the_backward_table_has_every_key_tile_with_its_steps(size, name):
    shape, made, planes = lists_of(size, name)
    lists = made.transposed()
    planes = planes.reshape(-1, shape.group)
    table = list_schedule(BLOCKS, lists.offsets, planes, made.key_tiles, 1)
    assert (table[-1, 0] == NO_WORK[0]).all()
    found = dict(table.swapaxes(1, 2)[table[:, 0] >= 0].tolist())
    steps = {}
    for plane, own in enumerate(planes):
        for tile in range(made.key_tiles):
            lists_of_tile = [lists.offsets[p * made.key_tiles + tile : p * made.key_tiles + tile + 2] for p in own]
            steps[plane * made.key_tiles + tile] = sum(int(end - begin) for begin, end in lists_of_tile)
    assert found == steps


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SHAPES)
def test_entries_say_which_halves_see_a_tile_and_the_next(size, name):
    _, made, _ = lists_of(size, name, 64)
    lists, entries = made.transposed(), gradient.sighted_entries(made)
    assert np.array_equal(entries[:, 0], lists.entries[:, 0])
    index = entries[:, 1] & (1 << SIGHT_BITS) - 1
    assert np.array_equal(np.where(index == (1 << SIGHT_BITS) - 1, -1, index), lists.entries[:, 1])
    bits = np.unpackbits(made.bits.view(np.uint8), axis=-1, bitorder="little").reshape(len(made.bits), 64, 128)
    halves = [int(tile[:, :64].any()) + 2 * int(tile[:, 64:].any()) for tile in bits]
    for begin, end in itertools.pairwise(lists.offsets.tolist()):
        seen = [3 if i < 0 else halves[i] for i in lists.entries[begin:end, 1]]
        found = entries[begin:end, 1] >> SIGHT_BITS
        assert (found & 3).tolist() == seen
        assert (found >> 2).tolist() == [*seen[1:], *seen[:1]]


# ---- launches on a simulated GPU ---------------------------------------------------------------------------------


def called(pattern, queries=300, keys=300, dim=64, heads=4, **keywords):
    q, k = mx.zeros((1, heads, queries, dim), mx.bfloat16), mx.zeros((1, 2, keys, dim), mx.bfloat16)
    return (q, k, k), cuda.flash_attention(q, k, k, scale=0.125, pattern=pattern, **keywords)


@pytest.mark.parametrize(("queries", "dim"), [(300, 64), (300, 128), (3, 128), (300, 256), (1, 64)])
def test_a_pattern_gets_a_kernel_with_lists_and_parameters(recorder, queries, dim):
    pattern = masks.prefix(40) | masks.window(70)
    primals, output = called(pattern, queries, dim=dim)
    forward = recorder.plans[-1]
    outputs = [output, mx.zeros((1, 4, queries)), mx.zeros((1, 4, queries, 2))]
    recorder.gradient(forward.label, list(primals), [output], outputs)
    assert len(recorder.plans) == 3  # with and without a gradient, and the gradient
    for plan in recorder.plans:
        for _, program, *_, arguments in plan.steps:
            assert parameter_kinds(arguments) == signature(program), program.name
            if "rows" not in program.name and "finish" not in program.name:
                assert dict(program.constants)["LISTS"] == 1, program.name


@pytest.mark.parametrize(
    ("pattern", "queries", "dim", "consumers"),
    [
        (masks.padding([290]), 300, 128, 3),  # nearly all tiles
        (masks.padding([290]), 300, 64, 3),
        (masks.padding([290]), 300, 256, 2),
        (masks.padding([100]), 300, 128, 2),
        (masks.padding([290]), 100, 128, 1),  # too few for larger tiles
    ],
)
def test_lists_of_nearly_all_tiles_get_larger_ones(recorder, pattern, queries, dim, consumers):
    called(pattern, queries, dim=dim, heads=64)
    programs = [step[1] for plan in recorder.plans for step in plan.steps]
    assert {dict(program.constants)["CONSUMERS"] for program in programs} == {consumers}
    assert all(dict(program.constants)["LISTS"] for program in programs)


@pytest.mark.parametrize(("dim", "softcap"), [(64, None), (128, None), (128, 20.0), (256, None)])
def test_only_kernels_that_skip_read_which_halves_see_a_tile(recorder, monkeypatch, dim, softcap):
    tables, put = [], gradient.on_device
    monkeypatch.setattr(gradient, "on_device", lambda *given: tables.append(given) or put(*given))
    shape = CallShape(1, 4, 2, 600, 600, dim, "bf16")
    call = CallParams(0.125, False, None, softcap, pattern=masks.prefix(140) | masks.window(70))
    gradient.backward_launch.cache_clear()
    gradient.backward_launch(shape, call)
    kernel, [(_, offsets, entries, bits)] = gradient.kernel_of(shape, call), tables
    assert kernel.skips == (dim <= 128 and softcap is None) == dict(kernel.program.constants)["SKIPS"]
    wholly = entries[:, 1] & (1 << SIGHT_BITS) - 1 == (1 << SIGHT_BITS) - 1
    assert (0 < wholly.sum() < len(entries)) and len(entries) == offsets[-1]
    assert (entries[~wholly, 1] & (1 << SIGHT_BITS) - 1).max() == len(bits) - 1
    assert (entries[wholly, 1] == -1).all() != kernel.skips
    assert (entries[:, 1] >> SIGHT_BITS > 0).any() == kernel.skips


def test_equal_patterns_share_a_plan_and_others_do_not(recorder):
    called(masks.prefix(40) | masks.window(70))
    count = len(recorder.plans)
    called(masks.prefix(40) | masks.window(70))
    assert len(recorder.plans) == count
    called(masks.prefix(41) | masks.window(70))
    assert len(recorder.plans) > count


def test_poc_takes_patterns_and_names_what_it_does_not_take(recorder):
    pattern, q = masks.prefix(40) | masks.window(70), mx.zeros((1, 4, 300, 64), mx.bfloat16)
    assert "pattern" in path.TAKES
    for mask in ("prefix:40+window:70", "pattern:0.3", "documents:128"):
        workload = Workload(heads=4, seq=300, head_dim=64, dtype="bfloat16", mask=mask)
        found = path.route(workload, Needs(pattern=True))
        assert (found.supported, found.path) == (True, path.NAMES["forward"]), found.reason
    output, logsumexp = path.with_logsumexp(q, q, q, scale=0.1, mask=masks.Mask(pattern=pattern), softcap=None)
    assert (output.shape, logsumexp.shape) == (q.shape, (1, 4, 300))


@pytest.mark.parametrize(("pattern", "batch"), [(masks.prefix(40), 10), (masks.padding([300, 170]), 2)])
def test_vmap_does_not_fold_a_pattern_that_differs_by_batch(recorder, pattern, batch):
    q, k = mx.zeros((2, 4, 300, 64), mx.bfloat16), mx.zeros((2, 2, 300, 64), mx.bfloat16)
    cuda.flash_attention(q, k, k, scale=0.125, pattern=pattern)
    label, before = recorder.plans[-1].label, len(recorder.plans)
    wide = mx.zeros((2, 4, 5, 300, 64), mx.bfloat16)
    output, logsumexp, _ = recorder.batched(label, [wide, k, k], [2, -1, -1])
    assert (output.shape, logsumexp.shape) == ((5, 2, 4, 300, 64), (5, 2, 4, 300))
    assert len(recorder.plans) - before == 1
    assert recorder.plans[-1].shapes[0] == [batch, 4, 300, 64]


@pytest.mark.parametrize("name", NAMES)
def test_the_fallback_in_mlx_applies_the_pattern(name):
    shape = CallShape(2, 4, 2, 30, 40, 16, "bf16")
    pattern, (q, k, v, _) = patterns(shape)[name], selfcheck.inputs(shape)
    output, logsumexp = plain_attention(q, k, v, CallParams(0.25, False, None, None, pattern=pattern))
    seen = np.broadcast_to(np.array(pattern.dense(shape.scores)), shape.scores)
    options = kernel_oracle.Options(0.25, mask=seen)
    exact, right, _ = kernel_oracle.attention(*(kernel_oracle.numbers(x) for x in (q, k, v)), options)
    assert np.abs(kernel_oracle.numbers(output) - exact).max() < 0.02
    assert np.array_equal(np.isneginf(kernel_oracle.numbers(logsumexp)), np.isneginf(right))


def test_a_label_keeps_its_pattern():
    shape, pattern = CallShape(1, 2, 2, 9, 9, 64, "bf16"), masks.prefix(3) | masks.window(2)
    call = CallParams(0.5, False, None, None, pattern=pattern)
    label = launch.plan_label("forward", shape, call, True)
    assert launch.parse_label(label) == ("forward", shape, call, True)


def test_causal_beside_a_pattern_is_refused(recorder):
    with pytest.raises(ValueError, match="causal and window are left out"):
        called(masks.causal(), causal=True)


def test_a_pattern_with_an_array_mask_is_general(recorder):
    called(masks.prefix(40), mask=mx.ones((300, 300), mx.bool_))
    [(_, program, *_)] = recorder.plans[-1].steps
    constants = dict(program.constants)
    assert (program.name, constants["LISTS"], constants["MASK"]) == ("flash_general", 1, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("splits", [1, 3])
def test_general_work_covers_every_entry_longest_first(name, splits):
    shape, made, planes = lists_of((2, 4, 2, 300, 300), name)
    items = portable_launch.list_work_items(shape, made, splits)
    lengths = (items[:, 3] - items[:, 2]).reshape(-1, splits).sum(axis=1)
    assert (np.diff(lengths) <= 0).all()
    by_tile = items.reshape(-1, splits, 4)
    assert {tuple(work[:2]) for work in items.tolist()} == {
        (plane, tile) for plane in range(len(planes)) for tile in range(made.row_tiles)
    }
    for pieces in by_tile.tolist():
        index = planes[pieces[0][0]] * made.row_tiles + pieces[0][1]
        assert [pieces[0][2], pieces[-1][3]] == made.offsets[index : index + 2].tolist()
        assert all(a[3] == b[2] for a, b in itertools.pairwise(pieces))


# ---- on a GPU ----------------------------------------------------------------------------------------------------

gpu = pytest.mark.gpu
usable = pytest.mark.skipif(not cuda.availability()[0], reason=cuda.availability()[1])


def checked(size, dim, dtype, name, general=False, softcap=None, seed=0):
    """Check output, logsumexp and gradients of a call with a pattern by FlashAttention 3's rule."""
    shape = CallShape(*size, dim, {"bfloat16": "bf16", "float16": "f16"}[dtype])
    pattern, made = patterns(shape)[name], selfcheck.inputs(shape, seed)
    seen = np.broadcast_to(np.array(pattern.dense(shape.scores)), shape.scores)
    options = kernel_oracle.Options(dim**-0.5, softcap=softcap, mask=seen)
    arrays, kind = [kernel_oracle.numbers(x) for x in made], kernel_oracle.DTYPES[dtype]
    call = CallParams(dim**-0.5, False, None, softcap, pattern=pattern)

    def attend(*given):
        return cuda.flash_attention_with_logsumexp(*given, scale=dim**-0.5, softcap=softcap, pattern=pattern)

    output, logsumexp = attend(*made[:3])
    gradients = mx.vjp(lambda *given: attend(*given)[0], made[:3], made[3:])[1]
    kernel_oracle.poison()
    mx.eval(output, logsumexp, gradients)
    assert choice.path_of(shape, call) == ("general" if general else "forward", [])
    assert cuda_gradients.refusal(shape, call) is None
    exact, right, _ = kernel_oracle.attention(*arrays[:3], options)
    plain = kernel_oracle.plain_attention(*arrays[:3], options, kind)
    kernel_oracle.assert_near(output, exact, plain, kind, 2, f"{size} {name}: output")
    found = kernel_oracle.numbers(logsumexp)
    assert np.array_equal(np.isneginf(found), np.isneginf(right))
    with np.errstate(invalid="ignore"):
        assert np.nanmax(np.abs(found - right), initial=0) < 1e-3
    exact = kernel_oracle.gradients(*arrays, options)
    plain = kernel_oracle.plain_gradients(*arrays, options, kind)
    for what, own, wanted, rounded in zip(("dQ", "dK", "dV"), gradients, exact, plain, strict=True):
        kernel_oracle.assert_near(own, wanted, rounded, kind, 3, f"{size} {name}: {what}")


@gpu
@usable
@pytest.mark.skipif(cuda.variant() != "hopper", reason="only Hopper GPUs have kernels of their own for many queries")
@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, "bfloat16"), (96, "float16"), (128, "bfloat16"), (192, "float16"), (256, "bfloat16")]
)
@pytest.mark.parametrize("name", NAMES)
def test_results_meet_flash_attention_3s_error_bound(name, dim, dtype):
    for seed, size in enumerate(SHAPES):
        checked(size, dim, dtype, name, seed=seed)


@gpu
@usable
@pytest.mark.skipif(cuda.variant() != "hopper", reason="only Hopper GPUs have kernels of their own for many queries")
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_softcaps_combine_with_lists(dim):
    for name in NAMES:
        checked((2, 4, 2, 300, 300), dim, "bfloat16", name, softcap=1.5)


@gpu
@usable
@pytest.mark.parametrize("dim", [64, 80, 256])
@pytest.mark.parametrize("name", NAMES)
def test_the_general_kernels_meet_the_bound_too(name, dim):
    with portable_only():
        for seed, size in enumerate(SHAPES[2:6]):
            checked(size, dim, "bfloat16", name, general=True, seed=seed)


@gpu
@usable
@pytest.mark.slow
@pytest.mark.parametrize("windowed", [False, True], ids=["documents", "window"])
def test_memory_does_not_grow_with_the_scores_of_a_million_keys(windowed):
    length, window = 1 << 20, 4096
    mask = masks.window(window) if windowed else masks.causal() & masks.documents([window] * (length // window))
    q, k, v = (mx.random.normal((1, 2, length, 64), key=mx.random.key(n)).astype(mx.bfloat16) for n in range(3))
    last = slice(-300, None)

    def attend(*given, mask):
        return attention(*given, mask=mask, implementation="poc")

    mx.eval(q, k, v)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out, gradients = mx.vjp(lambda *given: attend(*given, mask=mask), [q, k, v], [q])
    mx.eval(out, gradients)
    assert mx.get_peak_memory() - before < 10 * q.nbytes  # the scores would take 8,192 times as much
    near = attend(q[:, :, last], k[:, :, -2 * window :], v[:, :, -2 * window :], mask=masks.window(window))
    if windowed:
        assert mx.allclose(out[0][:, :, last], near, atol=2e-2, rtol=2e-2).item()


@gpu
@usable
def test_the_same_input_gives_the_same_bits():
    shape = CallShape(1, 2, 1, 300, 9000, 128, "bf16")
    pattern, made = patterns(shape)["first row sees all"], selfcheck.inputs(shape)
    first = cuda.flash_attention(*made[:3], scale=0.1, pattern=pattern)
    for _ in range(5):
        assert mx.array_equal(first, cuda.flash_attention(*made[:3], scale=0.1, pattern=pattern)).item()
