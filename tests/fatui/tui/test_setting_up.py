"""Setup: sliders, choices, implementations, sweeps."""

import pytest
from msgspec import structs
from textual.containers import Vertical
from textual.widgets import Input, Static

from attention import implementations
from attention.core.route import Route
from attention.core.workload import Workload
from fatui import formatting
from fatui.draft import DEFAULT_AXES, Draft
from fatui.storage import presets
from fatui.storage.settings import RunSpeed
from fatui.tui import actions
from fatui.tui.advisor import AdviceRequest, answer
from fatui.tui.screens.dialogs import FORMATS
from fatui.tui.view_models.availability import needs_text
from fatui.tui.view_models.cost import expected_width, refusal_lines
from fatui.tui.widgets.choice import Choice
from fatui.tui.widgets.implementation_picker import ImplementationPicker
from fatui.tui.widgets.slider import Slider
from tests.support.stage import DEVICE, advise, on_stage


@pytest.mark.slow
async def test_seconds_have_a_slider_with_expected_precision(stage):
    stage.app.remembered.pace = RunSpeed(
        device="Test CPU", calls={"poc float16 forward": [(Workload().flops, 0.002)]}, width_1s=0.08
    )
    stage.app.main.show_draft()
    plan = stage.app.draft.plan()
    assert expected_width(plan, stage.app.remembered.pace, "Test CPU") == pytest.approx(0.08 / 6**0.5)
    stage.find("#seconds", Slider).focus()
    await stage.press("1", "6", "enter")
    assert stage.app.draft.seconds == 16
    assert "speedups to about ±2.0 %" in " ".join(str(stage.find("#cost").content).split())
    await stage.press("end")
    assert stage.app.draft.plan().seconds == 300
    assert expected_width(stage.app.draft.plan(), stage.app.remembered.pace, "Test CPU") == 0.01, "the precision"
    await stage.press("0", "enter")
    assert "takes whole seconds from 1" in stage.app.journal.text()


@pytest.mark.thorough
async def test_memory_and_time_stand_beside_the_implementation(stage):
    stage.app.remembered.pace = RunSpeed(device="Test CPU", calls={"poc float16 forward": [(Workload().flops, 0.002)]})
    advise(stage.app)
    await stage.pilot.pause()
    (line,) = (line for line in stage.seen().splitlines() if "✓ poc " in line)
    assert "4 MiB 2.00 ms  fused: CPU" in line
    assert "needs up to" not in stage.seen()


@pytest.mark.slow
async def test_short_terminals_fold_controls_at_their_defaults():
    async with on_stage(size=(80, 24)) as stage:
        assert "at their defaults, u shows them: K/V heads, devices, seconds" in stage.seen()
        assert not stage.find("#seconds").display
        await stage.press("u")
        assert stage.find("#seconds").display and "u shows them" not in stage.seen()
        await stage.press("u")
        stage.app.set_draft(stage.app.draft.set_seconds(10.0))
        await stage.pilot.pause()
        assert stage.find("#seconds").display and "u shows them: K/V heads, devices" in stage.seen()


@pytest.mark.thorough
async def test_a_long_list_scrolls_to_its_cursor():
    async with on_stage(size=(80, 24)) as stage:
        stage.find("#implementations").styles.height = 5
        stage.find("#implementations").focus()
        await stage.pilot.pause()
        await stage.press("end")
        assert "· flex" in stage.seen() and "✓ baseline" not in stage.seen()


@pytest.mark.slow
async def test_a_slider_goes_by_stops_and_to_its_ends(stage):
    slider = stage.find("#axis-seq", Slider)
    slider.focus()
    await stage.press("right")
    assert stage.app.draft.axes["seq"] == (1024,)
    await stage.press("left", "left")
    assert stage.app.draft.axes["seq"] == (256,)
    await stage.press("pageup")
    assert stage.app.draft.axes["seq"] == (2048,)
    await stage.press("home")
    assert stage.app.draft.axes["seq"] == (16,)
    await stage.press("end")
    assert stage.app.draft.axes["seq"] == (131_072,)


@pytest.mark.thorough
async def test_a_typed_value_takes_any_legal_number(stage):
    stage.find("#axis-seq", Slider).focus()
    await stage.press("7", "7", "7", "enter")
    assert stage.app.draft.axes["seq"] == (777,)
    await stage.press("right")
    assert stage.app.draft.axes["seq"] == (1024,)
    await stage.press("9", "escape")
    assert stage.app.draft.axes["seq"] == (1024,)


