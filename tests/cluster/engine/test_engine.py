"""Whole engines in this process: real threads, gRPC, workers and drivers. Each token of the model, `echo`, depends on
all KV before it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rest import NEWS_S, REST_S, at_rest

from diptych.cluster.config import ModelSettings
from diptych.cluster.engine.engine import Engine
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFacts
from diptych.cluster.router.mirror import PromptNames
from diptych.cluster.router.session import EngineSession, SessionTerms
from diptych.kernels.echo.testing import expected_tokens
from diptych.protos.errors import DiptychError, EngineFault, InvalidRequest, StartupError
from diptych.protos.faults import FaultPlan, FaultRule, FaultSettings
from diptych.protos.settings import DecodeSettings, EchoSettings, KvSettings, PrefillSettings, TransferSettings
from diptych.protos.status import EngineStatus
from diptych.protos.types import (
    GENERATING,
    DecodeOrder,
    EngineId,
    EngineRef,
    Finish,
    FinishReason,
    GenerateRequest,
    PrefillOrder,
    PromptLogprobs,
    Role,
    SamplingParams,
    TokenLogprobs,
    TransferKey,
)

WAIT_S = 60
VOCAB = 1000
FACTS = ModelFacts(
    name="tiny",
    architecture="LlamaForCausalLM",
    layers=2,
    kv_heads=2,
    head_dim=8,
    vocab_size=VOCAB,
    max_context_tokens=512,
    weights_bytes=0,
    num_parameters=0,
    eos_token_ids=(),
    bos_token_id=None,
    dtype="float32",
    chat_template=None,
)
SETTINGS = ModelSettings(
    source="echo",
    kv=KvSettings(memory_mib=1, block_tokens=16),
    prefill=PrefillSettings(step_tokens=32, threads=1),
    decode=DecodeSettings(step_tokens=32, threads=1),
)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A short one: unix socket paths hold 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="dt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def spec_of(
    run_dir: Path, name: str, *roles: Role, transport: str = "auto", settings: ModelSettings = SETTINGS
) -> EngineSpec:
    return EngineSpec(
        engine_id=EngineId(name),
        epoch=3,
        roles=frozenset(roles),
        model="tiny",
        settings=settings,
        transfer=TransferSettings.model_validate(
            {"transport": transport, "slot_kib": 64, "slots": 4, "dial_timeout_s": 0.5}
        ),
        folder=Path("/nowhere"),
        facts=FACTS,
        dtype="float32",
        run_dir=run_dir,
    )


class Sink:
    """Collects one phase of one request."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.end: asyncio.Future[Finish | DiptychError] = asyncio.get_running_loop().create_future()
        self.got_token = asyncio.Event()

    def on_token(self, index: int, token: int, logprobs: TokenLogprobs | None = None) -> None:
        assert index not in self.tokens
        self.tokens[index] = token
        self.got_token.set()

    def on_start(self) -> None:
        pass

    def on_prompt(self, piece: PromptLogprobs) -> None:
        raise AssertionError("nobody asked for the prompt's logprobs")

    def on_end(self, role: Role, outcome: Finish | DiptychError) -> None:
        assert not self.end.done(), "a second terminal event"
        self.end.set_result(outcome)

    async def finish(self) -> Finish:
        async with asyncio.timeout(WAIT_S):
            outcome = await self.end
        assert isinstance(outcome, Finish), outcome
        return outcome


