"""Replies and runs go through queues, caches and processes: what they tell travels, keys and connections do not.

Guards against a lock in a registry that no pickle takes, a tenant's key in a cache on disk, a reply that goes on by
another tenant's registry, and a validator that is silently left out after a journey.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator

from diptych.agents import llm
from diptych.agents.llm import registry as registry_module
from diptych.agents.llm.testing import ScriptedModel, registry_of, tool_call

SECRET = "sk-very-secret-0123456789"


class Book(BaseModel):
    title: str = Field(min_length=1)


class Quote(BaseModel):
    words: str

    @field_validator("words")
    @classmethod
    def is_sourced(cls, words: str, info: ValidationInfo) -> str:
        assert info.context is not None
        assert info.context["source"]
        return words


@llm.tool(timeout=3.0)
def shout(text: str) -> str:
    """Says it louder."""
    return text.upper()


def whisper(text: str, ctx: llm.Context[Any] = llm.INJECTED) -> str:
    """Says it lower."""
    return f"{text.lower()} {ctx.deps}"


def sent(given: Any) -> Any:
    return pickle.loads(pickle.dumps(given))


both = pytest.mark.parametrize("journey", [sent, copy.deepcopy, copy.copy])


@both
def test_a_reply_arrives_whole(journey: Any) -> None:
    lab = ScriptedModel(["no book", '{"title": "Emma"}', '{"title": "Persuasion"}'])
    registry = registry_of(lab=lab)

    @llm.call("lab/m", output=Book, registry=registry, temperature=0.5)
    def recommend(genre: str) -> str:
        return f"a {genre} book"

    reply = recommend("regency")
    again = journey(reply)
    assert again.value == Book(title="Emma")
    assert type(again.value) is Book
    assert (again.text, again.messages, again.spent, again.model) == (
        reply.text, reply.messages, reply.spent, reply.model,
    )  # fmt: skip
    assert [(one.why, one.text, one.raw) for one in again.attempts] == [
        (one.why, one.text, one.raw) for one in reply.attempts
    ]
    arrived, left = again.attempts[0].error, reply.attempts[0].error
    assert isinstance(arrived, llm.InvalidOutput)
    assert isinstance(left, llm.InvalidOutput)
    assert arrived.report == left.report
    further = again.resume("another")  # in this process its registry is found again
    assert further.value == Book(title="Persuasion")
    assert lab.requests[-1]["temperature"] == 0.5


def test_a_deep_copy_is_one() -> None:
    registry = registry_of(lab=ScriptedModel(['{"title": "Emma"}']))
    reply = llm.call("lab/m", output=Book, registry=registry)(lambda: "a book")()
    again = copy.deepcopy(reply)
    again.value.title = "Emma, changed"
    again.attempts[0].raw.append("changed")
    assert (reply.value.title, "changed" in reply.attempts[0].raw) == ("Emma", False)
    assert again.draft is reply.draft  # nothing in it changes, and what is in it has no copy


def test_no_key_and_nothing_of_the_developers_own_travels() -> None:
    registry = llm.Registry(keys={"openai": SECRET}, clusters={"mine": llm.Cluster("http://a", key=SECRET)})
    registry.add("lab", ScriptedModel(["hello"]))

    @llm.call("lab/m", registry=registry, deps={"password": SECRET}, validation={"key": SECRET}, tools=[whisper])
    def greet() -> str:
        return "greet"

    assert SECRET.encode() not in pickle.dumps(greet())


@both
def test_tools_run_after_the_journey(journey: Any) -> None:
    model = ScriptedModel([tool_call("shout", text="a"), "done"])

    @llm.call("lab/m", registry=registry_of(lab=model), tools=[shout, whisper])
    def chat() -> str:
        return "go"

    again = journey(chat())
    assert [(one.name, one.timeout) for one in again.draft.tools] == [("shout", 3.0), ("whisper", None)]
    outcomes = again.run_tools()
    assert outcomes[0].outcome == llm.Ok("A")
    assert again.resume(outcomes).value == "done"


def test_deps_are_given_anew_where_there_were_some() -> None:
    model = ScriptedModel([tool_call("whisper", text="A")])
    call = llm.call("lab/m", registry=registry_of(lab=model), tools=[whisper], deps="secret")
    again = sent(call(lambda: "go")())
    with pytest.raises(llm.UsageError, match=r"its deps did not travel.*run_tools\(deps="):
        again.run_tools()
    assert again.run_tools(deps="mine")[0].outcome == llm.Ok("a mine")


def test_a_tool_without_a_name_in_a_module_is_told_of_when_it_should_run() -> None:
    model = ScriptedModel([tool_call("local", text="A"), "answered"])

    def local(text: str) -> str:
        """Of this function alone."""
        return text

    call = llm.call("lab/m", registry=registry_of(lab=model), tools=[llm.tool(needs_approval=lambda _: True)(local)])
    again = sent(call(lambda: "go")())
    assert [one.told() for one in again.draft.tools] == [one.told() for one in (llm.tool(local),)]
    with pytest.raises(llm.UsageError, match=r"the tool local did not travel.*llm\.result\("):
        again.run_tools()
    assert again.resume([llm.result(again.tool_calls[0].id, "B")]).value == "answered"


def test_a_validation_context_is_given_anew_before_anything_is_sent() -> None:
    model = ScriptedModel(['{"words": "a"}', '{"words": "b"}'])

    call = llm.call("lab/m", output=Quote, registry=registry_of(lab=model), validation={"source": "s"})
    again = sent(call(lambda: "quote")())
    with pytest.raises(llm.UsageError, match=r"validation did not travel.*replace\(reply\.draft, validation="):
        again.resume("more")
    with pytest.raises(llm.UsageError, match=r"validation did not travel"):
        again.fork(2)
    assert len(model.requests) == 1
    mended = replace(again, draft=replace(again.draft, validation={"source": "t"}))
    assert mended.resume("more").value.words == "b"


def test_a_type_that_has_no_name_stays_behind_and_its_value_comes() -> None:
    model = ScriptedModel(["3", "4"])
    kind: Any = Annotated[int, AfterValidator(lambda value: value + 1)]
    call = llm.call("lab/m", output=kind, registry=registry_of(lab=model))
    again = sent(call(lambda: "count")())
    assert again.value == 4
    with pytest.raises(llm.UsageError, match=r"its type did not travel.*top of a module"):
        again.resume("more")
    assert len(model.requests) == 1


def test_types_made_of_named_ones_travel() -> None:
    kinds: list[tuple[Any, str, Any]] = [
        (list[Book], '[{"title": "a"}]', [Book(title="a")]),
        (Annotated[int, Field(gt=2)], "3", 3),
        (Book | None, "null", None),
        (dict[str, tuple[int, str]], '{"a": [1, "b"]}', {"a": (1, "b")}),
    ]
    for kind, text, value in kinds:
        model = ScriptedModel([text, text])
        again = sent(llm.call("lab/m", output=kind, registry=registry_of(lab=model))(lambda: "go")())
        assert again.value == value == again.resume("more").value
        assert model.requests[0]["response_format"] == model.requests[1]["response_format"]


@both
def test_a_run_arrives_whole(journey: Any) -> None:
    model = ScriptedModel([tool_call("shout", text="a"), "done"])
    agent = llm.Agent("lab/m", name="clerk", registry=registry_of(lab=model), tools=[shout])
    run = agent.run("go")
    again = journey(run)
    assert (again.value, again.state, again.is_done) == ("done", run.state, True)
    assert [one.outcomes for one in again.steps] == [one.outcomes for one in run.steps]


def test_a_paused_run_still_has_no_value() -> None:
    @llm.tool(needs_approval=True)
    def pay(cents: int) -> str:
        """Pays."""
        return "paid"

    agent = llm.Agent(
        "lab/m", name="clerk", registry=registry_of(lab=ScriptedModel([tool_call("pay", cents=1)])), tools=[pay]
    )
    again = sent(agent.run("go"))
    assert [one.tool for one in again.pending] == ["pay"]
    with pytest.raises(llm.UsageError, match="waits for pay"):
        _ = again.value
    assert sent(llm.UNSET) is llm.UNSET
    assert copy.deepcopy(llm.UNSET) is llm.UNSET


def test_elsewhere_a_registry_is_asked_for_and_the_process_own_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another tenant's registry is never taken in its place."""
    own = llm.call("lab/m", registry=registry_of(lab=ScriptedModel(["own"])))(lambda: "hi")()
    monkeypatch.setattr(registry_module, "_default", registry_of(lab=ScriptedModel(["default"])))
    usual = llm.call("lab/m")(lambda: "hi")()
    (tmp_path / "replies").write_bytes(pickle.dumps([own, usual]))
    script = """
    import pickle, sys
    from pathlib import Path
    from diptych import llm
    from diptych.llm.testing import ScriptedModel, registry_of
    own, usual = pickle.loads(Path(sys.argv[1]).read_bytes())
    assert (own.value, usual.value) == ("own", "default")
    llm.default_registry().add("lab", ScriptedModel(["the default of this process"]))
    assert usual.resume("more").value == "the default of this process"
    try:
        own.resume("more")
    except llm.UsageError as exc:
        assert "with llm.using(registry=" in str(exc), exc
    else:
        raise AssertionError("it went on by another registry")
    with llm.using(registry=registry_of(lab=ScriptedModel(["given"]))):
        assert own.resume("more").value == "given"
    Path(sys.argv[1]).write_bytes(pickle.dumps(own))
    """
    path = str(tmp_path / "replies")
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), path], check=True, timeout=120)
    back = pickle.loads((tmp_path / "replies").read_bytes())
    assert back.draft.registry is own.draft.registry
