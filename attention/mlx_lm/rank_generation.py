"""Benchmark generation with a model over several ranks: each phase and prompt length, beside one device alone."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Final

import mlx.core as mx
from msgspec import structs

from attention import implementations
from attention.core import events as on
from attention.core.errors import error_line
from attention.core.kv_format import DENSE
from attention.core.plan import GenerationPlan
from attention.core.workload import Generation, Workload
from attention.distributed import collectives
from attention.engine.case_runner import CaseRunner
from attention.engine.ranks import RankCall, RankCalls
from attention.implementations.calls import take_path
from attention.measure.device import Device, probe
from attention.measure.rounds import Arm, take_sample
from attention.mlx_lm import configuration
from attention.mlx_lm.arms import Layers, ModelArm
from attention.mlx_lm.generation import (
    PREFILL_STEP,
    DecodeRun,
    PrefillRun,
    Prompts,
    check_logits,
    next_logits,
)
from attention.mlx_lm.network import Network, copy_caches
from attention.mlx_lm.patch import ORIGINAL, replace_attention
from attention.mlx_lm.sharded import ShardedPatch

UNSUPPORTED: Final = "over several ranks a model runs whole, with a cache that is not quantized"


class ModelCall:
    """Prefill of a case's prompts, or the decoding of its tokens, by all ranks."""

    def __init__(self, work: Generation, network: Network, prompts: Prompts, name: str, group: Any) -> None:
        """Patch the model for a rank; for decoding, fill the caches."""
        self._work, self._prompts, self._patch = work, prompts, ShardedPatch(name, group)
        self._model = self._patch.sharded(network.model)
        self._opened = ExitStack()
        self._sent_bytes = 0
        self._filled: list[Any] = []
        self._fresh: list[Any] = []
        self.steps = work.generate if work.phase == "decode" else 1
        if work.phase == "decode":
            self._filled = self._model.make_cache()
            with self._patch:
                self._token = mx.argmax(prompts.prefill(self._model, self._filled), axis=-1)
                mx.eval(self._token)

    def prepare(self) -> None:
        """Patch the model, and copy the caches filled by the prompts; not timed."""
        if self._work.phase == "decode":
            self._fresh = copy_caches(self._filled)
        self._opened.enter_context(self._patch)
        self._sent_bytes = collectives.statistics().bytes_sent

    def queue(self) -> object:
        """Fill new caches by the prompts, or generate all tokens."""
        if self._work.phase == "prefill":
            return self._prompts.prefill(self._model, self._model.make_cache())
        cache, self._fresh, token = self._fresh, [], self._token
        for _ in range(self.steps):
            token = mx.argmax(next_logits(self._model, cache, token), axis=-1)
            mx.eval(token)
        return token

    def queue_compute(self) -> None:
        """Return None: a model without communication is not run."""
        return

    def wait(self, outputs: Sequence[object]) -> None:
        """Evaluate the logits or the last token, and undo the patch."""
        mx.eval(outputs)
        self._opened.close()
        self._sent_bytes = collectives.statistics().bytes_sent - self._sent_bytes

    def results(self) -> list[mx.array]:
        """Return the logits of the first token, or of the first decoding step."""
        self.prepare()
        if self._work.phase == "prefill":
            logits = self._prompts.prefill(self._model, self._model.make_cache())
        else:
            logits = next_logits(self._model, self._fresh, self._token)
        self.wait([logits])
        return [logits]

    def sent_bytes(self) -> int:
        """Return the bytes that this rank sent in the latest call."""
        return self._sent_bytes


class ModelCalls:
    """The calls of a plan of generations; every rank has the whole model."""

    def __init__(self, plan: GenerationPlan, group: "mx.distributed.Group") -> None:
        first = plan.cases[0]
        self._plan, self._group = plan, group
        self.configuration = configuration.find_model(first.model)
        self.network = Network(self.configuration, first.dtype, None, plan.seed)

    def signature(self, case: int, name: str) -> str:
        """Return the case and the implementation."""
        return f"{self._plan.cases[case].label} by {name}"

    def make(self, case: int, name: str) -> RankCall:
        """Make the weights, if they are not in memory, and bind them to the prompts of a case."""
        if not self.network.made:
            self.network.make()
        work = self._plan.cases[case]
        return ModelCall(work, self.network, self.prompts(work), name, self._group)

    def prompts(self, work: Generation) -> Prompts:
        """Return the prompts of a case, the same on every rank."""
        return Prompts(work, int(self.configuration.fields.get("vocab_size", 256)), self._plan.seed)


