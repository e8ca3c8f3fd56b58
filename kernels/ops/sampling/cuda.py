"""The op on a card. `choose_largest` and `choose_as_asked` ask nothing of the device: how many launches a step takes
follows from its specs, what they do from the state of its slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from diptych.protos.constraint import mask_words
from diptych.protos.step import SampleSpec

from ...device.rules import HEAD
from ...device.state import WITH_RULES
from ...device.step import LOGITS_NOT_FINITE, RULED_OUT
from ...device.wire import HEADER, ROW
from ..compiled import launch
from . import by_spec, filter_kernel, kernel, reference, rules_kernel
from .sampled import Sampled
from .space import Asking, SampleSpace

if TYPE_CHECKING:
    from ...device.state import DeviceState
    from ...device.wire import Sampling

_TURNS = 10  # of a search: 8 ** 10 exceeds the number of weights from 0 to 1
_HEAVIEST = 0x3F800000  # the bits of 1.0
_HISTORY = 4096  # tokens of a program
_BLOCK = 1024
_WORDS = 128


def sample(
    logits_NV: Tensor, specs: Sequence[SampleSpec], histories: Mapping[int, Tensor], masks: Mapping[int, Tensor]
) -> Sampled:
    """See launch.py. By the definition: whoever has no slots on the device has time to ask it."""
    return reference.sample(logits_NV, specs, histories, masks)


def choose_largest(logits_NV: Tensor, space: SampleSpace, tokens_N: Tensor, flags_N: Tensor) -> None:
    """See launch.py."""
    rows, vocab = logits_NV.shape
    launch(
        kernel.largest,
        (rows, space.num_segments, 1),
        (logits_NV, space.values_NP, space.ids_NP, space.tickets_N, tokens_N, flags_N, space.best_N),
        UNSOUND=LOGITS_NOT_FINITE,
        STRIDE=logits_NV.stride(0),
        **_shares(space, vocab),
    )


def choose_as_asked(
    logits_NV: Tensor, asking: Asking, state: DeviceState, space: SampleSpace, tokens_N: Tensor, flags_N: Tensor
) -> None:
    """See launch.py. Rows whose rules the device was not told are chosen by the definition: then the host waits."""
    told = [one for one in asking.rows if one.is_told]
    for begin in range(0, len(told), space.rows):
        end = begin + space.rows
        masked = asking.masked_A[begin:end], asking.masks_MW
        piece = _Piece(logits_NV, asking.wire_W, asking.where_A[begin:end], *masked, state, space, tokens_N, flags_N)
        _choose(piece, _work_of(told[begin : begin + space.rows], logits_NV.shape[1]))
    if len(told) < len(asking.rows):
        rest = [one for one in asking.rows if not one.is_told]
        by_spec.choose_by_spec(logits_NV, rest, asking.masks_of(rest), state, tokens_N, flags_N)


class _Piece(NamedTuple):
    """What the kernels of one piece are given."""

    logits_NV: Tensor
    wire_W: Tensor
    where_A: Tensor
    masked_A: Tensor
    masks_MW: Tensor
    state: DeviceState
    space: SampleSpace
    tokens_N: Tensor
    flags_N: Tensor


class _Work(NamedTuple):
    """What any row of a piece needs."""

    draws: bool
    rules: bool
    repetition: int  # tokens of the longest history that it looks at; 0: of none
    generated: int  # the same of frequency and presence
    top_k: bool
    top_p: bool
    min_p: bool


def _work_of(rows: Sequence[Sampling], vocab: int) -> _Work:
    drawing = [one.spec for one in rows if one.spec.temperature != 0]
    ruled = [(one.spec, one.spec.rules) for one in rows if one.spec.rules is not None]
    return _Work(
        draws=bool(drawing),
        rules=bool(ruled) or any(one.spec.guide is not None for one in rows),
        repetition=max((spec.position for spec, rules in ruled if rules.repetition_penalty != 1), default=0),
        generated=max(
            (
                spec.position - rules.num_prompt
                for spec, rules in ruled
                if rules.frequency_penalty or rules.presence_penalty
            ),
            default=0,
        ),
        top_k=any(0 < spec.top_k < vocab for spec in drawing),
        top_p=any(spec.top_p < 1 for spec in drawing),
        min_p=any(spec.min_p > 0 for spec in drawing),
    )


def _choose(piece: _Piece, work: _Work) -> None:
    if work.rules:
        _rule(piece, work)
    if work.draws:
        _weigh(piece)
        if work.top_k:
            _narrow(piece, piece.state.top_k_S, is_mass=False)
        if work.top_p:
            _narrow(piece, piece.state.top_p_S, is_mass=True)
        _draw(piece, is_filtered=work.top_k or work.top_p or work.min_p)


def _rule(piece: _Piece, work: _Work) -> None:
    logits_NV, wire_W, where_A, masked_A, masks_MW, state, space, tokens_N, flags_N = piece
    rows, vocab = len(where_A), logits_NV.shape[1]
    of_rules = (state.kind_S, flags_N, state.rules_W, state.record_S)
    launch(
        rules_kernel.copy_allowed,
        (rows, space.num_segments, 1),
        (logits_NV, wire_W, where_A, masked_A, masks_MW, space.weights_AV, *of_rules),
        RULED=WITH_RULES,
        HEAD=HEAD,
        MASK=mask_words(vocab),
        HEADER=HEADER,
        ROW=ROW,
        LOGITS_STRIDE=logits_NV.stride(0),
        STRIDE=space.stride,
        V=vocab,
        SPAN=space.span,
        TILE=space.tile,
    )
    launch(
        rules_kernel.change_listed,
        (rows, 1, 1),
        (wire_W, where_A, space.weights_AV, *of_rules, state.tokens_SC, state.tokens_stride),
        RULED=WITH_RULES,
        HEAD=HEAD,
        MASK=mask_words(vocab),
        **_of_wire(space),
        BLOCK=_WORDS,
    )
    for length, generated in ((work.repetition, 0), (work.generated, 1)):
        grid = (rows, -(-max(0, length) // _HISTORY), 1)
        counting = (wire_W, where_A, space.counts_AV, *of_rules, state.tokens_SC)
        constants: dict[str, Any] = {"RULED": WITH_RULES, **_of_wire(space), "V": vocab}
        constants |= {"PIECE": _HISTORY, "BLOCK": _BLOCK}
        launch(rules_kernel.count_tokens, grid, (*counting, state.tokens_stride, generated), **constants)
        launch(rules_kernel.penalise, grid, (*counting, space.weights_AV, state.tokens_stride, generated), **constants)
    launch(
        kernel.largest_ruled,
        (rows, space.num_segments, 1),
        (
            *(wire_W, where_A, space.weights_AV, state.kind_S, space.values_NP, space.ids_NP, space.tickets_N),
            *(tokens_N, flags_N, space.ruled_best_A),
        ),
        RULED=WITH_RULES,
        RULED_OUT=RULED_OUT,
        **_of_wire(space),
        **_shares(space, vocab),
    )


def _weigh(piece: _Piece) -> None:
    logits_NV, wire_W, where_A, _, _, state, space, _, flags_N = piece
    launch(
        kernel.weigh,
        (len(where_A), space.num_segments, 1),
        (
            *(logits_NV, wire_W, where_A, space.weights_AV, state.kind_S, state.temperature_S, flags_N),
            *(space.best_N, space.ruled_best_A, space.sums_AP, space.equals_AP, space.pivots_A, space.extras_A),
        ),
        RULED=WITH_RULES,
        HEADER=HEADER,
        ROW=ROW,
        LOGITS_STRIDE=logits_NV.stride(0),
        STRIDE=space.stride,
        **_shares(space, logits_NV.shape[1]),
    )


def _narrow(piece: _Piece, wanted_S: Tensor, *, is_mass: bool) -> None:
    logits_NV, wire_W, where_A, _, _, state, space, _, flags_N = piece
    constants = {**_of_wire(space), **_shares(space, logits_NV.shape[1])}
    rows = (wire_W, where_A, space.weights_AV, flags_N, state.temperature_S, wanted_S, space.pivots_A, space.extras_A)
    between = (space.parts_2AP8, space.intervals_2A2, space.masses_2A2)
    for turn in range(_TURNS + 1):
        now, before = turn % 2, 1 - turn % 2
        launch(
            filter_kernel.narrow,
            (len(where_A), space.num_segments if turn < _TURNS else 1, 1),
            (*rows, *(pair[at] for pair in between for at in (before, now)), space.num_segments, turn),
            num_warps=8,
            MASS=is_mass,
            TURNS=_TURNS,
            TOP=_HEAVIEST,
            **constants,
        )


def _draw(piece: _Piece, *, is_filtered: bool) -> None:
    logits_NV, wire_W, where_A, _, _, state, space, tokens_N, flags_N = piece
    constants = {**_of_wire(space), **_shares(space, logits_NV.shape[1])}
    rows = (wire_W, where_A, space.weights_AV, flags_N, state.temperature_S, state.min_p_S)
    if is_filtered:
        launch(
            filter_kernel.weigh_kept,
            (len(where_A), space.num_segments, 1),
            (*rows, space.pivots_A, space.sums_AP, space.equals_AP),
            **constants,
        )
    launch(
        kernel.draw,
        (len(where_A), 1, 1),
        (
            *(*rows, state.seed_S, space.pivots_A, space.extras_A, space.sums_AP, space.equals_AP, tokens_N),
            space.num_segments,
        ),
        **constants,
    )


def _of_wire(space: SampleSpace) -> dict[str, Any]:
    return {"HEADER": HEADER, "ROW": ROW, "STRIDE": space.stride}


def _shares(space: SampleSpace, vocab: int) -> dict[str, Any]:
    return {"V": vocab, "SPAN": space.span, "SP": space.segments, "TILE": space.tile}
