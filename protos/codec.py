"""Between the dataclasses of types.py and the messages of engine.proto, both ways.

An order that makes no sense raises InvalidRequest, an engine's message that makes none ValueError; nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from . import engine_pb2 as pb
from .constraint import MAX_GRAMMAR_BYTES, MAX_PREFIX_BYTES, Backend, Constraint, Reasoning
from .errors import InvalidRequest
from .status import EngineStatus
from .strict_json import printable
from .types import (
    DecodeOrder,
    EngineId,
    EngineRef,
    Finish,
    FinishReason,
    GenerateRequest,
    PoolCounts,
    PrefillOrder,
    PromptLogprobs,
    Role,
    SamplingParams,
    StageTimes,
    TokenLogprobs,
    TransferKey,
)

_FLOAT32 = 3.4028234663852886e38
# What no request of the API leaves. NaN is in no range; in a step it would fail the requests of others, too.
_RANGES = (
    ("temperature", 0.0, _FLOAT32),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, _FLOAT32),
    ("presence_penalty", -_FLOAT32, _FLOAT32),
    ("frequency_penalty", -_FLOAT32, _FLOAT32),
)


def ref_to_pb(ref: EngineRef) -> pb.EngineRef:
    """One life of an engine, as a message."""
    return pb.EngineRef(engine_id=ref.engine_id, epoch=ref.epoch, target=ref.target)


def ref_from_pb(msg: pb.EngineRef) -> EngineRef:
    """The inverse of ref_to_pb."""
    return EngineRef(EngineId(msg.engine_id), msg.epoch, msg.target)


def _sampling_to_pb(sampling: SamplingParams) -> pb.Sampling:
    msg = pb.Sampling(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed & 0xFFFF_FFFF_FFFF_FFFF,
        stop_token_ids=sorted(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        bias_token_ids=[token for token, _ in sampling.logit_bias],
        bias_values=[value for _, value in sampling.logit_bias],
        bad_words=[pb.TokenList(token=word) for word in sampling.bad_words],
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )
    if sampling.allowed_token_ids is not None:
        msg.allowed_token_ids.CopyFrom(pb.TokenList(token=sampling.allowed_token_ids))
    return msg


def _sampling_from_pb(msg: pb.Sampling) -> SamplingParams:
    if msg.max_tokens < 1:
        raise InvalidRequest("max_tokens must be at least 1", "max_tokens")
    if len(msg.bias_token_ids) != len(msg.bias_values):
        raise InvalidRequest("bias_token_ids and bias_values differ in length", "logit_bias")
    for name, least, most in _RANGES:
        if not least <= getattr(msg, name) <= most:
            raise InvalidRequest(f"{name} must be a number from {least:g} to {most:g}", name)
    if not all(map(math.isfinite, msg.bias_values)):
        raise InvalidRequest("a value of logit_bias is not finite", "logit_bias")
    return SamplingParams(
        max_tokens=msg.max_tokens,
        temperature=msg.temperature,
        top_p=msg.top_p,
        top_k=msg.top_k,
        min_p=msg.min_p,
        seed=msg.seed,
        stop_token_ids=frozenset(msg.stop_token_ids),
        min_tokens=msg.min_tokens,
        repetition_penalty=msg.repetition_penalty or 1.0,
        presence_penalty=msg.presence_penalty,
        frequency_penalty=msg.frequency_penalty,
        logit_bias=tuple(zip(msg.bias_token_ids, msg.bias_values, strict=True)),
        bad_words=tuple(tuple(word.token) for word in msg.bad_words),
        allowed_token_ids=tuple(msg.allowed_token_ids.token) if msg.HasField("allowed_token_ids") else None,
        logprobs=msg.logprobs if msg.HasField("logprobs") else None,
        prompt_logprobs=msg.prompt_logprobs if msg.HasField("prompt_logprobs") else None,
    )


def _constraint_to_pb(constraint: Constraint) -> pb.Constraint:
    msg = pb.Constraint(grammar=constraint.grammar, backend=constraint.backend.value, prefix=constraint.prefix)
    if (reasoning := constraint.reasoning) is not None:
        start, end, is_open, budget = reasoning.start, reasoning.end, reasoning.is_open, reasoning.budget or 0
        msg.reasoning.CopyFrom(pb.Reasoning(start=start, end=end, is_open=is_open, budget=budget))
    return msg


def _constraint_from_pb(msg: pb.Constraint) -> Constraint:
    if msg.backend not in list(Backend):
        raise InvalidRequest(f"no engine has a backend {printable(msg.backend, 24)} for grammars", "constraint")
    if len(msg.grammar.encode()) > MAX_GRAMMAR_BYTES:
        raise InvalidRequest(f"the grammar has more than {MAX_GRAMMAR_BYTES} bytes", "constraint")
    if len(msg.prefix.encode()) > MAX_PREFIX_BYTES:
        raise InvalidRequest(f"the beginning of the answer has more than {MAX_PREFIX_BYTES} bytes", "messages")
    reasoning = None
    if msg.HasField("reasoning"):
        told = msg.reasoning
        reasoning = Reasoning(told.start, told.end, told.is_open, told.budget or None)
    return Constraint(grammar=msg.grammar, backend=Backend(msg.backend), prefix=msg.prefix, reasoning=reasoning)


def logprobs_to_pb(logprobs: TokenLogprobs, row: int = 0) -> pb.Logprobs:
    """One token's, as a message; `row` of the step's columns."""
    return pb.Logprobs(
        row=row,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token=[token for token, _ in logprobs.top],
        top_logprob=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_pb(msg: pb.Logprobs) -> TokenLogprobs:
    """The inverse of logprobs_to_pb. Columns of unequal length raise ValueError."""
    return TokenLogprobs(msg.logprob, msg.rank, tuple(zip(msg.top_token, msg.top_logprob, strict=True)))


def prompt_logprobs_to_pb(handle: int, piece: PromptLogprobs) -> pb.PromptLogprobs:
    """`handle` is the session's name for piece.key."""
    return pb.PromptLogprobs(handle=handle, first=piece.first, logprobs=[logprobs_to_pb(one) for one in piece.logprobs])


