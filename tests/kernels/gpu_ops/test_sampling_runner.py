"""A device's steps whose rows draw, have rules and tell logprobs: launched without a look at the device, and with the
tokens of the definition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from diptych.kernels.device.runner import DeviceRunner
from diptych.kernels.device.testing import GREEDY, VOCAB, Request, Storm, SumDecoder, make_runner, nothing_waits
from diptych.kernels.device.wire import Layout, Wire
from diptych.kernels.ops import table
from diptych.protos.errors import EngineFault
from diptych.protos.step import LogitRules, SampleSpec, StepPlan, StepRow

CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
READS = ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it, and the ops of choosing are a card's from then on, interpreted."""
    if not INTERPRETED:
        pytest.skip("kernels that are compiled take no tensors of a CPU")

    def use() -> None:
        for op in ("sampling", "logprobs", "step_inputs"):
            monkeypatch.setitem(table.IMPLEMENTATIONS["cpu"], op, "cuda")
        table.implementation.cache_clear()

    yield use
    monkeypatch.undo()
    table.implementation.cache_clear()


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch, found: list[str]) -> Iterator[None]:
    """Names of the methods by which somebody takes a tensor's numbers. On a card each of them would wait."""
    with monkeypatch.context() as patched:
        for name in READS:
            original = getattr(torch.Tensor, name)

            def read(self: torch.Tensor, *args: Any, _original: Any = original, _name: str = name) -> Any:
                found.append(_name)
                return _original(self, *args)

            patched.setattr(torch.Tensor, name, read)
        yield


def specs_of(length: int) -> list[SampleSpec]:
    """Of requests whose prompt has `length` tokens."""
    rules = LogitRules(
        num_prompt=length,
        repetition_penalty=1.5,
        frequency_penalty=0.3,
        presence_penalty=0.1,
        logit_bias=((5, 0.7), (96, -3.0)),
        bad_words=((7,), (3, 9)),
        allowed_token_ids=(*range(0, VOCAB, 2), 11, 13),
        min_tokens=2,
        stop_token_ids=(4,),
    )
    return [
        SampleSpec(1.3, 1.0, 0, 2**63 + 11, 0),
        replace(GREEDY, logprobs=3, rules=rules),
        SampleSpec(0.9, 0.8, 20, 5, 0, min_p=0.01, logprobs=0, rules=LogitRules(num_prompt=length, bad_words=((8,),))),
        GREEDY,
    ]


def run_storm(
    runner: DeviceRunner, requests: int, new: int, launch: Callable[[StepPlan], None] | None = None
) -> list[Request]:
    """Requests of all kinds, steps launched ahead; in the order in which they came."""
    storm = Storm(3, depth=2)
    for number in range(requests):
        length = storm.rng.randint(1, 40)
        spec = specs_of(length)[number % 4]
        storm.add(length, new, spec, storm.rng.choice([None, 2]))
    while storm.turn(launch or runner.launch, runner.collect):
        pass
    return sorted(storm.finished, key=lambda request: request.prompt)


def test_launches_read_nothing_and_choose_what_the_definition_chooses(
    kernels: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def run(runner: DeviceRunner) -> list[tuple[Any, ...]]:
        def launch(plan: StepPlan) -> None:
            with counted_reads(monkeypatch, reads):
                runner.launch(plan)

        return [(one.prompt, one.tokens) for one in run_storm(runner, 4, 2, launch)]

    wanted = run(make_runner(CPU)[0])
    assert reads, "the definition reads, and is seen to"
    reads.clear()
    kernels()
    runner, _ = make_runner(CPU)
    runner.rehearse()
    runner.capture()
    while runner.idle():  # steps are padded then, also between rows of one token and prompts
        pass
    gaps: list[int] = []
    fill = Wire.fill

    def seen(wire: Wire, layout: Layout) -> Any:
        gaps.append(layout.gap)
        return fill(wire, layout)

    monkeypatch.setattr(Wire, "fill", seen)
    assert run(runner) == wanted
    assert not reads
    assert any(gaps)


def test_a_step_that_fails_leaves_zeros_for_the_next_ones_counts() -> None:
    decoder = SumDecoder()
    runner, _ = make_runner(CPU, decoder)
    runner._space.counts_AV.fill_(3)
    runner._space.tickets_N.fill_(1)
    decoder.fail = True
    row = StepRow(slot=0, num_tokens=1, tokens=(1,), start=0, blocks=[0], sample=GREEDY)
    with pytest.raises(EngineFault):
        runner.launch(StepPlan(0, (row,)))
    assert not runner._space.counts_AV.any()
    assert not runner._space.tickets_N.any()


def test_a_slots_next_request_has_rules_of_its_own() -> None:
    """And one without rules has none, whatever the slot's record says."""
    runner, _ = make_runner(CPU)

    def sample(slot: int, rules: LogitRules | None) -> int | None:
        spec = replace(GREEDY, position=1, rules=rules)
        row = StepRow(slot=slot, num_tokens=1, tokens=(7,), start=0, blocks=[slot], sample=spec)
        runner.launch(StepPlan(0, (row,)))
        return runner.collect().tokens[0]

    plain = sample(0, None)
    assert plain is not None
    only = LogitRules(num_prompt=1, allowed_token_ids=(50,))
    other = LogitRules(num_prompt=1, allowed_token_ids=(60,))
    assert [sample(0, only), sample(1, other), sample(0, other), sample(1, None), sample(1, only)] == [
        50,
        60,
        60,
        plain,
        50,
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_no_launch_of_any_kind_of_row_waits_for_the_card(graphs: bool) -> None:
    """Draws, filters, rules, logprobs of answers and prompts; the tokens are the definition's on a CPU."""
    runner, _ = make_runner(torch.device("cuda"), graphs=graphs)
    runner.rehearse()
    runner.capture()

    def launch(plan: StepPlan) -> None:
        with nothing_waits():
            runner.launch(plan)

    found = run_storm(runner, 8, 20, launch)
    wanted = run_storm(make_runner(CPU)[0], 8, 20)
    assert [(one.prompt, one.tokens) for one in found] == [(one.prompt, one.tokens) for one in wanted]
