"""Constraints made into guides: what they allow, what they foretell, what happens to hostile and to many of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import llguidance
import numpy as np
import pytest

from diptych.cluster.api.testing import byte_level_tokenizer
from diptych.cluster.constraints.compose import any_text
from diptych.cluster.engine.guides import guide as guide_module
from diptych.cluster.engine.guides import guides as guides_module
from diptych.cluster.engine.guides.guide import RequestGuide
from diptych.cluster.engine.guides.guides import Guides
from diptych.cluster.engine.guides.matcher import Compiled, Llguidance, Matcher
from diptych.protos.constraint import Backend, Constraint, Guide, Reasoning, fill_masks, mask_words
from diptych.protos.errors import EngineFault, InvalidRequest, Overloaded
from diptych.protos.types import GenerateRequest, SamplingParams, TransferKey

PROMPT = (1, 2, 3)
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "kind": {"const": "person"}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")
START, STOP = TOKENIZER.token_to_id("<|im_start|>"), TOKENIZER.token_to_id("<|endoftext|>")  # for reasoning's markers


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return path


@pytest.fixture
def backend(tokenizer_file: Path) -> Llguidance:
    return Llguidance(tokenizer_file, vocab_size=TOKENIZER.get_vocab_size() + 40, end_tokens=(END,))


@pytest.fixture
def guides(tokenizer_file: Path) -> Guides:
    def make() -> Llguidance:
        return Llguidance(tokenizer_file, vocab_size=TOKENIZER.get_vocab_size(), end_tokens=(END,))

    return Guides({Backend.LLGUIDANCE: make}, end_tokens=(END,), clock=time.monotonic)


def of_schema(schema: object) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides={"whitespace_flexible": False})


def tokens_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


def allowed(guide: Guide, position: int, vocab: int = TOKENIZER.get_vocab_size()) -> set[int]:
    mask = np.zeros(mask_words(vocab), np.int32)
    guide.fill(position, memoryview(mask).cast("B"))
    return set(np.unpackbits(mask.view(np.uint8), count=vocab, bitorder="little").nonzero()[0].tolist())


def write(guide: Guide, text: str, at: int = len(PROMPT)) -> list[int]:
    """Sample `text`, token by token, as the guide allows; what it foretells is taken, the rest comes from the text."""
    known: list[int] = []
    while (done := TOKENIZER.decode(known, skip_special_tokens=False)) != text:
        rest = tokens_of(text[len(done) :])
        assert rest[0] in allowed(guide, at + len(known)), (done, TOKENIZER.decode(rest[:1]))
        known += [rest[0], *guide.accept(at + len(known), rest[0])]
        if known[-1] == END:
            break
    return known


def request(grammar: str, resume: Collection[int] = (), **fields: object) -> GenerateRequest:
    given = {"max_tokens": 400, "stop_token_ids": frozenset({END})}
    constraint = Constraint(
        grammar=grammar, **{k: fields.pop(k) for k in ("prefix", "reasoning", "backend") if k in fields}
    )  # type: ignore[arg-type]
    return GenerateRequest(
        key=TransferKey(bytes(16)),
        prompt=PROMPT,
        sampling=SamplingParams(**{**given, **fields}),  # type: ignore[arg-type]
        constraint=constraint,
        resume=tuple(resume),
    )


async def test_an_answer_follows_its_schema_and_what_is_certain_is_foretold(guides: Guides) -> None:
    guide = await guides.open(request(of_schema(PERSON)))
    written = write(guide, '{"name":"fox","kind":"person"}')
    assert TOKENIZER.decode(written, skip_special_tokens=False) == '{"name":"fox","kind":"person"}<|im_end|>'
    assert guide.accept(len(PROMPT) + len(written) - 1, END) == (), "it has said so itself"
    assert allowed(guide, len(PROMPT) + len(written)) == set()
    assert allowed(guide, len(PROMPT)) == {written[0]}, "a known position allows its own token alone"
    assert guide.error is None


@pytest.mark.parametrize("fields", [{"logprobs": 0}, {"logit_bias": ((5, 1.0),)}, {"bad_words": ((5,),)}])
async def test_who_looks_at_every_token_has_every_token_sampled(guides: Guides, fields: dict[str, object]) -> None:
    guide = await guides.open(request(of_schema(PERSON), **fields))
    at = len(PROMPT)
    for token in tokens_of('{"name":"fox","kind":"person"}'):
        assert token in allowed(guide, at)
        assert guide.accept(at, token) == ()
        at += 1
    assert allowed(guide, at) == {END}
    assert guide.accept(at, END) == ()


async def test_nothing_is_masked_where_the_token_before_is_not_known(guides: Guides) -> None:
    guide = await guides.open(request(of_schema(PERSON)))
    assert allowed(guide, len(PROMPT) + 1) == set(range(TOKENIZER.get_vocab_size()))


async def test_reasoning_is_free_but_for_the_end_and_the_grammar_begins_behind_it(guides: Guides) -> None:
    guide = await guides.open(request(of_schema(PERSON), reasoning=Reasoning(START, STOP)))
    at = len(PROMPT)
    first = allowed(guide, at)
    assert START in first
    assert first == {START} | {token for token in first if TOKENIZER.decode([token]).startswith("{")}
    assert guide.accept(at, START) == ()
    for token in tokens_of("well { hello"):
        at += 1
        assert allowed(guide, at) == set(range(TOKENIZER.get_vocab_size())) - {END}
        assert guide.accept(at, token) == ()
    forced = guide.accept(at + 1, STOP)
    assert TOKENIZER.decode(list(forced)) == '{"name":"'[: len(TOKENIZER.decode(list(forced)))] != ""
    write(guide, TOKENIZER.decode(list(forced)) and 'x","kind":"person"}', at + 2 + len(forced))
    assert guide.error is None


async def test_reasoning_that_the_prompt_has_opened_or_that_the_model_leaves_out(guides: Guides) -> None:
    is_open = await guides.open(request(of_schema(PERSON), reasoning=Reasoning(START, STOP, is_open=True)))
    assert allowed(is_open, 3) == set(range(TOKENIZER.get_vocab_size())) - {END}
    left_out = await guides.open(request(of_schema(PERSON), reasoning=Reasoning(START, STOP)))
    write(left_out, '{"name":"a","kind":"person"}')
    assert left_out.error is None


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("resumed", range(4))
async def test_reasoning_ends_at_its_budget(guides: Guides, is_open: bool, resumed: int) -> None:
    """Also where another engine had begun it: the tokens that were made there count."""
    thought = ([] if is_open else [START]) + tokens_of("hello the fox")[:3]
    constraint = replace(any_text(), reasoning=Reasoning(START, STOP, is_open, budget=3))
    guide = await guides.open(replace(request("", resume=thought[:resumed]), constraint=constraint))
    for at, token in enumerate(thought[resumed:], len(PROMPT) + resumed):
        assert {token, STOP} <= allowed(guide, at) or at == len(PROMPT)
        assert guide.accept(at, token) == ()
    end = len(PROMPT) + len(thought)
    assert allowed(guide, end) == {STOP}
    assert guide.accept(end, STOP) == ()
    assert {END, *tokens_of("hello")} <= allowed(guide, end + 1)
    assert guide.error is None


@pytest.mark.parametrize("cut", range(12))
async def test_a_resumed_answer_goes_on_as_the_undisturbed_one(guides: Guides, cut: int) -> None:
    """Also where an engine was lost between a token and those that it had foretold."""
    whole = write(await guides.open(request(of_schema(PERSON))), '{"name":"fox","kind":"person"}')
    cut = min(cut, len(whole) - 2)
    guide = await guides.open(request(of_schema(PERSON), resume=whole[:cut]))
    at = cut
    while at < len(whole):
        assert whole[at] in allowed(guide, len(PROMPT) + at)
        at += 1 + len(guide.accept(len(PROMPT) + at, whole[at]))
    assert at == len(whole)
    assert guide.error is None


async def test_a_resumed_answer_that_has_another_form_is_an_engines_fault(guides: Guides) -> None:
    with pytest.raises(EngineFault, match="the answer so far"):
        await guides.open(request(of_schema(PERSON), resume=tokens_of('{"age')))


async def test_the_answer_goes_on_with_a_given_beginning(guides: Guides) -> None:
    guide = await guides.open(request(of_schema(PERSON), prefix='{"name":"the fo'))
    written = write(guide, 'x","kind":"person"}')
    assert written[-1] == END
    with pytest.raises(InvalidRequest, match="the beginning of the answer that was given"):
        await guides.open(request(of_schema(PERSON), prefix='{"age'))


def test_more_logits_than_tokens_and_fewer(tokenizer_file: Path) -> None:
    """Rows that no token has are never allowed; tokens that no row has are left out."""
    for vocab in (TOKENIZER.get_vocab_size() + 40, TOKENIZER.get_vocab_size() - 40):
        backend = Llguidance(tokenizer_file, vocab_size=vocab, end_tokens=(END,))
        compiled = backend.compile('start: /[^"]*/')
        guide = RequestGuide(compiled.start(), num_prompt=0, end_tokens={END})
        found = allowed(guide, 0, vocab)
        assert found
        assert max(found) < min(vocab, TOKENIZER.get_vocab_size())


async def test_a_token_that_the_grammar_does_not_allow_fails_this_guide_alone(guides: Guides) -> None:
    bad, good = [await guides.open(request(of_schema(PERSON))) for _ in range(2)]
    assert bad.accept(3, tokens_of("x")[0]) == ()
    assert isinstance(bad.error, InvalidRequest)
    assert allowed(bad, 4) == set()
    write(good, '{"name":"","kind":"person"}')
    assert good.error is None


async def test_equal_grammars_are_compiled_once_and_the_oldest_are_forgotten(
    guides: Guides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guides_module, "MAX_COMPILED", 3)
    await asyncio.gather(*(guides.open(request(of_schema(PERSON))) for _ in range(5)))
    assert guides.counters()["engine_grammars_compiled_total"] == 1
    for number in range(20):
        await guides.open(request(of_schema({"const": number})))
    assert guides.counters()["engine_grammars_kept"] == 3
    monkeypatch.setattr(guides_module, "MAX_COMPILED_BYTES", 500)
    for number in range(3):
        await guides.open(request(of_schema({"const": f"{number}{'x' * 400}"})))
    assert guides.counters()["engine_grammars_kept"] == 1


HOSTILE = {
    "quantifiers": llguidance.LLMatcher.grammar_from_regex("(a{1,1000}){1,1000}"),
    "nested": llguidance.LLMatcher.grammar_from_regex("((a*)*)*((b+)+)+c"),
    "wide": llguidance.LLMatcher.grammar_from_regex("(.{0,500}x){0,30}y"),
    "parentheses": llguidance.LLMatcher.grammar_from_regex("(" * 30_000 + "a" + ")" * 30_000),
    "lark parentheses": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000,
    "left recursion": 'start: start "a" | "a"',
    "mutual recursion": 'start: a\na: b "x" | a "y" |\nb: a',
    "endless": 'start: a*\na: b*\nb: "x"?',
    "itself": of_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
    "enum": of_schema({"enum": [f"value{number}" for number in range(100_000)]}),
    "items": of_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    "all of": of_schema({"allOf": [{"properties": {f"k{i}": {"pattern": "a" * i}}} for i in range(300)]}),
    "nonsense": "\0{{{",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_grammars_are_refused_or_followed_and_never_long(guides: Guides, name: str) -> None:
    began = time.process_time()
    try:
        guide = await guides.open(request(HOSTILE[name]))
        for at in range(3, 20):
            choices = sorted(allowed(guide, at))
            if not choices:
                break
            guide.accept(at, choices[-1])
    except InvalidRequest:
        assert guides.counters()["engine_grammars_refused_total"] == 1
    assert time.process_time() - began < 2.0


class Stuck:
    """A backend that compiles for ever."""

    def __init__(self) -> None:
        self.released = threading.Event()
        self.is_asked = threading.Event()
        self.begun = 0

    def compile(self, grammar: str) -> Compiled:
        self.begun += 1
        self.is_asked.set()
        self.released.wait()
        raise AssertionError

    def close(self) -> None:
        self.released.set()


async def test_what_takes_too_long_is_refused_and_too_many_at_once_are_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guides_module, "COMPILE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(guides_module, "MAX_COMPILING", 2)
    stuck = Stuck()
    guides = Guides({Backend.LLGUIDANCE: lambda: stuck}, end_tokens=(END,), clock=time.monotonic)
    opened = await asyncio.gather(*(guides.open(request(str(i))) for i in range(3)), return_exceptions=True)
    assert [type(one) for one in opened] == [InvalidRequest, InvalidRequest, Overloaded]
    assert "took more than" in str(opened[0])
    assert guides.counters()["engine_grammars_timeouts_total"] == 2
    guides.close()
    stuck.close()


async def test_a_backend_that_the_engine_lacks_is_named(guides: Guides) -> None:
    wanted = request("{}")
    assert wanted.constraint is not None
    other = GenerateRequest(
        key=wanted.key,
        prompt=PROMPT,
        sampling=wanted.sampling,
        constraint=Constraint(grammar="{}", backend=Backend.XGRAMMAR),
    )
    with pytest.raises(InvalidRequest, match="no grammar backend xgrammar"):
        await guides.open(other)


class Panic(BaseException):
    """As a library's Rust side raises it: no Exception."""


