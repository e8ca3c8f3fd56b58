"""States of agents as JSON. Guards against: a conversation that comes back changed (a signature, an image, broken JSON
of a call), a state that is half read, and tools with side effects that run again after a crash.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.agents import llm
from diptych.agents.llm.message_json import messages_from_json, messages_to_json
from diptych.agents.llm.testing import Said, ScriptedModel, registry_of, tool_call
from diptych.protos.messages import Media, Message, Reasoning, Refusal, Text, ToolCall, ToolResult

_TEXT = st.text(st.characters(), max_size=8) | st.sampled_from(["", "USER:", "\x00", "\ud800", '{"a": NaN}', "{"])
_DATA = st.dictionaries(
    st.sampled_from(["anthropic", "gemini"]), st.dictionaries(_TEXT, st.integers() | st.lists(_TEXT), max_size=2)
)
_KEPT = st.sampled_from(["", "5m", "1h"])
_TEXTS = st.builds(Text, _TEXT, _DATA, _KEPT)
_MEDIA = st.builds(
    Media,
    kind=st.sampled_from(["image", "audio", "file"]),
    path=_TEXT,
    media_type=_TEXT,
    data=_TEXT,
    url=_TEXT,
    name=_TEXT,
    detail=_TEXT,
    kept=_KEPT,
)
_CALLS = st.builds(
    ToolCall,
    id=_TEXT,
    name=_TEXT,
    arguments=st.dictionaries(_TEXT, st.integers() | _TEXT | st.none(), max_size=2),
    text=_TEXT | st.sampled_from(['{"a": 1}', '{"a": 1, "a": 2}', '{"x": 1e400}']),
    provider_data=_DATA,
    kept=_KEPT,
)
_RESULTS = st.builds(
    ToolResult,
    call_id=_TEXT,
    name=_TEXT,
    parts=st.lists(_TEXTS | _MEDIA, max_size=2).map(tuple),
    is_error=st.booleans(),
    kept=_KEPT,
)
_PARTS = (
    _TEXTS
    | st.builds(Refusal, _TEXT)
    | st.builds(Reasoning, _TEXT, _TEXT, st.booleans(), _DATA, _TEXT)
    | _MEDIA
    | _CALLS
    | _RESULTS
)
_MESSAGES = st.lists(
    st.builds(
        Message,
        role=st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        parts=st.lists(_PARTS, max_size=3).map(tuple),
        name=st.none() | _TEXT,
        provider_data=_DATA,
    ),
    max_size=3,
).map(tuple)


@settings(max_examples=60, deadline=None)
@given(_MESSAGES)
def test_messages_come_back_equal_places_included(messages: tuple[Message, ...]) -> None:
    found = messages_from_json(json.loads(json.dumps(messages_to_json(messages))))
    assert found == messages
    assert repr(found) == repr(messages)  # fields that equality leaves out


def test_arguments_are_told_once_unless_the_text_says_other() -> None:
    same = ToolCall(id="1", name="f", arguments={"a": 1}, text='{"a":1}')
    other = ToolCall(id="2", name="f", arguments={"a": 2}, text="no json")
    (told,) = messages_to_json([Message(role="assistant", parts=(same, other))])
    assert "arguments" not in told["parts"][0]
    assert told["parts"][1]["arguments"] == {"a": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(version=2), "state.version is 2; this program reads 1"),
        (lambda s: s.update(version=None), "state.version is None"),
        (lambda s: s.update(phase="sleeping"), "state.phase is 'sleeping'"),
        (lambda s: s.update(turns=-1), "state.turns is -1"),
        (lambda s: s.update(turns=True), "state.turns is bool"),
        (lambda s: s.update(messages={}), "state.messages is a dict; it may be a list"),
        (lambda s: s["messages"][0].update(role="root"), r"state.messages\[0\].role is 'root'"),
        (lambda s: s["messages"][0]["parts"][0].update(type="code"), r"messages\[0\].parts\[0\].type is 'code'"),
        (lambda s: s["messages"][0]["parts"][0].update(text=1), r"parts\[0\].text is a int"),
        (lambda s: s["messages"][0]["parts"][0].pop("text"), r"parts\[0\].text is missing"),
        (lambda s: s["messages"][0]["parts"][0].update(color=1), r"parts\[0\].color is no field here"),
        (lambda s: s.update(phase="tools"), "the last message calls no tool"),
        (lambda s: s.update(head=99), "state.head is 99"),
        (lambda s: s["spent"].update(dollars="much"), "state.spent.dollars is no number"),
        (lambda s: s.update(pending=[{"kind": "wish"}]), "state.pending.kind is 'wish'"),
        (lambda s: s.update(answered={"c": 1}), "state.answered.c is a int"),
        (lambda s: s.update(children={"c": {}}), "state.children.c.version is None"),
    ],
)
def test_what_is_no_state_is_told_with_its_place(change: Any, words: str) -> None:
    state = llm.AgentState(agent="a", session="s", messages=(llm.user("hello"),))
    told = state.to_dict()
    assert llm.AgentState.from_dict(json.loads(json.dumps(told))) == state
    change(told)
    with pytest.raises(llm.UsageError, match=words):
        llm.AgentState.from_json(json.dumps(told))


def test_no_json_and_no_object() -> None:
    for text in ("", "{", "[1]", "null", "[" * 100_000):
        with pytest.raises(llm.UsageError, match=r"^(the state is no JSON|state is)"):
            llm.AgentState.from_json(text)


def test_errors_travel_with_their_state() -> None:
    state = llm.AgentState(agent="a", session="s", messages=(llm.user("hello"),))
    error = llm.BudgetExceeded("too much", "turns")
    error.state = state
    copy = pickle.loads(pickle.dumps(error))
    assert copy.state == state
    blocked = pickle.loads(pickle.dumps(llm.Blocked("Check", "bad words", "after")))
    assert (blocked.processor, blocked.reason, blocked.side) == ("Check", "bad words", "after")


def test_spent_and_pending_and_children_come_back() -> None:
    call = ToolCall(id="c", name="f", arguments={}, text="{}")
    pending = llm.Pending(call_id="c/d", tool="f", arguments={"x": [1]}, kind="approval", agent="b", reason="why")
    child = llm.AgentState(agent="b", session="s", messages=(llm.user("?"),))
    state = llm.AgentState(
        agent="a",
        session="s",
        messages=(llm.user("?"), Message(role="assistant", parts=(call,))),
        phase="paused",
        pending=(pending,),
        children={"c": child},
        answered={"x": Message(role="tool", parts=(ToolResult(call_id="x", name="f", parts=()),))},
        spent=llm.Spent(1, 2, 3, 4, 5, Decimal("0.1234567890123456789")),
        seconds=1.5,
        notes={"RedactPII": {"counts": {"EMAIL": 1}}},
    )
    assert llm.AgentState.from_json(state.to_json()) == state


def test_notes_without_json_are_told() -> None:
    state = llm.AgentState(agent="a", session="s", messages=(llm.user("?"),), notes={"P": {"x": object()}})
    with pytest.raises(llm.UsageError, match="the state of a cannot be written"):
        state.to_json()


_PROGRAM = '''
import os, sys, threading
from pathlib import Path
from diptych.agents import llm
from diptych.agents.llm.testing import Said, ScriptedModel, registry_of, tool_call

folder, mode = Path(sys.argv[1]), sys.argv[2]
kept, is_paid = folder / "state.json", threading.Event()

@llm.tool
def pay(amount: int) -> str:
    """Pays once."""
    with open(folder / "paid", "a") as file:
        file.write(f"{amount}\\n")
    return f"paid {amount}"

@llm.tool(parallel=False)
def crash() -> str:
    """Does not come back, the first time: it ends the process as soon as the other payment is in the state."""
    if mode == "first":
        is_paid.wait()
        os.kill(os.getpid(), 9)
    return "survived"

@llm.tool
async def later() -> str:
    """Is run after the crash, too."""
    with open(folder / "later", "a") as file:
        file.write("x")
    return "late"

def keep(state):
    partial = folder / "state.part"
    partial.write_text(state.to_json())
    os.replace(partial, kept)
    if "paid 5" in kept.read_text():
        is_paid.set()

first = Said(calls=(("pay", {"amount": 7}),))
second = Said(calls=(("pay", {"amount": 5}), ("crash", {}), ("later", {})))
state = llm.AgentState.from_json(kept.read_text()) if mode == "second" else None
script = [first, second, "all paid"]
model = ScriptedModel(script[state.turns:] if state else script)
child = llm.Agent("test/m", name="payer", tools=[pay, crash, later], registry=registry_of(test=model))
agent = child
if sys.argv[3] == "delegated":
    boss_script = [Said(calls=(("payer", {"request": "pay"}),)), "all paid"]
    boss = ScriptedModel(boss_script[state.turns:] if state else boss_script)
    model.entries = script
    if state:
        model = ScriptedModel(script[state.children["call_0"].turns:])
        child.registry.add("test", model)
    agent = llm.Agent("boss/m", name="boss", tools=[child.as_tool()], registry=registry_of(boss=boss))
run = agent.run(None if state else "pay 7, then 5", state=state, on_step=keep)
print(run.value, run.state.tool_calls, run.spent.requests)
'''


@pytest.mark.parametrize("kind", ["alone", "delegated"])
def test_a_process_that_is_killed_goes_on_and_pays_once(tmp_path: Path, kind: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    root = Path(__file__).parents[3]

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(program), str(tmp_path), mode, kind],
            capture_output=True,
            text=True,
            cwd=root,
            env=dict(os.environ),
            timeout=60,
            check=False,
        )

    first = run("first")
    assert first.returncode == -9, first.stderr
    assert (tmp_path / "paid").read_text() == "7\n5\n"
    second = run("second")
    assert second.returncode == 0, second.stderr
    assert second.stdout.split() == ["all", "paid", *(["4", "3"] if kind == "alone" else ["1", "5"])]
    assert (tmp_path / "paid").read_text() == "7\n5\n"


def test_an_answer_that_is_not_to_its_call_is_refused() -> None:
    def add(a: int) -> int:
        return a

    seen: list[Any] = []
    registry = registry_of(test=ScriptedModel([Said(calls=(("add", {"a": 1}),)), "end"]))
    agent = llm.Agent("test/m", name="a", tools=[add], registry=registry)
    agent.run("?", on_step=lambda one: seen.append(one.to_dict()))
    told = next(one for one in seen if one["answered"])
    (name,) = told["answered"]
    told["answered"][name]["parts"] = []
    with pytest.raises(llm.UsageError, match=f"answered.{name} is not the answer to that call"):
        llm.AgentState.from_dict(told)


def test_whatever_ends_a_run_has_its_state() -> None:
    """An error that was none of a call's left its caller without what the run had paid for."""
    model = ScriptedModel([tool_call("look", n=1), "on another model"])
    registry = registry_of(lab=model)
    looked = []

    @llm.tool
    def look(n: int) -> str:
        """Looks."""
        looked.append(n)
        return "seen"

    class Breaks(llm.Processor):
        def before(self, messages: Any, ctx: llm.ProcessorContext) -> Any:
            if messages[0].role == "tool":
                raise llm.Unsupported("no words for this", "top_k")
            return messages

    agent = llm.Agent("lab/m", name="clerk", registry=registry, tools=[look], before=[Breaks()])
    with pytest.raises(llm.Unsupported) as caught:
        agent.run("go")
    assert caught.value.state is not None
    assert (caught.value.state.turns, caught.value.state.spent.requests) == (1, 1)
    assert pickle.loads(pickle.dumps(caught.value)).state == caught.value.state
    state = llm.AgentState.from_json(caught.value.state.to_json())
    calm = llm.Agent("lab/m", name="clerk", registry=registry, tools=[look])
    run = calm.run(state=state)
    assert (run.value, run.state.turns) == ("on another model", 2)


