"""Random orders, cancels, clocks, faults and transfer outcomes against a decode worker."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.decode.testing import DecodeBench
from diptych.protos.errors import PeerLost, TransferTimeout
from diptych.protos.settings import DecodeSettings
from diptych.protos.testing import echo_reference, talkative
from diptych.protos.types import FinishReason, SamplingParams, TransferKey

OPERATIONS = 1000


class Storm:
    """One worker under random operations: few token values, so that prefixes meet; few blocks, so that they lack."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.bench = DecodeBench(
            num_blocks=rng.choice([7, 13, 40]),
            block_tokens=rng.choice([1, 3, 4]),
            settings=DecodeSettings(
                step_tokens=rng.choice([1, 5, 16, 64]),
                max_running=rng.choice([1, 3, 8]),
                max_waiting=rng.choice([0, 4, 30]),
                watermark=rng.choice([0.0, 0.01, 0.1, 0.3]),
            ),
            slots=rng.choice([1, 2, 16]),
            prefix_cache=rng.random() < 0.8,
        )

    def operate(self) -> None:
        weights = {
            self.submit: 3,
            self.steps: 6,
            self.cancel: 0.5,
            self.want: 5,
            self.commit: 4,
            self.close: 2,
            self.lose: 1,
            self.wait: 1,
            self.fault: 0.15,
            self.poison: 0.15,
        }
        self.rng.choices(list(weights), list(weights.values()))[0]()

    def steps(self) -> None:
        for _ in range(self.rng.choice([1, 1, 2, 10])):
            self.bench.step()

    def cancel(self) -> None:
        if self.bench.requests:
            self.bench.cancel(self.rng.choice(list(self.bench.requests)[-20:]))

    def want(self) -> None:
        if able := [key for key, one in self.bench.receiver.transfers.items() if not one.wanted]:
            self.bench.want(self.rng.choice(able))

    def close(self) -> None:
        if able := [key for key, one in self.bench.receiver.transfers.items() if one.aborted is not None]:
            self.bench.deliver(self.bench.receiver.close(self.rng.choice(able)))

    def lose(self) -> None:
        if able := list(self.bench.receiver.transfers):
            self.bench.fail(self.rng.choice(able), self.rng.choice([PeerLost("gone"), TransferTimeout("slow")]))

    def wait(self) -> None:
        self.bench.clock.advance(self.rng.choice([0.1, 1.0, 5.0]))

    def fault(self) -> None:
        self.bench.runner.fault = self.rng.choice(["launch", "collect"])

    def poison(self) -> None:
        self.bench.runner.poison = lambda row: self.rng.random() < 0.3
        self.bench.step()
        self.bench.runner.poison = None

    def submit(self) -> None:
        rng = self.rng
        rule = talkative if rng.random() < 0.3 else None
        sampling = SamplingParams(
            max_tokens=1,
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, None, 0, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            min_tokens=rng.choice([0, 0, 3]),
        )
        if rule is not None:
            sampling = SamplingParams(max_tokens=1)  # else no token would be certain
        prompt = [rng.randrange(2)] * rng.choice([0, 4, 12]) + [rng.randrange(9)] * rng.choice([1, 2, 4, 7])
        max_tokens = rng.choice([1, 2, 5, 20, 20])
        num_resumed = rng.randrange(min(max_tokens, 8)) if rng.random() < 0.4 else 0
        resume = [rng.randrange(9) for _ in range(num_resumed)]
        self.bench.submit(
            prompt,
            max_tokens=max_tokens,
            resume=tuple(resume if rule is None else echo_reference(prompt, num_resumed, rule=rule)),
            rule=rule,
            stop=range(0, 32_000, 10) if rng.random() < 0.2 else [],
            salt=rng.choice([b"", b"", b"x"]),
            deadline=self.bench.clock() + rng.choice([0.0, 3.0, 30.0]) if rng.random() < 0.3 else None,
            transfer=rng.random() < 0.7,
            allow_local_prefill=rng.random() < 0.8,
            sampling=sampling,
            priority=rng.choice([0, 0, 0, 1, -1]),
            tenant=rng.choice(["", "", "a", "b"]),
            weight=rng.choice([1.0, 1.0, 3.0]),
        )

    def commit(self) -> None:
        """A receiver may commit what has its blocks or is wholly cached; prefill calls its token final when it is."""
        transfers = self.bench.receiver.transfers
        final = {key for key in transfers if self.ends_at_once(key)}
        able = [
            key for key, one in transfers.items() if one.blocks or one.have_tokens == one.num_tokens or key in final
        ]
        if able:
            key = self.rng.choice(able)
            self.bench.commit(key, final=key in final)

    def ends_at_once(self, key: TransferKey) -> bool:
        return len(self.bench.expected(key)) == len(self.bench.requests[key].resume) + 1

    def settle(self) -> None:
        bench = self.bench
        bench.runner.fault = None
        self.bench.runner.poison = None
        while bench.run() or bench.receiver.transfers:
            for key, one in list(bench.receiver.transfers.items()):
                if not one.wanted and one.aborted is None:
                    bench.want(key)
            bench.run()
            able = [key for key, one in bench.receiver.transfers.items() if one.blocks and one.aborted is None]
            for key in able:
                bench.commit(key, final=self.ends_at_once(key))
            if not able:
                self.assert_the_line_moves()
                bench.end_transfers()

    def assert_the_line_moves(self) -> None:
        """With nobody running and nothing on its way, the head of the line has its blocks."""
        bench = self.bench
        transfers = bench.receiver.transfers.values()
        waiting = [one for one in transfers if one.wanted and one.aborted is None]
        draining = [one for one in transfers if one.blocks and one.aborted is not None]
        assert draining or not waiting, "a transfer waits for a grant that nobody stops"

    def check(self) -> None:
        bench = self.bench
        assert set(bench.ledger.finishes) == set(bench.requests), "exactly one finish per order"
        for key, finish in bench.ledger.finishes.items():
            bench.assert_tokens(key)
            emitted = bench.ledger.first_index.get(key, 0) + len(bench.ledger.tokens.get(key, []))
            assert bool(finish.error_code) == (finish.reason is FinishReason.ERROR)
            assert finish.num_tokens == emitted or key not in bench.ledger.tokens
            if finish.reason in {FinishReason.STOP, FinishReason.LENGTH}:
                assert finish.num_tokens == len(bench.expected(key)), "ended early"
        bench.assert_idle()


