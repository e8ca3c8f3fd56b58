"""What an engine takes of its card, from its spec and the model's config.json alone: told and judged before anything is
loaded, first by `diptych serve` and `doctor`, then by the engine itself. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from diptych.cluster.control.cards import Card
from diptych.kernels.device.memory_plan import DevicePlan, StepNeeds, plan_before_loading
from diptych.kernels.models.shape import DecoderShape, GenericOnly, read_shape
from diptych.kvtransfer.layout import ITEM_BYTES, KvLayout

from .spec import EngineSpec

CONTEXT = 600 << 20  # bytes: about what a process with torch holds of a card before its first tensor
_WIDEST = 12  # numbers of a token that live at once, by hidden size, where the model's own are not known
_DRAWN_ROWS, _DRAWN_ITEM = 64, 8  # rows drawn at once, bytes of a weight and a count; see ops/sampling/space.py
_RULES, _LONG_RULES = 320, 1 << 15  # words of a slot's rules and sampling; of the few with hundreds of bad words
_LEAST_CONTEXT, _LEAST_RUNNING, _LEAST_STEP = 4096, 16, 512  # what a refusal advises at the least


def card_bytes(spec: EngineSpec, *, free: int, total: int) -> int:
    """What the engine may take of a card: what is free, at most its share."""
    return min(free, int(spec.gpu_share * total))


def plan_card(spec: EngineSpec, free: int) -> DevicePlan:
    """`free`: bytes that the engine may take."""
    facts, item = spec.facts, ITEM_BYTES[spec.dtype]
    weights, widest = _numbers(spec)
    needs = StepNeeds(
        step_tokens=spec.step_tokens,
        max_rows=spec.max_slots,
        vocab_size=facts.vocab_size,
        widest=widest,
        item_bytes=item,
    )
    # Ids, a table of blocks and rules for each slot, and one more; see device/state.py.
    context = spec.wanted_context_tokens
    slot = context + -(-context // spec.kv.block_tokens) + facts.vocab_size // 32 + _RULES
    state = 4 * ((spec.max_slots + 1) * slot + _LONG_RULES)
    state += _DRAWN_ITEM * min(_DRAWN_ROWS, spec.max_slots) * facts.vocab_size
    rotary = 4 * context * facts.head_dim
    layout = KvLayout(
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        dtype=spec.dtype,
        block_tokens=spec.kv.block_tokens,
    )
    block = (layout.bytes_per_block, layout.block_tokens)
    return plan_before_loading(
        weights * item, state + rotary, needs=needs, free=free, block=block, wanted_kv=spec.kv_bytes
    )


def check_card(spec: EngineSpec, plan: DevicePlan) -> None:
    """StartupError where `plan`, made for the spec, does not hold the model and KV for one largest step: with the plan,
    what is missing and what would fit.
    """
    least = least_tokens(spec)
    if plan.missing(least) <= 0:
        return
    would_fit = []
    if plan.wanted_kv is not None and plan.room * plan.block_tokens >= least:
        fits = plan.room * plan.bytes_per_block >> 20
        would_fit.append(f"{spec.kv_key}.memory_mib: {fits} ({plan.told(plan.room)})")
    would_fit += _advice(spec, plan.free)
    raise plan.refusal(least, would_fit)


def card_plans(specs: Iterable[EngineSpec], present: Sequence[Card]) -> list[str]:
    """The plans of engines on this machine's cards, for people, before anything is started. StartupError: an engine
    finds no card that it fits on. Which card it will get is not known yet: the emptiest stands for it.
    """
    emptiest = max((card for card in present if card.total), key=lambda card: card.free, default=None)
    if emptiest is None:
        return []
    tables = []
    for spec in specs:
        if spec.device == "cuda" and spec.text is None:  # else nothing but weights stays there
            plan = plan_card(spec, card_bytes(spec, free=emptiest.free - CONTEXT, total=emptiest.total))
            check_card(spec, plan)
            tables.append(plan.table(f"{spec.engine_id} on one {emptiest.name}"))
    return tables


def least_tokens(spec: EngineSpec) -> int:
    """Of KV: with less an engine is of no use."""
    return min(spec.wanted_context_tokens, spec.step_tokens)


def _advice(spec: EngineSpec, free: int) -> Iterator[str]:
    """Of each kind the largest setting below the spec's own that fits, as a user writes it; where none does alone, the
    least of all of them together.
    """
    found = False
    for kind in _smaller(spec):
        for written, one in kind:
            plan = plan_card(one, free)
            if plan.missing(least_tokens(one)) <= 0:
                found = True
                yield f"{written} ({plan.told(plan.num_blocks)})"
                break
    if not found:
        context, running, step = _sizes(spec)
        least = min(context, _LEAST_CONTEXT), min(running, _LEAST_RUNNING), min(step, _LEAST_STEP)
        plan = plan_card(_other(spec, *least), free)
        if plan.missing(least_tokens(_other(spec, *least))) <= 0:
            yield (
                f"models.{spec.model}.max_context_tokens: {least[0]}, decode.max_running: {least[1]} and "
                f"decode.step_tokens: {least[2]} together ({plan.told(plan.num_blocks)})"
            )


def _smaller(spec: EngineSpec) -> Iterator[Iterator[tuple[str, EngineSpec]]]:
    name = f"models.{spec.model}"
    context, running, step = _sizes(spec)
    yield (
        (f"{name}.max_context_tokens: {size}", _other(spec, size, running, step))
        for size in _halves(context, _LEAST_CONTEXT)
    )
    yield (
        (f"{name}.decode.max_running: {size}", _other(spec, context, size, step))
        for size in _halves(running, _LEAST_RUNNING)
    )
    yield (
        (f"{name}.decode.step_tokens: {size}", _other(spec, context, running, size))
        for size in _halves(step, _LEAST_STEP)
    )


def _sizes(spec: EngineSpec) -> tuple[int, int, int]:
    return spec.wanted_context_tokens, spec.decode.max_running, spec.step_tokens


def _other(spec: EngineSpec, context: int, running: int, step: int) -> EngineSpec:
    settings = spec.settings
    pools = {
        "decode": settings.decode.model_copy(update={"max_running": running, "step_tokens": step}),
        "prefill": settings.prefill.model_copy(update={"step_tokens": step}),
    }
    return replace(spec, settings=settings.model_copy(update={"max_context_tokens": context, **pools}))


def _halves(size: int, least: int) -> Iterator[int]:
    while (size := size // 2) >= least:
        yield size


def _numbers(spec: EngineSpec) -> tuple[int, int]:
    """Numbers of the weights; those of one token that live at once. Of transformers' code the latter are a guess."""
    config: dict[str, Any] = json.loads((spec.folder / "config.json").read_text(encoding="utf-8"))
    try:
        shape = read_shape(config)
    except GenericOnly:
        hidden = next((config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config), 8192)
        return spec.facts.num_parameters, _WIDEST * int(hidden)
    return num_weights(shape), _buffers(shape)


def num_weights(shape: DecoderShape) -> int:
    """Of a hand-written decoder: as models/tensors.py allocates them."""
    hidden, heads, narrow = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv = heads + 2 * narrow
    total = (1 if shape.tied else 2) * shape.vocab_size * hidden + hidden
    for is_sparse in shape.sparse:
        experts = shape.experts if is_sparse else None
        num, inner = (1, shape.intermediate) if experts is None else (experts.num, experts.intermediate)
        total += 2 * hidden + qkv * hidden + heads * hidden + num * 3 * inner * hidden
        total += (0 if experts is None else num * hidden) + (2 * shape.head_dim if shape.head_norms else 0)
        total += (qkv if shape.qkv_bias else 0) + (hidden if shape.out_bias else 0)
        total += 2 * inner + hidden if shape.mlp_bias else 0
    return total


def _buffers(shape: DecoderShape) -> int:
    heads = shape.heads * shape.head_dim
    width = 2 * shape.hidden + 2 * heads + 2 * shape.kv_heads * shape.head_dim
    if not all(shape.sparse):
        width += 3 * shape.intermediate
    if shape.experts is not None:
        width += shape.experts.top_k * (shape.experts.intermediate + 2 * shape.hidden)
    return width
