"""Whatever raises in one request's work, at whatever stage, ends that request alone and frees all that it held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from diptych.decode import worker as decode_worker
from diptych.decode.testing import DecodeBench
from diptych.kvtransfer.pool import BlockTable
from diptych.prefill import worker as prefill_worker
from diptych.prefill.testing import PrefillBench
from diptych.protos import lifecycle
from diptych.protos.errors import EngineLost, NoBlocks
from diptych.protos.settings import DecodeSettings, PrefillSettings
from diptych.protos.types import FinishReason, SamplingParams, TransferKey

BAD = 77  # the first token of the prompt that nobody can compute
PROMPT = list(range(100, 123))
LOGPROBS = SamplingParams(max_tokens=1, prompt_logprobs=0)


class Panic(BaseException):
    """As pyo3 raises for a panic of a library's Rust side."""


class Poison:
    """Makes chosen calls raise, once, where they are for the bad request."""

    def __init__(self, error: BaseException, patch: pytest.MonkeyPatch) -> None:
        self.error = error
        self.hits = 0
        self._patch = patch
        self._tables: list[object] = []  # of the bad request

    def on(self, owner: object, name: str, is_bad: Callable[..., bool]) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if is_bad(*args, **kwargs):
                self.hits += 1
                raise self.error
            return inner(*args, **kwargs)

        self._patch.setattr(owner, name, wrapped)

    def on_table(self, pool: Any, name: str) -> None:
        inner = pool.open

        def opened(tokens: Any, *args: Any, **kwargs: Any) -> Any:
            table = inner(tokens, *args, **kwargs)
            if tokens[0] == BAD:
                self._tables.append(table)
            return table

        self._patch.setattr(pool, "open", opened)
        self.on(BlockTable, name, lambda table, *args, **kwargs: any(table is one for one in self._tables))


def strike(poison: Poison, stage: str, bench: Any, worker: Any) -> None:
    port = getattr(bench, "sender", None) or getattr(bench, "receiver", None)
    bad = TransferKey((2).to_bytes(16, "big"))
    match stage.split("."):
        case ["rows", "made"]:
            poison.on(lifecycle, "logit_rules", lambda sampling, num_prompt: num_prompt == len(PROMPT) + 1)
        case ["refusal"]:
            poison.on(worker, "refusal", lambda request, *_: request.key == bad)
        case ["finish_reason"]:
            poison.on(worker, "finish_reason", lambda *_, num_prompt, **__: num_prompt == len(PROMPT) + 1)
        case ["port", name]:
            poison.on(port, name, lambda key, *_, **__: key == bad)
        case ["pool", "open"]:
            poison.on(bench.pool, "open", lambda tokens, *_, **__: tokens[0] == BAD)
        case ["table", name]:
            poison.on_table(bench.pool, name)
        case ["rows", name]:
            poison.on(lifecycle.RowMaker, name, lambda rows, *_, **__: rows._key == bad)
        case _:
            raise AssertionError(stage)


@pytest.fixture(params=[ValueError("secret"), Panic("secret"), NoBlocks("ours")], ids=["error", "panic", "ours"])
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Poison:
    return Poison(request.param, monkeypatch)


def check_end(bench: Any, poison: Poison) -> None:
    bad = TransferKey((2).to_bytes(16, "big"))
    finish = bench.ledger.finishes[bad]
    assert poison.hits == 1
    assert finish.reason is FinishReason.ERROR
    assert finish.error_code == ("no_kv_blocks" if isinstance(poison.error, NoBlocks) else "engine_fault")
    assert "secret" not in finish.error_message
    bench.num_request_faults = 1
    bench.assert_idle()


