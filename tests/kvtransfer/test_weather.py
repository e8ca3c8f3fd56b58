"""Both machines under bad weather: messages late, doubled and out of order, slow copies, broken streams, liars."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from diptych.kvtransfer.messages import (
    Abort,
    AbortAck,
    ChunkAck,
    ChunkReady,
    ChunkStatus,
    Expect,
    FinalAck,
    Heartbeat,
    Message,
)
from diptych.kvtransfer.testing import HingePair, Weather
from diptych.protos.errors import Cancelled, EngineFault
from diptych.protos.types import TransferKey


def key(number: int = 1, attempt: int = 0) -> TransferKey:
    return TransferKey(number.to_bytes(16, "big"), attempt)


STORM = Weather(delay_s=0.3, duplicate=0.3, copy_s=0.2, corrupt=0.05)


def one_life(pair: HingePair, rng: random.Random, keys: list[TransferKey], breaks: bool) -> None:
    """Random requests with random commands in random order, with cancels at random times."""
    script: list[tuple[float, str, TransferKey, int]] = []
    sizes = {}
    for k in keys:
        sizes[k] = num_tokens = rng.randrange(1, 40)
        at = rng.uniform(0, 3)
        have = rng.choice([0, 0, rng.randrange(num_tokens + 1)])
        script.append((at + rng.uniform(0, 1), "expect", k, have))
        script.append((at, "open", k, num_tokens))
        upto = 0
        while upto < num_tokens:
            at += rng.uniform(0, 0.4)
            upto = min(num_tokens, upto + rng.randrange(1, 20))
            script.append((at, "compute", k, upto))
        script.append((at, "final" if rng.random() < 0.1 else "finish", k, 0))
        if rng.random() < 0.3:
            script.append((at - rng.uniform(0, 2), rng.choice(["abort_p", "abort_d"]), k, 0))
    if breaks:
        script += [(rng.uniform(0, 4), "break", keys[0], 0) for _ in range(3)]
    do: dict[str, Callable[[TransferKey, int], None]] = {
        "expect": lambda k, have: pair.expect(k, sizes[k], have),
        "open": pair.open,
        "compute": pair.compute,
        "finish": lambda k, _: pair.finish(k),
        "final": lambda k, _: pair.finish(k, final=True),
        "abort_p": lambda k, _: pair.abort_p(k, EngineFault("random")),
        "abort_d": lambda k, _: pair.abort_d(k, Cancelled("random")),
        "break": lambda *_: pair.break_stream(),
    }
    start = pair.now
    for at, what, k, number in sorted(script, key=lambda line: line[0]):
        pair.run(max(0.0, start + at - pair.now))
        do[what](k, number)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_no_weather_leaks_a_block_or_commits_a_wrong_token(seed: int, breaks: bool) -> None:
    rng = random.Random(seed)
    blocks = rng.choice([(4, 3), (1, 5), (7, 7)])
    pair = HingePair(seed=seed, weather=STORM, block_tokens=blocks, chunk_tokens=rng.choice([3, 6, 50]))
    keys = [key(number) for number in range(12)]
    one_life(pair, rng, keys, breaks)
    pair.run(80)  # every lease, stall and quarantine is over: nothing may need longer
    pair.check_quiet()
    assert pair.sender.counters["kv_pairs_lost_total"] == pair.receiver.counters["kv_pairs_lost_total"] == 0
    assert set(pair.released) == set(pair.outcomes) == set(keys)
    for k in keys:
        if pair.committed(k) and pair.released[k].error is not None:
            # D has its verified copy; only the last word to P was lost or crossed an abort.
            broken = breaks or pair.receiver.counters["kv_transports_blamed_total"]
            assert broken or isinstance(pair.released[k].error, EngineFault)


def test_in_fair_weather_everything_arrives() -> None:
    for seed in range(10):
        pair = HingePair(seed=seed, weather=Weather(delay_s=0.3, duplicate=0.3, copy_s=0.2))
        for number in range(10):
            pair.whole(key(number), 1 + 3 * number, have_tokens=number % 3 * number // 2)
        pair.run(30)
        assert all(pair.committed(key(number)) and pair.released[key(number)].error is None for number in range(10))
        pair.check_quiet()


def test_random_words_break_nothing() -> None:
    """A peer that says anything but a lie about its end: no crash, no wrong commit, no block or slot is lost."""
    for seed in range(20):
        rng = random.Random(seed)
        pair = HingePair(seed=seed, weather=Weather(copy_s=0.1))
        for number in range(4):
            pair.whole(key(number), 10 + number)
        for _ in range(150):
            pair.run(rng.uniform(0, 0.03))
            k = key(rng.randrange(6), rng.randrange(2))
            number = rng.randrange(4)
            messages: list[Message] = [
                Expect(k, rng.randrange(12)),
                ChunkReady(k, number, 4 * number, 4 * number + 4, number, rng.randrange(1, 4), 32, 0),
                ChunkAck(k, number, number, rng.randrange(1, 4), ChunkStatus(rng.randrange(3))),
                FinalAck(k),
                Abort(k, "x", ""),
                AbortAck(k),
                Heartbeat((k, key(3))),
            ]
            pair.inject(rng.choice(["p", "d"]), rng.choice(messages))
        pair.run(80)
        for number in range(4):
            if key(number) not in pair.outcomes:
                pair.abort_d(key(number), Cancelled("end"))
        pair.run(80)
        pair.check_quiet()
