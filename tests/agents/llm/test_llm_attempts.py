"""Attempts: what follows each failure, at which model, with which request; budgets; the history on the error.

Guards against: rate-limit texts told to the model, waits shorter than a target asked for, reasks that change the
prefix or grow with the square of the attempts, fallbacks that inherit another model's reproaches, money and tokens of
failed attempts that nobody counts, and errors that do not say what happened.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from typing import Annotated, Any

import pytest
from annotated_types import MaxLen
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from diptych.agents import llm
from diptych.agents.llm.call import Call
from diptych.agents.llm.exchange import value_of
from diptych.agents.llm.profiles import POOL, Profile
from diptych.agents.llm.reasking import MAX_TOLD_CHARS, MOST_TURNS
from diptych.agents.llm.retries import MAX_RETRY_AFTER_S, Course, Next
from diptych.agents.llm.testing import Said, ScriptedModel, failure, registry_of
from diptych.protos.failures import Failure, FailureKind
from diptych.protos.messages import Message, ToolCall
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Ended, Reply, Usage

PLAIN = Profile(media=POOL.media)  # of a target that does not go on from a beginning
AT_ONCE = llm.Retries(base_s=0)
OLD, NEW = {"title": "Emma", "year": 1815}, {"title": "Emma", "year": 2015}


class Book(BaseModel):
    title: str
    year: int

    @field_validator("year")
    @classmethod
    def old(cls, year: int) -> int:
        if year > 1900:
            raise ValueError(f"{year} is too new")
        return year


def asking(
    entries: list[Any], *others: list[Any], output: Any = Book, retries: llm.Retries = AT_ONCE, **more: Any
) -> tuple[Call[..., Any, Any], list[ScriptedModel]]:
    """A call of the first model; `others` are b/m, c/m, ..."""
    models = [ScriptedModel(one, profile=PLAIN) for one in (entries, *others)]
    registry = registry_of(**dict(zip("abcd", models, strict=False)))

    @llm.call("a/m", output=output, registry=registry, retries=retries, **more)
    def ask(text: str) -> str:
        return text

    return ask, models


def turns(model: ScriptedModel, number: int) -> list[dict[str, Any]]:
    """The messages of a request, from 0."""
    found: list[dict[str, Any]] = model.requests[number]["messages"]
    return found


def test_a_reask_shows_the_model_its_answer_and_the_field() -> None:
    ask, (model,) = asking([NEW, OLD])
    reply = ask("a book")
    assert reply.value == Book(**OLD)
    assert [(one.number, one.why, one.model) for one in reply.attempts] == [(1, "first", "a/m"), (2, "reask", "a/m")]
    user, answer, told = turns(model, 1)
    assert user == {"role": "user", "content": "a book"}
    assert answer == {"role": "assistant", "content": json.dumps(NEW)}
    assert told["role"] == "user"
    assert "/year" in told["content"]
    assert "2015 is too new" in told["content"]


def test_each_request_begins_with_the_one_before() -> None:
    """So that a target finds its KV."""
    ask, (model,) = asking([NEW, {"title": "Emma"}, OLD])
    ask("a book")
    assert turns(model, 1)[: len(turns(model, 0))] == turns(model, 0)
    assert turns(model, 2)[: len(turns(model, 1))] == turns(model, 1)


def test_many_reasks_do_not_send_ever_more() -> None:
    ask, (model,) = asking([NEW] * 7, retries=llm.Retries(attempts=7))
    with pytest.raises(llm.InvalidOutput):
        ask("a book")
    sizes = [len(turns(model, at)) for at in range(7)]
    assert sizes == [1, 3, 5, 5, 5, 5, 5]
    assert max(sizes) == 1 + 2 * MOST_TURNS
    assert turns(model, 6)[0] == turns(model, 0)[0]


def test_what_the_model_is_told_is_bounded() -> None:
    class Long(BaseModel):
        words: list[Annotated[str, MaxLen(3)]]

    ask, (model,) = asking([{"words": ["x" * 5_000] * 300}, {"words": ["ok"]}], output=Long)
    assert ask("go").value.words == ["ok"]
    told = turns(model, 1)[-1]["content"]
    assert len(told) < MAX_TOLD_CHARS + 200
    assert "/words/0" in told


def test_reasoning_goes_back_with_the_answer_it_led_to() -> None:
    ask, (model,) = asking([Said(text=json.dumps(NEW), thoughts="Emma is by Austen"), OLD])
    ask("a book")
    assert turns(model, 1)[1] == {
        "role": "assistant",
        "content": json.dumps(NEW),
        "reasoning_content": "Emma is by Austen",
    }


def test_transport_failures_send_the_same_again() -> None:
    """A rate limit's text was fed to the model as a reproach elsewhere."""
    ask, (model,) = asking([failure("rate_limited"), failure("server", status=500), OLD])
    reply = ask("a book")
    assert model.requests[0] == model.requests[1] == model.requests[2]
    assert [one.why for one in reply.attempts] == ["first", "retry", "retry"]
    assert reply.spent.requests == 3
    assert reply.cost == reply.attempts[-1].spent.dollars  # refusals cost nothing