class RankGenerationBench(CaseRunner[GenerationPlan]):
    """The part of a run of generations over several ranks that rank 0 executes."""

    def _prepare_all(self, device: Device) -> None:
        assert self._member is not None
        calls = self._member.makes
        assert isinstance(calls, ModelCalls)
        self._calls = calls
        self._progress.log(f"{self._ranks} ranks with {self._member.conditions.text}")

    def _run_case(self, case: int) -> str:
        work, device = self._plan.cases[case], probe()
        self._progress.emit(on.WeightsLoaded(case=case, weights_bytes=self._calls.network.weights_bytes))
        layer = self._layer(work)
        names = [name for name in self._assignment.remaining(case) if self._admit(name, work, layer, device)]
        if not names:
            return "nothing to run"
        logits = self._make_shared(names, lambda: self._expected(work))
        if logits is None:
            return "failed"
        self._build([name for name in names if self._needs_building(name, layer, device)], layer, device)
        arms = [arm for name in names if (arm := self._prepare(name, case, logits))]
        beside = [made for arm in arms if (made := self._one_device(arm, work))]
        return self._run_rounds(arms, self._plan.seconds, beside) if arms else "failed"

    def _layer(self, work: Generation) -> Workload:
        """Return the attention workload of a layer, on all ranks."""
        decodes = work.phase == "decode"
        length = min(work.prompt - 1, PREFILL_STEP)
        return self._calls.configuration.workload(
            "decode" if decodes else "forward",
            work.dtype,
            batch=work.batch,
            seq=1 if decodes else length,
            kv_seq=work.prompt + 1 if decodes else length,
            ranks=work.ranks,
        )

    def _admit(self, name: str, work: Generation, layer: Workload, device: Device) -> bool:
        if work.estimated or work.kv_format != DENSE:
            self._progress.end_row(name, "unsupported", UNSUPPORTED)
            return False
        if self._supported_route(name, layer, device) is None:
            return False
        if work.phase == "prefill":  # whose last token is a step
            step = self._layer(structs.replace(work, phase="decode"))
            route = self._route(implementations.load_implementation(name), step, device)
            if not route.supported:
                self._progress.end_row(name, "unsupported", route.reason)
                return False
        return True

    def _expected(self, work: Generation) -> mx.array:
        """Return the logits of mlx-lm's own attention on one device: of the first token, or of the first step."""
        network, prompts = self._calls.network, self._calls.prompts(work)
        if not network.made:
            self._progress.emit_progress(f"making {work.model}: {network.own_bytes / 2**30:.3g} GiB")
            network.make()
        with replace_attention(ORIGINAL):
            cache = network.cache()
            logits = prompts.prefill(network.model, cache)
            if work.phase == "decode":
                logits = next_logits(network.model, cache, mx.argmax(logits, axis=-1))
            mx.eval(logits)
        return logits.astype(mx.float32)

    def _prepare(self, name: str, case: int, logits: mx.array) -> Arm | None:
        """Run once on all ranks and compare the logits; warm up; return the arm."""
        assert self._member is not None
        progress = self._progress
        try:
            progress.begin_step(name, "first call")
            runner = RankCalls(self._member, case, name, self._plan.ordered)
            take_path()  # clear what an earlier call left
            started = time.perf_counter()
            found = runner.results()[0].astype(mx.float32)
            seconds = time.perf_counter() - started
            self._emit_taken_path(name, case)
            progress.emit(on.FirstCall(case=case, implementation=name, seconds=seconds))
            dtype = self._plan.cases[case].dtype
            progress.emit(check_logits(case, name, found, logits, dtype, "one device's"))
            progress.begin_step(name, "memory")
            progress.emit(on.MemoryMeasured(case=case, implementation=name, peak_bytes=runner.peak_bytes()))
            progress.begin_step(name, "warm up")
            call_s = take_sample(runner, 1)
            progress.record_call_s(name, call_s)
        except BaseException as error:  # ends the group
            self._fail(name, error)
            return None
        return Arm(name=name, runner=runner, call_s=call_s, lead_in=False)

    def _emit_taken_path(self, name: str, case: int) -> None:
        """Emit the path that the prefill recorded; a step's is that of its route."""
        work, path = self._plan.cases[case], take_path()
        if path is not None and work.phase == "prefill":
            route = self._route(implementations.load_implementation(name), self._layer(work), probe())
            route = structs.replace(route, path=f"x{work.ranks} {path}")
            self._progress.emit(on.RouteFound(case=case, implementation=name, route=route))

    def _one_device(self, arm: Arm, work: Generation) -> ModelArm | None:
        """Return the arm of the same model on one device, in the same rounds; None if it fails."""
        network, prompts = self._calls.network, self._calls.prompts(work)
        self._progress.emit_progress(f"{arm.name}: on one device")
        try:
            with replace_attention(arm.name):
                run: PrefillRun | DecodeRun = PrefillRun(network, prompts, network.layers)
                if work.phase == "decode":
                    cache = network.cache()
                    token = mx.argmax(prompts.prefill(network.model, cache), axis=-1)
                    mx.eval(token)
                    run = DecodeRun(network, cache, token, work.generate, network.layers)
                run.prepare()
                run.wait(run.queue())
        except Exception as error:
            self._progress.log(f"{arm.name}: no share of ideal: on one device: {error_line(error)}")
            return None
        return ModelArm(
            name=arm.name,
            implementation=arm.name,
            runner=run,
            call_s=arm.call_s * work.ranks,
            short=None,
            layers=Layers(network.layers, network.layers, work.layers),
            steps=work.generate if work.phase == "decode" else 1,
            base_bytes=mx.get_active_memory(),
            further_bytes=0,
            counterpart="one_device",
        )
