"""Benchmark generation with a model: every implementation at each phase and prompt length, reported as events."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from msgspec import Struct, structs
from numpy.typing import NDArray

from attention.core import events as on
from attention.core.errors import error_line
from attention.core.kv_format import DENSE, parse_kv_format
from attention.core.plan import GenerationPlan
from attention.core.results import MIN_ROUNDS
from attention.core.workload import MIN_SIZES, Generation, Workload
from attention.engine.case_runner import MAX_EXTENSION, CaseRunner, shortage_text
from attention.engine.prepare import SLOW_CALL_S
from attention.measure.device import Device, environment, probe
from attention.measure.rounds import Arm, take_sample
from attention.mlx_lm import configuration
from attention.mlx_lm.arms import Layers, ModelArm, Observer, SharedArm, SharedPass
from attention.mlx_lm.configuration import Configuration
from attention.mlx_lm.network import (
    Network,
    StateChanged,
    bytes_of_caches,
    copy_caches,
    digest_of_caches,
    digest_of_weights,
)
from attention.mlx_lm.patch import ORIGINAL, CallCounter, replace_attention

FILLS_QUANTIZED: Final = "practical"
"""The implementation that attends while a quantized cache is filled for decoding."""
NOT_READ: Final = "mlx-lm's own attention reads caches of one int format for keys and values"
NOT_READ_WITH_SINKS: Final = "mlx-lm's own attention reads no quantized cache in a model with attention sinks"
NOT_READ_BY_GEMMA_2: Final = "mlx-lm's attention of Gemma 2 reads no quantized cache"
PREFILL_STEP: Final = 2048
"""Maximum number of prompt tokens that mlx-lm processes at once."""
Logits = mx.array


def why_unread(model: Any, kv_format: str) -> str:
    """Return why mlx-lm's own attention cannot read a model's caches in a format, or "" if it can."""
    if kv_format == DENSE:
        return ""
    if not read_by_mlx_lm(kv_format):
        return NOT_READ
    named: Any = tree_flatten(model.parameters())
    if any(name.rpartition(".")[2] == "sinks" for name, _ in named):
        return NOT_READ_WITH_SINKS
    return NOT_READ_BY_GEMMA_2 if getattr(model, "model_type", None) == "gemma2" else ""


class Prompts:
    """The prompts of a case, random and seeded: (batch, length)."""

    def __init__(self, case: Generation, vocabulary: int, seed: int) -> None:
        """Draw the tokens."""
        self.tokens = mx.random.randint(0, vocabulary, (case.batch, case.prompt), key=mx.random.key(seed))
        mx.eval(self.tokens)

    def prefill(self, model: Any, cache: list[Any], observer: Observer | None = None) -> Logits:
        """Fill a cache and return the logits of the first token after the prompts: (batch, vocabulary).

        For all tokens but the last, mlx-lm evaluates only the cache, so MLX computes nothing else of the last layer.
        """
        last = self.tokens.shape[1] - 1
        for start in range(0, last, PREFILL_STEP):
            model(self.tokens[:, start : min(start + PREFILL_STEP, last)], cache=cache)
            if observer:
                observer.unneeded()
            mx.eval([each.state for each in cache])
            mx.clear_cache()
        return next_logits(model, cache, self.tokens[:, last], observer)


def next_logits(model: Any, cache: list[Any], token: mx.array, observer: Observer | None = None) -> Logits:
    """Run a model on one token of each sequence, and return the logits of the next: (batch, vocabulary)."""
    logits: mx.array = model(token[:, None], cache=cache)[:, -1]
    if observer:
        observer.needed()
    return logits


class PrefillRun:
    """Prefill of the prompts, with a new cache for each run.

    Attributes:
        cache_bytes: size of a run's cache.
    """

    observer: Observer | None = None
    cache_bytes = 0

    def __init__(self, network: Network, prompts: Prompts, layers: int, kv_format: str = DENSE) -> None:
        """Bind the model's first layers to the prompts, and to a kind of cache."""
        self._network, self._prompts, self._layers, self._kv_format = network, prompts, layers, kv_format

    def prepare(self) -> None:
        """Do nothing: each run makes a new cache."""

    def queue(self) -> list[mx.array]:
        """Evaluate all steps but the last, one by one, and queue the last."""
        cache = self._network.cache(self._kv_format)
        with self._network.shortened(self._layers) as model:
            outputs = [self._prompts.prefill(model, cache, self.observer)]
        self.cache_bytes = self.cache_bytes or bytes_of_caches(cache)  # once: it would be in the time of every run
        return outputs

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the logits."""
        mx.eval(outputs)

    def results(self) -> list[mx.array]:
        """Run once and return the logits of the first token."""
        outputs = self.queue()
        self.wait(outputs)
        return outputs

    def peak_bytes(self) -> int | None:
        """Return None: the rounds measure it."""


class DecodeRun:
    """Greedy decoding after the prompts; each step is queued before the previous token is read, as in mlx-lm.

    Every run uses a copy of the caches filled by the prompts. mlx-lm can remove tokens from some kinds of caches only:
    not from a window that has wrapped, nor from a recurrent state.

    Attributes:
        cache_bytes: size of the filled caches.
    """

    observer: Observer | None = None

    def __init__(self, network: Network, cache: list[Any], token: mx.array, steps: int, layers: int) -> None:
        """Bind the model's first layers to a filled cache.

        Args:
            network: the model.
            cache: caches of all layers, filled by the prompts; never modified.
            token: (batch,), the first input token.
            steps: number of tokens to generate.
            layers: number of layers that run.
        """
        self._network, self._cache, self._token = network, cache, token
        self._steps, self._layers = steps, layers
        self._digest = digest_of_caches(self._cache)
        self.cache_bytes = bytes_of_caches(self._cache)
        self._fresh: list[Any] | None = None

    def prepare(self) -> None:
        """Copy the caches for the next run; not timed.

        Raises:
            StateChanged: the copy differs from the caches as filled by the prompts.
        """
        fresh: list[Any] = copy_caches(self._cache)
        if digest_of_caches(fresh) != self._digest:
            raise StateChanged("the caches are not as the prompts left them")
        self._fresh = fresh

    def _taken(self) -> list[Any]:
        """Return the prepared caches and drop the reference to them, so that MLX can update them in place."""
        if self._fresh is None:
            self.prepare()
        fresh, self._fresh = self._fresh, None
        assert fresh is not None
        return fresh

    def queue(self) -> list[mx.array]:
        """Generate all tokens and read the last one, so that nothing remains to be evaluated."""
        cache = self._taken()
        with self._network.shortened(self._layers) as model:
            token = self._queued(model, cache, self._token)
            for left in reversed(range(self._steps)):
                following = self._queued(model, cache, token) if left else token
                token.tolist()
                token = following
        return [token]

    def wait(self, outputs: Sequence[object]) -> None:
        """Do nothing: `queue` has read the last token."""

    def results(self) -> list[mx.array]:
        """Run one step and return its logits."""
        cache = self._taken()
        with self._network.shortened(self._layers) as model:
            logits = next_logits(model, cache, self._token)
            mx.eval(logits)
        return [logits]

    def peak_bytes(self) -> int | None:
        """Return None: the rounds measure it."""

    def _queued(self, model: Any, cache: list[Any], token: mx.array) -> mx.array:
        following = mx.argmax(next_logits(model, cache, token, self.observer), axis=-1)
        mx.async_eval(following)  # type: ignore[no-untyped-call]
        return following


MAX_ADVISED_LAYERS: Final = 8
"""Maximum number of layers suggested in messages: more take longer and hardly improve the estimate."""


class MemoryNeeds(Struct, frozen=True):
    """Memory that a run needs, in bytes."""

    fixed: int
    """Bytes independent of the number of layers: embeddings, and one layer's working memory."""
    layer: float
    """Bytes per layer: weights and cache."""
    layers: int

    @staticmethod
    def of(configuration: Configuration, work: Generation, network: Network, attention_bytes: int) -> "MemoryNeeds":
        """Return the memory needs of a generation.

        Args:
            configuration: the model's shapes.
            work: the case.
            network: the model with the layers that run.
            attention_bytes: peak of one attention call above its inputs.
        """
        length = work.prompt + (work.generate if work.phase == "decode" else 0)
        weights = network.layer_bytes
        copies = 2 if work.phase == "decode" else 1  # every run uses a copy
        cache = copies * configuration.cache_bytes(1, work.batch, length, work.dtype, work.kv_format)
        if work.kv_format != DENSE:  # beside which the unquantized one is run
            cache += copies * configuration.cache_bytes(1, work.batch, length, work.dtype)
        working = (
            configuration.activation_bytes(work.batch * min(work.prompt, PREFILL_STEP), work.dtype) + attention_bytes
        )
        return MemoryNeeds(network.own_bytes - network.layers * weights + working, weights + cache, network.layers)

    @property
    def whole(self) -> float:
        """Total bytes."""
        return self.fixed + self.layers * self.layer

    def refusal(self, limit: int, work: Generation) -> str:
        """Return the reason for refusing a run: its needs, the limit, and the number of layers that would fit."""
        text = shortage_text(self.whole, limit)
        fitting = min(int((limit - self.fixed) // self.layer), MAX_ADVISED_LAYERS, work.layers - 1)
        if fitting >= MIN_SIZES["measured_layers"]:
            return f"{text}; --layers {fitting} would fit, and estimate the whole model"
        return f"{text}; not even two layers fit"


TOLERANCE: Final = {"float32": 1e-3, "float16": 0.03, "bfloat16": 0.15}
"""Maximum RMS difference from the reference's logits, relative to their RMS, that rounding alone may cause."""
LEAD_IN_S: Final = 0.25
"""Calls longer than this need no untimed call before them: clocks and power settle within the call."""
COST_TOKENS: Final = 128
"""Tokens of the timed pass from which the cost of a plan is estimated."""
LONG_CASE_S: Final = 120.0
"""If a case takes longer than this, a way to shorten it is logged."""
ADVISED_LAYERS: Final = 4


class Unquantized(Struct, frozen=True, eq=False):
    """The runs of a case with an unquantized cache, and their logits by mlx-lm's own attention."""

    run: PrefillRun | DecodeRun
    short: PrefillRun | DecodeRun | None
    logits: Logits


class Setting(Struct, eq=False):
    """State shared by all implementations of a case."""

    case: Generation
    layers: Layers
    run: PrefillRun | DecodeRun
    short: PrefillRun | DecodeRun | None
    base_bytes: int
    further_bytes: int
    lead_in: bool
    weights: str
    """Digest of the weights in use."""
    logits: mx.array | None = None
    """Logits of the reference."""
    unquantized: Unquantized | None = None
    """What a quantized cache is compared with; None if the case's is unquantized."""


class GenerationBench(CaseRunner[GenerationPlan]):
    """The part of a run of generations that one worker executes."""

    def _prepare_all(self, device: Device) -> None:
        first = self._plan.cases[0]
        self._configuration = configuration.find_model(first.model)
        self._paths: dict[str, str] = {}
        self._network = Network(self._configuration, first.dtype, first.measured_layers, self._plan.seed)
        self._limit = self._plan.memory_limit_bytes or device.available_bytes

    def measure_cost(self) -> None:
        """Report what would be refused, and estimate each case from a pass over few tokens through two layers."""
        self._backend = (device := probe()).backend
        self._load_implementations()
        self._progress.emit(on.RunStarted(environment=environment(device)))
        self._prepare_all(device)
        first = self._plan.cases[0]
        small = Network(self._configuration, first.dtype, min(2, first.running_layers), self._plan.seed)
        fits = small.own_bytes <= self._limit / 4
        for case, work in enumerate(self._plan.cases):
            self._progress.begin_case(case)
            self._progress.emit(on.WeightsLoaded(case=case, weights_bytes=self._network.weights_bytes))
            count = sum(self._admit(name, work, device) for name in self._plan.ordered)
            if count and fits:
                if not small.made:
                    small.make()
                whole_s = self._whole_s(small, work)
                a_round = whole_s * (1.5 if work.estimated else 1.0) * self._passes(whole_s, count)
                seconds = 2 * whole_s * count + max(self._plan.seconds, MIN_ROUNDS * a_round)
                self._progress.emit(on.CaseTimeEstimated(case=case, seconds=seconds, implementations=count))
            self._progress.end_case("cost")
        self._progress.emit(on.RunDone())

    def _whole_s(self, network: Network, work: Generation) -> float:
        """Estimate the seconds of a case's timed call from COST_TOKENS through one and through two layers.

        A decode's call takes all its tokens, each as long as a short prompt.
        """
        decodes = work.phase == "decode"
        prompt = 2 if decodes else min(work.prompt, COST_TOKENS)
        passes = work.generate if decodes else work.prompt / prompt
        few = structs.replace(work, phase="prefill", prompt=prompt, kv_format=DENSE)
        times = []
        for layers in (1, 2):
            run = PrefillRun(network, self._prompts(few), layers=layers)
            take_sample(run, 1)  # compiles
            times.append(take_sample(run, 1))
        one, two = times
        return (one + max(two - one, 0.0) * (work.running_layers - 1)) * passes

    def _run_case(self, case: int) -> str:
        work = self._plan.cases[case]
        device = probe()
        self._progress.emit(on.WeightsLoaded(case=case, weights_bytes=self._network.weights_bytes))
        names = [name for name in self._assignment.remaining(case) if self._admit(name, work, device)]
        if not names:
            return "nothing to run"
        setting = self._make_shared(names, lambda: self._setting(work, device))
        if setting is None:
            return "failed"
        layer = self._layer(work)
        self._build([name for name in names if self._needs_building(name, layer, device)], layer, device)
        if work.phase == "prefill" and not work.estimated and work.layers > ADVISED_LAYERS:
            self._estimate_time(work, len(names))
        arms: list[ModelArm] = []
        for index, name in enumerate(names):
            arm = self._prepare(name, setting)
            if arm is not None:
                arms.append(arm)
                self._emit_estimate(arm, len(names), left=len(names) - index - 1, first=len(arms) == 1)
        if not arms:
            return "failed"
        without = _arm(on.WITHOUT_ATTENTION, setting, arms[0].call_s)
        shared = self._takes_long(arms[0].sample_s, len(arms))
        unquantized = self._unquantized_arms(arms, setting, shared)
        if shared:
            *arms, without = self._sharing([*arms, without], setting.run, setting.short)
        stopped_by = self._run_rounds(arms, self._plan.seconds, beside=[without, *unquantized])
        if not isinstance(arms[0], SharedArm) and not work.estimated:  # own passes, of the whole model
            self._measure_energy(device)
        return stopped_by

    def _unquantized_arms(self, arms: list[ModelArm], setting: Setting, shared: bool) -> list[ModelArm]:
        """Return arms with an unquantized cache, sampled in the same rounds; none if the case has one, or they fail."""
        beside = setting.unquantized
        if beside is None:
            return []
        fields: dict[str, Any] = {"runner": beside.run, "short": beside.short, "counterpart": "unquantized"}
        made = [ModelArm(**{**structs.asdict(arm), **fields, "samples": []}) for arm in arms]
        if shared:
            return self._sharing(made, beside.run, beside.short)
        for arm in made:
            self._progress.emit_progress(f"{arm.name}: with an unquantized cache")
            try:
                with replace_attention(arm.implementation):
                    beside.run.prepare()
                    beside.run.wait(beside.run.queue())
            except Exception as error:
                self._progress.log(f"no K/V speedup: {arm.name} with an unquantized cache: {error_line(error)}")
                return []
        return made

    def _layer(self, work: Generation) -> Workload:
        """Return the attention workload of a layer: the largest one of a prefill, the first token of a decode."""
        if work.phase == "decode":
            length = work.prompt + 1
            shape = {"batch": work.batch, "seq": 1, "kv_seq": length}
            return self._configuration.workload("decode", work.dtype, **shape, kv_format=work.kv_format)
        shape = {"batch": work.batch, "seq": min(work.prompt - 1, PREFILL_STEP), "kv_seq": work.prompt - 1}
        return self._configuration.workload("forward", work.dtype, **shape, kv_format=work.kv_format)

    def _admit(self, name: str, work: Generation, device: Device) -> bool:
        """Query an implementation's route; end its row if the case is unsupported or will not fit in memory."""
        unread = why_unread(self._network.model, work.kv_format) if name == ORIGINAL else ""
        if unread:
            self._progress.end_row(name, "unsupported", unread)
            return False
        route = self._supported_route(name, self._layer(work), device)
        if route is None:
            return False
        self._paths[name] = route.path
        needed = MemoryNeeds.of(self._configuration, work, self._network, route.predicted_bytes or 0)
        if needed.whole > self._limit and not self._plan.force:
            self._progress.end_row(name, "refused", needed.refusal(self._limit, work))
            return False
        return True

    def _setting(self, work: Generation, device: Device) -> Setting:
        """Make the weights, the prompts, and for decoding the filled cache, with mlx-lm's own attention."""
        if not self._network.made:
            self._progress.emit_progress(f"making {work.model}: {self._network.own_bytes / 2**30:.3g} GiB")
            self._network.make()
        prompts = self._prompts(work)
        many = self._network.layers
        few = max(1, many // 2) if work.estimated else many
        run, token = self._runs(work, prompts, work.kv_format)
        unquantized = self._unquantized(work, prompts, token, few, many)
        return Setting(
            case=work,
            layers=Layers(few, many, work.layers, unfinished=int(work.phase == "prefill")),
            run=run(many),
            short=run(few) if work.estimated else None,
            base_bytes=mx.get_active_memory(),
            further_bytes=self._configuration.cache_bytes(
                work.layers - many, work.batch, work.prompt, work.dtype, work.kv_format
            ),
            lead_in=device.backend != "cpu" and work.phase == "prefill",
            weights=digest_of_weights(self._network.model),
            unquantized=unquantized,
        )

    def _prompts(self, work: Generation) -> Prompts:
        return Prompts(work, int(self._configuration.fields.get("vocab_size", 256)), self._plan.seed)

    def _runs(
        self, work: Generation, prompts: Prompts, kv_format: str, token: mx.array | None = None
    ) -> tuple[Callable[[int], PrefillRun | DecodeRun], mx.array | None]:
        """Return a function that makes a run for a number of layers, and a decode's first input token.

        Args:
            work: the case.
            prompts: of the case.
            kv_format: of the caches.
            token: first input token of a decode; by default the most probable one after the prompt.
        """
        if work.phase == "prefill":
            return lambda layers: PrefillRun(self._network, prompts, layers, kv_format), None
        quantized = kv_format != DENSE
        self._progress.emit_progress(f"processing the prompt{f' into a cache in {kv_format}' if quantized else ''}")
        cache = self._network.cache(kv_format)
        # mlx-lm's own attention reads few formats, and builds the score matrix of a whole step of a quantized prompt
        with replace_attention(FILLS_QUANTIZED if quantized else ORIGINAL):
            following = mx.argmax(prompts.prefill(self._network.model, cache), axis=-1)
            mx.eval(following)
        first = following if token is None else token
        return lambda layers: DecodeRun(self._network, cache, first, work.generate, layers), first

    def _unquantized(
        self, work: Generation, prompts: Prompts, token: mx.array | None, few: int, many: int
    ) -> Unquantized | None:
        """Return the runs with an unquantized cache of a case with a quantized one; None for other cases."""
        if work.kv_format == DENSE:
            return None
        make, _ = self._runs(work, prompts, DENSE, token)
        run = make(many)
        run.prepare()
        logits = run.results()[0]
        return Unquantized(run, make(few) if work.estimated else None, logits.astype(mx.float32))

    def _prepare(self, name: str, setting: Setting) -> ModelArm | None:
        try:
            return self._first_run(name, setting)
        except Exception as error:
            self._fail(name, error)
            return None

    def _first_run(self, name: str, setting: Setting) -> ModelArm:
        """Run once, count the calls and compare the logits; run again to warm up; return the arm."""
        progress = self._progress
        progress.begin_step(name, "first call")
        if digest_of_weights(self._network.model) != setting.weights:
            raise StateChanged("the weights are not those that the first row started with")
        setting.run.prepare()
        with replace_attention(name), CallCounter(name) as calls:
            started = time.perf_counter()
            logits = setting.run.results()[0]
            call_s = time.perf_counter() - started
        progress.emit(on.FirstCall(case=progress.case, implementation=name, seconds=call_s))
        progress.emit(calls.event(progress.case, self._paths.get(name)))
        self._emit_cache(setting)
        self._compare(name, logits, setting)
        # An autotuner knows its path only now.
        self._supported_route(name, self._layer(setting.case), probe())
        run_s = call_s * (setting.case.generate if setting.case.phase == "decode" else 1)
        if self._takes_long(run_s, len(self._plan.implementations)):
            call_s = run_s  # a shared pass warms up all implementations at once
        elif call_s < SLOW_CALL_S or setting.case.phase == "decode":
            progress.begin_step(name, "warm up")
            setting.run.prepare()
            with replace_attention(name):
                started = time.perf_counter()
                setting.run.wait(setting.run.queue())
                call_s = time.perf_counter() - started
        return _arm(name, setting, call_s)

    def _emit_cache(self, setting: Setting) -> None:
        """Emit the size of the cache of the whole model, from that of the layers that ran."""
        work = setting.case
        token_bytes = work.layers * self._configuration.token_bytes(work.dtype, work.kv_format)
        held = setting.run.cache_bytes * work.layers // self._network.layers
        self._progress.emit(on.CacheMeasured(case=self._progress.case, kv_token_bytes=token_bytes, cache_bytes=held))

    def _takes_long(self, run_s: float, count: int) -> bool:
        """Return whether the minimum number of rounds takes too long if `count` implementations run separately.

        Passes are shared only on a device that runs one operation at a time.
        """
        separate_s = MIN_ROUNDS * run_s * (self._kinds_of_cache * count + 2)
        return self._backend == "cpu" and separate_s > MAX_EXTENSION * self._plan.seconds

    @property
    def _kinds_of_cache(self) -> int:
        """Kinds of caches in the rounds of the current case: 2 if the unquantized one runs beside a quantized one."""
        return 1 if self._plan.cases[self._progress.case].kv_format == DENSE else 2

    def _passes(self, run_s: float, count: int) -> int:
        """Return the passes of the model in a round of `count` implementations whose runs take `run_s`."""
        if self._takes_long(run_s, count):
            return self._kinds_of_cache  # shared by all implementations
        return self._kinds_of_cache * count + 2

    def _sharing(
        self, arms: list[ModelArm], run: PrefillRun | DecodeRun, short: PrefillRun | DecodeRun | None
    ) -> list[ModelArm]:
        """Return arms that share their passes, warmed up; the given arms if the model does not support that."""
        self._progress.emit_progress("a pass that all implementations share")
        runs = {"many": run, **({"few": short} if short else {})}
        names = {arm.name: arm.implementation for arm in arms}
        if arms[0].counterpart is None:
            names = {arms[0].name: arms[0].implementation, on.REPEATED_REFERENCE: arms[0].implementation, **names}
        shared = SharedPass(runs, names, seed=self._plan.seed, at_work=self._attends)
        try:
            shared.warm_up()
        except Exception as error:  # each arm then runs separately, and reports its own failure
            self._progress.log(f"the implementations cannot share passes: {error_line(error)}")
            return arms
        finally:
            self._progress.mark_idle()
        self._progress.log(
            f"a pass takes {shared.seconds:.3g} s: all implementations attend in the same passes, one after another, "
            "and share the time of the rest"
        )
        self._progress.emit(on.PassesShared(case=self._progress.case))
        for_each_s = shared.seconds / len(names)
        return [SharedArm(**{**structs.asdict(arm), "shared": shared, "call_s": for_each_s}) for arm in arms]

    def _attends(self, name: str) -> None:
        if name in self._plan.implementations:
            self._progress.mark_running(name)
        else:
            self._progress.mark_idle()

    def _compare(self, name: str, logits: mx.array, setting: Setting) -> None:
        """Compare the first token's logits with those of the first implementation that ran."""
        logits = logits.astype(mx.float32)
        if setting.logits is None:
            setting.logits = logits
        checked = check_logits(self._progress.case, name, logits, setting.logits, setting.case.dtype, "the reference's")
        if setting.unquantized:
            checked.kl_divergence = kl_divergence(setting.unquantized.logits, logits)
        self._progress.emit(checked)

    def _estimate_time(self, work: Generation, count: int) -> None:
        """Time two layers, of which a prefill completes one; if the case takes long, log a way to shorten it."""
        self._progress.emit_progress("timing two layers")
        probe_run = PrefillRun(self._network, self._prompts(work), layers=2)
        for _ in range(2):  # the first pass compiles: what it says is long is timed again
            whole_s = take_sample(probe_run, 1) * (work.layers - 1)
            seconds = whole_s * (count + MIN_ROUNDS * self._passes(whole_s, count))
            if seconds <= LONG_CASE_S:
                break
        else:
            text = f"the whole model takes {seconds / 60:.0f} minutes or more for this prompt"
            self._progress.log(f"{text}; --layers {ADVISED_LAYERS} would estimate it sooner")

    def _emit_estimate(self, arm: ModelArm, count: int, *, left: int, first: bool) -> None:
        """Report the time left of the case, assuming that all implementations are as fast as this one.

        Args:
            arm: the implementation whose call was timed.
            count: implementations of the case, without the reference's second arm and the model without attention.
            left: implementations not prepared yet.
            first: whether this is the first estimate of the case.
        """
        layers = arm.layers
        shorter = (layers.few - layers.unfinished) / (layers.many - layers.unfinished) if arm.short else 0.0
        a_round = arm.sample_s * (1 + shorter) * self._passes(arm.sample_s, count)
        # The preparation of an implementation is its first call and, unless that was slow, a second one to warm up.
        seconds = 2 * arm.call_s * left + max(self._plan.seconds, MIN_ROUNDS * a_round)
        self._progress.emit_progress(f"{arm.name}: {arm.call_s:.3g} s", seconds)
        if first:
            self._progress.emit(on.CaseTimeEstimated(case=self._progress.case, seconds=seconds, implementations=count))

    def _emit_arm_results(self, arm: Arm) -> None:
        assert isinstance(arm, ModelArm)
        case = self._progress.case
        if arm.peak_bytes is not None:
            self._progress.emit(on.MemoryMeasured(case=case, implementation=arm.name, peak_bytes=arm.peak_bytes))
        if arm.short and arm.many_s:
            event = on.LayersTimed(case=case, implementation=arm.name, layer_s=arm.layer_s, fixed_s=arm.fixed_s)
            self._progress.emit(event)


def check_logits(case: int, name: str, found: Logits, expected: Logits, dtype: str, whose: str) -> on.AccuracyChecked:
    """Return the event of an implementation's logits, compared with those that count as right; both in float32.

    Args:
        case: number of the case.
        name: the implementation.
        found: its logits.
        expected: those that count as right.
        dtype: of the weights; it says what rounding may cause.
        whose: whose the expected ones are, in words: "the reference's".
    """
    spread = mx.sqrt(mx.mean(mx.square(expected)))
    difference = mx.abs(found - expected)
    rms = float(mx.sqrt(mx.mean(mx.square(difference))) / spread)
    largest = float(mx.max(difference))
    allowed = TOLERANCE[dtype]
    return on.AccuracyChecked(
        case=case,
        implementation=name,
        max_error=largest if largest == largest else None,
        rms_error=rms if rms == rms else None,
        accurate=rms <= allowed,
        detail=f"logits: {rms:.2g} of their spread off {whose}, {allowed:g} allowed",
    )


def kl_divergence(expected: mx.array, found: mx.array) -> float | None:
    """Return the Kullback-Leibler divergence of softmax(found) from softmax(expected), in nats: the mean over the rows.

    It is computed in float64 from logits (batch, vocabulary). None if it is not finite.
    """
    p, q = (_log_softmax(np.array(logits.astype(mx.float32)).astype(np.float64)) for logits in (expected, found))
    mean = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    return max(0.0, mean) if math.isfinite(mean) else None


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    made: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return made


def read_by_mlx_lm(kv_format: str) -> bool:
    """Return whether mlx-lm's own attention reads caches of a format."""
    formats = parse_kv_format(kv_format)
    return formats is None or formats.shared_affine is not None


def _arm(name: str, setting: Setting, call_s: float) -> ModelArm:
    return ModelArm(
        name=name,
        implementation=name,
        runner=setting.run,
        call_s=call_s,
        lead_in=setting.lead_in and call_s < LEAD_IN_S,
        short=setting.short,
        layers=setting.layers,
        steps=setting.case.generate if setting.case.phase == "decode" else 1,
        base_bytes=setting.base_bytes,
        further_bytes=setting.further_bytes,
    )