@pytest.mark.parametrize("kind", ["content_policy", "auth", "not_found", "quota", "context_length", "unsupported"])
def test_what_no_second_request_mends_goes_to_a_fallback(kind: str) -> None:
    ask, (first, second) = asking([failure(kind)], [OLD], retries=llm.Retries(fallback=["b/m"]))
    reply = ask("a book")
    assert reply.model == "b/m"
    assert [one.why for one in reply.attempts] == ["first", "fallback"]
    assert (first.left, second.left) == (0, 0)


@pytest.mark.parametrize("kind", ["bad_request", "cancelled"])
def test_a_wrong_request_is_wrong_everywhere(kind: str) -> None:
    ask, (_, second) = asking([failure(kind)], [OLD], retries=llm.Retries(fallback=["b/m"]))
    with pytest.raises(llm.ProviderError) as caught:
        ask("a book")
    assert len(caught.value.attempts) == 1
    assert second.requests == []


@pytest.mark.parametrize(
    "kind", ["rate_limited", "overloaded", "server", "connect", "timeout_first_token", "timeout_idle", "timeout_total"]
)
def test_attempts_count_the_first(kind: str) -> None:
    ask, (model,) = asking([failure(kind)] * 3, retries=llm.Retries(attempts=3, base_s=0))
    with pytest.raises(llm.ProviderError) as caught:
        ask("a book")
    assert len(model.requests) == 3
    assert [one.number for one in caught.value.attempts] == [1, 2, 3]
    ask, (model,) = asking([failure(kind)], retries=llm.Retries(attempts=1))
    with pytest.raises(llm.ProviderError):
        ask("a book")


def test_a_fallback_begins_with_the_developers_own_messages_and_has_its_own_attempts() -> None:
    ask, (first, second, third) = asking(
        [NEW, NEW], [NEW, NEW], [OLD], retries=llm.Retries(attempts=2, fallback=["b/m", "c/m"])
    )
    reply = ask("a book")
    assert [one.model for one in reply.attempts] == ["a/m", "a/m", "b/m", "b/m", "c/m"]
    assert turns(second, 0) == turns(third, 0) == turns(first, 0)
    assert len(turns(second, 1)) == 3


def test_the_model_that_worked_goes_on() -> None:
    ask, (first, second) = asking([failure("auth")], [OLD, OLD], retries=llm.Retries(fallback=["b/m"]))
    reply = ask("a book")
    again = reply.resume("another")
    assert again.model == "b/m"
    assert len(first.requests) == 1
    assert turns(second, 1)[-1]["content"] == "another"


def as_anthropic(model: ScriptedModel) -> None:
    """Whose format has no words for a bias."""
    model.codec_name, model.quirks = "anthropic.messages", Quirks(family="anthropic")