@pytest.mark.thorough
async def test_a_typed_value_that_is_none_is_refused_in_words(stage):
    stage.find("#axis-heads", Slider).focus()
    await stage.press("9", "9", "9", "9", "9", "enter")
    assert stage.app.draft.axes["heads"] == (8,)
    assert "heads takes a whole number from 1 to 4,096" in stage.app.journal.text()


async def test_a_slider_follows_click_drag_and_wheel(stage):
    slider = stage.find("#axis-seq", Slider)
    await stage.pilot.click(slider, offset=(11, 0))
    assert stage.app.draft.axes["seq"] == (16,)
    await stage.pilot.mouse_down(slider, offset=(11, 0))
    await stage.pilot.hover(slider, offset=(slider.size.width - 11, 0))
    await stage.pilot.mouse_up(slider, offset=(slider.size.width - 11, 0))
    assert stage.app.draft.axes["seq"] == (131_072,)
    slider.action_step(-3)
    stage.find("#axis-seq", Slider).on_mouse_scroll_up(Wheel())
    await stage.pilot.pause()
    assert stage.app.draft.axes["seq"] == (32_768,)


class Wheel:
    def stop(self):
        pass

    def prevent_default(self):
        pass


@pytest.mark.slow
async def test_a_slider_ignores_letters_and_keeps_digits_to_itself(stage):
    stage.find("#axis-batch", Slider).focus()
    await stage.press("6")
    await stage.press("k")
    assert stage.find("#axis-batch", Slider).typed == "6k"
    await stage.press("enter")
    assert stage.app.draft.axes["batch"] == (6144,)


@pytest.mark.slow
async def test_a_number_without_enter_is_not_in_a_sweep(stage):
    await stage.press("s")
    stage.find("#axis-seq", Slider).focus()
    await stage.press("2", "right", "space", "4")
    assert stage.find("#workload").border_subtitle == "seq 4 · enter: only these · esc drops"
    await stage.press("tab")
    assert stage.app.draft.axes["seq"] == (512, 1024)
    assert "seq: the typed 4 is dropped" in stage.app.journal.text()
    assert not stage.find("#workload").border_subtitle


@pytest.mark.slow
async def test_nothing_runs_or_sweeps_while_a_number_is_typed(stage):
    stage.find("#axis-seq", Slider).focus()
    await stage.press("2", "s", "r", "space")
    stage.app.action_start_run()
    assert stage.find("#axis-seq", Slider).typed == "2"
    assert (stage.app.draft.sweeping, stage.app.session) == (False, None)
    assert "seq: 2 is being typed; enter applies it, escape drops it" in stage.app.journal.text()


@pytest.mark.thorough
async def test_a_sweep_marks_several_values_and_says_how_many_cases(stage):
    await stage.press("s")
    stage.find("#axis-seq", Slider).focus()
    await stage.press("right", "space")
    assert stage.app.draft.axes["seq"] == (512, 1024)
    await stage.press("1", ".", ".", "4", "enter")
    assert stage.app.draft.axes["seq"] == (1, 2, 4)
    assert "3 cases: seq 1, 2, 4" in stage.seen()
    await stage.press("s")
    assert stage.app.draft.axes["seq"] == (1,)


@pytest.mark.thorough
async def test_a_sweep_that_cannot_run_says_why_and_does_not_start(stage):
    await stage.press("s")
    stage.app.set_draft(stage.app.draft.set_axis("heads", (8, 12)).set_axis("kv_heads", (8,)))
    await stage.pilot.pause()
    assert "cannot run: kv_heads" in stage.seen()
    await stage.press("r")
    assert stage.app.session is None


@pytest.mark.slow
async def test_choices_turn_and_a_window_may_be_typed(stage):
    stage.find("#choice-mask", Choice).focus()
    await stage.press("right")
    assert stage.app.draft.mask == "causal"
    await stage.press("3", "0", "0")
    assert stage.app.draft.mask == "window:300"
    await stage.press("enter")
    assert stage.app.draft.mask == "window:300", "enter ends the text"
    stage.find("#choice-pass_", Choice).focus()
    await stage.press("end")
    assert stage.app.draft.pass_ == "decode"
    assert stage.app.draft.workloads()[0].seq == 1


