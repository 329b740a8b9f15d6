"""Streaming states against float64 over the same kept tokens."""

import pickle
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from attention import Rope, StreamingKV, UsageError, attention, quantized
from attention.core.kv_format import parse_kv_format
from tests.support.streaming_calls import ROPES, close, expected, made, rope_of
from tests.support.streaming_oracle import Sequence


@pytest.mark.sampled(0.3)
@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(("first", "window", "spare"), [(4, 10, 0), (0, 5, 0), (3, 7, 4), (2, 1, 0)])
@pytest.mark.parametrize("implementation", ["practical", "poc"])
def test_chunks_of_any_length(rope, first, window, spare, implementation):
    """Steps and chunks longer than the window, through the wrap-around, equal float64."""
    state = StreamingKV(first, window, rope=rope_of(rope), spare=spare)
    oracle = Sequence(first, window, spare, rope)
    for seed, length in enumerate((2, 1, 30, 1, 1, 5, 1, 19, *[1] * 12)):
        q, k, v = made(length, seed=seed)
        got = state.attend(*map(mx.array, (q, k, v)), implementation=implementation)
        assert close(got[0], expected(oracle, q[0], k[0], v[0]))
    assert state.kept().tolist() == oracle.kept()
    assert state.position == len(oracle.tokens)


def test_rows_of_a_batch_have_their_own_lengths():
    """Each row of a batch goes on from its own tokens; queries after its new ones give 0."""
    state = StreamingKV(2, 6, rope=Rope(16))
    rows = [Sequence(2, 6, rope=ROPES["halves"]) for _ in range(3)]
    for seed, lengths in enumerate([(5, 0, 2), (1, 1, 1), (9, 3, 0), (1, 1, 1), (1, 0, 1), (1, 1, 1)]):
        q, k, v = made(max(lengths), batch=3, seed=seed)
        got = state.attend(*map(mx.array, (q, k, v)), lengths=lengths)
        for b, length in enumerate(lengths):
            if length:
                assert close(got[b, :, :length], expected(rows[b], *(x[b, :, :length] for x in (q, k, v))))
            assert mx.all(got[b, :, length:] == 0)
    assert state.position == [len(row.tokens) for row in rows]


def test_rows_that_differ_in_a_full_ring():
    """Rows whose rings are full at different slots are attended to together."""
    state = StreamingKV(1, 4)
    rows = [Sequence(1, 4) for _ in range(2)]
    for seed, lengths in enumerate([(9, 7), *[(1, 1)] * 5]):
        q, k, v = made(max(lengths), batch=2, seed=seed)
        got = state.attend(*map(mx.array, (q, k, v)), lengths=lengths)
        for b, length in enumerate(lengths):
            assert close(got[b, :, :length], expected(rows[b], *(x[b, :, :length] for x in (q, k, v))))


def test_a_state_is_what_attention_takes():
    """`attention` over an updated state is the state's own step."""
    one, other = StreamingKV(2, 6), StreamingKV(2, 6)
    for seed, length in enumerate((9, 1, 1)):
        q, k, v = map(mx.array, made(length, seed=seed))
        assert mx.array_equal(
            attention(q, *one.update(k, v), implementation="practical"),
            other.attend(q, k, v, implementation="practical"),
        )


@pytest.mark.parametrize("rope", [None, ROPES["halves"]], ids=["none", "rope"])
def test_full_heads_beside_streaming_ones(rope):
    """Full heads see all tokens, streaming ones their window, in one call."""
    state = StreamingKV(2, 5, rope=rope_of(rope), heads=["full", "streaming"])
    whole, recent = Sequence(0, 10**6, rope=rope), Sequence(2, 5, rope=rope)
    for seed, length in enumerate((9, 1, 1, 4, 1)):
        q, k, v = made(length, seed=seed)
        got = state.attend(*map(mx.array, (q, k, v)))[0]
        assert close(got[:2], expected(whole, q[0, :2], k[0, :1], v[0, :1]))
        assert close(got[2:], expected(recent, q[0, 2:], k[0, 1:], v[0, 1:]))


