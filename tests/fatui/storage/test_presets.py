import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention.core.errors import UsageError
from attention.core.workload import Workload
from fatui import storage
from fatui.cli.main import main
from fatui.storage import presets
from fatui.storage.presets import Preset, parse

GOOD = "schema = 1\n[workload]\nseq = 64\n"


def problems(text: str) -> tuple[str, ...]:
    with pytest.raises(UsageError) as caught:
        parse(text, Path("mine.toml"))
    return caught.value.problems


def test_every_bundled_preset_is_in_order():
    listed = presets.list_presets()
    assert {entry.name for entry in listed} >= {"seed-table", "quick", "scaling", "llama-7b", "qwen2.5-1.5b"}
    assert [entry.problems for entry in listed] == [()] * len(listed)


def test_the_seed_table_has_the_studys_six_rows():
    cases = presets.load("seed-table").cases
    assert [(case.batch, case.seq, case.head_dim) for case in cases] == [
        (1, 64, 32),
        (1, 64, 64),
        (1, 128, 32),
        (1, 128, 64),
        (2, 128, 32),
        (4, 256, 32),
    ]
    assert {(case.heads, case.dtype) for case in cases} == {(8, "float16")}


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "head_dim"),
    [("tinyllama-1.1b", 32, 4, 64), ("qwen2.5-1.5b", 12, 2, 128), ("llama-7b", 32, 32, 128)],
)
def test_a_models_preset_has_its_heads_in_prefill_and_decode(name, heads, kv_heads, head_dim):
    cases = presets.load(name).cases
    assert {(case.heads, case.kv_heads, case.head_dim) for case in cases} == {(heads, kv_heads, head_dim)}
    assert {case.pass_ for case in cases} == {"forward", "decode"}


def test_formats_of_keys_and_values_are_read_and_written() -> None:
    text = GOOD + 'kv_format = "int4"\n[sweep]\nhead_dim = [64, 128]\n[[case]]\nkv_format = ["none", "mxfp8+int4:32"]\n'
    made = parse(text, None)
    assert [case.kv_format for case in made.cases] == ["int4", "int4", "none", "mxfp8+int4:32"]
    assert parse(presets.to_toml(made), None).cases == made.cases
    assert "kv_format" not in presets.to_toml(parse(GOOD, None))
    assert problems(GOOD + 'kv_format = "int7"\n')[0].startswith(
        "mine.toml: [workload] kv_format: got 'int7'; it takes"
    )


def test_the_quantized_preset_is_a_decode_with_a_counterpart() -> None:
    made = presets.load("quantized")
    assert {case.kv_format for case in made.cases} == {"none", "int8", "int4", "mxfp4"}
    assert {(case.pass_, case.heads, case.kv_heads, case.head_dim) for case in made.cases} == {("decode", 32, 8, 128)}


def test_scaling_moves_one_axis_at_a_time():
    cases = presets.load("scaling").cases
    middle = Workload(batch=1, seq=512, heads=8, head_dim=64, dtype="float16", mask="causal")
    assert middle in cases
    for case in cases:
        moved = [name for name in ("batch", "seq", "head_dim") if getattr(case, name) != getattr(middle, name)]
        assert len(moved) <= 1


def test_lists_in_cases_and_sweeps_make_all_combinations_once():
    text = GOOD + "[sweep]\nbatch = [1, 2]\nhead_dim = [32, 64]\n[[case]]\nbatch = [2, 4]\n"
    shapes = [(case.batch, case.head_dim) for case in parse(text, None).cases]
    assert shapes == [(1, 32), (1, 64), (2, 32), (2, 64), (4, 64)]


def test_a_decode_case_may_give_its_cache_as_kv_seq_or_as_seq():
    text = 'schema = 1\n[workload]\npass = "decode"\n[[case]]\nkv_seq = 100\n[[case]]\nseq = 200\n'
    assert [(case.seq, case.kv_seq) for case in parse(text, None).cases] == [(1, 100), (1, 200)]


def test_three_mistakes_are_told_at_once_each_with_file_and_key():
    reported = problems('schema = 1\ntitel = "x"\nseconds = "long"\n[workload]\nheads = 8\nkv_heads = 3\n')
    assert len(reported) == 3
    assert all(problem.startswith("mine.toml: ") for problem in reported)
    assert "titel: unknown key (did you mean 'title'?)" in reported[0]
    assert "seconds: got 'long'; it takes a number" in reported[1]
    assert "[workload] kv_heads: got 3; it must divide heads, which is 8" in reported[2]


