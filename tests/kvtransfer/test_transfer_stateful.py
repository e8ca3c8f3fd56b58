"""Hypothesis against both machines of a transfer: commands, deaths, cuts and time in any order; then rest.

`HingePair` checks by itself that nothing is read after its release, written after its end, or committed wrongly.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from diptych.kvtransfer.messages import Abort, AbortAck, ChunkAck, ChunkStatus, Expect, FinalAck, Heartbeat, Message
from diptych.kvtransfer.testing import HingePair, Weather
from diptych.protos.errors import Cancelled, EngineFault
from diptych.protos.settings import TransferSettings
from diptych.protos.types import TransferKey

REST_S = 36.0  # a lease, an abort's wait, and what ticks and copies add: nothing may be held for longer
FAIR = Weather()
STORM = Weather(delay_s=0.3, duplicate=0.3, copy_s=0.2, corrupt=0.1)
keys = st.builds(
    lambda number, attempt: TransferKey(number.to_bytes(16, "big"), attempt), st.integers(0, 3), st.integers(0, 2)
)


class TransferMachine(RuleBasedStateMachine):
    """One prefill and one decode machine."""

    @initialize(
        seed=st.integers(0, 2**32 - 1),
        weather=st.sampled_from([FAIR, STORM]),
        slots=st.integers(2, 5),
        chunk_tokens=st.integers(1, 8),
        auto_grant=st.booleans(),
        ends_in_silence=st.booleans(),
    )
    def begin(
        self, *, seed: int, weather: Weather, slots: int, chunk_tokens: int, auto_grant: bool, ends_in_silence: bool
    ) -> None:
        self.pair = HingePair(
            seed=seed,
            settings=TransferSettings(slots=slots, lease_s=30),
            weather=weather,
            chunk_tokens=chunk_tokens,
            auto_grant=auto_grant,
        )
        self.ends_in_silence = ends_in_silence
        self.opened: dict[TransferKey, int] = {}
        self.expected: set[TransferKey] = set()

    def size(self, key: TransferKey) -> int:
        """Tokens of the request: the same at both ends and in all attempts."""
        return 1 + 5 * key.transfer_id[-1]

    @rule(key=keys)
    def open(self, key: TransferKey) -> None:
        if key not in self.opened:
            self.opened[key] = 0
            self.pair.open(key, self.size(key))

    @rule(key=keys, part=st.floats(0, 1))
    def compute(self, key: TransferKey, part: float) -> None:
        if key in self.opened:
            upto = self.opened[key] = max(self.opened[key], round(part * self.size(key)))
            self.pair.compute(key, upto)

    @rule(key=keys, final=st.booleans())
    def finish(self, key: TransferKey, final: bool) -> None:
        if key in self.opened:
            self.opened[key] = self.size(key)
            self.pair.compute(key, self.size(key))
            self.pair.finish(key, final=final)

    @rule(key=keys, have=st.integers(0, 16))
    def expect(self, key: TransferKey, have: int) -> None:
        if key not in self.expected:
            self.expected.add(key)
            self.pair.expect(key, self.size(key), min(have, self.size(key)))

    @rule(key=keys)
    def grant(self, key: TransferKey) -> None:
        if key in self.pair.wanted:
            self.pair.grant(key)

    @rule(key=keys)
    def abort_at_p(self, key: TransferKey) -> None:
        if key in self.opened:
            self.pair.abort_p(key, EngineFault("the step raised"))

    @rule(key=keys)
    def abort_at_d(self, key: TransferKey) -> None:
        self.pair.abort_d(key, Cancelled("the client left"))

    @rule(seconds=st.sampled_from([0.01, 0.2, 0.7, 1.5, 6.0, 25.0]))
    def pass_time(self, seconds: float) -> None:
        self.pair.run(seconds)

    @rule()
    def break_stream(self) -> None:
        self.pair.break_stream()

    @rule()
    def cut(self) -> None:
        """The stream stands and carries nothing any more: a partition, or a process that is stopped."""
        self.pair._up.clear()

    @rule(reachable=st.booleans())
    def reach(self, reachable: bool) -> None:
        self.pair.reachable = reachable

    @precondition(lambda self: self.pair._pair_epoch)
    @rule(key=keys, kind=st.integers(0, 5), chunk=st.integers(0, 2), slot_gen=st.integers(1, 3), old=st.booleans())
    def an_odd_word_reaches_p(self, key: TransferKey, kind: int, chunk: int, slot_gen: int, old: bool) -> None:
        """Late, repeated or of nobody; of an old life of the pair it must change nothing at all."""
        said: list[Message] = [
            AbortAck(key),
            ChunkAck(key, chunk, chunk % 2, slot_gen, ChunkStatus.CHECKSUM),
            Heartbeat((key,)),
            Abort(key, "x", ""),
            FinalAck(key),
            Expect(key, 0),
        ]
        # Words that end, free or start something are told in an old life only: in the present one they would be a lie.
        pair_epoch = self.pair._pair_epoch - 1 if old or kind >= 3 or kind == 0 else None
        before = len(self.pair.sent), self.pair.sender.num_open, self.pair.sender.ledger.num_busy
        self.pair.inject("p", said[kind], pair_epoch=pair_epoch)
        if pair_epoch is not None:
            assert before == (len(self.pair.sent), self.pair.sender.num_open, self.pair.sender.ledger.num_busy)

    @invariant()
    def slots_add_up(self) -> None:
        if hasattr(self, "pair"):
            self.pair.sender.check_integrity()
            assert set(self.pair.outcomes) <= self.expected
            assert set(self.pair.released) <= set(self.opened)

    def teardown(self) -> None:
        """From any state all is free in time: when nobody says another word, and when all that is left is given up."""
        if not hasattr(self, "pair"):
            return
        if self.ends_in_silence:
            self.pair._up.clear()
            self.pair.reachable = False
        else:
            self.pair.reachable = True
            for key in list(self.opened):
                self.pair.abort_p(key, EngineFault("the engine ends"))
            for key in list(self.expected):
                self.pair.abort_d(key, Cancelled("its time is over"))
        self.pair.run(REST_S)
        assert set(self.pair.outcomes) == self.expected
        assert set(self.pair.released) == set(self.opened)
        self.pair.check_quiet()


TestTransfer = TransferMachine.TestCase
if settings.get_current_profile_name() != "nightly":
    TestTransfer.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