@pytest.mark.parametrize("kv_format", ["int8", "int4", "int8:32+mxfp4"])
def test_quantized_storage(kv_format):
    """A step reads what `mx.quantize` makes of each token."""
    forms = parse_kv_format(kv_format)
    state, oracle = StreamingKV(2, 6, kv_format), Sequence(2, 6)
    for seed in range(14):
        q, k, v = made(1, seed=seed, width=64)
        got = state.attend(*map(mx.array, (q, k, v)))[0]
        read = [quantized(mx.array(x), f).exact() for x, f in zip((k, v), (forms.key, forms.value), strict=True)]
        assert close(got, expected(oracle, q[0], read[0][0], read[1][0]), 2e-5)
    assert state.format == kv_format


def test_a_fork_goes_on_by_itself():
    """Neither of two forks sees the other's tokens."""
    state, oracle = StreamingKV(2, 6), Sequence(2, 6)
    q, k, v = made(11)
    expected(oracle, q[0], k[0], v[0])
    state.append(mx.array(k), mx.array(v))
    twin = state.fork()
    again = Sequence(2, 6, tokens=[*oracle.tokens], lost=oracle.lost)
    for seed in range(9):
        for one, row, more in ((state, oracle, 100), (twin, again, 200)):
            q, k, v = made(1, seed=seed + more)
            assert close(one.attend(*map(mx.array, (q, k, v)))[0], expected(row, q[0], k[0], v[0]))


