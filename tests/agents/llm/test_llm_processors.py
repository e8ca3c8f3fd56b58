"""Processors of agents. Guards against: secrets and addresses that get through or are taken out of what is none,
hostile texts that take a second for each kilobyte, a stream that shows what a processor would have stopped, and a
beginning of requests that processors change from one turn to the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from diptych.agents import llm
from diptych.agents.llm.processors.pii import pii_of, restored
from diptych.agents.llm.testing import Entry, Said, ScriptedModel, registry_of, tool_call
from diptych.protos.messages import Reasoning, ToolCall


def agent_of(model: ScriptedModel, **given: Any) -> llm.Agent[Any, Any]:
    return llm.Agent("test/m", name="a", registry=registry_of(test=model), **given)


def asked(model: ScriptedModel, request: int = -1) -> list[Any]:
    return [turn.get("content") for turn in model.requests[request]["messages"]]


PII: list[tuple[str, str]] = [
    ("write to ana.b+x@ex-ample.co.uk, please", "write to [EMAIL], please"),
    ("<ana@b.de>;j\u00fcrgen@m\u00fcller.de.", "<[EMAIL]>;[EMAIL]."),
    ("@ana and a@b and x@1.2 and git@", "@ana and a@b and x@1.2 and git@"),
    ('{"m": "\\nana@b.de"}', '{"m": "\\n[EMAIL]"}'),
    ("+49 151 2345678, (415) 555-2671, 415-555-2671", "[PHONE], [PHONE], [PHONE]"),
    ("020 7946 0958 or 0049 30 123456", "[PHONE] or [PHONE]"),
    (
        "on 2026-11-23 at 12:30:45, order 1234567890, 1 000 000",
        "on 2026-11-23 at 12:30:45, order 1234567890, 1 000 000",
    ),
    ("4111 1111 1111 1111 12/27", "[CARD] 12/27"),
    ("378282246310005 and 4111-1111-1111-1112", "[CARD] and 4111-1111-1111-1112"),
    ("DE89 3704 0044 0532 0130 00.", "[IBAN]."),
    ("gb82west12345698765432 DE89370400440532013001", "[IBAN] DE89370400440532013001"),
    ("10.0.0.1, 2001:db8::1, ::ffff:10.0.0.1", "[IP], [IP], [IP]"),
    ("version 1.2.3.4.5, 300.1.1.1, std::vector, a::b", "version 1.2.3.4.5, 300.1.1.1, std::vector, a::b"),
]


@pytest.mark.parametrize(("text", "wanted"), PII)
def test_addresses_and_numbers_by_their_own_checks(text: str, wanted: str) -> None:
    assert llm.RedactPII().redacted(text) == wanted


def test_only_the_kinds_that_are_asked_for() -> None:
    text = "ana@b.de 10.0.0.1"
    assert llm.RedactPII(["ip"]).redacted(text) == "ana@b.de [IP]"
    with pytest.raises(llm.DefinitionError, match="no kind 'name'; there are email, phone"):
        llm.RedactPII(["name"])  # type: ignore[list-item]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([text for text, _ in PII]) | st.text(max_size=12) | st.just("[EMAIL_1]"), max_size=4))
def test_what_was_taken_out_comes_back(pieces: list[str]) -> None:
    processor, notes = llm.RedactPII(restore=True), dict[str, Any]()
    text = " ".join(pieces)
    redacted = processor.redacted(text, notes)
    assert restored(redacted, notes) == text
    assert processor.redacted(text, notes) == redacted
    assert all(text[span.begin : span.end] not in notes for span in pii_of(text))


SECRETS = [
    ("password: hunter2!", "password: [secret]"),
    ('api_key="abc-def", x', 'api_key="[secret]", x'),
    ('{\\"client_secret\\": \\"abcd\\"}', '{\\"client_secret\\": \\"[secret]\\"}'),
    ("Authorization: Bearer abcdefghijklmnop12345==", "Authorization: Bearer [secret]"),
    ("https://ana:pw1@host/x", "https://ana:[secret]@host/x"),
    ("use sk-proj-abc123def456ghi789jkl.", "use [secret]."),
    ("AKIAIOSFODNN7EXAMPLE,ghp_0123456789abcdefghijABCDEFGHIJ0123", "[secret],[secret]"),
    ('{"k":"\\nsk-proj-abc123def456ghi789jkl"}', '{"k":"\\n[secret]"}'),
    ("eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM", "[secret]"),
    ("a -----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY----- b", "a [secret] b"),
    ("-----BEGIN PRIVATE KEY----- cut off", "[secret]"),
    ("-----BEGIN CERTIFICATE-----\nMII", "-----BEGIN CERTIFICATE-----\nMII"),
    ("basic internationalization, sk-learn-compatible-estimators, my password.", None),
]


@pytest.mark.parametrize(("text", "wanted"), SECRETS)
def test_secrets_by_their_forms(text: str, wanted: str | None) -> None:
    processor = llm.RedactSecrets()
    found = processor.redacted(text)
    assert found == (text if wanted is None else wanted)
    assert processor.redacted(found) == found


HOSTILE = [
    *("a", "@", "a@", "1", "1 ", "4-", ":", "1:", "1.", "password", "password:", "-----BEGIN ", "://a:", "DE89 "),
    *("-----BEGIN PRIVATE KEY-----", "+1 ", "(0", "eyJ.", "sk-", "bearer ", " +", "a.b@c.", "a@b.de ", "[EMAIL_1]"),
    *("\u0301", "\u202e", "AKIA0123456789ABCDEF ", "\ufdfa", "secret  :  ", "\\n", "::1 ", "1.1.1.1 "),
]


@pytest.mark.parametrize(
    "change", [llm.RedactPII(restore=True).redacted, llm.RedactSecrets().redacted, llm.Normalise("NFKC").normal]
)
def test_hostile_texts_take_linear_time(change: Callable[[str], str]) -> None:
    """The bound is forty times what the worst of them takes; a search from each place to the end takes far more."""
    for piece in HOSTILE:
        text = piece * (60_000 // len(piece))
        began = time.process_time()
        change(text)
        assert time.process_time() - began < 3, piece


def test_unseen_characters_and_lengths() -> None:
    normal = llm.Normalise().normal
    assert normal("e\u0301\u202e\u200bx\x00\r\ny\rz\tq\U000e0041\ufeff\ud800") == "\u00e9x\ny\nz\tq\ufffd"
    assert normal("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469"  # a family stays together
    assert len(normal("a" + "\u0301\u0323" * 1000)) <= 32
    assert llm.Normalise("NFKC").normal("\ufb01") == "fi"
    assert llm.Normalise(controls=False).normal("a\x00") == "a\x00"
    model = ScriptedModel(["ok", "never"])
    agent_of(model, before=[llm.Normalise(most_chars=5)]).run([llm.user("abc"), llm.user("defg")])
    assert asked(model) == ["abc", "de"]
    with pytest.raises(llm.Blocked, match="Normalise blocks what the model would be told: it is longer than 5"):
        agent_of(model, before=[llm.Normalise(most_chars=5, over="block")]).run("abcdef")
    for wrong in ({"form": "NFX"}, {"most_chars": 0}, {"over": "maybe"}):
        with pytest.raises(llm.DefinitionError, match="Normalise"):
            llm.Normalise(**wrong)


def test_results_of_tools_pass_them_and_what_was_sent_stays() -> None:
    def look() -> str:
        return "mail ana@b.de, token ghp_0123456789abcdefghijABCDEFGHIJ0123"

    model = ScriptedModel([tool_call("look"), "ok"])
    agent = agent_of(
        model, instructions="ask help@us.de", tools=[look], before=[llm.RedactPII(restore=True), llm.RedactSecrets()]
    )
    agent.run("I am ana@b.de, not bob@b.de")
    assert asked(model) == [
        "ask help@us.de",  # the developer's own words
        "I am [EMAIL_1], not [EMAIL_2]",
        None,
        "mail [EMAIL_1], token [secret]",
    ]
    first, second = (body["messages"] for body in model.requests)
    assert second[: len(first)] == first


@pytest.mark.parametrize("is_streamed", [False, True])
def test_placeholders_are_restored_in_answers_and_for_tools_over_a_crash(is_streamed: bool) -> None:
    got: list[str] = []

    def send(to: str, cc: list[str]) -> str:
        got.extend([to, *cc])
        return f"sent to {to}"

    script: list[Entry] = [tool_call("send", to="[EMAIL_1]", cc=["[EMAIL_2]", "[EMAIL_9]"]), "I wrote to [EMAIL_1]."]
    model = ScriptedModel(script)
    redact = llm.RedactPII(restore=True)
    given: dict[str, Any] = {"tools": [send], "before": [redact], "after": [redact]}
    seen: list[str] = []

    def on_step(state: llm.AgentState) -> None:
        seen.append(state.to_json())

    agent = agent_of(model, **given)
    if is_streamed:
        stream = agent.stream("tell ana@b.de and bob@b.de", on_step=on_step)
        assert "".join(stream.text()) == "I wrote to ana@b.de."
        run = stream.run()
    else:
        run = agent.run("tell ana@b.de and bob@b.de", on_step=on_step)
    assert got == ["ana@b.de", "bob@b.de", "[EMAIL_9]"]
    assert run.value == run.text == "I wrote to ana@b.de."
    assert run.messages[-1].content == "I wrote to [EMAIL_1]."
    assert "ana@b.de" not in str(model.requests)
    state = llm.AgentState.from_json(seen[1])  # after the first answer, before the tool
    again = agent_of(ScriptedModel(script[1:]), **given).run(state=state)
    assert got[3:] == got[:3]
    assert again.value == run.value


def test_values_are_read_from_what_passed() -> None:
    class Contact(BaseModel):
        mail: str

    model = ScriptedModel([{"mail": "[EMAIL_1]"}])
    redact = llm.RedactPII(restore=True)
    run = agent_of(model, output=Contact, before=[redact], after=[redact]).run("ana@b.de")
    assert run.value == Contact(mail="ana@b.de")


def test_streams_show_nothing_before_it_passed() -> None:
    model = ScriptedModel([Said(text="key AKIAIOSFODNN7EXAMPLE", thoughts="AKIAIOSFODNN7EXAMPLE?")])
    events = list(agent_of(model, after=[llm.RedactSecrets()]).stream("?"))
    assert [event.text for event in events if isinstance(event, llm.TextDelta)] == ["key [secret]"]
    assert [event.text for event in events if isinstance(event, llm.ThoughtDelta)] == ["[secret]?"]

    class Looks(llm.Processor):
        needs_whole = False

    model = ScriptedModel(["four and four"])
    events = list(agent_of(model, after=[Looks()]).stream("?"))
    assert len([event for event in events if isinstance(event, llm.TextDelta)]) > 1


def test_an_answer_that_is_blocked_is_paid_and_not_kept() -> None:
    class Sum(BaseModel):
        total: int

    model = ScriptedModel(["not a sum", '{"total": 4}'])
    agent = agent_of(model, after=[llm.CheckSchema(Sum)])
    with pytest.raises(llm.Blocked) as caught:
        agent.run("?")
    error = caught.value
    assert (error.processor, error.side) == ("CheckSchema[Sum]", "after")
    assert "the answer" in error.reason
    assert error.state is not None
    assert (error.state.phase, error.state.spent.requests, len(error.state.messages)) == ("model", 1, 1)
    assert agent.run(state=error.state).value == '{"total": 4}'


def test_what_is_blocked_before_it_is_said_leaves_the_conversation_as_it_was() -> None:
    model = ScriptedModel(["hi", "bye"])
    agent = agent_of(model, before=[llm.Moderation(lambda text: "damn" in text)])
    with pytest.raises(llm.Blocked, match="the hook says so") as caught:
        agent.run("damn")
    assert caught.value.state is None
    state = agent.run("hello").state
    with pytest.raises(llm.Blocked) as caught:
        agent.run("damn", state=state)
    assert caught.value.state is not None
    assert caught.value.state.messages == state.messages
    assert agent.run("well", state=caught.value.state).value == "bye"


def test_notes_of_earlier_states_do_not_change() -> None:
    def look() -> str:
        return "bob@b.de"

    states: list[llm.AgentState] = []
    model = ScriptedModel([tool_call("look"), "ok"])
    agent = agent_of(model, tools=[look], before=[llm.RedactPII(restore=True)])
    agent.run("ana@b.de", on_step=states.append)
    assert [len(state.notes["RedactPII"]["placeholders"]) for state in states] == [1, 1, 2, 2, 2]


def test_inputs_are_checked_against_a_schema() -> None:
    model = ScriptedModel(["ok"])
    agent = agent_of(model, before=[llm.CheckSchema(list[int], on="input")])
    assert agent.run("[1, 2]").value == "ok"
    with pytest.raises(llm.Blocked, match="it is no"):
        agent.run('["x"]')
    assert len(model.requests) == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_moderation_by_a_developers_own_judgement(is_async: bool) -> None:
    seen: list[str] = []

    def judge(text: str) -> str | None:
        seen.append(text)
        return "it swears" if "damn" in text else None

    async def later(text: str) -> str | None:
        return judge(text)

    hook = later if is_async else judge
    model = ScriptedModel(["fine", "damn"])
    agent = agent_of(model, before=[llm.Moderation(hook)], after=[llm.Moderation(hook, on="output", name="Out")])
    assert agent.run("hello").value == "fine"
    with pytest.raises(llm.Blocked, match="Out blocks the model's answer: it swears"):
        agent.run("hello")
    with pytest.raises(llm.Blocked, match="Moderation blocks what the model would be told"):
        agent.run([llm.user("hello"), llm.user("damn")])
    assert len(model.requests) == 2
    assert seen == ["hello", "fine", "hello", "damn", "hello", "damn"]
    with pytest.raises(llm.UsageError, match="the hook gave a int"):
        agent_of(model, before=[llm.Moderation(lambda text: 7)]).run("?")  # type: ignore[arg-type, return-value]


def test_the_order_is_the_chains_and_own_ones_are_small() -> None:
    class Add(llm.Processor):
        def __init__(self, word: str) -> None:
            self.word = word

        @property
        def name(self) -> str:
            return f"Add {self.word}"

        async def before(self, messages: Sequence[llm.Message], ctx: llm.ProcessorContext) -> list[llm.Message]:
            ctx.notes["count"] = ctx.notes.get("count", 0) + 1
            return [llm.with_texts(message, lambda text: f"{text} {self.word}") for message in messages]

        def after(self, message: llm.Message, ctx: llm.ProcessorContext) -> llm.Message:
            assert ctx.is_final
            assert ctx.deps == "deps"
            return llm.with_texts(message, lambda text: f"{text} {self.word}")

    model = ScriptedModel(["out"])
    chain = [Add("a"), Add("b")]
    run = agent_of(model, before=chain, after=chain).run("in", deps="deps")
    assert asked(model) == ["in a b"]
    assert run.value == "out a b"
    assert run.state.notes == {"Add a": {"count": 1}, "Add b": {"count": 1}}


def test_what_processors_must_not_give() -> None:
    class Nothing(llm.Processor):
        def before(self, messages: Sequence[llm.Message], ctx: llm.ProcessorContext) -> Any:
            return None

        def after(self, message: llm.Message, ctx: llm.ProcessorContext) -> Any:
            return "text"

    with pytest.raises(llm.UsageError, match=r"Nothing.before\(...\) gave None \(is a return missing"):
        agent_of(ScriptedModel(["x"]), before=[Nothing()]).run("?")
    with pytest.raises(llm.UsageError, match=r"Nothing.after\(...\) gave a str; it gives a message"):
        agent_of(ScriptedModel(["x"]), after=[Nothing()]).run("?")

    class Drops(llm.Processor):
        def before(self, messages: Sequence[llm.Message], ctx: llm.ProcessorContext) -> Sequence[llm.Message]:
            return [message for message in messages if message.role != "tool"]

    def look() -> str:
        return "x"

    with pytest.raises(llm.UsageError, match="took the result of look away"):
        agent_of(ScriptedModel([tool_call("look")]), tools=[look], before=[Drops()]).run("?")


def test_only_words_are_changed() -> None:
    signed = Reasoning("think", "proof")
    call = ToolCall(id="c", name="f", arguments={"a": ["x", {"x": 1}]}, text='{"a": ["x", {"x": 1}]}')
    message = llm.Message(role="assistant", parts=(signed, llm.Text("x"), call))
    assert llm.with_texts(message, lambda text: text) is message
    changed = llm.with_texts(message, lambda text: text.replace("x", "y"), calls=True)
    assert changed.parts[0] is signed
    assert changed.content == "y"
    assert changed.tool_calls[0].arguments == {"a": ["y", {"x": 1}]}
    assert llm.with_texts(message, str.upper, thoughts=True).reasoning_content == "THINK"