def storm(seed: int) -> Storm:
    one = Storm(random.Random(seed))
    for _ in range(OPERATIONS):
        one.operate()
    one.settle()
    return one


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32))
def test_random_operations_give_right_tokens_end_once_and_leak_nothing(seed: int) -> None:
    storm(seed).check()


def test_the_storm_reaches_every_way_to_end_and_every_turn() -> None:
    """Otherwise the property above would say little."""
    seen: dict[str, float] = {}
    for seed in range(16):
        bench = storm(seed).bench
        for finish in bench.ledger.finishes.values():
            name = finish.error_code or finish.reason.value
            seen[name] = seen.get(name, 0) + 1
        for name, value in bench.worker.counters().items():
            seen[name] = seen.get(name, 0) + value
        for key, index in bench.ledger.first_index.items():
            resumed = len(bench.requests[key].resume)
            seen["from 1"] = seen.get("from 1", 0) + (index == resumed + 1)
            seen["resumed"] = seen.get("resumed", 0) + (resumed > 0)
    ways = {
        "stop",
        "length",
        "cancelled",
        "overloaded",
        "deadline_exceeded",
        "engine_fault",
        "peer_lost",
        "no_kv_blocks",
    }
    counted = ("preemptions", "local_prefills", "cached_tokens", "transfer_failures", "forced_tokens")
    turns = {f"decode_{name}_total" for name in counted}
    assert all(seen.get(name, 0) > 20 for name in {*ways, *turns, "from 1", "resumed"}), seen


def test_a_seed_repeats_its_schedule() -> None:
    assert storm(7).bench.trace == storm(7).bench.trace


def test_keys_that_were_never_ordered_are_nobody() -> None:
    bench = storm(3).bench
    bench.cancel(TransferKey(b"never ordered..."))
    bench.assert_idle()