BETWEEN = {
    "a chunk": lambda state, q, k, v: state.append(k[:, :, :3], v[:, :, :3]),
    "a fork": lambda state, q, k, v: state.fork().append(k[:, :, :1], v[:, :, :1]),
    "a fork that is kept": lambda state, q, k, v: vars(state).setdefault("twin", state.fork()),
    "a rewind": lambda state, q, k, v: state.rewind(2),
    "an update": lambda state, q, k, v: state.update(k[:, :, :1], v[:, :, :1]),
    "another scale": lambda state, q, k, v: state.attend(q[:, :, :1], k[:, :, :1], v[:, :, :1], scale=0.5),
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kv_format", [None, "int8:32"])
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_repeated_steps_after_something_else(between, kv_format, dtype):
    """Steps that repeat the one before have the bits of steps by themselves, whatever comes between them."""
    states = [StreamingKV(2, 6, kv_format, rope=Rope(32), spare=2) for _ in range(2)]
    q, k, v = (mx.array(x).astype(dtype) for x in made(40, batch=2, width=32))
    mx.eval(q, k, v)
    for t in range(12, 36):
        outputs = []
        for state, repeats in zip(states, (True, False), strict=True):
            if t == 12:
                state.append(k[:, :, :12], v[:, :, :12])
            if t == 24:
                between(state, q, k, v)
            if not repeats:
                state._fused.again = None
            new = [x[:, :, t : t + 1] for x in (q, k, v)]
            if t % 8:
                mx.eval(new)
            outputs.append(state.attend(*new))
        assert mx.array_equal(*outputs)
        assert states[0].kept().tolist() == states[1].kept().tolist()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("repeats", [True, False])
def test_lazy_inputs_do_not_copy_the_ring(repeats):
    """A step on a CPU whose inputs are not evaluated is written in place, as others are."""
    state, oracle = StreamingKV(1, 4), Sequence(1, 4)
    for seed in range(8):
        q, k, v = made(1, seed=seed)
        before = [*state._kept["streaming"].keys.arrays] if seed else []
        if not repeats:
            state._fused.again = None
        got = state.attend(*(mx.array(x) * 1 for x in (q, k, v)))
        assert close(got[0], expected(oracle, q[0], k[0], v[0]))
        if seed > 1:  # the first step of all is attended to part by part
            assert all(a is b for a, b in zip(before, state._kept["streaming"].keys.arrays, strict=True))


@pytest.mark.usefixtures("kernel")
def test_steps_of_a_full_ring_are_repeated():
    """What makes a step on a CPU like the one before is kept while nothing else comes between."""
    state = StreamingKV(1, 4)
    tokens = [mx.array(x) for x in made(1)]
    for _ in range(9):
        state.attend(*tokens)
    again = state._fused.again
    assert again is not None
    state.attend(*tokens)
    assert state._fused.again is again
    state.append(*tokens[1:])
    assert state._fused.again is None


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("flag", ["no", 0, 0.0, 1, np.bool_(False), None])
def test_repeated_steps_take_flags_only(flag):
    """What merely equals the flag of the step before is refused as in other steps, and nothing is stored."""
    state, tokens = StreamingKV(1, 4), [mx.array(x) for x in made(1)]
    for _ in range(9):
        state.attend(*tokens)
    assert state._fused.again is not None
    with pytest.raises(UsageError, match=r"rotated: got .*; it takes True or False"):
        state.attend(*tokens, rotated=flag)
    assert state.position == 9


def test_cpu_steps_wait_for_those_of_cuda():
    """A step on the CPU evaluates what steps on CUDA left in the slots, and is repeated as a step on the CPU."""
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("steps on the CPU only")
    state, tokens = StreamingKV(1, 4), [mx.array(x) for x in made(1)]
    for _ in range(8):
        state.attend(*tokens)
    state._fused.latest, state._fused.again = mx.zeros(1) + 1, None
    state.attend(*tokens)
    assert state._fused.latest is None and state._fused.again is not None


def test_spare_slots_make_rewinds_exact():
    """With spare slots a rewound state computes as if the tokens had never come."""
    q, k, v = map(mx.array, made(20))
    some, never = StreamingKV(2, 6, spare=4), StreamingKV(2, 6, spare=4)
    for one, tokens in ((some, 20), (never, 16)):
        for t in range(tokens):
            one.attend(*(x[:, :, t : t + 1] for x in (q, k, v)))
    some.rewind(4)
    assert some.kept().tolist() == never.kept().tolist()
    last = [x[:, :, :1] for x in (q, k, v)]
    assert mx.array_equal(some.attend(*last), never.attend(*last))


def test_a_rewind_beyond_what_is_kept():
    """A rewind takes back at most what the ring has."""
    state = StreamingKV(2, 6)
    state.append(*map(mx.array, made(20)[1:]))
    with pytest.raises(UsageError, match="tokens: got 7; this state can take back from 0 to 6"):
        state.rewind(7)


def test_memory_does_not_grow():
    """Storage is allocated once."""
    state = StreamingKV(4, 32, "int8")
    sizes = set()
    for seed in range(50):
        _, k, v = made(3, seed=seed, width=64)
        state.append(mx.array(k), mx.array(v))
        sizes.add(state.nbytes)
    assert sizes == {2 * 2 * 36 * (64 + 2 * 4)}


RESUME = """
import mlx.core as mx, sys
from attention import StreamingKV
state, arrays = StreamingKV.load(sys.argv[1]), mx.load(sys.argv[2])
out = [state.attend(*(arrays[n][:, :, t:t + 1] for n in "qkv")) for t in range(arrays["q"].shape[2])]
mx.save_safetensors(sys.argv[3], {"out": mx.concatenate(out, 2)})
"""


@pytest.mark.slow  # starts an interpreter
@pytest.mark.parametrize("kv_format", [None, "int4"])
def test_another_process_goes_on_with_the_same_bits(tmp_path, kv_format):
    """A saved state, loaded elsewhere, gives the bits that the uninterrupted one gives."""
    state = StreamingKV(4, 20, kv_format, rope=Rope(64))
    state.append(*map(mx.array, made(57, width=64)[1:]))
    state.save(tmp_path / "state")
    arrays = dict(zip("qkv", map(mx.array, made(30, seed=1, width=64)), strict=True))
    mx.save_safetensors(str(tmp_path / "in.safetensors"), arrays)
    files = [str(tmp_path / name) for name in ("state", "in.safetensors", "out.safetensors")]
    subprocess.run([sys.executable, "-c", RESUME, *files], check=True, cwd=Path(__file__).parents[3])
    resumed = mx.load(files[2])["out"]
    own = [state.attend(*(arrays[n][:, :, t : t + 1] for n in "qkv")) for t in range(30)]
    assert mx.array_equal(resumed, mx.concatenate(own, 2))


def test_a_loaded_state_is_the_saved_one(tmp_path):
    """Settings, tokens and positions come back, of full heads and rows with their own lengths; from a pickle too."""
    state = StreamingKV(
        2, 5, "int8+int4", rope=Rope(64, freqs=mx.arange(1.0, 33.0)), heads=["streaming", "full"], spare=1
    )
    state.append(*map(mx.array, made(13, batch=2, width=64)[1:]), lengths=[13, 4])
    state.save(tmp_path / "state")
    q, k, v = map(mx.array, made(1, batch=2, seed=5, width=64))
    wanted = state.fork().attend(q, k, v)
    for again in (StreamingKV.load(tmp_path / "state"), pickle.loads(pickle.dumps(state))):
        assert (again.position, again.format, again.heads, again.layout) == (
            state.position,
            state.format,
            state.heads,
            state.layout,
        )
        assert mx.array_equal(again.attend(q, k, v), wanted)


@pytest.mark.thorough
def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """MLX raises RuntimeError; what was saved before stays."""
    program = (
        "import resource, signal, sys; from pathlib import Path; import mlx.core as mx\n"
        "from attention import StreamingKV\n"
        "mx.set_default_device(mx.cpu)\n"
        "state = StreamingKV(2, 500)\n"
        "state.append(*[mx.zeros((1, 2, 9, 64))] * 2)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: state.save(sys.argv[1])\n"
        "except OSError as error: print(error)"
    )
    (tmp_path / "state").write_text("before")
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "state")], capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "state") in ran.stdout
    assert len(ran.stdout.splitlines()) == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("damage", ["truncated", "a byte", "empty", "another file"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, damage):
    """Nothing is loaded from a file that is not whole."""
    path = tmp_path / "state"
    state = StreamingKV(2, 5)
    state.append(*map(mx.array, made(9)[1:]))
    state.save(path)
    whole = path.read_bytes()
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.zeros(3)})
    bad = {
        "truncated": whole[:-40],
        "a byte": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        "empty": b"",
        "another file": (tmp_path / "other.safetensors").read_bytes(),
    }[damage]
    path.write_bytes(bad)
    with pytest.raises(UsageError) as raised:
        StreamingKV.load(path)
    assert str(raised.value).startswith(f"{path}: not a saved StreamingKV, or damaged: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", [3, None, b"state", ["state"]])