class Site:
    """Engines and one client session to each."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.engines: dict[str, Engine] = {}
        self.sessions: dict[str, EngineSession] = {}
        self.failures: list[BaseException] = []
        self.router_faults: FaultPlan | None = None

    async def add(
        self,
        name: str,
        *roles: Role,
        transport: str = "auto",
        settings: ModelSettings = SETTINGS,
        **more: Any,
    ) -> EngineRef:
        spec = dataclasses.replace(spec_of(self._run_dir, name, *roles, transport=transport, settings=settings), **more)
        engine = Engine(spec, on_failure=self.failures.append)
        info = (await asyncio.to_thread(engine.start)).info
        ready = asyncio.Event()
        terms = SessionTerms(
            router_id="test", connect_timeout_s=10, silence_s=10, clock=time.monotonic, faults=self.router_faults
        )
        session = EngineSession(info, terms, on_change=ready.set)
        session.start()
        async with asyncio.timeout(WAIT_S):
            await ready.wait()
        self.engines[name], self.sessions[name] = engine, session
        return info.ref

    async def stop(self, name: str) -> None:
        await self.sessions.pop(name).stop()
        await asyncio.to_thread(self.engines.pop(name).stop)

    async def at_rest(self, *names: str, within_s: float = REST_S) -> list[EngineStatus]:
        """A reading of each engine once all are at rest."""
        return await at_rest((self.engines[name] for name in names), within_s)


@pytest.fixture
async def site(run_dir: Path) -> AsyncIterator[Site]:
    made = Site(run_dir)
    yield made
    for name in list(made.engines):
        await made.stop(name)
    assert not made.failures


def faulty(*rules: dict[str, object]) -> FaultSettings:
    return FaultSettings(rules=tuple(FaultRule.model_validate(rule) for rule in rules))


def request(n: int, prompt: list[int], max_tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(
        key=TransferKey(n.to_bytes(16, "big")),
        prompt=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


def ask(site: Site, p: EngineRef, d: EngineRef, req: GenerateRequest) -> tuple[Sink, Sink]:
    prefill, decode = Sink(), Sink()
    site.sessions[d.engine_id].submit(DecodeOrder(request=req, prefill=p), decode)
    site.sessions[p.engine_id].submit(PrefillOrder(request=req, decode=d), prefill)
    return prefill, decode


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_a_prompt_computed_in_one_engine_is_continued_in_the_other(site: Site, transport: str) -> None:
    p = await site.add("p", Role.PREFILL, transport=transport)
    d = await site.add("d", Role.DECODE, transport=transport)
    rng = random.Random(1)
    prompts = [prompt_of(rng, length) for length in (1, 15, 16, 17, 100, 300)]
    pairs = [ask(site, p, d, request(n, prompt)) for n, prompt in enumerate(prompts)]
    for prompt, (prefill, decode) in zip(prompts, pairs, strict=True):
        assert (await prefill.finish()).reason is FinishReason.HANDOFF
        done = await decode.finish()
        assert (done.reason, done.num_tokens) == (FinishReason.LENGTH, 12)
        assert (done.transport, done.transfer_bytes > 0) == (transport, True)
        assert prefill.tokens.keys() == {0}
        assert 0 not in decode.tokens
        answer = prefill.tokens | decode.tokens
        assert [answer[i] for i in range(12)] == expected_tokens(prompt, 12)
    await site.at_rest("p", "d")
    for name in ("p", "d"):
        assert site.engines[name].status().counters["kv_transfer_bytes_total"] > 0


async def test_pools_may_differ_in_arena_and_block_size(site: Site) -> None:
    """KV crosses in one canonical form, whatever the block sizes of the two ends."""
    own = KvSettings(memory_mib=1, block_tokens=7, prefix_cache=False)
    settings = SETTINGS.model_copy(update={"prefill": PrefillSettings(step_tokens=32, threads=1, kv=own)})
    p = await site.add("p", Role.PREFILL, settings=settings)
    d = await site.add("d", Role.DECODE, settings=settings)
    rng = random.Random(8)
    for n, length in enumerate((1, 6, 7, 8, 16, 111)):
        prompt = prompt_of(rng, length)
        prefill, decode = ask(site, p, d, request(n, prompt))
        assert (await prefill.finish()).reason is FinishReason.HANDOFF
        assert (await decode.finish()).transfer_bytes > 0
        answer = prefill.tokens | decode.tokens
        assert [answer[i] for i in range(12)] == expected_tokens(prompt, 12)
    infos = [site.sessions[name].info for name in ("p", "d")]
    assert [info.block_tokens for info in infos] == [7, 16]
    assert [any("no prefix cache" in choice for choice in info.degraded) for info in infos] == [True, False]


async def test_a_prompt_too_long_for_the_prefill_arena_is_computed_by_the_decode_engine(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "FACTS", dataclasses.replace(FACTS, max_context_tokens=8192))
    wide = SETTINGS.model_copy(update={"decode": SETTINGS.decode.model_copy(update={"kv": KvSettings(memory_mib=4)})})
    p = await site.add("p", Role.PREFILL, settings=wide)
    d = await site.add("d", Role.DECODE, settings=wide)
    assert site.sessions["p"].info.max_context_tokens == 4096
    assert any("prompts on the prefill engines" in choice for choice in site.sessions["p"].info.degraded)
    prompt = prompt_of(random.Random(11), 4200)
    prefill, decode = ask(site, p, d, request(1, prompt, max_tokens=4))
    assert (await prefill.finish()).error_code == "no_kv_blocks"
    assert (await decode.finish()).reason is FinishReason.LENGTH
    assert [decode.tokens[i] for i in range(4)] == expected_tokens(prompt, 4)


async def test_a_colocated_engine_answers_alone(site: Site) -> None:
    settings = SETTINGS.model_copy(update={"layout": "colocated"})
    await site.add("d", Role.DECODE, settings=settings)
    assert site.sessions["d"].info.layout == "colocated"
    prompt = prompt_of(random.Random(9), 70)
    decode = Sink()
    site.sessions["d"].submit(DecodeOrder(request=request(1, prompt), prefill=None), decode)
    assert (await decode.finish()).reason is FinishReason.LENGTH
    assert [decode.tokens[i] for i in range(12)] == expected_tokens(prompt, 12)


async def test_a_draining_prefill_engine_stays_until_its_kv_was_fetched(site: Site) -> None:
    """Its own part ends when the KV is staged; the decode engine may not have fetched it yet."""
    p = await site.add("p", Role.PREFILL)
    d = await site.add("d", Role.DECODE)
    prompt = prompt_of(random.Random(10), 60)
    early = Sink()
    site.sessions["p"].submit(PrefillOrder(request=request(1, prompt), decode=d), early)  # nobody fetches this one yet
    async with asyncio.timeout(WAIT_S):
        await early.got_token.wait()
    draining = asyncio.create_task(asyncio.to_thread(site.engines["p"].drain, float(WAIT_S)))
    assert not (await asyncio.wait({draining}, timeout=0.05))[0]
    decode = Sink()
    site.sessions["d"].submit(DecodeOrder(request=request(1, prompt), prefill=p), decode)
    assert await draining
    done = await decode.finish()
    assert done.transfer_bytes > 0
    answer = early.tokens | decode.tokens
    assert [answer[i] for i in range(12)] == expected_tokens(prompt, 12)


async def test_an_engine_of_both_roles_hands_over_within_itself(site: Site) -> None:
    both = await site.add("both", Role.PREFILL, Role.DECODE)
    rng = random.Random(2)
    prompts = [prompt_of(rng, length) for length in (5, 40, 200)]
    pairs = [ask(site, both, both, request(n, prompt)) for n, prompt in enumerate(prompts)]
    for prompt, (prefill, decode) in zip(prompts, pairs, strict=True):
        await prefill.finish()
        assert (await decode.finish()).transport == "local"
        answer = prefill.tokens | decode.tokens
        assert [answer[i] for i in range(12)] == expected_tokens(prompt, 12)
    await site.at_rest("both")


async def test_a_decode_engine_computes_the_prompt_when_its_prefill_engine_is_gone(site: Site) -> None:
    p = await site.add("p", Role.PREFILL)
    d = await site.add("d", Role.DECODE)
    await site.stop("p")
    prompt = prompt_of(random.Random(3), 50)
    decode = Sink()
    site.sessions["d"].submit(DecodeOrder(request=request(1, prompt), prefill=p), decode)
    assert (await decode.finish()).reason is FinishReason.LENGTH
    assert [decode.tokens[i] for i in range(12)] == expected_tokens(prompt, 12)
    assert d.epoch == 3


async def test_a_router_learns_which_prompts_an_engine_has_cached(site: Site) -> None:
    await site.add("d", Role.DECODE)
    prompt, decode, mirror = prompt_of(random.Random(9), 50), Sink(), site.sessions["d"].mirror
    site.sessions["d"].submit(DecodeOrder(request=request(1, prompt), prefill=None), decode)
    await decode.finish()
    async with asyncio.timeout(WAIT_S):
        while mirror.cached_tokens(PromptNames(tuple(prompt), b"")) != 48:  # noqa: ASYNC110 - told with a status
            await asyncio.sleep(0.01)
    assert mirror.cached_tokens(PromptNames(tuple(prompt), b"another tenant")) == 0


async def test_random_cancels_leave_both_pools_as_they_were(site: Site) -> None:
    p = await site.add("p", Role.PREFILL)
    d = await site.add("d", Role.DECODE)
    rng = random.Random(4)
    sinks = []
    for n in range(60):
        req = request(n, prompt_of(rng, rng.randrange(1, 200)), max_tokens=rng.randrange(1, 30))
        prefill, decode = ask(site, p, d, req)
        sinks.append((req, prefill, decode))
        if rng.random() < 0.3:
            await asyncio.sleep(rng.random() * 0.02)
            for name in ("p", "d"):
                site.sessions[name].cancel(req.key)
    for req, prefill, decode in sinks:
        ends = [await prefill.finish(), await decode.finish()]
        assert FinishReason.ERROR not in {end.reason for end in ends}
        answer = prefill.tokens | decode.tokens
        expected = expected_tokens(req.prompt, req.sampling.max_tokens)
        assert all(expected[index] == token for index, token in answer.items())
    for name, reading in zip(("p", "d"), await site.at_rest("p", "d", within_s=NEWS_S), strict=True):
        counts = reading.blocks
        assert counts.free + counts.cached == counts.total
        mirror = site.sessions[name].mirror
        async with asyncio.timeout(WAIT_S):
            while len(mirror.names) != counts.cached:  # noqa: ASYNC110 - the engine tells it with its next status
                await asyncio.sleep(0.01)


async def test_a_client_that_vanishes_frees_its_blocks(site: Site) -> None:
    p = await site.add("p", Role.PREFILL)
    d = await site.add("d", Role.DECODE)
    _, decode = ask(site, p, d, request(1, prompt_of(random.Random(5), 100), max_tokens=400))
    async with asyncio.timeout(WAIT_S):
        await decode.got_token.wait()
    for session in site.sessions.values():
        await session.stop()
    await site.at_rest("p", "d")


async def test_draining_waits_for_running_requests_and_refuses_new_ones(site: Site) -> None:
    p = await site.add("p", Role.PREFILL)
    d = await site.add("d", Role.DECODE)
    prompt = prompt_of(random.Random(6), 30)
    prefill, decode = ask(site, p, d, request(1, prompt, max_tokens=100))
    async with asyncio.timeout(WAIT_S):
        await decode.got_token.wait()
    draining = asyncio.create_task(asyncio.to_thread(site.engines["d"].drain, float(WAIT_S)))
    while not site.engines["d"].is_draining:  # noqa: ASYNC110 - set by another thread
        await asyncio.sleep(0.001)
    late = Sink()
    site.sessions["d"].submit(DecodeOrder(request=request(2, prompt), prefill=None), late)
    assert (await late.finish()).error_code == "shutting_down"
    assert await draining
    assert (await decode.finish()).num_tokens == 100
    assert prefill.end.done()


async def test_the_number_of_threads_changes_in_the_thread_that_computes(site: Site) -> None:
    await site.add("d", Role.DECODE)
    seen: list[tuple[str, int]] = []
    engine = site.engines["d"]
    for n, count in ((1, 2), (2, 1)):
        engine.set_threads(count)
        decode = Sink()
        worker = engine.workers[Role.DECODE]
        step = type(worker).step

        def watched(self: object = worker, step: object = step) -> bool:
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return bool(step(self))  # type: ignore[operator]

        worker.step = watched  # type: ignore[method-assign]
        site.sessions["d"].submit(DecodeOrder(request=request(n, [1, 2, 3]), prefill=None), decode)
        await decode.finish()
        assert seen[-1] == ("step", count)


async def test_a_step_thread_that_cannot_go_on_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine without its step thread looks alive to gRPC; whoever owns the process must be told."""
    await site.add("d", Role.DECODE)

    def broken() -> float | None:
        raise RuntimeError("a defect")

    engine = site.engines["d"]
    monkeypatch.setattr(next(iter(engine.workers.values())), "next_wake", broken)
    async with asyncio.timeout(WAIT_S):
        while not site.failures:  # noqa: ASYNC110 - filled by another thread
            await asyncio.sleep(0.01)
    assert str(site.failures.pop()) == "a defect"


