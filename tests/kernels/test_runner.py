"""The runner's tokens are those of transformers' generate, however the work is cut into steps, rows and blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.runner import ModelRunner
from diptych.kernels.testing import ARCHITECTURES as TABLE
from diptych.kernels.testing import TinyArchitecture, make_tiny_checkpoint
from diptych.protos.errors import EngineFault
from diptych.protos.step import SampleSpec, StepPlan, StepRow

NEW_TOKENS = 12
TIE = 1e-4  # of the reference's two best logits: below it either token is right


@dataclass
class Sequence:
    prompt: tuple[int, ...]
    blocks: list[int]
    slot: int
    done: int = 0  # positions whose KV is in the blocks
    tokens: list[int] = field(default_factory=list)


class Driver:
    """A scheduler of a few lines: every step takes a chunk of each sequence, as far as the step's budget goes."""

    def __init__(self, model: LoadedModel, block_tokens: int, chunk: int, num_blocks: int = 256) -> None:
        shape = (num_blocks, model.kv_heads, block_tokens, model.head_dim)
        dtype = getattr(torch, model.dtype)
        self.kv = [(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)) for _ in range(model.layers)]
        self.runner = ModelRunner(model, self.kv, block_tokens=block_tokens, max_slots=32, max_step_tokens=512)
        self.block_tokens, self.chunk, self.steps = block_tokens, chunk, 0
        self.free = list(range(num_blocks))
        random.Random(5).shuffle(self.free)
        self.slots = list(range(32))

    def add(self, prompt: tuple[int, ...], shared: tuple[int, list[int]] = (0, [])) -> Sequence:
        """`shared`: tokens of the prompt that are cached, and the blocks that hold them."""
        cached, blocks = shared
        need = -(-(len(prompt) + NEW_TOKENS) // self.block_tokens) - len(blocks)
        own, self.free = self.free[:need], self.free[need:]
        return Sequence(prompt, [*blocks, *own], self.slots.pop(), done=cached)

    def row(self, sequence: Sequence, budget: int) -> StepRow:
        start, size = sequence.done, len(sequence.prompt)
        num = max(1, min(self.chunk, size - start, budget))
        end = start + num
        prompt = start < size
        sample = SampleSpec(0.0, 1.0, 0, 0, end) if end >= size else None
        used = -(-end // self.block_tokens)
        return StepRow(
            slot=sequence.slot,
            num_tokens=num,
            tokens=sequence.prompt[start:end] if prompt else None,
            start=start,
            blocks=tuple(sequence.blocks[:used]),
            sample=sample,
        )

    def step(self, sequences: list[Sequence]) -> None:
        rows, budget = [], 512
        for sequence in sequences:
            if budget:
                rows.append(self.row(sequence, budget))
                budget -= rows[-1].num_tokens
        self.runner.launch(StepPlan(self.steps, tuple(rows)))
        result = self.runner.collect()
        assert result.step_id == self.steps
        self.steps += 1
        for sequence, row, token in zip(sequences, rows, result.tokens, strict=False):
            sequence.done += row.num_tokens
            assert (token is None) == (row.sample is None)
            if token is not None:
                sequence.tokens.append(token)

    def run(self, sequences: list[Sequence]) -> None:
        while running := [s for s in sequences if len(s.tokens) < NEW_TOKENS]:
            self.step(running)


@dataclass(frozen=True)
class Reference:
    model: Any

    def check(self, sequence: Sequence) -> None:
        """Equal, or a tie at the first difference."""
        output = self.model.generate(
            torch.tensor([sequence.prompt]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        wanted = output.sequences[0, len(sequence.prompt) :].tolist()
        assert len(sequence.tokens) == NEW_TOKENS
        for index, (mine, theirs) in enumerate(zip(sequence.tokens, wanted, strict=True)):
            if mine != theirs:
                best = output.logits[index][0].topk(2).values
                assert float(best[0] - best[1]) <= TIE, f"token {index} is {mine}, not {theirs}"
                return


def reference_of(folder: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    return Reference(load(folder, dtype=torch.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder, dtype="float32")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return reference_of(folder)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, 512) for _ in range(rng.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("block_tokens", [4, 16])
@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_alone_and_ragged_every_chunk_and_block_size_gives_the_reference_tokens(
    model: LoadedModel, reference: Reference, block_tokens: int, chunk: int
) -> None:
    driver = Driver(model, block_tokens, chunk)
    alone = driver.add(prompts(1, seed=chunk)[0])
    driver.run([alone])
    ragged = [driver.add(prompt) for prompt in prompts(9, seed=100 + chunk)]
    driver.run(ragged)
    for sequence in (alone, *ragged):
        reference.check(sequence)


@pytest.mark.parametrize("block_tokens", [4, 16])
def test_a_prefix_that_lies_in_blocks_already_is_read_not_computed(
    model: LoadedModel, reference: Reference, block_tokens: int
) -> None:
    driver = Driver(model, block_tokens, 16)
    base = prompts(1, seed=8)[0][:1] * 3 + tuple(range(60, 93))
    first = driver.add(base)
    driver.run([first])
    blocks = 32 // block_tokens
    before = [k[first.blocks[:blocks]].clone() for k, _ in driver.kv]
    others = [driver.add(base[:32] + tail, (32, first.blocks[:blocks])) for tail in ((9,), (8, 7, 6, 5), base[32:])]
    driver.run(others)
    for sequence in (first, *others):
        reference.check(sequence)
    after = [k[first.blocks[:blocks]] for k, _ in driver.kv]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_sequences_may_join_and_leave_while_others_run(model: LoadedModel, reference: Reference) -> None:
    driver = Driver(model, 4, 5)
    waiting = [driver.add(prompt) for prompt in prompts(8, seed=3)]
    running: list[Sequence] = []
    while waiting or running:
        if waiting:
            running.append(waiting.pop())
        driver.step(running)
        for sequence in [s for s in running if len(s.tokens) == NEW_TOKENS]:
            reference.check(sequence)
            running.remove(sequence)


def test_the_next_step_may_be_launched_before_the_last_is_collected(model: LoadedModel, reference: Reference) -> None:
    driver = Driver(model, 4, 512)
    sequence = driver.add(prompts(1, seed=4)[0])
    driver.runner.launch(StepPlan(0, (driver.row(sequence, 512),)))
    sequence.done = len(sequence.prompt)
    for step in range(1, NEW_TOKENS):
        driver.runner.launch(StepPlan(step, (driver.row(sequence, 1),)))
        sequence.done += 1
        with pytest.raises(AssertionError, match="outstanding"):
            driver.runner.launch(StepPlan(99, (driver.row(sequence, 1),)))
        result = driver.runner.collect()
        assert result.step_id == step - 1
        sequence.tokens += [token for token in result.tokens if token is not None]
    sequence.tokens += [token for token in driver.runner.collect().tokens if token is not None]
    reference.check(sequence)
    with pytest.raises(AssertionError, match="no step"):
        driver.runner.collect()


def test_sampled_tokens_do_not_depend_on_the_batch_or_the_chunks(model: LoadedModel) -> None:
    def generate(chunk: int, company: int) -> list[int]:
        driver = Driver(model, 4, chunk)
        mine = driver.add(tuple(range(20, 43)))
        others = [driver.add(prompt) for prompt in prompts(company, seed=6)]
        plain: Callable[..., StepRow] = driver.row

        def row(sequence: Sequence, budget: int) -> StepRow:
            made = plain(sequence, budget)
            if made.sample is None:
                return made
            sample = SampleSpec(0.9, 0.95, 60, 1234, made.sample.position)
            fields = ("slot", "num_tokens", "tokens", "start", "blocks")
            return StepRow(**{name: getattr(made, name) for name in fields}, sample=sample)

        driver.row = row  # type: ignore[method-assign]
        driver.run([*others, mine])
        return mine.tokens

    tokens = generate(512, 0)
    assert tokens == generate(5, 0) == generate(512, 6) == generate(3, 4)
    assert len(set(tokens)) > 4


def test_rows_with_nan_are_told_and_the_runner_goes_on(folder: Path, reference: Reference) -> None:
    model = load_model(folder, dtype="float32")
    driver = Driver(model, 4, 512)
    sequence = driver.add(prompts(1, seed=9)[0])
    norm = model.module.get_parameter("model.norm.weight")
    with torch.inference_mode():
        saved = norm.clone()
        norm.fill_(float("nan"))
    row = driver.row(sequence, 512)
    driver.runner.launch(StepPlan(0, (row,)))
    with torch.inference_mode():
        norm.copy_(saved)
    decode = StepRow(
        slot=row.slot, num_tokens=1, tokens=None, start=row.num_tokens, blocks=sequence.blocks, sample=None
    )
    driver.runner.launch(StepPlan(1, (decode,)))  # nothing is wrong but that its token was never sampled
    for step in (0, 1):
        result = driver.runner.collect()
        assert (result.step_id, result.tokens, result.faults) == (step, (None,), {0})
    driver.run([sequence])
    reference.check(sequence)


def test_leftovers_in_reused_blocks_do_no_harm(model: LoadedModel, reference: Reference) -> None:
    """After a fault, blocks that are given to another sequence may hold NaN."""
    driver = Driver(model, 16, 7)
    for k, v in driver.kv:
        k.fill_(float("nan"))
        v.fill_(float("nan"))
    sequences = [driver.add(prompt) for prompt in prompts(5, seed=10)]
    driver.run(sequences)
    for sequence in sequences:
        reference.check(sequence)


def test_a_token_outside_of_the_vocabulary_fails_its_step_only(model: LoadedModel, reference: Reference) -> None:
    driver = Driver(model, 4, 512)
    bad = driver.add((5, 512, 7))
    driver.runner.launch(StepPlan(0, (driver.row(bad, 512),)))
    with pytest.raises(EngineFault) as caught:
        driver.runner.collect()
    assert "step 0" in caught.value.detail
    good = driver.add((5, 511, 7))
    driver.run([good])
    reference.check(good)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"start": 1020, "num_tokens": 7, "tokens": (1,) * 7}, "context"),
        ({"num_tokens": 2, "tokens": None}, "only one token"),
        ({"num_tokens": 2, "tokens": (1,)}, "num_tokens"),
        ({"slot": 32}, "slot"),
        ({"blocks": (1,), "start": 5}, "fewer blocks"),
        ({"num_tokens": 513, "tokens": (1,) * 513}, "513"),
    ],
)
def test_a_plan_that_breaks_the_rules_is_a_programming_error(
    model: LoadedModel, change: dict[str, Any], match: str
) -> None:
    driver = Driver(model, 4, 512)
    fields = {"slot": 0, "num_tokens": 1, "tokens": (1,), "start": 0, "blocks": range(256), "sample": None} | change
    with pytest.raises(AssertionError, match=match):
        driver.runner.launch(StepPlan(0, (StepRow(**fields),)))  # type: ignore[arg-type]


def test_an_arena_that_does_not_fit_is_refused(model: LoadedModel) -> None:
    good = torch.zeros(2, model.kv_heads, 4, model.head_dim)
    for layers, match in (
        ([(good, good)], "3 layers"),
        ([(good, good.transpose(1, 2))] * 3, "blocks of shape"),
        ([(good.half(), good.half())] * 3, "float16"),
    ):
        with pytest.raises(ValueError, match=match):
            ModelRunner(model, layers, block_tokens=4, max_slots=1, max_step_tokens=8)


ARCHITECTURES: dict[str, TinyArchitecture] = {
    **TABLE,
    # Families beside those that are promised.
    "gpt-neox": TinyArchitecture("gpt_neox"),
    "lfm2": TinyArchitecture("lfm2", {"layer_types": ["full_attention"] * 2}),
    "cohere": TinyArchitecture("cohere", {"logit_scale": 0.3}),
    "granite": TinyArchitecture("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.3}),
}


# Importing a model's code takes a second or more: these run with every change, the others with the slow tests.
QUICK = ("llama", "mistral", "qwen3", "gemma2", "gpt-oss", "gpt2", "mixtral")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES])
def test_every_architecture_gives_the_reference_tokens(name: str, tmp_path: Path) -> None:
    folder = ARCHITECTURES[name].make(tmp_path / "model")
    reference = reference_of(folder)
    model = load_model(folder, dtype="float32")
    assert model.layers >= 2
    driver = Driver(model, 4, 7)
    sequences = [driver.add(prompt) for prompt in (*prompts(4, seed=11, longest=30), *prompts(1, seed=12, longest=90))]
    driver.run(sequences)
    for sequence in sequences:
        reference.check(sequence)


def test_bfloat16_runs_and_mostly_agrees_with_itself_in_float32(folder: Path, model: LoadedModel) -> None:
    drivers = [Driver(loaded, 16, 16) for loaded in (model, load_model(folder, dtype="bfloat16"))]
    runs = []
    for driver in drivers:
        sequences = [driver.add(prompt) for prompt in prompts(8, seed=12)]
        driver.run(sequences)
        runs.append([sequence.tokens[0] for sequence in sequences])
    assert sum(one == two for one, two in zip(*runs, strict=True)) >= 6


@pytest.mark.slow
def test_smollm2_gives_the_reference_tokens_alone_and_ragged(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The default model, with text of its own vocabulary; the same prompt alone and in company, two chunk sizes."""
    from tokenizers import Tokenizer

    from diptych.cluster.models.source import resolve

    folder = resolve("smollm2-135m-instruct", tmp_path_factory.mktemp("cache")).path
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (
        "The capital of France is",
        "def fibonacci(n):\n    ",
        "Once upon a time, in a small village by the sea, there lived",
        "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
        "1, 2, 3, 4, 5,",
        "Water boils at",
    )
    encoded = [tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    model, reference = load_model(folder, dtype="float32"), reference_of(folder)
    for block_tokens, chunk in ((16, 512), (4, 7)):
        driver = Driver(model, block_tokens, chunk)
        alone = driver.add(encoded[0])
        driver.run([alone])
        ragged = [driver.add(prompt) for prompt in encoded]
        driver.run(ragged)
        for sequence in (alone, *ragged):
            reference.check(sequence)