def prompt_logprobs_from_pb(msg: pb.PromptLogprobs, key: TransferKey) -> PromptLogprobs:
    """`key` is the one behind msg.handle. Columns of unequal length raise ValueError."""
    return PromptLogprobs(key, msg.first, tuple(logprobs_from_pb(one) for one in msg.logprobs))


def submit_to_pb(handle: int, order: PrefillOrder | DecodeOrder, now: float) -> pb.Submit:
    """`now` is the sender's monotonic clock: deadlines travel as time left."""
    request = order.request
    msg = pb.Submit(
        handle=handle,
        transfer_id=request.key.transfer_id,
        attempt=request.key.attempt,
        prompt=request.prompt,
        sampling=_sampling_to_pb(request.sampling),
        salt=request.salt,
        timeout_s=0.0 if request.deadline is None else max(request.deadline - now, 1e-3),
        traceparent=request.traceparent,
        priority=request.priority,
        tenant=request.tenant,
        weight=request.weight,
        resume=request.resume,
    )
    if request.constraint is not None:
        msg.constraint.CopyFrom(_constraint_to_pb(request.constraint))
    if isinstance(order, PrefillOrder):
        msg.phase = pb.PHASE_PREFILL
        msg.peer.CopyFrom(ref_to_pb(order.decode))
    else:
        msg.phase = pb.PHASE_DECODE
        msg.allow_local_prefill = order.allow_local_prefill
        if order.prefill is not None:
            msg.peer.CopyFrom(ref_to_pb(order.prefill))
    return msg


def key_from_pb(msg: pb.Submit | pb.Cancel) -> TransferKey:
    """The key that the message names; raises InvalidRequest unless the id has 16 bytes."""
    if len(msg.transfer_id) != 16:
        raise InvalidRequest("transfer_id must be 16 bytes", "transfer_id")
    return TransferKey(msg.transfer_id, msg.attempt)


