"""Random orders, cancels, clocks, faults and transfer outcomes against a prefill worker."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.prefill.testing import PrefillBench
from diptych.protos.errors import DiptychError, PeerLost, TransferTimeout
from diptych.protos.settings import PrefillSettings
from diptych.protos.testing import echo_logprobs, echo_reference, talkative
from diptych.protos.types import FinishReason, SamplingParams, TransferKey

OPERATIONS = 1000


class Storm:
    """One worker under random operations; a request's prompt is remembered to check its token."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.bench = PrefillBench(
            num_blocks=rng.choice([6, 12, 40]),
            block_tokens=rng.choice([1, 3, 4]),
            settings=PrefillSettings(
                step_tokens=rng.choice([1, 5, 16, 64]),
                max_running=rng.choice([1, 3, 8]),
                max_waiting=rng.choice([0, 4, 30]),
            ),
            slots=rng.choice([1, 2, 16]),
        )
        self.prompts: dict[TransferKey, list[int]] = {}
        self.faults = 0

    def operate(self) -> None:
        rng, bench = self.rng, self.bench
        match rng.choice("sssttttttccrrrrrlafp"):
            case "s":
                prompt = [rng.randrange(2) for _ in range(rng.choice([1, 2, 4, 7, 12, 25]))]
                max_tokens = rng.choice([1, 5])
                num_resumed = rng.randrange(max_tokens) if rng.random() < 0.4 else 0
                rule = talkative if rng.random() < 0.3 else None
                resume = tuple(rng.randrange(2) for _ in range(num_resumed))
                if rule is not None:
                    resume = tuple(echo_reference(prompt, num_resumed, rule=rule))
                stop = echo_reference(prompt, 1, resume=resume, rule=rule) if rng.random() < 0.1 else []
                deadline = bench.clock() + rng.choice([0.0, 1.0, 30.0]) if rng.random() < 0.3 else None
                salt = rng.choice([b"", b"x"])
                key = bench.submit(
                    prompt,
                    max_tokens=max_tokens,
                    resume=resume,
                    rule=rule,
                    stop=stop,
                    salt=salt,
                    deadline=deadline,
                    sampling=SamplingParams(
                        max_tokens=1,
                        presence_penalty=rng.choice([0.0, 0.0, 0.5]) if rule is None else 0.0,
                        logprobs=rng.choice([None, 1]),
                        prompt_logprobs=rng.choice([None, None, 1]),
                    ),
                    priority=rng.choice([0, 0, 0, 1, -1]),
                    tenant=rng.choice(["", "", "a", "b"]),
                    weight=rng.choice([1.0, 1.0, 3.0]),
                )
                self.prompts[key] = prompt
            case "t":
                bench.step()
            case "c" if self.prompts:
                bench.cancel(rng.choice(list(self.prompts)))
            case "r":
                self.release(None)
            case "l":
                self.release(rng.choice([PeerLost("gone"), TransferTimeout("slow")]))
            case "a":
                bench.clock.advance(rng.choice([0.1, 1.0, 10.0]))
            case "p" if rng.random() < 0.3:
                bench.runner.poison = lambda row: rng.random() < 0.3
                bench.step()
                bench.runner.poison = None
            case "f" if rng.random() < 0.3:
                bench.runner.fault = rng.choice(["launch", "collect"])

    def release(self, error: DiptychError | None) -> None:
        able = [
            key
            for key, sending in self.bench.sender.transfers.items()
            if error is not None or sending.first_token is not None or sending.aborted is not None
        ]
        if able:
            self.bench.release(self.rng.choice(able), error)

    def settle(self) -> None:
        self.bench.runner.fault = None
        while self.bench.run() or self.bench.sender.transfers:
            self.bench.release_sent()

    def check(self) -> None:
        ledger = self.bench.ledger
        assert set(ledger.finishes) == set(self.prompts), "exactly one finish per order"
        for key, tokens in ledger.tokens.items():
            sampling, resume = self.bench.requests[key].sampling, self.bench.requests[key].resume
            rule = self.bench.rules.get(key.transfer_id)
            assert tokens == echo_reference(self.prompts[key], 1, resume=resume, rule=rule), "a wrong token"
            assert ledger.first_index[key] == len(resume)
            known = [*self.prompts[key], *resume, *tokens]
            if sampling.logprobs is not None:
                assert ledger.logprobs[key] == [echo_logprobs(known[:-1], known[-1], 1)]
            if sampling.prompt_logprobs is not None:
                told = [] if resume else [echo_logprobs(known[:at], known[at], 1) for at in range(1, len(known) - 1)]
                assert ledger.prompt_logprobs.get(key, []) == told
        for key, finish in ledger.finishes.items():
            assert finish.num_tokens == len(self.bench.requests[key].resume) + (key in ledger.tokens)
            assert bool(finish.error_code) == (finish.reason is FinishReason.ERROR)
            if finish.reason in {FinishReason.HANDOFF, FinishReason.STOP, FinishReason.LENGTH}:
                assert key in ledger.tokens
        self.bench.assert_idle()


def storm(seed: int) -> Storm:
    one = Storm(random.Random(seed))
    for _ in range(OPERATIONS):
        one.operate()
    one.settle()
    return one


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_operations_end_every_order_once_and_leak_nothing(seed: int) -> None:
    storm(seed).check()


def test_the_storm_reaches_every_way_to_end() -> None:
    """Otherwise the property above would say little."""
    seen: dict[str, int] = {}
    for seed in range(12):
        for finish in storm(seed).bench.ledger.finishes.values():
            name = finish.error_code or finish.reason.value
            seen[name] = seen.get(name, 0) + 1
    ways = {"handoff", "stop", "length", "cancelled", "overloaded", "deadline_exceeded", "engine_fault", "peer_lost"}
    assert ways <= set(seen), seen


def test_a_seed_repeats_its_schedule() -> None:
    assert storm(7).bench.trace == storm(7).bench.trace