def test_what_is_no_path_is_named(path):
    """Neither loading nor saving takes it."""
    for call in (StreamingKV.load, StreamingKV().save):
        with pytest.raises(UsageError, match=r"path: got .*; it takes a str or a pathlib\.Path"):
            call(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first": -1}, "first: got -1; it takes a whole number from 0"),
        ({"window": 0}, "window: got 0; it takes a whole number from 1"),
        ({"format": "int9"}, "int9"),
        ({"format": 8}, "format: got int; it takes None or a name"),
        ({"heads": "some"}, "heads: got 'some'"),
        ({"rope": 16}, "rope: got int; it takes None or attention.Rope"),
    ],
)
def test_invalid_settings(arguments, message):
    """A bad argument is named, with what would be right."""
    with pytest.raises(UsageError, match=message):
        StreamingKV(**arguments)


def test_whole_numbers_of_any_size_are_bases():
    x = mx.ones((1, 1, 3, 8))
    turned = [StreamingKV(2, 4, rope=Rope(8, base=base)).attend(x, x, x) for base in (10**20, 1e20)]
    assert mx.array_equal(*turned)


@pytest.mark.parametrize("value", [3, None, StreamingKV, [1]])
def test_an_invalid_implementation_is_named(value):
    x = mx.ones((1, 1, 3, 8))
    with pytest.raises(UsageError, match=r"implementation: got .*; it takes a name, or an object"):
        StreamingKV(2, 4).attend(x, x, x, implementation=value)