def test_a_fallback_that_cannot_be_asked_so_is_left_out() -> None:
    retries = llm.Retries(fallback=["b/m", "c/m"])
    ask, (_, second, _) = asking([failure("auth")], [], [OLD], retries=retries, logit_bias={1: 2.0})
    as_anthropic(second)
    assert [one.model for one in ask("a book").attempts] == ["a/m", "c/m"]
    assert second.requests == []


def test_the_error_tells_of_fallbacks_that_were_left_out() -> None:
    ask, (_, second) = asking([failure("auth")], [], retries=llm.Retries(fallback=["b/m"]), logit_bias={1: 2.0})
    as_anthropic(second)
    with pytest.raises(llm.ProviderError) as caught:
        ask("a book")
    assert "b/m was left out" in str(caught.value)
    assert "logit_bias" in str(caught.value)


def test_the_first_model_is_never_left_out() -> None:
    ask, (first, _) = asking([], [OLD], retries=llm.Retries(fallback=["b/m"]), logit_bias={1: 2.0})
    as_anthropic(first)
    with pytest.raises(llm.Unsupported, match="logit_bias"):
        ask("a book")


def test_a_fallback_that_nobody_knows_is_told_of_before_anything_is_sent() -> None:
    ask, (model,) = asking([OLD], retries=llm.Retries(fallback=["nowhere/m"]))
    with pytest.raises(llm.UsageError, match="nowhere"):
        ask("a book")
    assert model.requests == []


def test_what_is_cut_off_is_asked_for_with_twice_as_many_once() -> None:
    half = Said(text='{"title": "Emma", "year": 18', finish="length")
    ask, (model,) = asking([half, OLD], max_tokens=20)
    reply = ask("a book")
    assert [one.why for one in reply.attempts] == ["first", "longer"]
    assert [body["max_completion_tokens"] for body in model.requests] == [20, 40]
    assert turns(model, 1) == turns(model, 0)
    assert reply.draft.params == {"max_tokens": 20}  # of what is gone on with
    ask, _ = asking([half, half], max_tokens=20)
    with pytest.raises(llm.Truncated) as caught:
        ask("a book")
    assert len(caught.value.attempts) == 2
    assert caught.value.text == half.text
    assert caught.value.partial == {"title": "Emma"}  # of the year, more digits might have come
    ask, _ = asking([half], retries=llm.Retries(longer=False))
    with pytest.raises(llm.Truncated):
        ask("a book")


def test_a_text_that_is_cut_off_is_a_value_and_says_so() -> None:
    ask, _ = asking([Said(text="Once upon", finish="length")], output=None)
    reply = ask("a tale")
    assert (reply.value, reply.finish) == ("Once upon", "length")


def test_reasoning_that_took_all_tokens_is_asked_for_with_more() -> None:
    """It passed for an empty text."""
    ask, (model,) = asking([Said(thoughts="hm", finish="length"), "hello"], output=None, max_tokens=5)
    assert ask("a tale").value == "hello"
    assert [body["max_completion_tokens"] for body in model.requests] == [5, 10]


def test_a_call_of_a_tool_that_is_cut_off_is_not_run() -> None:
    """Its arguments were no JSON, and the tool would have run without any."""
    ask, _ = asking([Said(calls=(("find", {"q": "x"}),), finish="length")], output=None)
    reply = ask("go")
    assert reply.tool_calls[0].arguments == {"q": "x"}  # a whole one is
    call = ToolCall(id="1", name="find", arguments={}, text='{"q": "x')
    answer = Reply(message=Message(role="assistant", parts=(call,)), ended=Ended("length"))
    with pytest.raises(llm.Truncated, match="find"):
        value_of(reply.draft, answer)