class Panicking:
    """A matcher that panics in one method, and is the given one in all others."""

    def __init__(self, matcher: Matcher, method: str) -> None:
        self._matcher = matcher
        self._method = method

    def __getattr__(self, name: str) -> object:
        if name != self._method:
            return getattr(self._matcher, name)
        if name == "error":
            raise Panic("index out of bounds")

        def panic(*_: object) -> None:
            raise Panic("index out of bounds")

        return panic


@pytest.mark.parametrize("method", ["consume", "fill", "forced", "is_over", "error"])
def test_a_library_that_panics_fails_its_guide_alone(backend: Llguidance, method: str) -> None:
    """What passed through would end the step for all its rows, or the step thread and with it the engine."""
    compiled = backend.compile(of_schema(PERSON))
    vocab = TOKENIZER.get_vocab_size() + 40
    good = [RequestGuide(compiled.start(), num_prompt=0, end_tokens={END}) for _ in range(6)]
    matcher: Matcher = Panicking(compiled.start(), method)  # type: ignore[assignment]
    bad = RequestGuide(matcher, num_prompt=0, end_tokens={END})
    masks = np.zeros((7, mask_words(vocab)), np.int32)
    for at, brace in enumerate((None, tokens_of("{")[0])):
        if brace is not None:
            for guide in (bad, *good):
                guide.accept(0, brace)
        position = len(good[0]._known) if at else 0
        guided: list[tuple[Guide, int]] = [(bad, position), *((one, position) for one in good)]
        fill_masks(guided, masks.data.cast("B"))
        assert all(mask.any() for mask in masks[1:])
    assert isinstance(bad.error, EngineFault)
    assert "index out of bounds" in bad.error.args[1]
    assert not masks[0].any()
    assert all(one.error is None for one in good)


