"""Choosing a step's tokens from the state of its slots, against the definition: in the interpreter and on a card.

Equal to the last id: where a kernel's weights are rounded otherwise than torch's exp rounds them, `definition` takes
the kernel's way of rounding, and a test of its own holds both against each other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.kernels.device.step import LOGITS_NOT_FINITE, RULED_OUT
from diptych.kernels.device.testing import nothing_waits
from diptych.kernels.ops.sampling import by_spec, cuda, kernel, launch, reference
from diptych.kernels.ops.sampling.philox import uniform
from diptych.kernels.ops.sampling.space import SampleSpace, Tiling
from diptych.kernels.ops.sampling.testing import AskedStep
from diptych.protos.step import LogitRules, SampleSpec

WHOLE = Tiling(rows=64, segments=2, tile=1024)  # a row in one segment: fewer programs to interpret
HALVES = Tiling(rows=64, segments=2, tile=512)
INF, NAN = float("inf"), float("nan")
PROMPT = 6  # tokens of every history that are a prompt's


def logits_of(rows: int, vocab: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def history_of(length: int, vocab: int, seed: int = 0) -> list[int]:
    """With many repetitions."""
    rng = random.Random(seed)
    return [rng.randrange(vocab) if rng.random() < 0.5 else rng.randrange(9) for _ in range(length)]


def spec(temperature: float = 1.0, *, seed: int = 2**63 + 5, position: int = 20, **fields: Any) -> SampleSpec:
    fields = {"top_p": 1.0, "top_k": 0} | fields
    return SampleSpec(temperature, seed=seed, position=position, **fields)


def ruled(temperature: float = 0.0, *, position: int = 20, filters: dict[str, Any] | None = None, **rules: Any) -> Any:
    return spec(temperature, position=position, **(filters or {}), rules=LogitRules(num_prompt=PROMPT, **rules))


def definition(logits_V: Tensor, one: SampleSpec, history: Sequence[int]) -> tuple[int, int]:
    """Token and flag by reference.py, but for the rounding of exp."""
    logits_V = logits_V.cpu().float()
    if not logits_V.max().isfinite():
        return 0, LOGITS_NOT_FINITE
    is_known = one.rules is not None and one.rules.needs_history
    known = torch.tensor(history).clamp(min=0) if is_known else None
    row_V = reference.apply_rules(logits_V, one, known)
    if not row_V.max().isfinite():
        return 0, RULED_OUT
    if one.temperature == 0:
        return int((row_V == row_V.max()).nonzero()[0]), 0
    weights_V = torch.exp(((row_V - row_V.max()) / one.temperature).double()).float().double()
    weights_V = torch.where(reference.kept_tokens(weights_V, one), weights_V, 0.0)
    cumulated_V = weights_V.cumsum(0)
    beyond = (cumulated_V > uniform(one.seed, one.position) * float(cumulated_V[-1])).nonzero()
    return int(beyond[0] if len(beyond) else weights_V.nonzero()[-1]), 0


def check(
    specs: Sequence[SampleSpec], logits: Tensor, place: torch.device, *, tiling: Tiling | None = WHOLE, seed: int = 0
) -> AskedStep:
    """Every row's token and flag are the definition's; the logits stay, and so do the zeros between steps."""
    vocab = logits.shape[1]
    histories = [history_of(one.position, vocab, seed + row) for row, one in enumerate(specs)]
    step = AskedStep(specs, histories, vocab=vocab, device=place, tiling=tiling)
    given_NV = logits.to(place)
    before = given_NV.clone()
    tokens, flags = step.choose(cuda, given_NV)
    wanted = [definition(*row) for row in zip(logits, specs, histories, strict=True)]
    assert list(zip(tokens, flags, strict=True)) == wanted
    assert torch.equal(given_NV.nan_to_num(), before.nan_to_num())
    assert not step.space.counts_AV.any()
    assert not step.space.tickets_N.any()
    return step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [1, 97, 1003, 2048, 32_001])
def test_the_largest_logit_and_the_lowest_id_among_equals(vocab: int, dtype: torch.dtype, place: torch.device) -> None:
    rows = logits_of(6, vocab, dtype=dtype).round()  # hundreds of equal ones
    rows[1] = 2.0
    rows[2, vocab // 2], rows[3, vocab - 1], rows[4, 0] = NAN, INF, -INF
    rows[5] = -INF
    space = SampleSpace(max_rows=8, vocab=vocab, device=place, tiling=Tiling(8, 4, 512))
    tokens_N = torch.full((6,), -7, dtype=torch.int64, device=place)
    flags_N = torch.full((6,), -7, dtype=torch.int32, device=place)
    cuda.choose_largest(rows.to(place), space, tokens_N, flags_N)
    wanted = [definition(row_V, spec(0.0), ()) for row_V in rows]
    assert list(zip(tokens_N.tolist(), flags_N.tolist(), strict=True)) == wanted
    assert not space.tickets_N.any()
    by_spec.choose_largest(rows, space, tokens_N := tokens_N.cpu().fill_(-7), flags_N := flags_N.cpu().fill_(-7))
    assert list(zip(tokens_N.tolist(), flags_N.tolist(), strict=True)) == wanted


number_of = kernel.uniform


@triton.jit
def numbers_of(seeds, positions, out):  # type: ignore[no-untyped-def]
    at = tl.program_id(0)
    tl.store(out + at, number_of(tl.load(seeds + at), tl.load(positions + at)))


def test_random_numbers_are_those_of_the_definition_to_the_last_bit(place: torch.device) -> None:
    pairs = [(seed, position) for seed in (0, 1, 2**31, 2**32 - 1, 2**63 + 7, 2**64 - 1) for position in (0, 1, 2**20)]
    seeds = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed, _ in pairs], device=place)
    positions = torch.tensor([position for _, position in pairs], dtype=torch.int32, device=place)
    out = torch.zeros(len(pairs), dtype=torch.float64, device=place)
    numbers_of[(len(pairs),)](seeds, positions, out)
    assert out.tolist() == [uniform(*pair) for pair in pairs]


FILTERS: dict[str, list[SampleSpec]] = {
    "none": [spec(), spec(0.01), spec(1e-30), spec(2.0, seed=0), spec(1.3, seed=3, position=2)],
    "top_k": [spec(top_k=k) for k in (1, 2, 40, 1002, 1003, 5000)],
    "top_p": [spec(top_p=p) for p in (0.9, 0.5, 0.05, 1e-9, 0.999999, 0.0)],
    "min_p": [spec(min_p=p) for p in (0.1, 1.0, 1e-6)],
    "all": [
        spec(0.8, top_k=50, top_p=0.9, min_p=0.02),
        spec(1.5, top_k=7, top_p=0.3),
        spec(2.0, top_k=900, top_p=0.99),
        spec(1.0, top_p=0.95, min_p=0.05),
        spec(0.0),
        spec(0.9),
    ],
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_and_draws_give_the_definitions_token(name: str, place: torch.device) -> None:
    check(FILTERS[name], logits_of(len(FILTERS[name]), 1003), place)


def test_ties_at_the_edge_of_a_filter_keep_the_lower_ids(place: torch.device) -> None:
    """As bfloat16 has them by the hundred: within a tile, across tiles and segments, and all over the row."""
    rounded = logits_of(1, 1003)[0].round()
    equal, few = torch.full((1003,), -1.5), torch.full((1003,), -INF)
    few[[3, 511, 512, 1002]] = 4.0
    rows = [
        (rounded, spec(top_k=5)),
        (rounded - 1e6, spec(top_k=300, seed=3)),
        (rounded, spec(top_p=0.7, top_k=600, seed=9)),
        (rounded * 60, spec(top_p=0.9)),  # all but the largest weigh nothing
        (equal, spec(top_k=1000)),
        (equal, spec(top_p=0.3)),
        (few, spec(top_k=6, top_p=0.5)),
        (few, spec(top_k=3, min_p=1.0)),
    ]
    check([one for _, one in rows], torch.stack([row_V for row_V, _ in rows]), place, tiling=HALVES)


def test_a_vocabulary_of_odd_size_in_many_segments(place: torch.device) -> None:
    specs = [spec(top_k=50, top_p=0.9), ruled(0.7, logit_bias=((32_000, 9.0),), repetition_penalty=1.2)]
    check(specs, logits_of(2, 32_001, dtype=torch.float16), place, tiling=Tiling(4, 4, 4096))


def test_rows_that_are_not_sound_are_flagged_and_their_neighbours_are_not_touched(place: torch.device) -> None:
    fields: dict[str, Any] = {"allowed_token_ids": (1, 2, 3), "presence_penalty": 1.0}
    specs = [spec(top_k=5), ruled(0.8, **fields), ruled(**fields), spec(), spec(top_p=0.5), ruled(0.8, **fields)]
    logits = logits_of(6, 300)
    logits[0, 299], logits[1, 5], logits[2, 2], logits[4] = NAN, INF, NAN, -INF
    step = check(specs, logits, place)
    assert step.flags_N.tolist() == [LOGITS_NOT_FINITE] * 3 + [0, LOGITS_NOT_FINITE, 0]


def test_more_rows_than_a_piece_holds_in_any_mixture(place: torch.device) -> None:
    kinds = [spec(), spec(0.0), ruled(1.0, bad_words=((4,),)), spec(top_k=3), ruled(frequency_penalty=1.0)]
    specs = [replace(kinds[row % 5], seed=row) for row in range(11)]
    step = check(specs, logits_of(11, 97), place, tiling=Tiling(rows=4, segments=2, tile=128))
    assert len(step.asking.where_A) == 9


RULES: dict[str, dict[str, Any]] = {
    "allowed": {"allowed_token_ids": (0, 3, 31, 32, 500, 1002, 1003, -1)},
    "bias": {"logit_bias": ((0, -100.0), (4, 2.5), (1002, 33.0), (1003, 99.0), (-2, 99.0))},
    "bias twice": {"logit_bias": ((4, 2.5), (4, 1.5))},
    "one bad word": {"bad_words": ((4,), (), (1003,), (-1,))},
    "min_tokens": {"min_tokens": 15, "stop_token_ids": (3, 900, 1003)},
    "min_tokens over": {"min_tokens": 14, "stop_token_ids": (3, 900)},
    "repetition": {"repetition_penalty": 1.3},
    "encouraged": {"repetition_penalty": 0.7, "frequency_penalty": -0.3, "presence_penalty": -1.0},
    "frequency": {"frequency_penalty": 0.4},
    "presence": {"presence_penalty": 1.1},
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_changes_logits_as_the_definition_does(name: str, place: torch.device) -> None:
    """To the last bit: a greedy row leaves the logits that it chose from."""
    logits = logits_of(2, 1003)
    one = ruled(**RULES[name])
    step = check([spec(), one], logits, place, tiling=HALVES)
    known = torch.tensor(history_of(20, 1003, 1))
    wanted = reference.apply_rules(logits[1], one, known if one.rules.needs_history else None)
    assert torch.equal(step.space.weights_AV[1, :1003].cpu(), wanted)


def all_rules(history: Sequence[int], vocab: int) -> dict[str, Any]:
    rng = random.Random(3)
    return {
        "allowed_token_ids": tuple(range(0, vocab, 2)),
        "logit_bias": tuple((token, rng.uniform(-5, 5)) for token in range(0, vocab, 7)),
        # More than one block of them; some the history completes, whole or in part, one is longer than it.
        "bad_words": (
            *((token,) for token in range(1, 300, 2)),
            *((history[-1], 4), (history[-2], history[-1], 8), (history[-1], history[-2], 10)),
            (5, *history[-25:], 12),
        ),
        "min_tokens": 1000,
        "stop_token_ids": (2, 6),
        "repetition_penalty": 1.7,
        "frequency_penalty": 0.25,
        "presence_penalty": 0.5,
    }


@pytest.mark.parametrize("length", [2, 20, 5000])
def test_all_rules_together_in_the_definitions_order(length: int, place: torch.device) -> None:
    """A history of more than one program, of which most tokens occur hundreds of times."""
    histories = [history_of(length, 97, row) for row in range(3)]
    logits = logits_of(3, 1003)
    specs = [
        ruled(t, position=length, filters={"top_p": p, "top_k": k}, **all_rules(history, 1003))
        for (t, p, k), history in zip([(0.0, 1.0, 0), (0.8, 1.0, 0), (1.1, 0.9, 60)], histories, strict=True)
    ]
    step = AskedStep(specs, histories, vocab=1003, device=place, tiling=WHOLE)
    tokens, flags = step.choose(cuda, logits.to(place))
    wanted = [definition(*row) for row in zip(logits, specs, histories, strict=True)]
    assert list(zip(tokens, flags, strict=True)) == wanted
    assert torch.equal(
        step.space.weights_AV[0, :1003].cpu(), reference.apply_rules(logits[0], specs[0], torch.tensor(histories[0]))
    )
    assert not step.space.counts_AV.any()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rules_that_leave_no_token_are_told_and_cost_no_other_row(temperature: float, place: torch.device) -> None:
    nothing: list[dict[str, Any]] = [
        {"allowed_token_ids": ()},
        {"allowed_token_ids": (400,)},
        {"allowed_token_ids": (7, 8), "bad_words": ((7,),), "min_tokens": 20, "stop_token_ids": (8,)},
    ]
    specs = [ruled(temperature, **rules) for rules in nothing] + [ruled(temperature, allowed_token_ids=(9,))]
    step = check(specs, logits_of(4, 300), place)
    assert step.flags_N.tolist() == [RULED_OUT] * 3 + [0]
    assert step.tokens_N.tolist() == [0, 0, 0, 9]


def test_a_token_that_was_never_sampled_counts_as_the_definition_counts_it(place: torch.device) -> None:
    """Its row is faulty, but no kernel may go astray."""
    one = ruled(position=9, repetition_penalty=2.0, bad_words=((3, 5),))
    history = [1, 2, 3, 4, 5, 6, 7, 8, -1]
    step = AskedStep([one], [history], vocab=97, device=place, tiling=WHOLE)
    logits = logits_of(1, 97)
    tokens, flags = step.choose(cuda, logits.to(place))
    assert [(tokens[0], flags[0])] == [definition(logits[0], one, history)]


def test_rules_without_room_on_the_device_go_by_the_definition(place: torch.device) -> None:
    """An absurd number of bad words costs time, and no token."""
    one = ruled(bad_words=tuple((token,) for token in range(5, 1000)) * 10)
    specs = [spec(top_k=4), one, ruled(bad_words=((5,),))]
    step = check(specs, logits_of(3, 1003), place)
    assert [asking.is_told for asking in step.asking.rows] == [True, False, True]


ids = st.integers(0, 100)
small = st.integers(0, 8)  # these fill the histories
ANY_RULES = st.builds(
    LogitRules,
    num_prompt=st.integers(1, 12),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.6]),
    presence_penalty=st.sampled_from([0.0, 0.9, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.35, -0.2]),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=4).map(lambda d: tuple(sorted(d.items()))),
    bad_words=st.lists(st.lists(small, min_size=1, max_size=3).map(tuple), max_size=8).map(tuple),
    allowed_token_ids=st.none() | st.none() | st.lists(ids, max_size=30, unique=True).map(lambda i: tuple(sorted(i))),
    min_tokens=st.integers(0, 20),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
)
ANY_SPEC = st.builds(
    SampleSpec,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    top_k=st.sampled_from([0, 3, 40]),
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(12, 40),
    min_p=st.sampled_from([0.0, 0.0, 0.2]),
    rules=st.none() | ANY_RULES,
)


def any_specs(examples: int) -> Callable[[Any], Any]:
    """Runs a test over this many lists of specs."""
    how = settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda test: how(
        given(specs=st.lists(ANY_SPEC, min_size=1, max_size=3), seed=st.integers(0, 50), rounded=st.booleans())(test)
    )


@any_specs(6)
def test_any_specs_and_rules_give_the_definitions_tokens(
    place: torch.device, specs: list[SampleSpec], seed: int, rounded: bool
) -> None:
    logits = logits_of(len(specs), 97, seed)
    check(specs, logits.round() if rounded else logits, place, tiling=Tiling(4, 2, 128), seed=seed)


@pytest.mark.slow
@any_specs(30)
def test_many_specs_and_rules_in_many_segments_give_the_definitions_tokens(
    place: torch.device, specs: list[SampleSpec], seed: int, rounded: bool
) -> None:
    logits = logits_of(len(specs), 97, seed)
    check(specs, logits.round() if rounded else logits, place, tiling=Tiling(4, 4, 16), seed=seed)


def test_the_definition_here_is_the_reference_but_for_the_rounding_of_exp() -> None:
    """Which decides nothing unless a number lies within 1e-7 of a token's edge."""
    specs, histories = mixed_specs(64, 1003)
    for seed in range(4):
        logits = logits_of(64, 1003, seed, torch.float32 if seed % 2 else torch.bfloat16)
        known = {row: torch.tensor(history) for row, history in enumerate(histories) if specs[row].rules is not None}
        wanted = reference.sample(logits, specs, known, {})
        mine = [definition(*row)[0] for row in zip(logits, specs, histories, strict=True)]
        assert mine == wanted.tokens_N.tolist()