PREFILL_STAGES = [
    "rows.made",
    "refusal",
    "port.open",
    "pool.open",
    "table.try_grow",
    "table.extend_prefix",
    "table.foresee",
    "table.commit",
    "rows.next_row",
    "rows.tell_prompt",
    "port.computed",
    "port.finish",
    "finish_reason",
]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stage", PREFILL_STAGES)
def test_a_prompt_that_raises_ends_alone(
    stage: str, depth: int, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against an engine that ends, or a block that stays, because of one request."""
    monkeypatch.setattr(PrefillBench, "depth", depth)
    bench = PrefillBench(settings=PrefillSettings(step_tokens=16))
    strike(poison, stage, bench, prefill_worker)
    keys = [bench.submit(prompt, sampling=LOGPROBS) for prompt in (PROMPT, [BAD, *PROMPT], PROMPT[1:])]
    bench.run()
    bench.release_sent()
    bench.run()
    for key in (keys[0], keys[2]):
        assert bench.ledger.finishes[key].reason is FinishReason.HANDOFF
        assert len(bench.ledger.tokens[key]) == 1
    check_end(bench, poison)


DECODE_STAGES = [
    "rows.made",
    "refusal",
    "pool.open",
    "table.try_grow",
    "table.extend_prefix",
    "table.foresee",
    "table.commit",
    "rows.next_row",
    "rows.tell_prompt",
    "finish_reason",
]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stage", DECODE_STAGES)
def test_a_prompt_that_is_computed_here_and_raises_ends_alone(
    stage: str, depth: int, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeBench, "depth", depth)
    bench = DecodeBench(settings=DecodeSettings(step_tokens=16))
    strike(poison, stage, bench, decode_worker)
    prompts = PROMPT, [BAD, *PROMPT], PROMPT[1:]
    keys = [bench.submit(prompt, sampling=LOGPROBS, transfer=False) for prompt in prompts]
    bench.run()
    for key in (keys[0], keys[2]):
        bench.assert_complete(key, first_index=0)
    check_end(bench, poison)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "stage",
    [
        "refusal",
        "pool.open",
        "port.expect",
        "port.grant",
        "table.try_grow",
        "table.commit",
        "rows.next_row",
        "finish_reason",
    ],
)
def test_a_transfer_that_raises_ends_alone(
    stage: str, depth: int, poison: Poison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeBench, "depth", depth)
    bench = DecodeBench()
    strike(poison, stage, bench, decode_worker)
    keys = [bench.submit(prompt) for prompt in (PROMPT, [BAD, *PROMPT], PROMPT[1:])]
    for key in keys:
        if key in bench.receiver.transfers:
            bench.want(key)
    bench.run()
    for key in keys:
        if key in bench.receiver.transfers and bench.receiver.transfers[key].aborted is None:
            bench.commit(key)
    bench.run()
    bench.end_transfers()
    bench.run()
    for key in (keys[0], keys[2]):
        bench.assert_complete(key, first_index=1)
    check_end(bench, poison)


@pytest.mark.parametrize("make", [PrefillBench, DecodeBench])
def test_a_step_that_panics_ends_its_requests_and_not_the_engine(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a native library's panic in a step, which is no Exception."""
    bench = make()
    inner, hits = bench.runner.launch, [0]

    def launch(plan: Any) -> None:
        if hits[0] == 0:
            hits[0] += 1
            raise Panic("in a step")
        inner(plan)

    monkeypatch.setattr(bench.runner, "launch", launch)
    local = {"transfer": False} if make is DecodeBench else {}
    first = bench.submit(PROMPT, **local)
    bench.run()
    assert bench.ledger.finishes[first].error_code == "engine_fault"
    second = bench.submit(PROMPT, **local)
    bench.run()
    assert bench.ledger.tokens[second]


def test_what_ends_the_process_is_nobodys_fault() -> None:
    """Guards against a barrier that keeps Ctrl-C, or the loss of the device, from those who must hear of it."""
    for error in (KeyboardInterrupt(), SystemExit(1), EngineLost("the device is gone")):
        bench = DecodeBench()
        bench.runner.launch = lambda plan, error=error: (_ for _ in ()).throw(error)  # type: ignore[method-assign]
        bench.submit(PROMPT, transfer=False)
        with pytest.raises(type(error)):
            bench.run()