def test_new_tokens_are_like_the_first_ones():
    """Another shape or dtype than that of the first call is refused."""
    state = StreamingKV()
    _, k, v = map(mx.array, made(3))
    state.append(k, v)
    with pytest.raises(UsageError, match=r"this state has mlx\.core\.float32 with batch 1, 2 heads and width 16"):
        state.append(k[..., :8], v)
    with pytest.raises(UsageError, match=r"k: got mlx\.core\.float16"):
        state.append(k.astype(mx.float16), v.astype(mx.float16))
    with pytest.raises(UsageError, match=r"mask: got one; with a StreamingKV it takes None or 'causal'"):
        attention(k, *state.update(k, v), mask=mx.ones((3, 3)))
    with pytest.raises(UsageError, match="window: got 0; with a StreamingKV it takes None\nreturn_lse: got True"):
        attention(k, *state.update(k, v), window=0, return_lse=True)


@pytest.mark.parametrize("rope", [None, ROPES["halves"]], ids=["none", "rope"])
@pytest.mark.parametrize("length", [1, 7, 30])
def test_positions_beyond_32_bits(rope, length):
    """Far behind 2^31 tokens a chunk still sees its windows."""
    state, oracle = StreamingKV(2, 12, rope=rope_of(rope)), Sequence(2, 12, rope=rope)
    q, k, v = made(40)
    state.append(mx.array(k), mx.array(v))
    expected(oracle, q[0], k[0], v[0])
    for row in state._rows:
        row.seen, row.oldest = row.seen + 12 * 2**30, row.oldest + 12 * 2**30  # whole laps of the ring
    for seed, tokens in enumerate((length, 1)):
        q, k, v = made(tokens, seed=seed)
        assert close(state.attend(*map(mx.array, (q, k, v)))[0], expected(oracle, q[0], k[0], v[0]))


class Fails:
    """An implementation that fails when it is called."""

    name = "fails"

    def route(self, workload, device):
        """Never asked."""

    def __call__(self, *arguments, **named):
        """Fail."""
        raise RuntimeError("failed")


def test_a_failed_step_takes_the_token_that_it_overwrote():
    """A rewind after a step that raised does not bring back a slot with another token in it."""
    state = StreamingKV(2, 6)
    state.append(*map(mx.array, made(20)[1:]))
    with pytest.raises(RuntimeError, match="failed"):
        state.attend(*map(mx.array, made(1, seed=1)), implementation=Fails())
    assert (state.position, state.removable()) == (20, 5)
    state.rewind(1)
    assert state.kept().tolist() == [0, 1, 15, 16, 17, 18]


@pytest.mark.parametrize("sinks", [mx.zeros(1), mx.zeros(3), mx.zeros((1, 4)), mx.zeros(4, mx.int32), [0.0] * 4])
def test_sinks_are_one_number_a_query_head(sinks):
    """Other shapes and types are refused, before a token is stored."""
    state = StreamingKV(2, 6)
    with pytest.raises(UsageError, match=r"sinks: got .*; it takes None, or float32, .* of shape \(4,\)"):
        state.attend(*map(mx.array, made(1)), sinks=sinks)
    assert state.position == 0