@pytest.mark.parametrize("text", ["", "   ", "\n\n\t\n" * 50])
def test_an_empty_answer_is_asked_for_again(text: str) -> None:
    ask, (model,) = asking([text, OLD])
    assert ask("a book").value == Book(**OLD)
    assert model.requests[0] == model.requests[1]
    ask, _ = asking([text] * 3, output=None)
    with pytest.raises(llm.EmptyAnswer):
        ask("a book")


def test_a_loop_of_spaces_is_no_answer_that_needs_more_room() -> None:
    ask, (model,) = asking([Said(text=" \n" * 100, finish="length"), OLD], max_tokens=100)
    assert ask("a book").value == Book(**OLD)
    assert [body["max_completion_tokens"] for body in model.requests] == [100, 100]


def test_who_declines_is_not_asked_again() -> None:
    ask, (model, _) = asking(
        [Said(text='{"title"', finish="content_filter")], [OLD], retries=llm.Retries(fallback=["b/m"])
    )
    assert ask("a book").model == "b/m"
    ask, (model,) = asking([Said(finish="content_filter")])
    with pytest.raises(llm.Refused):
        ask("a book")
    assert len(model.requests) == 1


def test_a_validators_own_call_that_fails_is_not_an_attempt_of_this_one() -> None:
    """Its failure was taken for one of the target's, and tried again."""
    judge, _ = asking([failure("auth")], output=None)

    class Judged(BaseModel):
        text: str

        @field_validator("text")
        @classmethod
        def sound(cls, text: str) -> str:
            return str(judge(text).value)

    ask, (model,) = asking([{"text": "x"}], output=Judged)
    with pytest.raises(llm.ProviderError) as caught:
        ask("go")
    assert len(model.requests) == 1
    assert caught.value.failure.kind is FailureKind.AUTH


# Budgets.