def test_what_does_not_fit_together_is_refused(place: torch.device) -> None:
    step = AskedStep([spec(), spec(0.0)], [[1] * 20] * 2, vocab=97, device=place, tiling=WHOLE)
    logits = torch.zeros(2, 97, device=place)
    tokens, flags, asking = step.tokens_N, step.flags_N, step.asking
    with pytest.raises(ValueError, match="at most 2 rows"):
        launch.choose_largest(torch.zeros(3, 97, device=place), step.space, tokens, flags)
    with pytest.raises(ValueError, match=r"flags of torch\.int64"):
        launch.choose_largest(logits, step.space, tokens, tokens)
    few = replace(asking, where_A=asking.where_A[:0])
    wide = torch.zeros(2, 101, device=place)
    with pytest.raises(ValueError, match="rows of the wire for 1"):
        launch.choose_as_asked(logits, few, step.state, step.space, tokens, flags)
    with pytest.raises(ValueError, match="space for 100"):
        launch.choose_as_asked(wide, asking, step.state, step.space, tokens, flags)


def mixed_specs(rows: int, vocab: int) -> tuple[list[SampleSpec], list[list[int]]]:
    """Every kind, each in turn, with other seeds and positions."""
    rng = random.Random(rows)
    specs, histories = [], []
    for row in range(rows):
        position = rng.randint(PROMPT, 700)
        history = history_of(position, vocab, row)
        kinds = [
            spec(0.0),
            spec(1.0),
            spec(0.7, top_k=rng.choice([1, 20, 500])),
            spec(1.0, top_p=rng.choice([0.1, 0.9, 0.95])),
            spec(1.3, top_p=0.9, top_k=50, min_p=0.01),
            ruled(0.0, **all_rules(history, vocab)),
            ruled(0.9, filters={"top_p": 0.8}, **all_rules(history, vocab)),
            ruled(1.0, repetition_penalty=1.1, presence_penalty=0.2),
        ]
        specs.append(replace(kinds[row % len(kinds)], seed=rng.randrange(2**64), position=position))
        histories.append(history)
    return specs, histories


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [128_256, 151_936])
def test_a_card_chooses_what_the_definition_chooses(vocab: int, dtype: torch.dtype, place: torch.device) -> None:
    """The reference itself, of torch's own exp; a row may differ where its number lies at a token's edge. And again,
    in another order, without one look at the device.
    """
    specs, histories = mixed_specs(96, vocab)
    logits = logits_of(96, vocab, dtype=dtype)
    step = AskedStep(specs, histories, vocab=vocab, device=place)
    on_card = logits.to(place)
    tokens, flags = step.choose(cuda, on_card)
    looking = [row for row, one in enumerate(specs) if one.rules is not None and one.rules.needs_history]
    wanted = reference.sample(logits, specs, {row: torch.tensor(histories[row]) for row in looking}, {})
    assert flags == [0] * 96
    differing = [row for row in range(96) if tokens[row] != int(wanted.tokens_N[row])]
    print(f"{len(differing)} of 96 rows at an edge")
    for row in differing:
        assert tokens[row] == definition(logits[row], specs[row], histories[row])[0]
    assert len(differing) <= 1
    # Rules that find no room on the device make the host ask it: of the large ones there are as many as fit.
    order = [row for row in reversed(range(96)) if row % 8 not in (5, 6) or row < 24]
    again = AskedStep([specs[row] for row in order], [histories[row] for row in order], vocab=vocab, device=place)
    turned = on_card[torch.tensor(order, device=place)]
    torch.cuda.synchronize()
    with nothing_waits():
        cuda.choose_largest(turned, again.space, again.tokens_N, again.flags_N)
        cuda.choose_as_asked(turned, again.asking, again.state, again.space, again.tokens_N, again.flags_N)
    assert again.tokens_N.tolist() == [tokens[row] for row in order]


@pytest.mark.gpu
def test_the_largest_logit_of_many_rows_in_a_graph(place: torch.device) -> None:
    """bfloat16 ties by the hundred; replayed, as steps are."""
    logits = torch.randn(512, 128_256, device=place).bfloat16()
    space = SampleSpace(max_rows=512, vocab=128_256, device=place)
    tokens_N = torch.zeros(512, dtype=torch.int64, device=place)
    flags_N = torch.zeros(512, dtype=torch.int32, device=place)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        cuda.choose_largest(logits, space, tokens_N, flags_N)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            cuda.choose_largest(logits, space, tokens_N, flags_N)
        for _ in range(3):
            tokens_N.fill_(-1)
            graph.replay()
        stream.synchronize()
    best_N1 = logits.max(dim=1, keepdim=True).values
    assert tokens_N.tolist() == (logits == best_N1).cpu().numpy().argmax(axis=1).tolist()  # the first of equals
    assert not flags_N.any()
