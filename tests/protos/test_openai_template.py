"""What a request may tell a chat template: variables of plain values, how the rendering ends; never a template."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import parse_chat, parse_completion
from diptych.protos.openai_template import TemplateOptions

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}


def options(*, messages: Any = (USER,), **fields: Any) -> TemplateOptions:
    return parse_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode()).template


def test_variables_and_the_end_of_a_rendering() -> None:
    assert options() == TemplateOptions()
    told = options(
        reasoning_effort="low", chat_template_kwargs={"enable_thinking": False, "a_b": "x", "n": 1.5, "z": None}
    )
    assert told.variables == {"reasoning_effort": "low", "enable_thinking": False, "a_b": "x", "n": 1.5, "z": None}
    for most in ("xhigh", "max"):  # words of OpenAI's client that no template knows
        asked = options(reasoning_effort=most)
        assert (asked.variables, asked.asked_effort) == ({"reasoning_effort": "high"}, most)
        kept = options(reasoning_effort=most, chat_template_kwargs={"reasoning_effort": most}).variables
        assert kept == {"reasoning_effort": most}
    assert options(reasoning_effort="low", chat_template_kwargs={"reasoning_effort": "low"}).variables == {
        "reasoning_effort": "low"
    }
    assert not options(add_generation_prompt=False).generation_prompt
    assert options(add_generation_prompt=True, continue_final_message=False) == TemplateOptions()
    for fields in ({}, {"add_generation_prompt": False}):
        going_on = options(messages=[USER, ANSWER], continue_final_message=True, **fields)
        assert (going_on.continue_final, going_on.generation_prompt) == (True, False)


KWARGS = "chat_template_kwargs"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"chat_template": "{{ 1 }}"}, "chat_template", "a template is a program"),
        ({KWARGS: {"chat_template": "{{ 1 }}"}}, f"{KWARGS}.chat_template", "a template is a program"),
        ({"documents": [{"text": "x"}]}, "documents", "into a message"),
        ({KWARGS: []}, KWARGS, "must be an object"),
        ({KWARGS: {f"a{'b' * i}": 1 for i in range(17)}}, KWARGS, "limit is 16"),
        ({KWARGS: {"A": 1}}, KWARGS, "characters a-z and _"),
        ({KWARGS: {"": 1}}, KWARGS, "characters a-z and _"),
        ({KWARGS: {"a" * 33: 1}}, KWARGS, "characters a-z and _"),
        ({KWARGS: {"a": []}}, f"{KWARGS}.a", "must be a string, a number"),
        ({KWARGS: {"a": {}}}, f"{KWARGS}.a", "must be a string, a number"),
        ({KWARGS: {"a": "x" * 1025}}, f"{KWARGS}.a", "limit is 1024"),
        ({KWARGS: {"enable_thinking": "false"}}, f"{KWARGS}.enable_thinking", "true or false"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort", "must be none, minimal, low, medium, high, xhigh or max"),
        ({"reasoning_effort": 1}, "reasoning_effort", "must be none"),
        ({"reasoning_effort": "low", KWARGS: {"reasoning_effort": "high"}}, "reasoning_effort", "differ"),
        ({"continue_final_message": True}, "continue_final_message", "end with an assistant's message"),
        ({"continue_final_message": 1}, "continue_final_message", "true or false"),
        (
            {"continue_final_message": True, "messages": [{"role": "assistant", "content": " "}]},
            "continue_final_message",
            "with a text",
        ),
        (
            {"continue_final_message": True, "add_generation_prompt": True, "messages": [ANSWER]},
            "continue_final_message",
            "exclude each other",
        ),
        (
            {
                "continue_final_message": True,
                "messages": [USER, ANSWER],
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": "required",
            },
            "continue_final_message",
            "tool_choice makes the answer a call",
        ),
    ],
)
def test_a_fault_is_refused_with_its_path(fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        options(**fields)
    assert told.value.param == param
    assert words in str(told.value)
    assert param in str(told.value)


@pytest.mark.parametrize(
    "name",
    "messages tools documents add_generation_prompt bos_token eos_token image_token raise_exception strftime_now "
    "namespace range dict loop self _x __class__ caller".split(),
)
def test_a_client_shadows_nothing_that_templates_are_given(name: str) -> None:
    """A bos_token of the client's would be one of the model's own markers."""
    with pytest.raises(InvalidRequest, match="may not set"):
        options(chat_template_kwargs={name: "x"})


def test_completions_refuse_templates_with_the_same_sentence() -> None:
    for name in ("chat_template", "documents"):
        with pytest.raises(InvalidRequest) as told:
            parse_completion(json.dumps({"model": "m", "prompt": "x", name: ["{{ 1 }}"]}).encode())
        assert told.value.param == name