def test_a_list_in_workload_hides_no_other_mistake():
    reported = problems("schema = 1\n[workload]\nseq = [8, 16]\nhead_dim = 0\nmask = 'casual'\n[sweep]\nheads = [-1]\n")
    keys = {problem.split(": ")[1] for problem in reported}
    assert keys == {"[workload] seq", "[workload] head_dim", "[workload] mask", "[sweep] heads"}


def keys_of(text: str) -> list[str]:
    return [problem.split(": ")[1] for problem in problems(f"schema = 1\n{text}")]


@pytest.mark.parametrize("field", presets.FIELDS)
def test_an_empty_list_hides_no_other_mistake_and_makes_none(field):
    """Among them are values that do not fit the default of the field that has none."""
    fitting = {"kv_heads": "16", "kv_format": "'int4:128'", "value_dim": "128", "batch": "2"}
    given = "".join(f"{name} = {value}\n" for name, value in fitting.items() if name != field)
    sizes = "".join(f"{name} = {value}\n" for name, value in (("heads", 16), ("head_dim", 128)) if name != field)
    swept = f"[sweep]\n{field} = []\n"
    assert keys_of(f"[workload]\n{given}{sizes}{swept}") == [f"[sweep] {field}"]
    wrong = "dtype = ['fp16']\n" if field != "dtype" else "seq = [0]\n"
    assert keys_of(f"[workload]\n{given}{sizes}{swept}{wrong}") == [f"[sweep] {field}", f"[sweep] {wrong.split()[0]}"]


def test_too_many_cases_hide_no_other_mistake():
    numbers = list(range(1, 101))
    text = f"[workload]\nhead_dim = 0\n[sweep]\nseq = {numbers}\nbatch = {[*numbers, -1]}\n"
    assert keys_of(text)[1:] == ["[workload] head_dim", "[sweep] batch"]


def test_queries_of_a_decode_pass_hide_no_other_mistake():
    text = "[workload]\npass = 'decode'\nseq = 4\nkv_seq = 64\ndtype = 'fp16'\nheads = 0\n"
    assert keys_of(text) == ["[workload] seq", "[workload] heads", "[workload] dtype"]


def test_a_syntax_error_is_reported_with_line_and_column():
    (reported,) = problems("schema = 1\nseconds = = 3\n")
    assert "line 2, column 11" in reported


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[workload]\nseq = 1\n", "schema: missing"),
        ("schema = 2\n[workload]\n", "newer fatui"),
        ("schema = true\n[workload]\n", "schema: got True"),
        ("schema = 1\n", "nothing to measure"),
        ("schema = 1\nworkload = 3\n", "workload: got 3"),
        ("schema = 1\ncase = 3\n", "[[case]]"),
        ("schema = 1\n[workload]\nseq = [1, 2]\n", "[sweep] or [[case]]"),
        ("schema = 1\n[sweep]\nseq = 4\n", "it takes a list"),
        ("schema = 1\n[sweep]\nseq = []\n", "empty list"),
        ("schema = 1\n[workload]\nsqe = 4\n", "did you mean 'seq'?"),
        ("schema = 1\n[[case]]\n[[case]]\nhead_dim = 0\n", "[[case]] 2 head_dim: got 0"),
        ("schema = 1\n[workload]\nseq = -1\n", "seq: got -1"),
        ("schema = 1\n[workload]\nseq = 1.5\n", "seq: got 1.5"),
        ("schema = 1\n[workload]\nseq = true\n", "seq: got True"),
        ("schema = 1\n[workload]\nseq = 99999999999999999999\n", "seq: got 99999999999999999999"),
        ("schema = 1\n[workload]\nmask = ['a']\n", "mask"),
        ("schema = 1\n[workload]\nmask = {a = 1}\n", "mask: got"),
        ("schema = 1\n[workload]\ndtype = 'fp16'\n", "did you mean 'float16'?"),
        ("schema = 1\nseconds = nan\n[workload]\n", "seconds: got nan"),
        ("schema = 1\nseed = -1\n[workload]\n", "seed: got -1"),
        ("schema = 1\nmemory_limit = 'big'\n[workload]\n", "memory_limit: got 'big'"),
        ("schema = 1\nimplementations = []\n[workload]\n", "implementations: got []"),
        ("schema = 1\nimplementations = ['basline']\n[workload]\n", "did you mean 'baseline'?"),
        ("schema = 1\ntitle = 3\n[workload]\n", "title: got 3"),
        (f"schema = 1\n[sweep]\nseq = {list(range(1, 101))}\nbatch = {list(range(1, 101))}\n", "10,000 cases"),
        ("x = " + "[" * 5000, "nested too deeply"),
        ("x = " + "9" * 5000, "too many digits"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_wrong(text, expected):
    reported = problems(text)
    assert any(expected in problem for problem in reported), reported
    assert all("\n" not in problem and len(problem) < 300 for problem in reported)


sizes = st.integers(1, 4096)
workloads = st.builds(
    lambda batch, seq, kv_seq, groups, kv_heads, head_dim, value_dim, dtype, mask, pass_: Workload(
        batch=batch,
        seq=1 if pass_ == "decode" else seq,
        kv_seq=kv_seq,
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        mask=mask,
        pass_=pass_,
    ),
    *(sizes, sizes, sizes, st.integers(1, 8), st.integers(1, 64), sizes, sizes),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.sampled_from(["none", "causal", "window:7"]),
    st.sampled_from(["forward", "training", "decode"]),
)
texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=40)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cases=st.lists(workloads, min_size=1, max_size=5, unique=True),
    title=texts,
    seconds=st.floats(0.05, 3600),
    limit=st.none() | st.integers(1, 2**60),
)
def test_what_is_written_reads_back_the_same(cases, title, seconds, limit):
    preset = Preset(name="preset", title=title, cases=tuple(cases), seconds=seconds, memory_limit_bytes=limit, seed=3)
    assert parse(presets.to_toml(preset), None) == preset