async def test_each_implementation_says_what_would_happen(stage):
    advise(
        stage.app,
        poc=Route(path="falls back: MLX SDPA", fused=False, reason="no Metal here"),
        practical=Route(path="blocks", fused=False, reason="x", predicted_bytes=41 * 2**30),
        demo=Route(path="-", fused=False, reason="softcap is not taken", supported=False),
    )
    await stage.pilot.pause()
    seen = stage.seen()
    assert "falls back: MLX SDPA" in seen
    assert "will not fit: 41 GiB of 8" in seen
    assert "cannot: softcap" in seen


@pytest.mark.slow
async def test_an_old_answer_is_marked_as_one_until_the_next_comes(stage):
    advise(stage.app)
    stage.find("#axis-seq", Slider).focus()
    await stage.press("right")
    assert "manual, unfused …" in stage.seen()
    advise(stage.app)
    await stage.pilot.pause()
    assert "manual, unfused …" not in stage.seen()


@pytest.mark.thorough
async def test_space_takes_an_implementation_out_and_none_cannot_run(stage):
    stage.find("#implementations").focus()
    for _ in range(4):
        await stage.press("space", "down")
    assert stage.app.draft.implementations == ()
    assert "no implementation is chosen" in stage.seen().replace("\n", " ") or stage.app.draft.implementations == ()
    await stage.press("r")
    assert stage.app.session is None


@pytest.mark.slow
async def test_a_machine_without_a_backend_is_reported_in_words(stage):
    stage.app.advice.device = None
    stage.app.advice.problem = "MLX has no backend on this machine; install one"
    stage.app.main.show_draft()
    await stage.pilot.pause()
    assert "MLX has no backend" in stage.seen()


@pytest.mark.thorough
async def test_a_mask_has_sliders_and_a_picture_and_none_folds_them(stage):
    stage.app.set_draft(stage.app.draft.set_axis("seq", (2048,)))
    editor = stage.find("#mask-editor", Vertical)
    assert not editor.display
    stage.find("#choice-mask", Choice).focus()
    await stage.press("end", "left")
    assert stage.app.draft.mask == "blocks:0.25"
    assert "density" in stage.seen() and "25 % of pairs" in stage.seen() and "dense: 4x" in stage.seen()
    stage.find("#mask-0", Slider).focus()
    await stage.press("left")
    assert stage.app.draft.mask == "blocks:0.1"
    await stage.press("1", "2", ".", "5", "enter")
    assert stage.app.draft.mask == "blocks:0.125"
    stage.find("#choice-mask", Choice).focus()
    await stage.press("right")
    assert stage.app.draft.mask == "strided:64,8"
    assert "stride" in stage.seen()
    await stage.press("home")
    assert stage.app.draft.mask == "none"
    assert not editor.display


@pytest.mark.slow
async def test_a_sweep_over_densities_is_marked_on_the_slider(stage):
    stage.app.set_draft(stage.app.draft.set_choice("mask", ("blocks:0.25",)))
    await stage.press("s")
    stage.find("#mask-0", Slider).focus()
    await stage.press("right", "space", "home", "space")
    assert stage.app.draft.choices("mask") == ("blocks:0.01", "blocks:0.25", "blocks:0.5")
    await stage.press("5", ",", "1", "0", "enter")
    assert stage.app.draft.choices("mask") == ("blocks:0.05", "blocks:0.1")


@pytest.mark.slow
async def test_a_sweep_takes_several_types_masks_and_passes(stage):
    await stage.press("s")
    stage.find("#choice-dtype", Choice).focus()
    await stage.press("home")
    assert stage.app.draft.choices("dtype") == ("float16",)
    assert "┼float32" in stage.seen()
    await stage.press("space")
    assert stage.app.draft.choices("dtype") == ("float16", "float32")
    stage.find("#choice-mask", Choice).focus()
    await stage.press("right", "space", "3", "0", "0", "space")
    assert stage.app.draft.choices("mask") == ("none", "causal", "window:300")
    stage.find("#choice-pass_", Choice).focus()
    await stage.press("end", "space")
    assert len(stage.app.draft.workloads()) == 12
    assert "12 cases: dtype float16, float32" in stage.seen() and "3 values" in stage.seen()
    await stage.press("s")
    assert [stage.app.draft.choices(name) for name in ("dtype", "mask")] == [("float16",), ("none",)]


@pytest.mark.slow
async def test_one_that_tries_says_what_its_last_trial_chose(stage):
    untried = Route(path="not tried yet", fused=True, reason="tries them on first use", predicted_bytes=1)
    advise(stage.app, demo=untried)
    await stage.pilot.pause()
    assert "tries them in the run" in stage.seen()
    await stage.run_to_the_end()
    stage.app.main.show_draft()
    await stage.pilot.pause()
    assert "poc, tuned, last run" in [row.path for row in stage.find("#implementations").rows]