def order_from_pb(msg: pb.Submit, now: float) -> PrefillOrder | DecodeOrder:
    """`now` is the receiver's monotonic clock."""
    if not msg.prompt:
        raise InvalidRequest("the prompt has no tokens", "prompt")
    if not 0 <= msg.weight < math.inf:  # NaN, too: a line cannot be sorted by it
        raise InvalidRequest(f"the weight {msg.weight} is not a share", "weight")
    if msg.resume and len(msg.resume) >= msg.sampling.max_tokens:
        raise InvalidRequest(
            f"{len(msg.resume)} tokens are generated already: max_tokens {msg.sampling.max_tokens} allows no other",
            "resume",
        )
    request = GenerateRequest(
        key=key_from_pb(msg),
        prompt=tuple(msg.prompt),
        sampling=_sampling_from_pb(msg.sampling),
        salt=msg.salt,
        deadline=now + msg.timeout_s if msg.timeout_s > 0 else None,
        traceparent=msg.traceparent,
        priority=msg.priority,
        tenant=msg.tenant,
        weight=msg.weight or 1.0,
        resume=tuple(msg.resume),
        constraint=_constraint_from_pb(msg.constraint) if msg.HasField("constraint") else None,
    )
    peer = ref_from_pb(msg.peer) if msg.HasField("peer") else None
    if msg.phase == pb.PHASE_PREFILL:
        if peer is None:
            raise InvalidRequest("a prefill order names no decode engine", "peer")
        return PrefillOrder(request=request, decode=peer)
    if msg.phase == pb.PHASE_DECODE:
        return DecodeOrder(request=request, prefill=peer, allow_local_prefill=msg.allow_local_prefill)
    raise InvalidRequest(f"unknown phase {msg.phase}", "phase")


def finish_to_pb(handle: int, finish: Finish) -> pb.Finish:
    """`handle` is the session's name for finish.key."""
    msg = pb.Finish(
        handle=handle,
        reason=finish.reason.value,
        num_tokens=finish.num_tokens,
        cached_tokens=finish.cached_tokens,
        transfer_bytes=finish.transfer_bytes,
        transport=finish.transport,
        preemptions=finish.preemptions,
        times=pb.StageTimes(
            queue=finish.times.queue,
            prefill=finish.times.prefill,
            transfer=finish.times.transfer,
            decode=finish.times.decode,
        ),
    )
    if finish.error_code:
        msg.error.code = finish.error_code
        msg.error.message = finish.error_message
        msg.error.param = finish.error_param
    return msg


def finish_from_pb(msg: pb.Finish, key_of: Callable[[int], TransferKey], role: Role) -> Finish:
    """`key_of` gives the key behind a handle; an unknown reason raises ValueError."""
    return Finish(
        key=key_of(msg.handle),
        role=role,
        reason=FinishReason(msg.reason),
        num_tokens=msg.num_tokens,
        cached_tokens=msg.cached_tokens,
        error_code=msg.error.code,
        error_message=msg.error.message,
        error_param=msg.error.param,
        times=StageTimes(msg.times.queue, msg.times.prefill, msg.times.transfer, msg.times.decode),
        transfer_bytes=msg.transfer_bytes,
        transport=msg.transport,
        preemptions=msg.preemptions,
    )


def status_to_pb(status: EngineStatus) -> pb.Status:
    """A reading of an engine, as a message."""
    return pb.Status(
        running=status.running,
        waiting=status.waiting,
        blocks_total=status.blocks.total,
        blocks_free=status.blocks.free,
        blocks_cached=status.blocks.cached,
        blocks_used=status.blocks.used,
        transfers=status.transfers,
        ring_slots_busy=status.ring_slots_busy,
        counters=dict(status.counters),
        steps=status.steps,
    )


def status_from_pb(msg: pb.Status) -> EngineStatus:
    """The inverse of status_to_pb."""
    return EngineStatus(
        running=msg.running,
        waiting=msg.waiting,
        blocks=PoolCounts(total=msg.blocks_total, free=msg.blocks_free, cached=msg.blocks_cached, used=msg.blocks_used),
        transfers=msg.transfers,
        ring_slots_busy=msg.ring_slots_busy,
        steps=msg.steps,
        counters=dict(msg.counters),
    )