@pytest.mark.thorough
@settings(max_examples=20, deadline=None)
@given(st.text(max_size=100))
def test_no_text_does_more_than_be_refused(text):
    try:
        parse(text, None)
    except UsageError as error:
        assert error.problems


def test_a_sweep_is_written_as_a_sweep():
    cases = tuple(Workload(batch=batch, seq=seq) for batch in (1, 2) for seq in (64, 128))
    text = presets.to_toml(Preset(name="x", cases=cases))
    assert "[sweep]\nbatch = [1, 2]\nseq = [64, 128]\n" in text


def own(name: str, text: str = GOOD) -> Path:
    path = storage.own_presets() / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_ones_own_preset_comes_before_a_bundled_one_of_its_name():
    own("quick")
    assert presets.load("quick").cases == (Workload(seq=64),)
    assert [entry.bundled for entry in presets.list_presets() if entry.name == "quick"] == [False]


def test_a_broken_preset_is_listed_with_its_mistakes():
    path = own("broken", "schema = 1\nfoo = 1\n")
    (entry,) = [entry for entry in presets.list_presets() if entry.name == "broken"]
    assert entry.preset is None
    assert str(path) in entry.problems[0]


def test_an_unknown_name_is_reported_with_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        presets.load("quikc")
    with pytest.raises(UsageError) as caught:
        presets.load("x" * 5000)
    assert len(str(caught.value)) < 400 and "(5,000 characters)" in str(caught.value)


def test_a_file_that_is_no_preset_is_reported_in_one_line(tmp_path):
    for name, content in (("a.toml", b"\xff\xfe"), ("b.toml", b"#" * 2**21)):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "c.toml").mkdir()
    for name in ("a.toml", "b.toml", "c.toml", "d.toml"):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            presets.load(tmp_path / name)


def test_saving_never_overwrites_silently_and_keeps_a_backup():
    preset = presets.load("quick")
    first = own("mine", "schema = 1 # by hand\n[workload]\n")
    with pytest.raises(UsageError, match="already"):
        presets.save(preset, "mine")
    assert "by hand" in first.read_text()
    assert presets.load(presets.save(preset, "mine", overwrite=True)).cases == preset.cases
    assert "by hand" in next((storage.own_presets() / ".deleted").iterdir()).read_text()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\n", "x" * 65, "mine.toml"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UsageError, match="it takes letters"):
        presets.save(presets.load("quick"), name)


def test_deleting_can_be_undone():
    own("my.own-1")
    aside = presets.delete("my.own-1")
    assert not any(entry.name == "my.own-1" for entry in presets.list_presets())
    presets.restore(aside)
    assert presets.load("my.own-1").cases == (Workload(seq=64),)


def test_renaming_keeps_what_is_there():
    own("a")
    own("b")
    with pytest.raises(UsageError, match="already"):
        presets.rename("a", "b")
    presets.rename("a", "c")
    assert presets.load("c")
    with pytest.raises(UsageError, match="is bundled"):
        presets.rename("quick", "d")


def test_a_file_may_begin_with_a_byte_order_mark():
    assert parse("\ufeff" + GOOD, None) == parse(GOOD, None)


def test_the_list_tells_the_first_mistake_and_how_many(capsys):
    folder = storage.own_presets()
    folder.mkdir(parents=True)
    (folder / "broken.toml").write_text("schema = 1\nseconds = 0\nseed = -1\ntitle = 3\n[workload]\nseq = 64\n")
    assert main(["presets"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "has mistakes: title: got 3; it takes a quoted string, and 2 more; `fatui presets check broken`" in said
    assert main(["presets", "check", "broken"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert main(["presets", "check", "quick"]) == 0