def test_an_arena_too_small_for_one_block_is_refused_with_the_key(run_dir: Path) -> None:
    facts = dataclasses.replace(FACTS, layers=200, kv_heads=64, head_dim=128)
    spec = dataclasses.replace(spec_of(run_dir, "p", Role.PREFILL), facts=facts)
    with pytest.raises(StartupError, match=r"models\.tiny\.kv\.memory_mib: 1 MiB hold no single block"):
        Engine(spec, on_failure=lambda error: None).start()


async def test_an_arena_smaller_than_the_context_is_told_as_degraded(site: Site, run_dir: Path) -> None:
    facts = dataclasses.replace(FACTS, max_context_tokens=1 << 20)
    engine = Engine(
        dataclasses.replace(spec_of(run_dir, "x", Role.DECODE), facts=facts), on_failure=site.failures.append
    )
    info = (await asyncio.to_thread(engine.start)).info
    await asyncio.to_thread(engine.stop)
    assert info.max_context_tokens == info.num_blocks * 16
    assert any("kv.memory_mib is the bound" in choice for choice in info.degraded)


async def test_a_step_that_fails_on_purpose_ends_its_requests_and_no_others(site: Site) -> None:
    """The occasions are counted from the first request on: the warm-up is none."""
    rules = faulty({"point": "engine.step", "action": "raise", "nth": [1]})
    d = await site.add("d", Role.DECODE, faults=rules)
    prompt = prompt_of(random.Random(1), 20)
    first, second = Sink(), Sink()
    session = site.sessions[d.engine_id]
    session.submit(DecodeOrder(request=request(1, prompt), prefill=None), first)
    assert (await first.finish()).error_code == "engine_fault"
    session.submit(DecodeOrder(request=request(2, prompt), prefill=None), second)
    assert (await second.finish()).num_tokens == 12
    assert list(second.tokens.values()) == expected_tokens(prompt, 12)
    await site.at_rest("d")
    assert site.engines["d"].status().counters["fault_engine_step_total"] == 1.0


