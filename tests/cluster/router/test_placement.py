"""What each policy chooses, and what holds for all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.cluster.config import PlacementSettings
from diptych.cluster.router.estimate import EngineMeter, EngineRates, PairMeter, Reserved
from diptych.cluster.router.mirror import PrefixMirror, PromptNames
from diptych.cluster.router.placement import Ask, EngineLoad, Placement, Placer
from diptych.cluster.router.policies import session as session_module
from diptych.cluster.router.policies.configured import placer_of
from diptych.kvtransfer.prefix import block_name, root_name, short_name
from diptych.protos.status import EngineStatus
from diptych.protos.types import EngineId, EngineRef

SIZE = 16
PROMPT = tuple(range(100))
POLICIES = ("cost", "prefix", "session", "least_load", "round_robin")


def engine(name: str, *, load: int = 0, cached: int = 0, **more: object) -> EngineLoad:
    mirror, parent = PrefixMirror(), root_name(b"m", b"")
    mirror.begin(b"m", SIZE)
    for start in range(0, cached // SIZE * SIZE, SIZE):
        parent = block_name(parent, PROMPT[start : start + SIZE])
        mirror.apply(reset=False, added=(short_name(parent),), removed=())
    ref = EngineRef(EngineId(name), 1, f"unix:/{name}")
    made = EngineLoad(
        ref=ref, in_flight=load, same_role=load, reported=0, num_blocks=1000, block_tokens=SIZE, mirror=mirror
    )
    return replace(made, **more)  # type: ignore[arg-type]


def ask(*, session: str = "", reads_cache: bool = True, prompt: tuple[int, ...] = PROMPT) -> Ask:
    return Ask(
        model="m",
        names=PromptNames(prompt, b""),
        session=("tenant", session) if session else None,
        reads_cache=reads_cache,
    )


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def placer(policy: str, *, local_below: int = 0, clock: Time | None = None, pairs: PairMeter | None = None) -> Placer:
    settings = PlacementSettings(policy=policy, local_prefill_below=local_below)
    return placer_of(settings, pairs=pairs or PairMeter(), clock=clock or Time())


def chosen(decision: object) -> tuple[str | None, str]:
    placement = getattr(decision, "placement", decision)
    assert isinstance(placement, Placement)
    return placement.prefill.engine_id if placement.prefill else None, placement.decode.engine_id


LOADS = st.lists(st.integers(0, 20), min_size=1, max_size=4)


@given(policy=st.sampled_from(POLICIES), prefill=LOADS, decode=LOADS, both=st.booleans(), data=st.data())
def test_every_policy_gives_living_engines_and_never_one_twice(
    policy: str, prefill: list[int], decode: list[int], both: bool, data: st.DataObject
) -> None:
    p = [engine(f"p{i}", load=load, cached=data.draw(st.integers(0, 100))) for i, load in enumerate(prefill)]
    d = [engine(f"d{i}", load=load, cached=data.draw(st.integers(0, 100))) for i, load in enumerate(decode)]
    if both:
        p = d
    first, then = chosen(placer(policy).place(ask(session="s"), p, d))
    assert then in {e.ref.engine_id for e in d}
    assert first != then
    assert first is None or first in {e.ref.engine_id for e in p}
    assert (first is None) == (both and len(d) == 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_order_in_which_engines_are_listed_does_not_matter(policy: str) -> None:
    p, d = [engine(f"p{i}") for i in range(3)], [engine(f"d{i}") for i in range(3)]
    one = placer(policy).place(ask(session="s"), p, d)
    assert placer(policy).place(ask(session="s"), p[::-1], d[::-1]) == one


@pytest.mark.parametrize("policy", POLICIES)
def test_a_model_without_prefill_engines_goes_to_decode_alone(policy: str) -> None:
    decision = placer(policy).place(ask(), [], [engine("d0"), engine("d1")], is_colocated=True)
    assert (decision.placement.prefill, decision.reason, decision.path) == (None, "colocated", "local")
    lost = placer(policy).place(ask(), [], [engine("d0")])
    assert (lost.placement.prefill, lost.reason) == (None, "no_prefill")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_decode_engine_that_lacks_little_takes_the_prompt_alone(policy: str) -> None:
    p, d = [engine("p")], [engine("d", cached=96)]
    near = placer(policy, local_below=5).place(ask(), p, d)
    assert (chosen(near), near.reason, near.choice, near.lacks) == (
        (None, "d"),
        "short",
        "local: 4 tokens < 5",
        4 if policy in ("cost", "prefix") else 100,
    )
    far = placer(policy, local_below=4).place(ask(), p, d)
    assert chosen(far) == ("p", "d")
    assert far.path == "pd"
    off = placer(policy).place(ask(prompt=(1,)), p, d)
    assert chosen(off) == ("p", "d")
    computed = placer(policy, local_below=5).place(ask(reads_cache=False), p, d)
    assert chosen(computed) == ("p", "d")
    assert computed.lacks == 100


def test_a_pin_holds_while_its_engines_live() -> None:
    p, d = [engine("p0"), engine("p1", load=9)], [engine("d0"), engine("d1", load=9)]
    pin = Placement(p[1].ref, d[1].ref)
    held = placer("least_load").place(ask(), p, d, pin=pin)
    assert (held.placement, held.policy, held.reason) == (pin, "pin", "pinned")
    assert chosen(placer("least_load").place(ask(), p[:1], d, pin=pin)) == ("p0", "d0")
    assert chosen(placer("least_load").place(ask(), p, d[:1], pin=pin)) == ("p0", "d0")
    alone = placer("least_load").place(ask(), p, d, pin=Placement(None, d[1].ref))
    assert chosen(alone) == (None, "d1")


@pytest.mark.parametrize("policy", ["least_load", "round_robin", "session"])
def test_a_policy_that_sees_no_caches_has_no_prompt_hashed(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PromptNames, "shared_tokens", None)
    placer(policy).place(ask(session="s"), [engine("p", cached=96)], [engine("d", cached=96)])


def test_round_robin_gives_each_its_turn() -> None:
    place = placer("round_robin")
    p, d = [engine(f"p{i}") for i in range(2)], [engine(f"d{i}") for i in range(3)]
    pairs = [chosen(place.place(ask(), p, d)) for _ in range(6)]
    assert [then for _, then in pairs] == ["d0", "d1", "d2"] * 2
    assert [first for first, _ in pairs] == ["p0", "p1"] * 3


def test_least_load_counts_what_was_sent_since_the_last_status() -> None:
    d = [engine("d0", reported=3), engine("d1", reported=2, reserved=Reserved(requests=2))]
    assert chosen(placer("least_load").place(ask(), [], d)) == (None, "d0")


def test_prefix_goes_where_most_is_cached_unless_that_engine_is_far_busier() -> None:
    d = [engine("d0"), engine("d1", cached=48, load=8), engine("d2", cached=96, load=9)]
    assert chosen(placer("prefix").place(ask(), [], d)) == (None, "d1")


def test_a_session_stays_until_it_was_idle_for_long_and_replicas_agree() -> None:
    time = Time()
    place, replica = placer("session", clock=time), placer("session", clock=time)
    p, d = [engine(f"p{i}") for i in range(3)], [engine(f"d{i}") for i in range(3)]
    seats = {}
    for number in range(40):
        seats[number] = chosen(place.place(ask(session=f"s{number}"), p, d))
        assert chosen(replica.place(ask(session=f"s{number}"), p, d)) == seats[number]
    assert {then for _, then in seats.values()} == {"d0", "d1", "d2"}
    time.now = 599
    more = [*d, *(engine(f"d{i}") for i in range(3, 9))]
    assert all(chosen(place.place(ask(session=f"s{n}"), p, more)) == seats[n] for n in seats)
    fewer = [chosen(place.place(ask(session=f"s{n}"), p, d[1:])) for n in seats]
    assert all(now == seats[n] for n, now in enumerate(fewer) if seats[n][1] != "d0"), "who lost no engine stays"
    time.now = 1300
    later = [chosen(place.place(ask(session=f"s{n}"), p, more))[1] for n in seats]
    assert later != [then for _, then in seats.values()]


def test_sessions_of_any_length_and_number_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_SESSIONS", 3)
    place, d = placer("session"), [engine("d0"), engine("d1")]
    for number in range(9):
        place.place(ask(session=f"{number}" * 10_000), [], d)
    seats = place.policy._seats  # type: ignore[attr-defined]
    assert len(seats) == 3
    assert {len(key) for key in seats} == {16}


def test_cost_waits_for_a_cached_prefix_only_as_long_as_it_saves() -> None:
    d, rates = [engine("d")], EngineRates(prefill_tokens_per_s=100)
    cold = engine("p0", rates=rates)
    warm = engine("p1", rates=rates, cached=96)
    assert chosen(placer("cost").place(ask(), [cold, warm], d)) == ("p1", "d")
    busy = replace(warm, queued_tokens=200)
    assert chosen(placer("cost").place(ask(), [cold, busy], d)) == ("p0", "d")
    sent = replace(warm, reserved=Reserved(requests=2, prompt_tokens=200))
    assert chosen(placer("cost").place(ask(), [cold, sent], d)) == ("p0", "d")


def test_cost_sees_slow_steps_full_memory_and_slow_pairs() -> None:
    p = [engine("p")]
    slow = engine("d0", rates=EngineRates(base_s=0.2))
    assert chosen(placer("cost").place(ask(), p, [slow, engine("d1")])) == ("p", "d1")
    full = engine("d0", used_blocks=990)
    assert chosen(placer("cost").place(ask(), p, [full, engine("d1")])) == ("p", "d1")
    pairs = PairMeter()
    for _ in range(40):
        pairs.learn("p", "d0", 100, 10.0)
    assert chosen(placer("cost", pairs=pairs).place(ask(), p, [engine("d0"), engine("d1")])) == ("p", "d1")


def test_cost_avoids_the_colocated_engine_with_the_long_queue_of_prompt_tokens() -> None:
    """Its rate is its own, learned from its steps: twice the queue is done sooner at six times the speed."""
    queued = [engine("d0", queued_tokens=2000), engine("d1", queued_tokens=400, load=3)]
    decision = placer("cost").place(ask(), [], queued, is_colocated=True)
    assert (chosen(decision), decision.reason) == ((None, "d1"), "colocated")
    learned = []
    for tokens_per_s in (3000.0, 500.0):
        meter = EngineMeter()
        for n in range(60):
            grown = {"decode_tokens_total": tokens_per_s * n, "decode_generated_tokens_total": 1.0 * n}
            meter.read(EngineStatus(counters={**grown, "decode_steps_total": n, "decode_step_seconds_total": 1.0 * n}))
        learned.append(meter.rates)
    fast, slow = (replace(one, rates=rates) for one, rates in zip(queued, learned, strict=True))
    assert chosen(placer("cost").place(ask(), [], [replace(fast, queued_tokens=800), slow])) == (None, "d0")
    assert chosen(placer("cost").place(ask(), [], [replace(fast, queued_tokens=8000), slow])) == (None, "d1")


def test_cost_gives_up_a_short_local_prompt_when_its_engine_is_swamped() -> None:
    p, d = [engine("p")], [engine("d0", cached=96, sequences=900), engine("d1")]
    assert chosen(placer("cost", local_below=10).place(ask(), p, d)) == ("p", "d1")


def test_reservations_spread_a_burst_between_two_readings() -> None:
    place, counts = placer("cost"), {"p0": 0, "p1": 0, "p2": 0}
    p = {name: engine(name) for name in counts}
    for _ in range(30):
        first, _ = chosen(place.place(ask(), list(p.values()), [engine("d")]))
        assert first is not None
        counts[first] += 1
        before = p[first].reserved
        p[first] = replace(p[first], reserved=Reserved(before.requests + 1, before.prompt_tokens + 100))
    assert all(abs(a - b) <= 1 for a, b in pairwise(counts.values()))