def test_what_a_target_has_no_words_for_in_the_middle_of_a_run_can_be_gone_on_from_elsewhere() -> None:
    texts = ScriptedModel([], then=tool_call("picture"))
    texts.profile = replace(texts.profile, media=frozenset())
    boss_model = ScriptedModel([tool_call("clerk", request="look")])
    registry = registry_of(texts=texts, boss=boss_model, eyes=ScriptedModel(["a cat"]))

    @llm.tool
    def picture() -> Any:
        """A picture."""
        return llm.image(data=b"\x89PNG\r\n\x1a\n" + bytes(16))

    agent = llm.Agent("texts/m", name="clerk", registry=registry, tools=[picture])
    boss = llm.Agent("boss/m", name="boss", registry=registry, tools=[agent.as_tool()])
    with pytest.raises(llm.Unsupported) as below:
        boss.run("go")
    assert below.value.state is not None
    assert below.value.state.agent == "boss"
    assert [one.agent for one in below.value.state.children.values()] == ["clerk"]
    with pytest.raises(llm.Unsupported, match="takes no image") as caught:
        list(agent.stream("what is it?"))
    assert caught.value.state is not None
    with llm.using("eyes/m"):
        run = agent.run(state=caught.value.state)
    assert (run.value, run.state.turns, run.state.tool_calls) == ("a cat", 2, 1)


def test_what_is_wrong_before_a_run_begins_has_no_state() -> None:
    agent = llm.Agent("lab/m", name="clerk", registry=registry_of(lab=ScriptedModel([])))
    with pytest.raises(llm.UsageError) as caught:
        agent.run()
    assert caught.value.state is None