async def test_late_news_from_the_hinge_change_no_answer(site: Site) -> None:
    rules = faulty({"point": "hinge.deliver", "action": "delay", "probability": 1.0, "delay_s": 0.03})
    p = await site.add("p", Role.PREFILL, faults=rules)
    d = await site.add("d", Role.DECODE, faults=rules)
    rng = random.Random(2)
    prompts = [prompt_of(rng, length) for length in (5, 40, 200)]
    sinks = [ask(site, p, d, request(n, prompt))[1] for n, prompt in enumerate(prompts)]
    for prompt, sink in zip(prompts, sinks, strict=True):
        assert (await sink.finish()).transfer_bytes > 0
        assert list(sink.tokens.values()) == expected_tokens(prompt, 12)[1:]
    await site.at_rest("p", "d")


async def test_a_step_that_does_not_come_back_ends_the_engine(site: Site) -> None:
    rules = faulty({"point": "engine.step", "action": "delay", "nth": [1], "delay_s": 1.0})
    await site.add("d", Role.DECODE, faults=rules, step_stall_s=0.2)
    site.sessions["d"].submit(DecodeOrder(request=request(1, [1, 2, 3]), prefill=None), sink := Sink())
    await sink.finish()
    [error] = site.failures
    assert isinstance(error, EngineFault)
    site.failures.clear()


