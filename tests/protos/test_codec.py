"""What crosses between router and engine comes back as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.protos import codec
from diptych.protos import engine_pb2 as pb
from diptych.protos.constraint import MAX_GRAMMAR_BYTES, Backend, Constraint, Reasoning
from diptych.protos.errors import InvalidRequest
from diptych.protos.types import (
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
    StageTimes,
    TokenLogprobs,
    TransferKey,
)

KEY = TransferKey(b"k" * 16, 2)
PEER = EngineRef(EngineId("e"), 5, "unix:/e")
IDS = st.integers(0, 2**32 - 1)
FLOATS = st.floats(allow_nan=False, width=32)
FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)
SHARES = st.floats(0, 1, width=32)
SAMPLINGS = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 2**32 - 1),
    temperature=FINITE.map(abs),
    top_p=SHARES,
    top_k=IDS,
    min_p=SHARES,
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.frozensets(IDS, max_size=3),
    min_tokens=IDS,
    repetition_penalty=FINITE.map(abs).filter(bool),
    presence_penalty=FINITE,
    frequency_penalty=FINITE,
    logit_bias=st.lists(st.tuples(IDS, FINITE), max_size=3).map(tuple),
    bad_words=st.lists(st.lists(IDS, min_size=1, max_size=3).map(tuple), max_size=2).map(tuple),
    allowed_token_ids=st.none() | st.lists(IDS, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)
LOGPROBS = st.builds(
    TokenLogprobs, FLOATS, st.integers(1, 2**32 - 1), st.lists(st.tuples(IDS, FLOATS), max_size=3).map(tuple)
)
CONSTRAINTS = st.builds(
    Constraint,
    grammar=st.text(max_size=20),
    backend=st.sampled_from(Backend),
    prefix=st.text(max_size=5),
    reasoning=st.none()
    | st.builds(Reasoning, start=IDS, end=IDS, is_open=st.booleans(), budget=st.none() | st.integers(1, 2**32 - 1)),
)


@given(
    sampling=SAMPLINGS,
    prompt=st.lists(IDS, min_size=1, max_size=4).map(tuple),
    tenant=st.text(max_size=5),
    priority=st.integers(-(2**31), 2**31 - 1),
    weight=st.floats(0.001, 1000),
    role=st.sampled_from(Role),
    has_peer=st.booleans(),
    resume=st.lists(IDS, max_size=4).map(tuple),
    constraint=st.none() | CONSTRAINTS,
)
def test_an_order_survives_the_way(
    sampling: SamplingParams,
    prompt: tuple[int, ...],
    tenant: str,
    priority: int,
    weight: float,
    role: Role,
    has_peer: bool,
    resume: tuple[int, ...],
    constraint: Constraint | None,
) -> None:
    sampling = replace(sampling, max_tokens=max(sampling.max_tokens, len(resume) + 1))
    request = GenerateRequest(
        key=KEY,
        prompt=prompt,
        sampling=sampling,
        salt=b"s",
        deadline=12.0,
        traceparent="00-a",
        priority=priority,
        tenant=tenant,
        weight=weight,
        resume=resume,
        constraint=constraint,
    )
    order: PrefillOrder | DecodeOrder = PrefillOrder(request=request, decode=PEER)
    if role is Role.DECODE:
        order = DecodeOrder(request=request, prefill=PEER if has_peer else None, allow_local_prefill=has_peer)
    sent = pb.Submit.FromString(codec.submit_to_pb(7, order, 10.0).SerializeToString())
    assert codec.order_from_pb(sent, 10.0) == order


@given(logprobs=LOGPROBS, row=IDS)
def test_logprobs_survive_the_way(logprobs: TokenLogprobs, row: int) -> None:
    sent = pb.Logprobs.FromString(codec.logprobs_to_pb(logprobs, row).SerializeToString())
    assert (codec.logprobs_from_pb(sent), sent.row) == (logprobs, row)


@given(first=st.integers(1, 2**32 - 1), logprobs=st.lists(LOGPROBS, max_size=3).map(tuple))
def test_prompt_logprobs_survive_the_way(first: int, logprobs: tuple[TokenLogprobs, ...]) -> None:
    piece = PromptLogprobs(KEY, first, logprobs)
    sent = pb.PromptLogprobs.FromString(codec.prompt_logprobs_to_pb(9, piece).SerializeToString())
    assert (codec.prompt_logprobs_from_pb(sent, KEY), sent.handle) == (piece, 9)


def test_a_finish_survives_the_way() -> None:
    finish = Finish(
        key=KEY,
        role=Role.DECODE,
        reason=FinishReason.ERROR,
        num_tokens=3,
        cached_tokens=4,
        error_code="no_kv_blocks",
        error_message="full",
        error_param="bad_words",
        times=StageTimes(1.0, 2.0, 3.0, 4.0),
        transfer_bytes=5,
        transport="shm",
        preemptions=6,
    )
    sent = pb.Finish.FromString(codec.finish_to_pb(1, finish).SerializeToString())
    assert codec.finish_from_pb(sent, lambda _: KEY, Role.DECODE) == finish


def test_an_order_whose_answer_is_complete_is_refused() -> None:
    good = GenerateRequest(key=KEY, prompt=(1,), sampling=SamplingParams(max_tokens=3), resume=(4, 5))
    msg = codec.submit_to_pb(7, DecodeOrder(request=good, prefill=None), 0.0)
    assert codec.order_from_pb(msg, 0.0).request.known == (1, 4, 5)
    msg.resume.append(6)
    with pytest.raises(InvalidRequest, match="3 tokens are generated already") as refused:
        codec.order_from_pb(msg, 0.0)
    assert refused.value.param == "resume"


def submit_with(constraint: Constraint) -> pb.Submit:
    request = GenerateRequest(key=KEY, prompt=(1,), sampling=SamplingParams(max_tokens=3), constraint=constraint)
    return codec.submit_to_pb(7, DecodeOrder(request=request, prefill=None), 0.0)


@pytest.mark.parametrize("backend", ["", "outlines", "XGRAMMAR", "x" * 1000])
def test_a_backend_that_no_engine_has_is_refused_in_short_words(backend: str) -> None:
    """A router newer than the engine may name one."""
    msg = submit_with(Constraint(grammar="start: /a/"))
    msg.constraint.backend = backend
    with pytest.raises(InvalidRequest, match="backend") as refused:
        codec.order_from_pb(pb.Submit.FromString(msg.SerializeToString()), 0.0)
    assert refused.value.param == "constraint"
    assert len(refused.value.message) < 100


@pytest.mark.parametrize("letter", ["a", "\xe9"])
def test_a_grammar_has_a_size_in_bytes(letter: str) -> None:
    most = MAX_GRAMMAR_BYTES // len(letter.encode())
    longest = Constraint(grammar=letter * most)
    assert codec.order_from_pb(submit_with(longest), 0.0).request.constraint == longest
    with pytest.raises(InvalidRequest, match=f"more than {MAX_GRAMMAR_BYTES} bytes") as refused:
        codec.order_from_pb(submit_with(Constraint(grammar=letter * (most + 1))), 0.0)
    assert refused.value.param == "constraint"


def test_an_order_without_a_constraint_says_none() -> None:
    request = GenerateRequest(key=KEY, prompt=(1,), sampling=SamplingParams(max_tokens=3))
    msg = codec.submit_to_pb(7, DecodeOrder(request=request, prefill=None), 0.0)
    assert not msg.HasField("constraint")
    assert codec.order_from_pb(msg, 0.0).request.constraint is None


def test_a_ping_survives_the_way() -> None:
    sent = pb.RouterFrame.FromString(pb.RouterFrame(ping=pb.Ping()).SerializeToString())
    assert sent.WhichOneof("frame") == "ping"


def test_nonsense_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="shorter"):
        codec.logprobs_from_pb(pb.Logprobs(top_token=[1, 2], top_logprob=[0.5]))
    good = pb.Submit(transfer_id=b"k" * 16, prompt=[1], sampling=pb.Sampling(max_tokens=1), phase=pb.PHASE_DECODE)
    weights = (("weight", value) for value in (-1.0, math.inf, math.nan))
    for field, value in (("transfer_id", b"k"), ("phase", 9), *weights):
        bad = pb.Submit.FromString(good.SerializeToString())
        setattr(bad, field, value)
        with pytest.raises(InvalidRequest):
            codec.order_from_pb(bad, 0.0)
    messages = [pb.Sampling(), pb.Sampling(max_tokens=1, bias_token_ids=[1])]
    messages.append(pb.Sampling(max_tokens=1, bias_token_ids=[1], bias_values=[math.inf]))
    floats = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    messages += [pb.Sampling(max_tokens=1, **{name: math.nan}) for name in floats]
    messages += [pb.Sampling(max_tokens=1, temperature=-1.0), pb.Sampling(max_tokens=1, top_p=1.5)]
    for message in messages:
        bad = pb.Submit.FromString(good.SerializeToString())
        bad.sampling.CopyFrom(message)
        with pytest.raises(InvalidRequest):
            codec.order_from_pb(bad, 0.0)