def test_rows_that_do_not_exist():
    """A row of the batch is counted from 0."""
    state = StreamingKV(2, 6)
    state.append(*map(mx.array, made(9, batch=2)[1:]))
    for call in (state.kept, lambda row: state.rewind(0, row=row), lambda row: state.removable(row=row)):
        for row in (2, -1, "x"):
            with pytest.raises(UsageError, match=f"row: got {row!r}; it takes a whole number from 0 to 1"):
                call(row)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 0.0}, "softcap: got 0.0; it takes a number from 1e-30"),
        ({"softcap": -1.0}, "softcap: got -1.0; it takes a number"),
        ({"scale": float("nan")}, "scale: got nan; it takes a number"),
        ({"scale": "x"}, "scale: got 'x'; it takes a number"),
        ({"lengths": 1}, "lengths: got 1; it takes 1 whole numbers"),
        ({"rotated": "no"}, "rotated: got 'no'; it takes True or False"),
    ],
)
def test_invalid_arguments_of_a_call(arguments, message, tokens):
    """A step refuses what a chunk refuses, and stores nothing."""
    state = StreamingKV(2, 6)
    state.append(*map(mx.array, made(9)[1:]))
    with pytest.raises(UsageError, match=message):
        state.attend(*map(mx.array, made(tokens)), **arguments)
    assert state.position == 9


