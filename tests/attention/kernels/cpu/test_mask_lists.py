"""Block lists made by compiled code are those that NumPy makes; when it is loaded, and when compiled."""

import itertools

import numpy as np
import pytest

from attention import masks
from attention.core.errors import KernelUnavailable
from attention.kernels import cpu
from attention.kernels.cpu import library, listing
from attention.kernels.cpu.mask_lists import Builder
from attention.masks import block_list
from attention.masks.tiles import Grid
from tests.support import mask_values


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """Leave the code that lists are made by as it was."""
    monkeypatch.setattr(block_list, "_builder", None)


@pytest.fixture(scope="module")
def builder(compiled_kernel):
    cpu.load(parts=listing.PARTS)
    return Builder(library._loaded)


class Counting(Builder):
    """Counts lists that were made."""

    count = 0

    def of_blocks(self, blocks, grid):
        self.count += 1
        return super().of_blocks(blocks, grid)

    def of_intervals(self, low, high, grid):
        self.count += 1
        return super().of_intervals(low, high, grid)


def check(builder, pattern, grid):
    """Compare the lists of both, and return whether compiled code took the mask."""
    counting = Counting(builder._module)
    found, expected = block_list.build(pattern, grid, counting), block_list.build(pattern, grid)
    assert found.pairs == expected.pairs
    assert np.array_equal(found.offsets, expected.offsets)
    assert np.array_equal(found.entries[:, 0], expected.entries[:, 0])
    assert np.array_equal(found.entries[:, 1] < 0, expected.entries[:, 1] < 0)
    assert np.array_equal(found.dense(), expected.dense())
    assert found.entries[:, 1].max(initial=-1) < len(found.bits)
    return counting.count == 1


IN_INTERVALS = (
    mask_values.causal,
    mask_values.window,
    mask_values.prefix,
    mask_values.of_documents,
    mask_values.padding,
)


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("seed", range(60))
def test_lists_of_adjacent_keys_are_those_of_numpy(builder, seed):
    random = np.random.default_rng(seed)
    shape = int(random.integers(1, 3)), 2, int(random.integers(1, 500)), int(random.integers(1, 500))
    pattern = IN_INTERVALS[seed % 5](random, shape)[0]
    for _ in range(int(random.integers(3))):
        pattern = pattern & IN_INTERVALS[random.integers(5)](random, shape)[0]
    tile = [(64, 128), (128, 128), (48, 32), (192, 64), (1, 256)][random.integers(5)]
    assert check(builder, pattern, Grid(*shape, *tile))


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(("block", "tile"), [(128, (128, 128)), (128, (64, 128)), (128, (128, 64)), (512, (64, 64))])
def test_lists_of_blocks_are_those_of_numpy(builder, density, block, tile):
    flags = np.random.default_rng(3).random((1, 2, -(-1280 // block), -(-2304 // block))) < density
    assert check(builder, masks.blocks(flags, block=block), Grid(1, 2, 1280, 2304, *tile))


@pytest.mark.parametrize("density", [0.02, 0.1, 0.2, 0.3, 0.9])
def test_long_rows_of_blocks_are_listed_by_words_of_64_flags(builder, density):
    flags = np.random.default_rng(4).random((1, 2, 3, 200)) < density
    assert check(builder, masks.blocks(flags, block=32), Grid(1, 2, 96, 6400, 32, 32))


def test_blocks_beyond_the_scores_are_those_of_numpy(builder):
    flags = np.array([[[[True, False, True]]], [[[False, True, True]]]])
    assert check(builder, masks.blocks(flags, block=1024), Grid(2, 1, 256, 2560, 64, 128))


@pytest.mark.sampled(0.4)
@pytest.mark.parametrize("seed", range(10))
def test_other_masks_are_left_to_numpy(builder, seed):
    random, shape = np.random.default_rng(seed), (1, 2, 200, 300)
    pattern = masks.dilated(5, 3) & mask_values.draw(random, shape)[0]
    assert not check(builder, pattern, Grid(*shape, 64, 128))


def test_addresses_of_other_arrays_are_refused(builder):
    grid = Grid(1, 1, 256, 256, 64, 128)
    with pytest.raises(ValueError, match="intervals: got int64"):
        builder.of_intervals(*[np.zeros((1, 256), np.int64)] * 2, grid)
    with pytest.raises(ValueError, match=r"blocks: got bool \(1, 1, 3, 2\)"):
        builder.of_blocks(block_list.BlockFlags(np.ones((1, 1, 3, 2), bool), 2, 1), grid)


@pytest.fixture
def loads(monkeypatch):
    """Simulate a process that has made no list; return the calls that load compiled code."""
    made = []
    monkeypatch.setattr(listing, "_spent_s", 0.0)
    monkeypatch.setattr(listing, "_next_s", listing.LOAD_AFTER_S)

    def load(parts):
        made.append(parts)

    monkeypatch.setattr(library, "load", load)
    return made


def take(monkeypatch, seconds, count=1):
    """Make lists that take some time each."""
    clock = itertools.chain.from_iterable((start, start + seconds) for start in range(count))
    monkeypatch.setattr(listing.time, "thread_time", lambda: next(clock))
    for _ in range(count):
        assert listing.block_list(masks.window(70), (1, 1, 300, 300), 64, 128).pairs


def test_compiled_code_is_loaded_once_lists_take_long(loads, monkeypatch):
    monkeypatch.setattr(library, "is_compiled", lambda parts: True)
    take(monkeypatch, 0.4 * listing.LOAD_AFTER_S, 2)
    assert not loads
    take(monkeypatch, 0.4 * listing.LOAD_AFTER_S)
    assert loads == [listing.PARTS]


def test_nothing_is_compiled_for_few_lists(loads, monkeypatch):
    monkeypatch.setattr(library, "is_compiled", lambda parts: False)
    take(monkeypatch, 0.15 * listing.COMPILE_AFTER_S, 6)
    assert not loads
    take(monkeypatch, 0.15 * listing.COMPILE_AFTER_S, 3)
    assert loads == [listing.PARTS]


def test_without_a_compiler_it_is_not_tried_again(loads, monkeypatch):
    def fail(parts):
        loads.append(parts)
        raise KernelUnavailable("no C++ compiler found")

    monkeypatch.setattr(library, "is_compiled", lambda parts: False)
    monkeypatch.setattr(library, "load", fail)
    take(monkeypatch, 2 * listing.COMPILE_AFTER_S, 4)
    assert len(loads) == 1