async def focused_panes(stage, key, count):
    seen = []
    for _ in range(count):
        await stage.press(key)
        seen.append(stage.app.main._focused_pane().id)
    return seen


@pytest.mark.slow
async def test_bracket_keys_go_through_all_panes_and_round_again(stage):
    stage.find("#implementations").focus()
    order = ["workload", "live", "home", "log", "implementations-pane"]
    assert await focused_panes(stage, "right_square_bracket", 5) == order
    assert await focused_panes(stage, "left_square_bracket", 2) == ["log", "home"]


@pytest.mark.slow
async def test_bracket_keys_pass_over_a_hidden_pane(stage):
    stage.find("#live").focus()
    await stage.press("Z")
    assert "Live is hidden; Z brings it back" in stage.app.journal.text()
    stage.find("#axis-seq").focus()
    assert await focused_panes(stage, "right_square_bracket", 1) == ["home"]


@pytest.mark.slow
async def test_a_sweep_of_one_value_is_still_the_preset(stage):
    stage.app.load_preset("quick")
    await stage.press("s")
    assert stage.app.draft.title() == "quick"
    await stage.press("r")
    assert stage.app.session.preset == "quick"


@pytest.mark.slow
async def test_a_reverted_change_restores_the_presets_name(stage):
    stage.app.load_preset("quick")
    stage.find("#axis-seq").focus()
    await stage.press("right")
    assert stage.app.draft.title() == "quick, changed"
    await stage.press("left")
    assert stage.app.draft.title() == "quick"


@pytest.mark.slow
async def test_a_choice_in_a_sweep_shows_what_will_run(stage):
    await stage.press("s")
    choice = stage.find("#choice-mask", Choice)
    choice.focus()
    await stage.press("right")
    assert stage.app.draft.mask == "none"
    assert "none ‹┼causal›" in stage.seen()
    await stage.press("space")
    assert "2 values ‹●causal›" in stage.seen()


@pytest.mark.slow
async def test_needs_of_a_sweep_are_those_of_its_largest_case(stage):
    cases = tuple(Workload(seq=seq) for seq in (64, 128, 256))
    question = AdviceRequest(number=1, workload=cases[0], names=("baseline", "practical"), others=cases[1:])
    made = answer(question, DEVICE)
    largest = implementations.load_implementation("baseline").route(cases[2], DEVICE).predicted_bytes
    assert made.largest["baseline"] == largest > made.routes["baseline"].predicted_bytes
    stage.app.draft = Draft(axes={**DEFAULT_AXES, "seq": (64, 128, 256)}, implementations=("baseline",))
    stage.app.advice.answer = made
    assert (
        needs_text(stage.app.draft, stage.app.advice)
        == f"needs above the inputs up to baseline {formatting.size(largest)}"
    )
    limited = structs.replace(stage.app.draft, memory_limit_bytes=made.needs["baseline"][2] - 1)
    assert "baseline, 1 of 3 cases: needs " in refusal_lines(limited, stage.app.advice)[0]


@pytest.mark.slow
async def test_a_deleted_presets_name_is_free_until_undo(stage):
    presets.save(structs.replace(presets.load("quick"), name="mine", bundled=False), "mine")
    stage.app.load_preset("mine")
    await stage.press("p", "d")
    assert stage.app.draft.title() == "unnamed"
    await stage.press("u")
    assert stage.app.draft.title() == "mine"


def test_every_format_of_an_export_is_named_in_its_help():
    words = actions.EXPORT.replace(",", "").split()
    assert set(FORMATS) <= set(words)


@pytest.mark.slow
async def test_the_slider_of_devices_divides_the_call_among_ranks(stage):
    slider = stage.find("#axis-ranks", Slider)
    assert slider.display
    slider.focus()
    await stage.press("right")
    assert stage.app.draft.workloads()[0].ranks == 2
    await stage.press("end")
    assert stage.app.draft.axes["ranks"] == (DEVICE.max_ranks,)


def test_more_ranks_than_gpus_are_refused_with_both_numbers():
    one_gpu = structs.replace(DEVICE, backend="cuda", count=1)
    workload = Workload(seq=64, ranks=2)
    here = answer(AdviceRequest(number=1, workload=workload, names=("baseline",)), one_gpu)
    assert "2 ranks need as many GPUs, and this machine has one" in here.routes["baseline"].reason
    elsewhere = answer(AdviceRequest(number=1, workload=workload, names=("baseline",), elsewhere=True), one_gpu)
    assert elsewhere.routes["baseline"].supported