@pytest.mark.parametrize(
    "wrong",
    [
        *({"base": 0}, {"base": -1.0}, {"base": 10**400}, {"scale": "x"}, {"scale": 1e31}, {"freqs": [1.0, 2.0]}),
        *({"dims": 10**30}, {"traditional": "no"}),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_invalid_rope(wrong):
    """A bad field is named."""
    with pytest.raises(UsageError, match=f"rope: got {next(iter(wrong))} "):
        Rope(**{"dims": 4, **wrong})


class Streams(RuleBasedStateMachine):
    """Forks, rewinds, steps, chunks and files of states, each beside its oracle."""

    states = Bundle("states")

    @rule(
        target=states,
        first=st.integers(0, 4),
        window=st.integers(1, 9),
        spare=st.integers(0, 3),
        rope=st.sampled_from([*ROPES.values()]),
    )
    def start(self, first, window, spare, rope):
        return StreamingKV(first, window, rope=rope_of(rope), spare=spare), Sequence(first, window, spare, rope)

    @rule(pair=states, length=st.sampled_from([1, 1, 1, 2, 5, 23]), seed=st.integers(0, 10**6))
    def attend(self, pair, length, seed):
        state, oracle = pair
        q, k, v = made(length, seed=seed)
        got = state.attend(*map(mx.array, (q, k, v)))
        assert close(got[0], expected(oracle, q[0], k[0], v[0]))

    @rule(pair=states, length=st.integers(1, 7), seed=st.integers(0, 10**6))
    def append(self, pair, length, seed):
        state, oracle = pair
        q, k, v = made(length, seed=seed)
        state.append(mx.array(k), mx.array(v))
        expected(oracle, q[0], k[0], v[0])

    @rule(pair=states, share=st.floats(0, 1))
    def rewind(self, pair, share):
        state, oracle = pair
        tokens = int(share * state.removable())
        state.rewind(tokens)
        oracle.rewind(tokens)
        assert state.kept().tolist() == oracle.kept()

    @rule(target=states, pair=states)
    def fork(self, pair):
        state, oracle = pair
        copy = Sequence(oracle.first, oracle.window, oracle.spare, oracle.rope, [*oracle.tokens], oracle.lost)
        return state.fork(), copy

    @rule(target=states, pair=consumes(states))
    def save_and_load(self, pair):
        import tempfile

        state, oracle = pair
        with tempfile.TemporaryDirectory() as folder:
            state.save(f"{folder}/state")
            return StreamingKV.load(f"{folder}/state"), oracle


class TestStreams(Streams.TestCase):
    """The short profile."""

    settings = settings(max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=[*HealthCheck])


@pytest.mark.slow  # half a minute
class TestManyStreams(Streams.TestCase):
    """The long profile."""

    settings = settings(max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=[*HealthCheck])


@pytest.mark.slow  # 200,000 tokens
@pytest.mark.parametrize("rope", [None, ROPES["halves"]], ids=["none", "rope"])
def test_500_random_points_of_a_long_stream(rope):
    """Far from its beginning a stream is still attention over exactly the tokens that are kept."""
    rng = np.random.default_rng(3)
    q, k, v = (x[0] for x in made(997, seed=4))  # token p is token p % 997 of these
    arrays = [[mx.array(x[None, :, t : t + 1]) for t in range(997)] for x in (q, k, v)]
    state, first, window, at = StreamingKV(4, 100, rope=rope_of(rope), spare=8), 4, 100, 0
    for point in np.sort(rng.choice(200_000, 500, replace=False)).tolist():
        while at < point:
            state.attend(*(x[at % 997] for x in arrays))
            at += 1
        if rng.random() < 0.3:
            state = state.fork()
        if rng.random() < 0.3:
            back = min(at, int(rng.integers(1, 9)))
            state.rewind(back)
            at -= back
        kept = [p % 997 for p in [*range(min(first, at + 1)), *range(max(first, at + 1 - window), at + 1)]]
        oracle = Sequence(
            first, window, rope=rope, tokens=[(k[:, p].astype(float), v[:, p].astype(float)) for p in kept]
        )
        got = state.attend(*(x[at % 997] for x in arrays))
        assert close(got[0, :, 0], oracle.attend(q[:, at % 997].astype(float)))
        at += 1


def test_what_changes_after_an_update_is_stored_as_it_was() -> None:
    q, k, v = (mx.random.normal((2, 2, 3, 16), key=mx.random.key(n)) for n in range(3))
    wanted = StreamingKV(1, 4).attend(q, k, v, lengths=[2, 3], implementation="practical")
    state, lengths = StreamingKV(1, 4), [2, 3]
    new, values = (x * mx.ones(1) for x in (k, v))
    held = state.update(new, values, lengths=lengths)
    new[...] = 0
    values *= 2
    lengths[0] = 1
    found = attention(q, *held, implementation="practical")
    np.testing.assert_allclose(np.array(found), np.array(wanted), atol=1e-6)


@pytest.mark.parametrize("steps", [3, 12])
def test_a_step_has_the_gradient_of_its_arguments(steps: int) -> None:
    """The operation of a step on a CPU computes at once: its output would be a constant."""
    state = StreamingKV(2, 6)
    for seed in range(steps):
        state.attend(*map(mx.array, made(1, seed=seed)))
    token = [*map(mx.array, made(1, seed=steps))]

    def gradients(implementation: str) -> list[mx.array]:
        twin = state.fork() if implementation == "baseline" else state

        def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return mx.square(twin.attend(q, k, v, implementation=implementation)).sum()

        return mx.grad(loss, argnums=[0, 1, 2])(*token)

    wanted = gradients("baseline")
    for found, expected_one in zip(gradients("poc"), wanted, strict=True):
        assert mx.abs(expected_one).max() > 1e-3
        assert mx.allclose(found, expected_one, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
def test_a_traced_call_is_refused(transform, tokens):
    """The state changes once, when the function is traced, and not when it runs."""
    state = StreamingKV(2, 6)
    arrays = [mx.array(x)[None] for x in made(tokens)]
    state.attend(*(x[0] for x in arrays))
    attend = transform(lambda q, k, v: state.attend(*(x.reshape(1, *x.shape[-3:]) for x in (q, k, v))))
    with pytest.raises(UsageError, match=r"k, v: got arrays that mx\.compile or mx\.vmap traces"):
        attend(*arrays)
    assert state.position == tokens


@pytest.mark.parametrize("q", [None, [1.0], mx.array(1.0), mx.zeros((1, 1, 8))], ids=["none", "list", "number", "3-D"])
def test_a_query_that_is_none_is_named(q):
    state = StreamingKV(2, 6)
    with pytest.raises(UsageError, match=r"^q: got "):
        attention(q, *state.update(*(mx.array(x) for x in made(1)[1:])))
