"""A call is taken once, soon, from a holder of the secret who may make it; all else is refused, told and counted."""

from __future__ import annotations

import logging
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos.channels import CALLERS, FETCH_BYTES, KV_SESSION, SESSION, leaves_host
from diptych.protos.trust import MAX_AGE_S, PROOF_KEY, Gate, Refusal, Refusals, Trust, secret_id
from diptych.protos.types import EngineId, EngineRef

SECRET = bytes(range(32))
ME = EngineRef(EngineId("prefill-0"), 7, "unix:/p.sock")


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(Trust(SECRET, "prefill", clock=clock), ME, CALLERS)


def caller(clock: Clock, name: str = "router", secret: bytes = SECRET) -> Trust:
    return Trust(secret, name, clock=clock)


def test_a_proof_opens_its_own_call_once(gate: Gate, clock: Clock) -> None:
    proof = caller(clock).proof(SESSION, ME)
    assert gate.judge(SESSION, proof) is None
    assert gate.judge(SESSION, proof) is Refusal.REPLAYED
    assert gate.judge(SESSION, caller(clock).proof(SESSION, ME)) is None


def test_what_was_made_for_something_else_opens_nothing(gate: Gate, clock: Clock) -> None:
    router = caller(clock)
    for method, engine in (
        (KV_SESSION, ME),
        (SESSION, EngineRef(EngineId("prefill-1"), 7, ME.target)),
        (SESSION, EngineRef(ME.engine_id, 8, ME.target)),
    ):
        assert gate.judge(SESSION, router.proof(method, engine)) is Refusal.WRONG
    assert gate.judge(SESSION, caller(clock, secret=bytes(32)).proof(SESSION, ME)) is Refusal.WRONG


def test_the_name_and_the_second_in_a_proof_cannot_be_changed(gate: Gate, clock: Clock) -> None:
    ((key, value),) = caller(clock, "decode").proof(SESSION, ME)
    assert gate.judge(SESSION, [(key, value.replace("decode", "router"))]) is Refusal.WRONG
    assert gate.judge(SESSION, [(key, value.replace("1000000", "1000001"))]) is Refusal.WRONG


@pytest.mark.parametrize(
    ("name", "method", "refusal"),
    [
        ("router", SESSION, None),
        ("decode", SESSION, Refusal.ROLE),
        ("prefill", SESSION, Refusal.ROLE),
        ("decode", KV_SESSION, None),
        ("decode", FETCH_BYTES, None),
        ("decode-prefill", KV_SESSION, None),
        ("router", KV_SESSION, Refusal.ROLE),
        ("prefill", FETCH_BYTES, Refusal.ROLE),
        ("router", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Refusal.ROLE),
    ],
)
def test_each_call_is_for_its_callers(
    gate: Gate, clock: Clock, name: str, method: str, refusal: Refusal | None
) -> None:
    assert gate.judge(method, caller(clock, name).proof(method, ME)) is refusal


def test_a_recorded_proof_is_refused_for_ever(gate: Gate, clock: Clock) -> None:
    """Remembered while it is young, too old when it is forgotten: no second in between takes it again."""
    early = caller(clock).proof(SESSION, ME)
    clock.now += MAX_AGE_S - 1
    assert gate.judge(SESSION, early) is None
    for _ in range(300):
        assert gate.judge(SESSION, early) in (Refusal.REPLAYED, Refusal.STALE)
        clock.now += 1
    ahead = Clock()
    ahead.now = clock.now + MAX_AGE_S - 1  # a host whose clock is fast
    proof = caller(ahead).proof(SESSION, ME)
    assert gate.judge(SESSION, proof) is None
    for _ in range(300):
        assert gate.judge(SESSION, proof) in (Refusal.REPLAYED, Refusal.STALE)
        clock.now += 1


def test_clocks_may_differ_by_less_than_a_minute(gate: Gate, clock: Clock) -> None:
    for offset, refusal in ((-MAX_AGE_S - 2, Refusal.STALE), (-50, None), (50, None), (MAX_AGE_S + 2, Refusal.STALE)):
        other = Clock()
        other.now += offset
        assert gate.judge(SESSION, caller(other).proof(SESSION, ME)) is refusal