async def test_an_engine_changes_its_role_and_keeps_model_and_sessions(site: Site) -> None:
    """P and D change places; before and after every answer is right."""
    p = await site.add("p", Role.PREFILL, more_roles=frozenset({Role.DECODE}))
    d = await site.add("d", Role.DECODE, more_roles=frozenset({Role.PREFILL}))
    rng = random.Random(3)
    prompt, other = prompt_of(rng, 100), prompt_of(rng, 50)
    decode = ask(site, p, d, request(1, prompt))[1]
    assert (await decode.finish()).transfer_bytes > 0
    wrong = Sink()
    site.sessions["p"].submit(DecodeOrder(request=request(2, other), prefill=None), wrong)
    assert (await wrong.finish()).error_code == "shutting_down", "a role that it does not have now"
    for name, role in (("p", Role.DECODE), ("d", Role.PREFILL)):
        info = await asyncio.to_thread(site.engines[name].set_roles, [role], float(WAIT_S))
        assert (info.roles, info.ref) == (frozenset({role}), (p if name == "p" else d))
    for n, text in enumerate((prompt, other), 3):
        prefill, decode = ask(site, d, p, request(n, text))
        assert (await prefill.finish()).reason is FinishReason.HANDOFF
        assert (await decode.finish()).reason is FinishReason.LENGTH
        assert [prefill.tokens[0], *decode.tokens.values()] == expected_tokens(text, 12)
    await site.at_rest("p", "d")
    for name in ("p", "d"):
        assert not site.engines[name].is_draining


