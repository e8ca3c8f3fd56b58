"""Sampling: the random numbers, the filters, and that nothing but (logits, spec) decides a row's token."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.kernels.ops.sampling import cpu, launch, reference
from diptych.kernels.ops.sampling.philox import philox4x32, uniform
from diptych.protos.step import SampleSpec

BOTH = pytest.mark.parametrize("module", [reference, cpu], ids=["reference", "cpu"])


def spec(
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    *,
    seed: int = 7,
    position: int = 3,
    min_p: float = 0.0,
) -> SampleSpec:
    return SampleSpec(temperature, top_p, top_k, seed, position, min_p)


def choose(module: ModuleType, logits: Tensor, specs: list[SampleSpec]) -> list[int]:
    chosen = module.sample(logits, specs, {}, {})
    assert chosen.sound_N.all()
    tokens: list[int] = chosen.tokens_N.tolist()
    return tokens


def logits_of(rows: int, vocab: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the vectors published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == words


def test_uniform_numbers_are_in_range_spread_and_differ_by_seed_and_position() -> None:
    numbers = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 2000
    assert all(150 < count < 250 for count in Counter(int(number * 10) for number in numbers).values())
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)
    assert uniform(1, 2**32) != uniform(1, 0)


@BOTH
def test_greedy_takes_the_lowest_of_equal_maxima(module: ModuleType) -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0], [9.0, 0.0, 9.0, 9.0]])
    for dtype in (torch.float32, torch.bfloat16):
        assert choose(module, logits.to(dtype), [spec(0.0), spec(0.0)]) == [1, 0]


@BOTH
def test_a_row_gets_its_token_whatever_else_is_in_the_batch(module: ModuleType) -> None:
    logits = logits_of(6, 300)
    specs = [
        spec(0.0),
        spec(0.7),
        spec(1.3, top_p=0.8),
        spec(1.0, top_k=5),
        spec(2.0, 0.9, 40, min_p=0.1),
        spec(1.0, seed=9),
    ]
    together = choose(module, logits, specs)
    assert [choose(module, logits[i : i + 1], [specs[i]])[0] for i in range(6)] == together
    backwards = choose(module, logits.flip(0), specs[::-1])
    assert backwards[::-1] == together


@BOTH
def test_position_and_seed_decide_and_nothing_else(module: ModuleType) -> None:
    logits = logits_of(1, 1000, scale=0.5)
    tokens = [choose(module, logits, [spec(position=position)])[0] for position in range(30)]
    assert tokens == [choose(module, logits, [spec(position=position)])[0] for position in range(30)]
    assert len(set(tokens)) > 20
    assert tokens != [choose(module, logits, [spec(seed=8, position=position)])[0] for position in range(30)]


@BOTH
def test_switched_off_filters_change_nothing(module: ModuleType) -> None:
    """top_k of the whole vocabulary and more, and top_p of 1, leave the plain distribution, to the last bit."""
    logits = logits_of(1, 200)
    for position in range(100):
        plain = choose(module, logits, [spec(position=position)])
        for off in (spec(top_k=200, position=position), spec(top_k=5000, position=position), spec(min_p=1e-300)):
            assert plain == choose(module, logits, [replace(off, position=position)])


@BOTH
def test_top_k_of_one_is_greedy_and_a_tiny_top_p_too(module: ModuleType) -> None:
    logits = logits_of(1, 500)
    best = int(logits.argmax())
    for position in range(20):
        assert choose(module, logits, [spec(3.0, top_k=1, position=position)])[0] == best
        assert choose(module, logits, [spec(1.0, top_p=1e-9, position=position)])[0] == best
        assert choose(module, logits, [spec(1e-30, position=position)])[0] == best


@BOTH
def test_only_kept_tokens_appear_and_all_of_them(module: ModuleType) -> None:
    logits = torch.tensor([[0.5, 0.1, 0.2, 0.15, 0.05]]).log()
    for given_spec, kept in (
        ({"top_k": 3}, {0, 2, 3}),
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 0.84}, {0, 2, 3}),
        ({"top_p": 0.5 - 1e-6}, {0}),
        # of the three largest (0.85 in all) the prefix that holds 0.75 * 0.85
        ({"top_k": 3, "top_p": 0.75}, {0, 2}),
        ({"min_p": 0.29}, {0, 2, 3}),
        ({"min_p": 0.31}, {0, 2}),
        ({"min_p": 1.0}, {0}),
        ({"min_p": 0.05, "top_k": 2}, {0, 2}),
    ):
        seen = {choose(module, logits, [spec(position=p, **given_spec)])[0] for p in range(300)}
        assert seen == kept, given_spec


@BOTH
def test_equal_weights_at_the_edge_keep_the_lower_ids(module: ModuleType) -> None:
    logits = torch.zeros(1, 10)
    assert {choose(module, logits, [spec(top_k=4, position=p)])[0] for p in range(200)} == {0, 1, 2, 3}
    assert {choose(module, logits, [spec(top_p=0.35, position=p)])[0] for p in range(200)} == {0, 1, 2, 3}


@BOTH
def test_frequencies_follow_the_distribution(module: ModuleType) -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    draws = 4000
    counts = Counter(
        choose(module, probabilities.log().expand(draws, 4), [spec(seed=seed, position=1) for seed in range(draws)])
    )
    chi_square = sum((counts[i] - draws * float(p)) ** 2 / (draws * float(p)) for i, p in enumerate(probabilities))
    assert chi_square < 16.3  # 0.1 % for three degrees of freedom; the draws are fixed


@BOTH
def test_minus_infinity_is_never_chosen(module: ModuleType) -> None:
    logits = torch.full((1, 50), float("-inf"))
    logits[0, [3, 49]] = 0.0
    for given_spec in (spec(), spec(top_p=0.99), spec(top_k=10), spec(0.0)):
        for position in range(40):
            row = SampleSpec(given_spec.temperature, given_spec.top_p, given_spec.top_k, 1, position)
            assert choose(module, logits, [row])[0] in (3, 49)


@BOTH
def test_min_p_is_relative_to_the_heaviest_after_temperature(module: ModuleType) -> None:
    """At temperature 2 probabilities of 0.5 and 0.02 stand as 1 to 0.2."""
    logits = torch.tensor([[0.02, 0.5, 0.48]]).log()
    for min_p, kept in ((0.19, {0, 1, 2}), (0.21, {1, 2})):
        assert {choose(module, logits, [spec(2.0, min_p=min_p, position=p)])[0] for p in range(300)} == kept


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_finite_numbers_gets_no_token_and_the_others_theirs(
    module: ModuleType, value: float, temperature: float
) -> None:
    logits = logits_of(5, 700)
    specs = [spec(temperature, position=p) for p in range(5)]
    expected = choose(module, logits, specs)
    broken = logits.clone()
    broken[1] = value
    broken[3, 699] = float("nan")
    chosen = module.sample(broken, specs, {}, {})
    assert chosen.sound_N.tolist() == [True, False, True, False, True]
    assert chosen.tokens_N.tolist() == [expected[0], 0, expected[2], 0, expected[4]]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.999, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 2, 50, 700, 5000]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    rounded=st.booleans(),
)
def test_cpu_equals_the_reference(
    seed: int, position: int, temperature: float, top_p: float, top_k: int, min_p: float, rounded: bool
) -> None:
    """Rounded logits have equal ones, as in bfloat16."""
    logits = logits_of(2, 3000, seed=seed % 1000, scale=1.0)
    if rounded:
        logits = (logits * 2).round() / 2
    specs = [spec(temperature, top_p, top_k, seed=seed, position=position, min_p=min_p), spec(1.0, 0.9)]
    assert choose(cpu, logits, specs) == choose(reference, logits, specs)


@pytest.mark.parametrize("scale", [0.0, 0.01, 3.0, 12.0])
def test_top_p_near_its_ends_and_on_an_edge_equals_the_reference(scale: float) -> None:
    """A flat row, where the mass of a prefix is top_p itself; and so peaked a row that one token is all of it."""
    logits = logits_of(1, 1000, scale=scale)
    for top_p in (1 - 1e-15, 1 - 1e-9, 0.999999, 0.5, 0.3, 0.1, 1e-300):
        specs = [spec(1.0, top_p, seed=seed) for seed in range(8)]
        rows = logits.expand(8, -1)
        assert choose(cpu, rows, specs) == choose(reference, rows, specs)
        one, two = (
            cpu._kept_ids(torch.exp(logits[0] - logits[0].max()).numpy(), specs[0]),
            reference.kept_tokens(torch.exp(logits[0] - logits[0].max()).double(), specs[0]).nonzero()[:, 0],
        )
        assert one.tolist() == two.tolist()


def test_specs_and_rows_must_match() -> None:
    with pytest.raises(ValueError, match=r"\(2, 5\) for 1 specs"):
        launch.sample(torch.zeros(2, 5), [spec()])