def test_memory_of_proofs_is_bounded_and_full_memory_takes_nothing(
    gate: Gate, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.protos.trust._MAX_SEEN", 3)
    for _ in range(3):
        assert gate.judge(SESSION, caller(clock).proof(SESSION, ME)) is None
    assert gate.judge(SESSION, caller(clock).proof(SESSION, ME)) is Refusal.REPLAYED
    clock.now += 2 * MAX_AGE_S + 2
    assert gate.judge(SESSION, caller(clock).proof(SESSION, ME)) is None


def test_only_holders_of_the_secret_fill_the_memory(gate: Gate, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.protos.trust._MAX_SEEN", 1)
    for _ in range(100):
        assert gate.judge(SESSION, caller(clock, secret=bytes(32)).proof(SESSION, ME)) is Refusal.WRONG
    assert gate.judge(SESSION, caller(clock).proof(SESSION, ME)) is None


@given(st.lists(st.tuples(st.sampled_from([PROOF_KEY, "other"]), st.one_of(st.text(), st.binary())), max_size=3))
def test_no_metadata_raises_or_passes(metadata: list[tuple[str, str | bytes]]) -> None:
    gate = Gate(Trust(SECRET, "prefill"), ME, CALLERS)
    assert gate.judge(SESSION, metadata) in (Refusal.NO_PROOF, Refusal.MALFORMED, Refusal.WRONG)
    assert gate.judge("no method", metadata) is not None


def test_two_proofs_in_one_call_are_none(gate: Gate, clock: Clock) -> None:
    both = caller(clock).proof(SESSION, ME) + caller(clock).proof(SESSION, ME)
    assert gate.judge(SESSION, both) is Refusal.MALFORMED


def test_a_secret_is_shown_to_nobody() -> None:
    trust = Trust(SECRET, "router")
    shown = f"{trust!r} {trust} {trust.proof(SESSION, ME)} {secret_id(SECRET)}"
    assert SECRET.hex() not in shown
    assert repr(SECRET) not in shown
    with pytest.raises(TypeError, match="does not leave its process"):
        pickle.dumps(trust)
    with pytest.raises(ValueError, match="31 bytes"):
        Trust(SECRET[:31], "router")


def test_a_component_that_is_told_no_secret_has_one_that_nobody_knows(clock: Clock) -> None:
    gate = Gate(Trust.alone("prefill"), ME, CALLERS)
    assert gate.judge(SESSION, Trust.alone("router").proof(SESSION, ME)) is None
    assert gate.judge(SESSION, Trust(bytes(32), "router").proof(SESSION, ME)) is Refusal.WRONG


def test_refusals_count_always_and_speak_once_per_peer_and_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    refusals = Refusals("the engine", clock)
    for port in range(50):
        refusals.note(f"ipv4:10.0.0.1:{port}", "because")
    refusals.note("ipv6:[::1]:9", "because")
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    clock.now += 61
    refusals.note("ipv4:10.0.0.1:1", "because")
    assert len(caplog.records) == 3
    assert refusals.total == 52
    assert "10.0.0.1" in caplog.text
    assert "because" in caplog.text


def test_an_attack_from_everywhere_fills_neither_memory_nor_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diptych.protos.trust._MAX_PEERS", 10)
    clock = Clock()
    refusals = Refusals("the engine", clock)
    for n in range(1000):
        refusals.note(f"ipv4:10.0.{n // 256}.{n % 256}:1", "because")
    assert (refusals.total, len(caplog.records)) == (1000, 10)
    clock.now += 61
    refusals.note("ipv4:10.1.1.1:1", "because")
    assert len(caplog.records) == 11


@pytest.mark.parametrize(
    ("target", "leaves"),
    [
        ("unix:/a/b.sock", False),
        ("127.0.0.1:1", False),
        ("127.9.9.9:1", False),
        ("localhost:1", False),
        ("[::1]:1", False),
        ("10.0.0.1:1", True),
        ("0.0.0.0:1", True),
        ("[::]:1", True),
        ("[fe80::1]:1", True),
        ("engine.example:1", True),
        ("dns:///localhost:1", True),
        ("ipv4:127.0.0.1:1", True),
    ],
)
def test_what_leaves_the_host(target: str, leaves: bool) -> None:
    """A form that is not known for local counts as leaving."""
    assert leaves_host(target) is leaves