async def test_what_a_leaving_role_cannot_finish_is_given_to_others_and_leaves_nothing_behind(site: Site) -> None:
    slowly = SETTINGS.model_copy(update={"echo": EchoSettings(step_s=0.02)})
    await site.add("d", Role.DECODE, settings=slowly, more_roles=frozenset({Role.PREFILL}))
    slow = request(1, prompt_of(random.Random(4), 30), max_tokens=400)
    running = Sink()
    site.sessions["d"].submit(DecodeOrder(request=slow, prefill=None), running)
    async with asyncio.timeout(WAIT_S):
        await running.got_token.wait()
    await asyncio.to_thread(site.engines["d"].set_roles, [Role.PREFILL], 0.0)
    assert (await running.finish()).error_code == "shutting_down"
    await site.at_rest("d")
    await asyncio.to_thread(site.engines["d"].set_roles, list(GENERATING), 0.0)
    again = Sink()
    site.sessions["d"].submit(DecodeOrder(request=request(2, [1, 2, 3]), prefill=None), again)
    assert (await again.finish()).reason is FinishReason.LENGTH
    assert list(again.tokens.values()) == expected_tokens([1, 2, 3], 12)


async def test_a_role_that_an_engine_was_not_made_for_is_refused_by_name(site: Site) -> None:
    await site.add("d", Role.DECODE)
    for roles in ([Role.PREFILL], []):
        with pytest.raises(InvalidRequest, match="engine d can be decode, not"):
            await asyncio.to_thread(site.engines["d"].set_roles, roles, 0.0)
    await site.at_rest("d")


@pytest.mark.parametrize("transport", ["shm", "grpc"])
async def test_faults_on_the_hinge_are_found_and_change_no_answer(site: Site, transport: str) -> None:
    bytes_ = [{"point": "hinge.publish", "action": action, "probability": 0.1} for action in ("corrupt", "truncate")]
    messages = [
        {"point": point, "action": action, "probability": 0.05, "delay_s": 0.05}
        for point in ("hinge.out", "hinge.in")
        for action in ("drop", "duplicate", "reorder", "delay")
    ]
    fetches = [{"point": "hinge.fetch", "action": action, "probability": 0.05} for action in ("corrupt", "delay")]
    rules = faulty(*bytes_, *messages, *fetches)
    p = await site.add("p", Role.PREFILL, transport=transport, faults=rules)
    d = await site.add("d", Role.DECODE, transport=transport, faults=rules)
    rng = random.Random(5)

    async def one(n: int) -> None:
        prompt = prompt_of(rng, rng.randrange(1, 300))
        prefill, decode = ask(site, p, d, request(n, prompt))
        done = await decode.finish()
        assert done.reason is FinishReason.LENGTH, done
        site.sessions["p"].cancel(request(n, prompt).key)  # as a router does with what is left of a request
        await prefill.finish()
        tokens = prefill.tokens | decode.tokens
        assert [tokens[index] for index in range(12)] == expected_tokens(prompt, 12)

    for begin in range(0, 30, 5):
        await asyncio.gather(*(one(n) for n in range(begin, begin + 5)))
    counters = {}
    await site.at_rest("p", "d")
    for name in ("p", "d"):
        counters[name] = site.engines[name].status().counters
        assert counters[name].get("kv_thread_faults_total", 0) == 0
    assert counters["p"]["fault_hinge_publish_total"] > 0
    assert counters["d"]["kv_checksum_failures_total"] > 0


async def test_orders_that_come_twice_and_cancels_that_come_late_change_no_answer(site: Site) -> None:
    rules = faulty(
        {"point": "session.submit", "action": "duplicate", "probability": 0.5},
        {"point": "session.cancel", "action": "delay", "probability": 0.5, "delay_s": 0.02},
        {"point": "session.open", "action": "raise", "nth": [1]},
    )
    site.router_faults = FaultPlan(rules, me="router")
    p, d = await site.add("p", Role.PREFILL), await site.add("d", Role.DECODE)
    rng = random.Random(6)
    prompts = [prompt_of(rng, rng.randrange(1, 100)) for _ in range(20)]
    pairs = [ask(site, p, d, request(n, prompt)) for n, prompt in enumerate(prompts)]
    for n, (prompt, (prefill, decode)) in enumerate(zip(prompts, pairs, strict=True)):
        assert (await decode.finish()).reason is FinishReason.LENGTH
        site.sessions["p"].cancel(request(n, prompt).key)
        await prefill.finish()
        tokens = prefill.tokens | decode.tokens
        assert [tokens[index] for index in range(12)] == expected_tokens(prompt, 12)
    counters = [site.engines[name].status().counters for name in ("p", "d")]
    doubled = sum(counted["engine_duplicate_orders_total"] for counted in counters)
    assert doubled == site.router_faults.counts["session.submit/duplicate"] > 0
    assert site.router_faults.counts["session.open/raise"] == 1
