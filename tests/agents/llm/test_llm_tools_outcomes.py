"""What tools give, as models are told of it, and calls that wait for a person. Guards against: a result that no request
can hold, a failure that looks like a result, a call that runs without its approval or twice, and a conversation that
goes on with a call nobody answered.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, PlainSerializer

from diptych.agents import llm
from diptych.agents.llm.profiles import Profile
from diptych.agents.llm.testing.scripted import Said, ScriptedModel
from diptych.protos.messages import Media, Text

Call = tuple[str, dict[str, Any]]


def asked(tools: Sequence[Any], *calls: Call, then: Sequence[Any] = ("done",), deps: Any = None, **rest: Any) -> Any:
    """The reply of a model that makes `calls`, and the model."""
    model = ScriptedModel([Said(calls=calls), *then], **rest)
    registry = llm.Registry()
    registry.add("test", model)

    @llm.call("test/m", registry=registry, tools=tools, deps=deps, session="s-1")
    def ask() -> str:
        return "go"

    return ask(), model


def told(model: ScriptedModel) -> list[Any]:
    return [one["content"] for one in model.requests[-1]["messages"] if one["role"] == "tool"]


def test_outcomes_may_be_returned_and_raised() -> None:
    def give(how: str) -> Any:
        match how:
            case "raise":
                raise llm.Retry("nearer")
            case "return":
                return llm.Retry("farther")
            case "failed":
                return llm.Failed("closed")
            case "ok":
                return llm.Ok({"a": 1})
            case "later":
                return llm.Deferred("job-7")
            case _:
                return llm.NeedsApproval("too dear")

    ways = ("raise", "return", "failed", "ok", "later", "ask")
    reply, model = asked([give], *[("give", {"how": way}) for way in ways])
    outcomes = reply.run_tools()
    assert [one.outcome for one in outcomes] == [
        llm.Retry("nearer"), llm.Retry("farther"), llm.Failed("closed"), llm.Ok({"a": 1}), llm.Deferred("job-7"),
        llm.NeedsApproval("too dear", {"how": "ask"}),
    ]  # fmt: skip
    assert [one.is_settled for one in outcomes] == [True] * 4 + [False] * 2
    with pytest.raises(llm.UsageError, match=r"result of give is still to come: add llm\.result\('call_4', value\)"):
        reply.resume(outcomes)
    outcomes = reply.run_tools(done=outcomes, approved={"call_5": llm.Failed("no money")})
    reply.resume([*outcomes, llm.result("call_4", ["late"]), "And now?"])
    assert told(model) == [
        "nearer\nCall again, with this put right.",
        "farther\nCall again, with this put right.",
        "Error: closed",
        '{"a":1}',
        '["late"]',
        "Error: no money",
    ]
    assert model.requests[-1]["messages"][-1] == {"role": "user", "content": "And now?"}


def test_retry_and_failed_are_values_that_compare_and_travel() -> None:
    import copy
    import pickle

    one = llm.Retry("again")
    assert pickle.loads(pickle.dumps(one)) == one == copy.copy(one)
    assert one != llm.Failed("again")
    assert {one: 1}[llm.Retry("again")] == 1
    match one:
        case llm.Retry(message):
            assert message == "again"


@dataclass
class Pair:
    a: int
    b: str


class Model(BaseModel):
    x: int


class Opaque:
    """Has no JSON."""


def _loop() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("as it is", "as it is"),
        ("half \ud800 pair", "half ? pair"),
        (None, "null"),
        (Pair(1, "\u00e9"), '{"a":1,"b":"\u00e9"}'),
        ([Model(x=1), {"k": {2}}], '[{"x":1},{"k":[2]}]'),
        (float("nan"), '"NaN"'),
        (b"bytes", '"bytes"'),
        ([Text("a"), "b", {"c": 1}], 'ab{"c":1}'),
    ],
)
def test_results_as_the_model_is_told(value: Any, text: str) -> None:
    def give() -> Any:
        return value

    reply, _ = asked([give], ("give", {}))
    (outcome,) = reply.run_tools()
    assert "".join(part.text for part in outcome.parts) == text
    assert reply.resume([outcome]).value == "done"


@pytest.mark.parametrize("value", [Opaque(), [Opaque()], _loop(), iter([1]), {"f": print}, b"\xff"])
def test_results_without_json_name_the_type_and_the_remedy(value: Any) -> None:
    def give() -> Any:
        return value

    reply, _ = asked([give], ("give", {}))
    (outcome,) = reply.run_tools()
    assert isinstance(outcome.outcome, llm.Failed)
    assert f"the tool give returned a {type(value).__name__}, which has no JSON" in outcome.outcome.message
    assert "return a text, a dict, a list, a pydantic model or a dataclass" in outcome.outcome.message


def test_a_serializer_that_raises_is_told() -> None:
    def boom(value: int) -> int:
        raise ValueError("boom")

    class Bad(BaseModel):
        x: Annotated[int, PlainSerializer(boom)]

    def give() -> Bad:
        return Bad(x=1)

    reply, _ = asked([give], ("give", {}))
    assert "boom" in reply.run_tools()[0].outcome.message


def test_a_huge_result_is_cut_with_a_note() -> None:
    def give(n: int) -> list[int]:
        return list(range(n))

    reply, _ = asked([give], ("give", {"n": 100_000}))
    (outcome,) = reply.run_tools(most_chars=1000)
    text = outcome.parts[0].text
    assert text.startswith("[0,1,2,")
    assert text.endswith("[cut here: these are the first 1000 of 588891 characters; ask for less at a time]")
    assert outcome.value[-1] == 99_999  # the program has all of it


PNG = Media(kind="image", path="", media_type="image/png", data="iVBORw0KGgo=")


def test_an_image_reaches_a_model_that_sees() -> None:
    def photo() -> list[Any]:
        return ["Here:", PNG]

    reply, model = asked([photo], ("photo", {}))
    reply.resume(reply.run_tools())
    assert told(model) == ["Here:"]
    assert "iVBORw0KGgo=" in json.dumps(model.requests[-1]["messages"][-1])


def test_an_image_to_a_model_without_vision_names_the_tool_before_anything_is_sent() -> None:
    def photo() -> Media:
        return PNG

    reply, model = asked([photo], ("photo", {}), profile=Profile())
    with pytest.raises(llm.Unsupported, match=r"the tool photo gave one: test/m takes no image") as caught:
        reply.resume(reply.run_tools())
    assert caught.value.field == "messages[2].content[0]"
    assert len(model.requests) == 1


def test_nothing_runs_without_its_approval_and_nothing_twice() -> None:
    paid: list[int] = []

    @llm.tool(needs_approval=lambda args: args["euros"] > 10)
    def pay(euros: int = 50, *, ctx: llm.Context[None]) -> str:
        paid.append(euros)
        return f"paid {euros} {ctx.is_approved}"

    reply, model = asked([pay], ("pay", {"euros": 5}), ("pay", {}), ("pay", {"euros": 99}), ("pay", {"euros": 20}))
    outcomes = reply.run_tools()
    assert paid == [5]
    assert [one.outcome for one in outcomes[1:]] == [llm.NeedsApproval("", {"euros": n}) for n in (50, 99, 20)]
    with pytest.raises(llm.UsageError, match=r"call of pay waits for approval: .*approved=\{'call_1': True\}, done="):
        reply.resume(outcomes)
    outcomes = reply.run_tools(done=outcomes, approved={"call_1": True, "call_2": False})
    assert sorted(paid) == [5, 50]
    assert isinstance(outcomes[3].outcome, llm.NeedsApproval)
    outcomes = reply.run_tools(done=outcomes, approved={"call_3": {"args": {"euros": "21"}}})
    assert sorted(paid) == [5, 21, 50]
    reply.resume(outcomes)
    assert told(model) == [
        "paid 5 False",
        "paid 50 True",
        "Error: this call was not approved, and did not run",
        '[Before it ran, a person changed the arguments to {"euros": "21"}]\npaid 21 True',
    ]


@pytest.mark.parametrize(
    ("approved", "words"),
    [
        ({"call_9": True}, r"approved names 'call_9'; the model's calls are: call_0 \(pay\)"),
        ({"call_0": "yes"}, r"approved\['call_0'\] is True, False"),
        ({"call_0": {"arg": {}}}, r"approved\['call_0'\] is True, False"),
        ({"call_0": {"args": {"euros": "many"}}}, r"tool pay does not take approved\['call_0'\]"),
        ({"call_0": {"args": {"euros": Opaque()}}}, r"has no JSON"),
    ],
)
def test_approvals_that_cannot_be_are_refused(approved: dict[str, Any], words: str) -> None:
    def pay(euros: int) -> None: ...

    reply, _ = asked([llm.tool(needs_approval=True)(pay)], ("pay", {"euros": 1}))
    with pytest.raises(llm.UsageError, match=words):
        reply.run_tools(approved=approved)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_check_that_breaks_lets_nothing_pass(is_async: bool) -> None:
    def check(args: dict[str, Any]) -> bool:
        raise KeyError("limit")

    async def later(args: dict[str, Any]) -> bool:
        raise KeyError("limit")

    ran: list[int] = []

    @llm.tool(needs_approval=later if is_async else check)
    def pay() -> None:
        ran.append(1)

    reply, _ = asked([pay], ("pay", {}))
    assert reply.run_tools()[0].outcome == llm.NeedsApproval("the check of this call raised KeyError: 'limit'", {})
    assert not ran


def test_going_on_without_results_is_refused_in_words() -> None:
    def pay(euros: int) -> str:
        return "ok"

    reply, model = asked([pay], ("pay", {"euros": 1}), ("pay", {"euros": 2}))
    with pytest.raises(llm.UsageError, match=r"the model calls pay \(call_0\), pay \(call_1\), and there is no result"):
        reply.resume("never mind")
    with pytest.raises(llm.UsageError, match=r"the model calls pay \(call_1\), and there is no result"):
        reply.resume(llm.result("call_0", "x"))
    with pytest.raises(llm.UsageError, match=r"a result for 'call_7' too many"):
        reply.resume([*reply.run_tools(), llm.result("call_7", "x")])
    done = reply.resume([llm.result("call_1", llm.Failed("closed")), llm.result("call_0", {"a": 1})])
    assert told(model) == ['{"a":1}', "Error: closed"]
    with pytest.raises(llm.UsageError, match="'call_0' too many; the model's calls are: none"):
        done.resume([llm.result("call_0", "x")])
    assert done.run_tools() == []


class Stop(BaseException):
    """As pytest.fail raises."""


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Stop("now"), "Stop: now"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (GeneratorExit(), "GeneratorExit"),
        (Mute(), "Mute"),
    ],
)
def test_whatever_a_tool_raises_is_an_outcome_and_later_calls_go_on(error: BaseException, words: str) -> None:
    async def waits() -> str:
        raise error

    def plain() -> str:
        raise error

    reply, _ = asked([waits, plain], ("waits", {}), ("plain", {}))
    outcomes = reply.run_tools()
    assert [one.outcome for one in outcomes] == [llm.Failed(words), llm.Failed(words)]
    assert reply.resume(outcomes).value == "done"


def test_a_call_of_a_model_that_wants_tools_itself_fails_alone() -> None:
    def inner() -> str:
        return "x"

    def other() -> int:
        return 3

    registry = llm.Registry()
    registry.add("test", ScriptedModel([Said(calls=(("inner", {}),))]))

    @llm.call("test/m", registry=registry, tools=[inner])
    def sub(question: str) -> str:
        return question

    reply, _ = asked([sub, other], ("sub", {"question": "?"}), ("other", {}))
    first, second = reply.run_tools()
    assert first.is_error
    assert "is a call of a model, which calls inner" in first.outcome.message
    assert second.value == 3
