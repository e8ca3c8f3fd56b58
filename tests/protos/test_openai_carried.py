"""An assistant's message goes to an OpenAI client and comes back with everything that its provider said of it.

It guards against proofs that end up at another text than they were made for.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.protos.errors import InvalidRequest
from diptych.protos.messages import Message, Part, Reasoning, Refusal, Text, ToolCall
from diptych.protos.openai_carried import OWN, carried
from diptych.protos.openai_messages import read_messages

DATA = st.sampled_from([{}, {"fam": {"a": 1}}, {"fam": {"b": []}, "other": {"c": None}}])
TEXT = st.text(max_size=8)
PART: st.SearchStrategy[Part] = st.one_of(
    st.builds(Text, TEXT, DATA),
    st.builds(Refusal, TEXT),
    st.builds(lambda text, proof, data: Reasoning(text, proof, provider_data=data), TEXT, TEXT, DATA),
    st.builds(lambda proof, data: Reasoning(proof, is_redacted=True, provider_data=data), TEXT, DATA),
    DATA.map(lambda data: ToolCall(id="", name="f", arguments={}, text="{}", provider_data=data)),
)


def wire(message: Message) -> dict[str, Any]:
    """As OpenAI's clients keep it."""
    told: dict[str, Any] = {"role": "assistant"}
    told["content"] = "".join(part.text for part in message.parts if isinstance(part, Text))
    told["refusal"] = message.refusal
    told["reasoning_content"] = message.reasoning_content
    told["tool_calls"] = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
        for call in message.tool_calls
    ]
    told["provider_specific_fields"] = carried(message)
    found: dict[str, Any] = json.loads(json.dumps(told))
    return found


def back(told: dict[str, Any]) -> Message:
    return read_messages([told])[0]


@settings(max_examples=60)
@given(st.lists(PART, max_size=6), DATA)
def test_what_was_carried_is_there_again(parts: list[Part], data: dict[str, Any]) -> None:
    named = tuple(
        ToolCall(id=f"c{i}", name="f", arguments={}, text="{}", provider_data=part.provider_data)
        if isinstance(part, ToolCall)
        else part
        for i, part in enumerate(parts)
    )
    message = Message(role="assistant", parts=named, provider_data=data)
    told = wire(message)
    found = back(told)
    assert found.content == message.content
    if told["provider_specific_fields"] is None:
        assert not any(getattr(part, "provider_data", None) or getattr(part, "signature", "") for part in named)
    else:
        assert (found.parts, found.provider_data) == (named, data)


def test_a_text_that_was_changed_has_no_proof_any_more() -> None:
    message = Message(role="assistant", parts=(Reasoning("hm", "proof"), Text("yes")))
    for change in ({"content": "no"}, {"reasoning_content": "other"}, {"reasoning_content": None}):
        found = back(wire(message) | change)
        assert not any(isinstance(part, Reasoning) and part.signature for part in found.parts)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (5, ""),
        ({}, ".parts"),
        ({"parts": [5]}, ".parts[0]"),
        ({"parts": [{"kind": "x"}]}, ".parts[0].kind"),
        ({"parts": [{"kind": "text", "chars": 1.5}]}, ".parts[0].chars"),
        ({"parts": [{"kind": "text", "chars": 1, "data": {"a": 1}}]}, ".parts[0].data.a"),
        ({"parts": [], "data": []}, ".data"),
    ],
)
def test_what_is_wrong_is_named(value: object, path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        back({"role": "assistant", "content": "x", "provider_specific_fields": {OWN: value}})
    assert caught.value.param == f"messages[0].provider_specific_fields.{OWN}{path}"