def test_masks_filled_together_are_filled_one_by_one_where_the_library_fails(
    backend: Llguidance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows then which of them it was."""

    def panic(*_: object) -> None:
        raise Panic("poisoned")

    monkeypatch.setattr(guide_module, "fill_rows", panic)
    compiled = backend.compile(of_schema(PERSON))
    good = [RequestGuide(compiled.start(), num_prompt=0, end_tokens={END}) for _ in range(5)]
    masks = np.zeros((5, mask_words(TOKENIZER.get_vocab_size() + 40)), np.int32)
    fill_masks([(one, 0) for one in good], masks.data.cast("B"))
    assert all(one.error is None for one in good)
    assert all(mask.any() for mask in masks)


def test_a_certain_token_that_the_model_has_no_row_for_is_not_taken(tokenizer_file: Path) -> None:
    """It would be looked up in the weights by the next step, which ends an engine on a card."""
    special = max(START, STOP, END)
    backend = Llguidance(tokenizer_file, vocab_size=special, end_tokens=(min(START, STOP, END),))
    for grammar in (f'start: "a" <[{special}]> "b"', f'start: "ab" <[{special}]>'):
        guide = RequestGuide(backend.compile(grammar).start(), num_prompt=0, end_tokens=())
        forced = guide.accept(0, tokens_of("a")[0])
        assert all(token < special for token in forced)
        assert allowed(guide, 1 + len(forced), special) == set()
        assert isinstance(guide.error, InvalidRequest)


def test_reasoning_whose_start_the_model_has_no_row_for_fails_no_step(backend: Llguidance) -> None:
    guide = RequestGuide(
        backend.compile(of_schema(PERSON)).start(),
        num_prompt=0,
        end_tokens={END},
        reasoning=Reasoning(10**6, 10**6 + 1),
    )
    assert tokens_of("{")[0] in allowed(guide, 0, TOKENIZER.get_vocab_size() + 40)
    assert guide.error is None


@pytest.mark.parametrize("where", ["load", "compile", "start"])
async def test_a_library_that_panics_while_it_compiles_fails_that_request(where: str) -> None:
    def panic(*_: object) -> NoReturn:
        raise Panic("index out of bounds")

    backend = SimpleNamespace(compile=lambda grammar: SimpleNamespace(start=panic), close=lambda: None)
    if where == "compile":
        backend.compile = panic
    guides = Guides(
        {Backend.LLGUIDANCE: panic if where == "load" else lambda: backend}, end_tokens=(END,), clock=time.monotonic
    )
    for _ in range(2):
        with pytest.raises(EngineFault, match="the form of the answer could not be prepared"):
            await guides.open(request("x"))
    guides.close()


async def test_what_nobody_waits_for_any_more_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those that come later wait behind it in vain, and a burst of slow grammars is never over."""
    monkeypatch.setattr(guides_module, "COMPILE_TIMEOUT_S", 0.05)
    stuck = Stuck()
    guides = Guides({Backend.LLGUIDANCE: lambda: stuck}, end_tokens=(END,), clock=time.monotonic)
    opened = await asyncio.gather(*(guides.open(request(str(i))) for i in range(8)), return_exceptions=True)
    kinds = [type(one) for one in opened]
    assert kinds.count(InvalidRequest) == stuck.begun == guides_module.THREADS[Backend.LLGUIDANCE]
    assert kinds.count(Overloaded) == 8 - stuck.begun, "their form may be as simple as can be"
    stuck.close()
    guides.close()
    for pool in guides._pools.values():
        await asyncio.to_thread(pool.shutdown)
    assert stuck.begun == guides_module.THREADS[Backend.LLGUIDANCE]


async def test_a_slow_backend_does_not_keep_the_other_waiting() -> None:
    """Both threads could wait for xgrammar's process, which takes seconds to start."""
    slow, quick = Stuck(), Stuck()
    quick.close()
    guides = Guides(
        {Backend.XGRAMMAR: lambda: slow, Backend.LLGUIDANCE: lambda: quick}, end_tokens=(END,), clock=time.monotonic
    )
    held = [asyncio.create_task(guides.open(request(str(i), backend=Backend.XGRAMMAR))) for i in range(4)]
    await asyncio.to_thread(slow.is_asked.wait)
    with pytest.raises(EngineFault):
        await guides.open(request("quick"))
    assert not any(one.done() for one in held)
    slow.close()
    assert len(await asyncio.gather(*held, return_exceptions=True)) == 4
    guides.close()