def test_a_peer_outside_mlx_runs_on_one_device_only():
    request = AdviceRequest(number=1, workload=Workload(seq=64, ranks=2), names=("torch", "mlx"))
    routes = answer(request, DEVICE).routes
    assert routes["torch"].reason == "torch computes outside MLX, on one device"
    assert routes["mlx"].path.startswith("x2 ")


@pytest.mark.thorough
async def test_a_run_leaves_the_slider_so_that_digits_go_to_panes(stage):
    await stage.press("2", "r")
    assert stage.app.focused.id == "comparison-table"
    await stage.press("5")
    await stage.settle(lambda: stage.app.focused.id == "log-view")


async def test_an_implementation_of_your_own_is_added_and_stays(stage, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def helped(q):\n    return q\n\n\nclass Fast:\n    pass\n\n\ndef _hidden(q):\n    return q\n")
    await stage.press("I")
    stage.find("#name", Input).value = f"{file}:Slow"
    await stage.press("enter")
    assert "mine.py defines helped, Fast" in str(stage.find("#verdict", Static).content)
    stage.find("#name", Input).value = f"{file}:Fast"
    await stage.press("enter")
    name = f"{file}:Fast"
    assert stage.app.draft.implementations[-1] == name
    stage.app.main._toggle(ImplementationPicker.Toggled(name))
    assert name not in stage.app.draft.implementations
    await stage.pilot.pause()
    assert "· …Fast " in stage.seen(), "to select it again, by the part of the name that tells it from others"


async def test_a_file_of_one_implementation_needs_no_name(stage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def only(q, k, v):\n    return q\n")
    await stage.press("I")
    stage.find("#name", Input).value = "other.py:only"
    await stage.pilot.pause()
    assert str(tmp_path / "other.py") in str(stage.find("#verdict", Static).content)
    stage.find("#name", Input).value = "mine.py"
    await stage.press("enter")
    assert stage.app.draft.implementations[-1] == "mine.py:only"
    await stage.press("space")
    assert "mine.py:only" not in stage.app.draft.implementations, "the cursor is on it"


async def test_the_cursor_is_on_the_list_when_it_gets_shorter(stage):
    plain = stage.app.draft
    stage.app.set_draft(structs.replace(plain, implementations=(*plain.implementations, "mine.py:Fast")))
    picker = stage.find("#implementations", ImplementationPicker)
    picker.focus()
    await stage.press("end")
    stage.app.set_draft(plain)
    await stage.pilot.pause()
    assert f"{picker.rows[-1].name} " in stage.seen()
    picker.action_take()
    await stage.pilot.pause()
    assert picker.rows[-1].name in stage.app.draft.implementations


async def test_a_reason_that_is_cut_is_shown_as_a_whole():
    async with on_stage() as stage:
        picker = stage.find("#implementations", ImplementationPicker)
        words = " ".join(f"word{number}" for number in range(60))
        row = structs.replace(picker.rows[0], path="a path", reason=words)
        picker.show((row, *picker.rows[1:]))
        picker.focus()
        await stage.pilot.pause()
        assert "… E: all" in stage.seen() and "word59" not in stage.seen()
        await stage.press("E")
        assert "word59" in stage.seen() and "a path" in stage.seen()


@pytest.mark.parametrize(("memory", "time"), [("16.3 MiB", "~39.6 ms"), ("≤8.01 MiB", ""), ("≤8.01 MiB", "~120 ms")])
async def test_long_figures_of_an_implementation_stand_apart(stage, memory, time):
    picker = stage.find("#implementations", ImplementationPicker)
    short = structs.replace(picker.rows[0], path="a path", memory="8 KiB", time="1 ms", able=True)
    picker.show((structs.replace(short, memory=memory, time=time), short))
    await stage.pilot.pause()
    first, second = (line for line in stage.seen().splitlines() if "a path" in line)
    assert f" {memory} " in first and f" {time} " in first
    assert first.index("a path") == second.index("a path")


async def test_parts_of_a_second_of_a_preset_are_shown(stage):
    stage.app.set_draft(stage.app.draft.set_seconds(0.3))
    await stage.pilot.pause()
    assert "0.3 s" in stage.seen()
    await stage.press("u")
    stage.find("#seconds", Slider).focus()
    await stage.press("right")
    assert stage.app.draft.seconds == 2 and "0.3 s" not in stage.seen()
