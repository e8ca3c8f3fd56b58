"""Masks of guides in choosing tokens: the CPU's way against the definition, and the kernels against both.

Guards a mask read for the wrong row, token or word, one that outlives its step, and rules that forget the mask below
them. The kernels run under the interpreter, or on a card.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.kernels.device.masks import MaskBuffers, accept
from diptych.kernels.device.step import LOGITS_NOT_FINITE, RULED_OUT
from diptych.kernels.device.wire import Sampling
from diptych.kernels.ops.sampling import by_spec, cpu, cuda, launch, reference
from diptych.kernels.ops.sampling.space import Tiling
from diptych.kernels.ops.sampling.testing import AskedStep
from diptych.protos.constraint import mask_words
from diptych.protos.step import LogitRules, SampleSpec
from diptych.protos.testing import FakeGuide

NAN, INF = float("nan"), float("inf")
LENGTH = 20  # of every history
PROMPT = 6


def logits_of(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def mask_of(ids: Collection[int], vocab: int) -> Tensor:
    """Bits behind the vocabulary are set: nobody may look at them."""
    bits = bytearray(4 * mask_words(vocab))
    for token in (*ids, *range(vocab, 32 * mask_words(vocab))):
        bits[token // 8] |= 1 << token % 8
    return torch.frombuffer(bits, dtype=torch.int32).clone()


def allows(ids: Collection[int]) -> FakeGuide:
    return FakeGuide(LENGTH, lambda known: (ids, ()))


def spec(temperature: float = 0.0, ids: Collection[int] | None = None, **fields: Any) -> SampleSpec:
    fields = {"top_p": 1.0, "top_k": 0, "seed": 2**63 + 5, "position": LENGTH} | fields
    return SampleSpec(temperature, guide=None if ids is None else allows(ids), **fields)


def with_rules(one: SampleSpec, **rules: Any) -> SampleSpec:
    return replace(one, rules=LogitRules(num_prompt=PROMPT, **rules))


def history_of(row: int, vocab: int) -> list[int]:
    rng = random.Random(row)
    return [rng.randrange(vocab) if rng.random() < 0.5 else rng.randrange(9) for _ in range(LENGTH)]


def host_masks(specs: Sequence[SampleSpec], vocab: int) -> dict[int, Tensor]:
    found = {}
    for row, one in enumerate(specs):
        if one.guide is not None:
            mask = bytearray(4 * mask_words(vocab))
            one.guide.fill(one.position, memoryview(mask))
            found[row] = torch.frombuffer(mask, dtype=torch.int32).clone()
    return found


def histories_of(specs: Sequence[SampleSpec], vocab: int) -> dict[int, Tensor]:
    looking = (row for row, one in enumerate(specs) if one.rules is not None and one.rules.needs_history)
    return {row: torch.tensor(history_of(row, vocab)) for row in looking}


MODULES = pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])


@MODULES
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 1003])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_of_one_token_gives_it_whatever_its_logit(module: ModuleType, vocab: int, temperature: float) -> None:
    for token in {0, vocab // 2, vocab - 1}:
        logits = logits_of(1, vocab)
        logits[0, token] = -50.0
        chosen = module.sample(logits, [spec(temperature)], {}, {0: mask_of([token], vocab)})
        assert (chosen.tokens_N.tolist(), chosen.sound_N.tolist()) == ([token], [True])


@MODULES
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_mask_of_nothing_rules_its_row_out_and_no_other(module: ModuleType, temperature: float) -> None:
    specs = [spec(temperature)] * 3
    logits = logits_of(3, 97)
    chosen = module.sample(logits, specs, {}, {1: mask_of([], 97)})
    plain = module.sample(logits, specs, {}, {})
    assert chosen.sound_N.tolist() == [True, False, True]
    assert chosen.ruled_out_N.tolist() == [False, True, False]
    assert chosen.tokens_N.tolist() == [int(plain.tokens_N[0]), 0, int(plain.tokens_N[2])]


@MODULES
def test_numbers_that_a_mask_hides_are_found(module: ModuleType) -> None:
    logits = logits_of(2, 97)
    logits[0, 50] = NAN
    logits[1, 7] = -INF
    chosen = module.sample(logits, [spec()] * 2, {}, {0: mask_of([7], 97), 1: mask_of([7], 97)})
    assert chosen.sound_N.tolist() == [False, False]
    assert chosen.ruled_out_N.tolist() == [False, True], "the first row's numbers are to blame, not its mask"


@MODULES
def test_rules_come_on_top_of_the_mask(module: ModuleType) -> None:
    logits = torch.zeros(4, 97)
    logits[:, 40] = 9.0
    logits[:, 41] = 8.0
    specs = [
        with_rules(spec(), bad_words=((40,),)),
        with_rules(spec(), logit_bias=((3, 100.0), (5, 20.0))),
        with_rules(spec(), allowed_token_ids=(5, 6)),
        with_rules(spec(), allowed_token_ids=(50, 51)),
    ]
    mask = mask_of([5, 40, 41], 97)
    chosen = module.sample(logits, specs, {}, dict.fromkeys(range(4), mask))
    assert chosen.tokens_N.tolist() == [41, 5, 5, 0]
    assert chosen.ruled_out_N.tolist() == [False, False, False, True]


def test_logits_and_masks_stay_as_they_were() -> None:
    logits, mask = logits_of(2, 97), mask_of(range(0, 97, 3), 97)
    before = logits.clone(), mask.clone()
    for module in (reference, cpu):
        module.sample(logits, [spec(1.0), spec()], {}, {0: mask, 1: mask})
        assert torch.equal(logits, before[0])
        assert torch.equal(mask, before[1])


def test_masks_that_do_not_fit_are_refused() -> None:
    logits = logits_of(2, 97)
    for mask in (torch.zeros(3, dtype=torch.int32), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 4).int()):
        with pytest.raises(ValueError, match="row 1 has a mask of"):
            launch.sample(logits, [spec()] * 2, {}, {1: mask})
    fits = launch.sample(logits, [spec()] * 2, {}, {1: mask_of([96], 97)})
    assert int(fits.tokens_N[1]) == 96


ids = st.integers(0, 96)
RULES = st.builds(
    LogitRules,
    num_prompt=st.just(PROMPT),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    logit_bias=st.dictionaries(ids, st.floats(-50, 50, width=32), max_size=3).map(lambda d: tuple(sorted(d.items()))),
    bad_words=st.lists(st.lists(ids, min_size=1, max_size=2).map(tuple), max_size=5).map(tuple),
    allowed_token_ids=st.none() | st.none() | st.lists(ids, max_size=60, unique=True).map(lambda i: tuple(sorted(i))),
    min_tokens=st.integers(0, 20),
    stop_token_ids=st.lists(ids, max_size=3).map(tuple),
)


@st.composite
def guided_specs(draw: st.DrawFn) -> SampleSpec:
    allowed = draw(st.none() | st.lists(ids, max_size=3) | st.just(range(0, 97, 2)) | st.just(range(97)))
    return SampleSpec(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.4])),
        top_p=draw(st.sampled_from([1.0, 0.9, 0.3])),
        top_k=draw(st.sampled_from([0, 3, 40])),
        seed=draw(st.integers(0, 2**64 - 1)),
        position=LENGTH,
        min_p=draw(st.sampled_from([0.0, 0.0, 0.2])),
        rules=draw(st.none() | RULES),
        guide=None if allowed is None else allows(allowed),
    )


def any_step(examples: int) -> Callable[[Any], Any]:
    how = settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    return lambda test: how(
        given(specs=st.lists(guided_specs(), min_size=1, max_size=4), seed=st.integers(0, 50))(test)
    )


@any_step(150)
def test_cpu_equals_the_reference_under_any_masks(specs: list[SampleSpec], seed: int) -> None:
    logits, masks, known = logits_of(len(specs), 97, seed), host_masks(specs, 97), histories_of(specs, 97)
    wanted = reference.sample(logits, specs, known, masks)
    got = cpu.sample(logits, specs, known, masks)
    for row, one in enumerate(specs):
        args = logits[row], one, known.get(row), masks.get(row)
        assert torch.equal(cpu.apply_rules(*args), reference.apply_rules(*args))
    assert got.sound_N.tolist() == wanted.sound_N.tolist()
    assert got.ruled_out_N.tolist() == wanted.ruled_out_N.tolist()
    assert got.tokens_N.tolist() == wanted.tokens_N.tolist()
    for row, one in enumerate(specs):
        if one.guide is not None and got.sound_N[row]:
            one.guide.accept(LENGTH, int(got.tokens_N[row]))  # asserts that it is allowed


def choose(
    how: object, specs: Sequence[SampleSpec], logits: Tensor, place: torch.device, tiling: Tiling
) -> tuple[list[tuple[int, int]], AskedStep]:
    vocab = logits.shape[1]
    histories = [history_of(row, vocab) for row in range(len(specs))]
    step = AskedStep(specs, histories, vocab=vocab, device=place, tiling=tiling)
    given_NV = logits.to(place)
    tokens, flags = step.choose(how, given_NV)
    assert torch.equal(given_NV.cpu().nan_to_num(), logits.nan_to_num())
    return list(zip(tokens, flags, strict=True)), step


def wanted_of(specs: Sequence[SampleSpec], logits: Tensor) -> list[tuple[int, int]]:
    vocab = logits.shape[1]
    chosen = reference.sample(logits, specs, histories_of(specs, vocab), host_masks(specs, vocab))
    columns = zip(chosen.tokens_N.tolist(), chosen.sound_N.tolist(), chosen.ruled_out_N.tolist(), strict=True)
    return [(token, 0 if sound else RULED_OUT if ruled else LOGITS_NOT_FINITE) for token, sound, ruled in columns]


def mixed(rows: int, vocab: int, seed: int = 0) -> list[SampleSpec]:
    """Every kind with and without a mask, in an order of its own."""
    rng = random.Random(seed)
    some = sorted(rng.sample(range(vocab), min(vocab, 40)))
    kinds = [
        spec(),
        spec(ids=[rng.randrange(vocab)]),
        spec(1.0),
        spec(1.0, ids=some),
        spec(0.8, ids=some, top_k=5, top_p=0.9, min_p=0.05),
        with_rules(spec(ids=some), bad_words=((some[0],), (some[-1],)), frequency_penalty=0.5),
        with_rules(spec(0.9, ids=some, top_p=0.8), repetition_penalty=1.3, allowed_token_ids=tuple(some[::2])),
        spec(ids=[]),
        with_rules(spec(), bad_words=((3,),)),
        with_rules(spec(0.7, ids=some[:3]), bad_words=tuple((token,) for token in some[:3])),
        spec(1.2, ids=range(vocab)),
        spec(ids=some, logprobs=1),
    ]
    made = [replace(kinds[row % len(kinds)], seed=rng.randrange(2**64)) for row in range(rows)]
    rng.shuffle(made)
    return made


TILINGS = [Tiling(rows=64, segments=2, tile=1024), Tiling(rows=4, segments=2, tile=128), Tiling(4, 4, 64)]


@pytest.mark.parametrize("how", [by_spec, cuda], ids=["by_spec", "kernels"])
@pytest.mark.parametrize("tiling", TILINGS, ids=["whole", "pieces", "segments"])
def test_a_step_of_all_kinds_with_more_rows_than_a_piece(how: ModuleType, tiling: Tiling, place: torch.device) -> None:
    for vocab in (97, 128, 229):
        specs, logits = mixed(13, vocab, vocab), logits_of(13, vocab, vocab)
        got, step = choose(how, specs, logits, place, tiling)
        assert got == wanted_of(specs, logits)
        guided = [number for number in step.asking.masked_A.tolist() if number >= 0]
        assert guided == list(range(sum(one.guide is not None for one in specs)))


@pytest.mark.parametrize("how", [by_spec, cuda], ids=["by_spec", "kernels"])
def test_a_vocabulary_with_a_rest_in_its_last_word_and_tile(how: ModuleType, place: torch.device) -> None:
    specs = [spec(ids=[token]) for token in (0, 31, 32, 1000, 1002)] + [spec(1.0, ids=[1001, 1002])]
    logits = logits_of(6, 1003)
    got, _ = choose(how, specs, logits, place, Tiling(64, 2, 512))
    assert got == wanted_of(specs, logits)
    assert [token for token, _ in got[:5]] == [0, 31, 32, 1000, 1002]


def test_rows_that_are_not_sound_are_flagged_under_a_mask_too(place: torch.device) -> None:
    specs = [spec(ids=[5, 6]), spec(1.0, ids=[5, 6]), spec(ids=[5]), spec(0.5, ids=[])]
    logits = logits_of(4, 97)
    logits[0, 90], logits[1, 5] = NAN, INF
    got, _ = choose(cuda, specs, logits, place, Tiling(64, 2, 1024))
    assert got == wanted_of(specs, logits)
    assert [flag for _, flag in got] == [LOGITS_NOT_FINITE, LOGITS_NOT_FINITE, 0, RULED_OUT]


def test_a_mask_under_rules_without_room_on_the_device(place: torch.device) -> None:
    """They go by the definition, and the masks of the rows around them stay theirs."""
    huge = tuple((token,) for token in range(5, 1000)) * 10
    specs = [
        spec(ids=[7]),
        with_rules(spec(ids=[2, 8, 9]), bad_words=huge),
        with_rules(spec(ids=[4, 600]), bad_words=((4,),)),
    ]
    logits = logits_of(3, 1003)
    got, step = choose(cuda, specs, logits, place, Tiling(64, 2, 512))
    assert [one.is_told for one in step.asking.rows] == [True, False, True]
    assert got == [(7, 0), (2, 0), (600, 0)]


@any_step(8)
def test_kernels_choose_what_the_reference_chooses_under_any_masks(
    place: torch.device, specs: list[SampleSpec], seed: int
) -> None:
    logits = logits_of(len(specs), 97, seed)
    got, _ = choose(cuda, specs, logits, place, Tiling(rows=2, segments=2, tile=128))
    assert got == wanted_of(specs, logits)


def test_what_does_not_fit_together_is_refused(place: torch.device) -> None:
    specs = [spec(ids=[1]), spec(1.0), spec(ids=[2])]
    step = AskedStep(specs, [[1] * LENGTH] * 3, vocab=97, device=place, tiling=Tiling(64, 2, 1024))
    logits, asking = torch.zeros(3, 97, device=place), step.asking
    masks = asking.masks_MW
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"masked_A": asking.masked_A[:-1]}, "numbers of masks"),
        ({"masked_A": asking.masked_A.long()}, "numbers of masks"),
        ({"masks_MW": masks[:1]}, r"masks \(1, 4\)"),
        ({"masks_MW": masks[:, :3].contiguous()}, r"masks \(2, 3\)"),
        ({"masks_MW": torch.zeros(2, 8, dtype=torch.int32, device=place)[:, ::2]}, "contiguous"),
        ({"masks_MW": masks.long()}, r"masks of torch\.int64"),
    ]
    for fields, message in wrong:
        with pytest.raises(ValueError, match=message):
            launch.choose_as_asked(
                logits, replace(asking, **fields), step.state, step.space, step.tokens_N, step.flags_N
            )


def test_room_for_masks_is_made_once_and_each_step_has_its_own() -> None:
    rows = [Sampling(at, at, at, at, spec(ids=[at])) for at in range(3)]
    room = MaskBuffers(turns=2, max_rows=4, vocab=97, device=torch.device("cpu"))
    assert room.put(0, []).shape == (1, 4)
    first = room.put(0, rows)
    assert [mask.tolist() for mask in first] == [[1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    second = room.put(1, rows[2:])
    assert second.tolist() == [[4, 0, 0, 0]]
    assert second.data_ptr() == first.data_ptr()


def test_guides_are_told_of_tokens_and_not_of_rows_without() -> None:
    guides = [FakeGuide(2, lambda known: ({5}, (6, 7))) for _ in range(3)]
    told = accept([(4, guides[0], 2, 5), (1, guides[1], 2, None), (2, guides[2], 2, 5)])
    assert told == {4: (6, 7), 2: (6, 7)}
    assert [guide.known for guide in guides] == [[5, 6, 7], [], [5, 6, 7]]