def used(text: Any, tokens: int, **more: Any) -> Said:
    """An answer that used so many, half of them for the prompt."""
    usage = Usage(input_tokens=tokens // 2, output_tokens=tokens - tokens // 2)
    return Said(text=text if isinstance(text, str) else json.dumps(text), usage=usage, **more)


def test_failed_attempts_use_up_the_budget() -> None:
    ask, (model,) = asking([used(NEW, 60), used(NEW, 60), OLD], budget=llm.Budget(tokens=100))
    with pytest.raises(llm.BudgetExceeded) as caught:
        ask("a book")
    assert caught.value.limit == "tokens"
    assert [one.spent.tokens for one in caught.value.attempts] == [60, 60]
    assert isinstance(caught.value.__cause__, llm.InvalidOutput)
    assert caught.value.text == json.dumps(NEW)
    assert model.left == 1


def test_a_value_counts_although_it_went_over() -> None:
    ask, _ = asking([used(OLD, 5_000)], budget=llm.Budget(tokens=100, dollars=0.000001))
    assert ask("a book").value == Book(**OLD)


def test_dollars_are_bounded_although_a_part_is_not_known() -> None:
    """One attempt without a price made the sum unknown, and the limit was forgotten."""
    no_usage = Said(text=json.dumps(NEW), usage=Usage())
    ask, _ = asking([no_usage, used(NEW, 1_000), OLD], budget=llm.Budget(dollars=0.005))
    with pytest.raises(llm.BudgetExceeded) as caught:
        ask("a book")
    assert (caught.value.limit, len(caught.value.attempts)) == ("dollars", 2)


def test_time_that_runs_out_in_an_attempt_is_the_budgets_end() -> None:
    """It was told as a timeout of the provider."""
    ask, (model,) = asking([Said(text="x", delay_s=60)], output=None, budget=llm.Budget(seconds=0.02))
    with pytest.raises(llm.BudgetExceeded) as caught:
        ask("go")
    assert caught.value.limit == "seconds"
    assert len(caught.value.attempts) == 1
    total_s = model.limits[0].total_s
    assert total_s is not None
    assert 0 < total_s <= 0.02
    with pytest.raises(llm.BudgetExceeded):
        next(iter(asking([Said(text="x", delay_s=60)], output=None, budget=llm.Budget(seconds=0.02))[0].stream("go")))


def test_an_attempts_own_timeout_is_no_budget() -> None:
    ask, (model,) = asking([Said(text="x", delay_s=60), "y"], output=None, timeout=0.01)
    assert ask("go").value == "y"
    assert [one.total_s for one in model.limits] == [0.01, 0.01]


@pytest.mark.parametrize("wrong", [{"tokens": 0}, {"dollars": -1}, {"seconds": float("nan")}, {"tokens": "5"}])
def test_a_budget_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(llm.UsageError, match=next(iter(wrong))):
        llm.Budget(**wrong)


# The course alone.


def course(budget: llm.Budget | None = None, **retries: Any) -> Course:
    return Course(llm.Retries(**retries), budget, "a/m", began_at=100.0)


def provider_error(kind: str, retry_after_s: float | None = None) -> llm.ProviderError:
    return llm.ProviderError(Failure(kind=FailureKind(kind), message="no", retry_after_s=retry_after_s), "a/m")


def after(going: Course, error: llm.CallFailed, now: float = 100.0) -> Next:
    number = len(going.attempts) + 1
    going.add(llm.Attempt(number=number, model=going.model, error=error))
    return going.after(error, now)


def fail_with(going: Course, kinds: list[FailureKind]) -> None:
    for kind in kinds:
        after(going, provider_error(kind))


@given(st.floats(0, MAX_RETRY_AFTER_S), st.floats(0, 5))
@settings(max_examples=30)
def test_a_pause_is_never_shorter_than_the_target_asked_for(asked_s: float, base_s: float) -> None:
    step = after(course(base_s=base_s), provider_error("rate_limited", asked_s))
    assert asked_s <= step.pause_s <= asked_s + base_s / 2


def test_pauses_double_up_to_a_most() -> None:
    going = course(attempts=9, base_s=1.0, most_s=5.0)
    pauses = [after(going, provider_error("overloaded")).pause_s for _ in range(8)]
    for pause_s, most_s in zip(pauses, [1, 2, 4, 5, 5, 5, 5, 5], strict=True):
        assert most_s / 2 <= pause_s <= most_s


def test_who_asks_for_a_long_pause_is_left() -> None:
    error = provider_error("rate_limited", MAX_RETRY_AFTER_S + 1)
    assert after(course(fallback=["b/m"]), error) == Next("fallback", "b/m")
    with pytest.raises(llm.ProviderError):
        after(course(), error)


def test_a_pause_beyond_the_budget_is_not_begun() -> None:
    error = provider_error("rate_limited", 60.0)
    assert after(course(llm.Budget(seconds=10), fallback=["b/m"]), error) == Next("fallback", "b/m")
    with pytest.raises(llm.BudgetExceeded) as caught:
        after(course(llm.Budget(seconds=10)), error)
    assert caught.value.limit == "seconds"
    assert len(caught.value.attempts) == 1


def test_no_model_is_asked_twice_as_a_fallback() -> None:
    going = course(attempts=1, fallback=["a/m", "b/m", "b/m"])
    assert after(going, provider_error("auth")).model == "b/m"
    with pytest.raises(llm.ProviderError):
        after(going, provider_error("auth"))


@given(
    st.lists(st.sampled_from([*FailureKind]), min_size=40, max_size=40),
    st.integers(1, 4),
    st.integers(0, 3),
)
@settings(max_examples=50)
def test_a_course_ends(kinds: list[FailureKind], attempts: int, num_fallbacks: int) -> None:
    """Whatever fails: at most `attempts` requests to each model, every one on the error."""
    fallback = [f"f{at}/m" for at in range(num_fallbacks)]
    going = course(attempts=attempts, fallback=fallback, base_s=0)
    with pytest.raises(llm.CallFailed) as caught:
        fail_with(going, kinds)
    models = [one.model for one in caught.value.attempts]
    assert all(models.count(model) <= attempts for model in ["a/m", *fallback])
    assert [one.number for one in caught.value.attempts] == list(range(1, len(models) + 1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"attempts": 0}, "at least 1"),
        ({"attempts": "3"}, "whole number"),
        ({"attempts": 2.5}, "whole number"),
        ({"attempts": None}, "whole number"),
        ({"fallback": "b/m"}, "list"),
        ({"fallback": [3]}, "list of models"),
        ({"fallback": None}, "list of models"),
        ({"base_s": -1}, "base_s"),
        ({"base_s": "1"}, "base_s"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(llm.UsageError, match=words):
        llm.Retries(**wrong)


# What the error tells.


def test_the_error_tells_attempt_by_attempt() -> None:
    ask, _ = asking([failure("rate_limited"), NEW, NEW], [failure("auth")], retries=_with_fallback())
    with pytest.raises(llm.ProviderError) as caught:
        ask("a book")
    lines = str(caught.value).splitlines()
    assert lines[0] == "b/m: scripted"
    assert lines[1].startswith("4 attempts, ")
    assert lines[2].startswith("1. first at a/m, ")
    assert "too new" in lines[3]
    assert lines[5].startswith("4. fallback at b/m, ")
    assert len(lines) == 6
    assert all(len(line) <= 200 for line in lines)
    assert caught.value.text == json.dumps(NEW)
    assert caught.value.last is caught.value.attempts[-1]


def _with_fallback() -> llm.Retries:
    return llm.Retries(base_s=0, fallback=["b/m"])


def test_one_attempt_is_told_in_its_own_words() -> None:
    ask, _ = asking([failure("auth")])
    with pytest.raises(llm.ProviderError) as caught:
        ask("a book")
    assert str(caught.value) == "a/m: scripted"


def test_errors_cross_processes_with_their_history() -> None:
    ask, _ = asking([NEW, NEW, NEW])
    with pytest.raises(llm.InvalidOutput) as caught:
        ask("a book")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert len(again.attempts) == 3
    assert again.report.paths == ("/year",)
    assert again.attempts[-1].error is again
    cut = llm.Truncated("cut", "{", {"a": 1})
    assert pickle.loads(pickle.dumps(cut)).partial == {"a": 1}


def test_the_same_both_ways() -> None:
    """What the sync driver does, the async one does."""

    def script() -> list[Any]:
        return [failure("server"), NEW, OLD]

    ask, (sync_model,) = asking(script())
    ask("a book")
    again, (async_model,) = asking(script())
    reply = asyncio.run(again.aio("a book"))
    assert reply.value == Book(**OLD)
    assert sync_model.requests == async_model.requests


@pytest.mark.parametrize(
    "error",
    [
        llm.Refused("no: " + "x" * 1_000_000, "x" * 1_000_000),
        llm.Truncated("cut", "x" * 1_000_000, {"a": "x" * 1_000_000}),
        llm.ProviderError(Failure(kind=FailureKind.SERVER, message="x" * 1_000_000), "a/m"),
        llm.UsageError("x" * 1_000_000),
        llm.Blocked("Check", "x" * 1_000_000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_line_of_a_log_is_no_megabyte(error: llm.Error) -> None:
    assert len(repr(error)) < 5_000
    assert len(str(error)) < 5_000
    assert repr(error).startswith(type(error).__name__)
    again = pickle.loads(pickle.dumps(error))
    assert (again.args, again.message) == (error.args, error.message)


def test_an_answer_that_is_wrong_is_whole_in_its_error_and_short_in_a_log() -> None:
    answer = "x" * 1_000_000
    ask, _ = asking([answer] * 3)
    with pytest.raises(llm.InvalidOutput) as caught:
        ask("a book")
    error = caught.value
    assert len(repr(error)) < 5_000
    assert len(str(error)) < 5_000
    assert len(repr(error.attempts)) < 20_000
    assert len(repr(error.report)) < 5_000
    assert error.text == error.report.text == error.attempts[0].text == answer
