"""What a call asks for arrives as it was asked for, or is refused with a word on what to do.

Guards against a parameter that a wire format drops in silence, an option of one family that reaches another, a misspelt
name that goes nowhere, layers that hold in the wrong order, and settings that change after they were given.
"""

from __future__ import annotations

import json
import logging
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.agents import llm
from diptych.agents.llm import params as all_params
from diptych.agents.llm.exchange import prepared
from diptych.agents.llm.machine import Machine, drive
from diptych.agents.llm.params import FAMILIES, NAMES, Options, layered, merged
from diptych.agents.llm.testing import ScriptedModel, registry_of
from diptych.cluster.providers.table import built_in
from diptych.cluster.router_settings import is_label
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_output import FORM_FIELDS
from diptych.protos.openai_template import TEMPLATE_FIELDS
from diptych.protos.openai_tools import TOOL_FIELDS
from diptych.protos.providers.codec import Outgoing

# A model of each wire format that takes what can be asked for.
MODELS = {
    "pool": "pool/m",
    "openai": "openai/gpt-6-luna",
    "openai_responses": "openai_responses/gpt-6-luna",
    "anthropic": "anthropic/claude-sonnet-4-5",
    "gemini": "google/gemini-3.5-flash",
    "bedrock": "bedrock/anthropic.claude-sonnet-4-5",
    "openrouter": "openrouter/x/y",
    "mistral": "mistral/mistral-small-latest",
}


def registry() -> llm.Registry:
    """All of the table, with a key for each; nothing is sent."""
    host = {"databricks": {"account": "dbc-a1b2.cloud.databricks.com"}}
    keys = {name: "k" for name, entry in built_in().items() if entry.keys and entry.auth not in ("aws", "google")}
    environ = {"AWS_REGION": "eu-west-1", "GOOGLE_CLOUD_PROJECT": "p", "DIPTYCH_URL": "http://127.0.0.1:1"}
    environ |= {place.env[0]: "a" for entry in built_in().values() for place in (entry.account, entry.region)
                if place is not None and place.env}  # fmt: skip
    return llm.Registry(keys=keys, providers=host, environ=environ)


ALL = registry()


def outgoing(model: str, **settings: Any) -> Outgoing:
    @llm.call(model, registry=ALL, **settings)
    def question() -> str:
        return "hello"

    def machine() -> Machine[Outgoing]:
        return (yield from prepared((yield from question.draft()))).outgoing

    return drive(machine())


def body(model: str, **settings: Any) -> dict[str, Any]:
    return outgoing(model, **settings).body


def a_value(kind: Any, name: str) -> Any:
    """One of the type; texts and lists tell where they come from."""
    if get_origin(kind) is not None and str(get_origin(kind)).endswith("Literal"):
        return get_args(kind)[0]
    origin = get_origin(kind) or kind
    if origin is list:
        return [a_value(get_args(kind)[0], name)]
    if origin is dict:
        return {f"a-{name}": a_value(get_args(kind)[1], name)}
    if kind is bool:
        return True
    if kind is int:
        return 7
    if kind is float:
        return 0.375
    return next((a_value(one, name) for one in get_args(kind)), f"text of {name}")


FIELDS = [
    (family, name, a_value(kind, name))
    for family, fields in get_type_hints(Options).items()
    for name, kind in get_type_hints(fields).items()
]


@pytest.mark.parametrize(("family", "name", "value"), FIELDS, ids=lambda v: v if isinstance(v, str) else None)
def test_every_option_of_every_family_reaches_the_body_unchanged(family: str, name: str, value: Any) -> None:
    sent = body(MODELS[family], options={family: {name: value}})
    assert sent[name] == value
    assert json.dumps(sent)


@pytest.mark.parametrize("provider", sorted(built_in()))
def test_an_option_reaches_every_provider_of_the_table_and_no_other(provider: str) -> None:
    """By the provider's own name, and by that of its family; `extra` whatever the target is."""
    model = f"{provider}/{built_in()[provider].example}"
    family = built_in()[provider].quirks.get("family", provider)
    mine = {"seen": {"a": [1, None]}} if provider not in FAMILIES else None
    name, value = next(iter(mine.items())) if mine else next((n, v) for f, n, v in FIELDS if f == provider)
    sent = body(model, options={provider: {name: value}}, extra={"other": None})
    assert sent[name] == value
    assert sent["other"] is None
    if family not in FAMILIES:
        assert body(model, options={family: {"seen": 1}})["seen"] == 1
    stranger = "xai" if provider != "xai" else "cohere"
    assert "seen" not in body(model, options={stranger: {"seen": 1}})


# Portable parameters, each with a value that asks for something.
PORTABLE: dict[str, Any] = {
    "temperature": 0.25,
    "top_p": 0.75,
    "top_k": 11,
    "max_tokens": 4321,
    "stop": ("END", "STOP"),
    "seed": 991,
    "presence_penalty": 0.125,
    "frequency_penalty": 0.625,
    "logit_bias": {17: 3.5},
    "thinking": "high",
    "thinking_tokens": 2048,
    "user": "somebody",
    "parallel_tools": False,
    "tool_choice": "look",
}
HERE = {"session", "timeout", "first_token_timeout", "options", "extra", "on_unsupported"}  # not for the body


def look(place: str) -> str:
    """Looks.

    Args:
        place: where
    """
    return place


def test_the_table_of_portable_parameters_is_complete() -> None:
    assert {*PORTABLE, *HERE} == NAMES


@pytest.mark.parametrize("provider", ["pool", *sorted(built_in())])
@pytest.mark.parametrize("name", sorted(PORTABLE))
def test_a_portable_parameter_is_said_or_refused_by_name(name: str, provider: str) -> None:
    model = "pool/m" if provider == "pool" else f"{provider}/{built_in()[provider].example}"
    tools = [look] if name in ("parallel_tools", "tool_choice") else []
    refused: llm.Unsupported | None = None
    try:
        sent = outgoing(model, tools=tools, **{name: PORTABLE[name]})
    except llm.Unsupported as exc:
        refused = exc
        assert body(model, tools=tools, **{name: PORTABLE[name]}, on_unsupported="drop")
    if refused is not None:
        assert refused.field
        assert provider in str(refused)
        return
    if name == "user" and [note.field for note in sent.notes if note.kind == "omitted"] == ["user"]:
        return  # no instruction to the model: where a format has no place for it, the answer is none the worse
    assert sent.body != body(model, tools=tools), f"{provider} is not told of {name}"
    if name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "user"):
        assert json.dumps(PORTABLE[name]) in json.dumps(sent.body)


def test_what_cannot_be_said_is_left_out_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(llm.Unsupported, match=r"anthropic/claude-sonnet-4-5 has no words for seed .*on_unsupported"):
        body(MODELS["anthropic"], seed=1)
    with caplog.at_level(logging.WARNING, logger="diptych.agents.llm.draft"):
        assert "seed" not in body(MODELS["anthropic"], seed=1, on_unsupported="warn")
    assert "has no words for seed" in caplog.text
    caplog.clear()
    body(MODELS["anthropic"], seed=1, on_unsupported="drop")
    assert not caplog.text


def test_options_of_a_cluster_are_what_its_api_takes_beyond_the_portable_ones() -> None:
    taken = (set(ChatRequest.model_fields) - ChatRequest.made) | FORM_FIELDS | TOOL_FIELDS | TEMPLATE_FIELDS
    portable = {all_params._FIELDS.get(name, name) for name in PORTABLE}
    of_the_call = {"model", "messages", "tools", "response_format", "stream", "stream_options", "structured"}
    other_words = {"functions", "function_call", "structured_outputs", "max_completion_tokens"}  # of the same
    of_the_prompt = {"continue_final_message", "add_generation_prompt"}
    one_answer = {"n"}
    assert FAMILIES["pool"] == taken - portable - of_the_call - other_words - of_the_prompt - one_answer


def test_options_of_a_cluster_are_taken_by_its_own_reader() -> None:
    """A body with each of them passes, where the value is one of the kind."""
    from diptych.protos.openai import parse_chat

    values = {
        "guided_choice": ["a", "b"], "guided_regex": "a+", "guided_json": {"type": "object"}, "metadata": {"a": "b"},
        "guided_grammar": "start: /a/", "top_logprobs": 3, "allowed_token_ids": [1], "stop_token_ids": [2],
        "bad_words": ["x"], "repetition_penalty": 1.5, "min_p": 0.1, "chat_template_kwargs": {"enable_thinking": False},
        "provider_options": {"openai": {"store": True}}, "prompt_logprobs": 2,
    }  # fmt: skip
    for _, name, made in (one for one in FIELDS if one[0] == "pool"):
        options = {name: values.get(name, made)} | ({"logprobs": True} if name == "top_logprobs" else {})
        parse_chat(json.dumps(body("pool/m", options={"pool": options})).encode())


def test_a_name_that_nobody_knows_is_told_with_what_is_close() -> None:
    for settings, words in (
        ({"temprature": 1}, r"question: llm\.call\(\.\.\.\): there is no .* 'temprature': did you mean temperature\?"),
        ({"options": {"pool": {"minp": 1}}}, r"pool has no option 'minp': did you mean min_p\?"),
        ({"options": {"pool": {"zzz": 1}}}, r"pool has no option 'zzz'; extra takes any field"),
        ({"options": {"pool": 3}}, r"options\.pool is a mapping"),
        ({"options": 3}, r"options is a mapping"),
        ({"extra": [1]}, r"extra is a mapping"),
        ({"logit_bias": [1]}, r"logit_bias is a mapping"),
        ({"on_unsupported": "ignore"}, r"error, warn or drop, not 'ignore'"),
        ({"timeout": 0}, r"timeout is a number of seconds above 0, not 0"),
        ({"timeout": "5"}, r"timeout is a number of seconds above 0, not '5'"),
        ({"first_token_timeout": float("nan")}, r"first_token_timeout is a number"),
        ({"session": "a\r\nx-tenant: b"}, r"session is a text of 1 to 128 printable"),
        ({"session": 7}, r"session is a text"),
    ):  # fmt: skip
        with pytest.raises(llm.UsageError, match=words):
            body("pool/m", **settings)
    with pytest.raises(llm.UsageError, match=r"there is no target 'antropic': did you mean anthropic\?"):
        body("pool/m", options={"antropic": {"top_k": 1}})
    with pytest.raises(llm.UsageError, match="there is no parameter 'tempurature'"):
        llm.using(tempurature=1).__enter__()  # type: ignore[call-arg]
    with pytest.raises(llm.UsageError, match=r"Registry\(params=\.\.\.\)"):
        llm.Registry(params={"temp": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "question: max_tokens: should be"),
        ({"max_tokens": True}, "question: max_tokens: should be"),
        ({"stop": [1]}, "stop"),
        ({"thinking": "very"}, "question: thinking must be"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tool_choice": "look"}, "'look' is none of: none"),
        ({"thinking_tokens": 0}, "question: thinking_tokens: should be"),
        ({"stop": 3}, "question: .*stop is a text or a list of texts, not a int"),
        ({"extra": {"a": object()}}, r"question: .*extra\.a holds what JSON has not"),
        ({"extra": {"a": float("nan")}}, r"extra\.a holds what JSON has not"),
        ({"extra": {1: 2}}, "extra: fields have names, and 1 is none"),
        ({"options": {"pool": {"min_p": {1}}}}, r"options\.pool holds what JSON has not"),
        ({"retries": 3}, r"question: llm\.call\(\.\.\.\): retries is llm\.Retries\(attempts=\.\.\.\), not a int"),
        ({"budget": 100}, "budget is llm.Budget"),
        ({"limiter": 4}, "limiter is llm.Limiter"),
        ({"hooks": print}, "hooks is llm.Hooks"),
        ({"cache": True}, "cache is llm.Cache.* or False, not a bool"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_sent(settings: dict[str, Any], words: str) -> None:
    model = ScriptedModel([])

    def ask() -> None:
        @llm.call("test/m", registry=registry_of(test=model), **settings)
        def question() -> str:
            return "hello"

        question()

    with pytest.raises(llm.UsageError, match=words):
        ask()
    assert model.requests == []


def test_a_setting_of_another_class_is_refused_by_with_too() -> None:
    @llm.call("test/m", registry=registry_of(test=ScriptedModel([])))
    def question() -> str:
        return "hello"

    with pytest.raises(llm.UsageError, match=r"question\.with_\(\.\.\.\): registry is llm\.Registry"):
        question.with_(registry="mine")  # type: ignore[arg-type]


def test_a_parameter_may_have_any_name() -> None:
    """A function's `self` is not the call's."""
    model = ScriptedModel([], then="ok")

    @llm.call("test/m", registry=registry_of(test=model))
    def question(self: str, model: str) -> str:
        return f"{self} {model}"

    given = {"self": "a", "model": "b"}
    assert question(**given).text == question.stream(**given).reply().text == "ok"
    assert question.request(**given)["messages"][0]["content"] == "a b"
    assert llm.prompt(question.function)(**given)[0].content == "a b"


def test_what_a_reply_shows_of_itself_holds_no_dependencies() -> None:
    @llm.call("test/m", registry=registry_of(test=ScriptedModel(["ok"])), deps="u:hidden@h", validation="hidden")
    def question() -> str:
        return "hello"

    assert "hidden" not in repr(question())


def test_later_layers_hold_and_none_takes_away_what_lies_below() -> None:
    model = ScriptedModel([], then="ok")
    own = llm.Registry(
        params={"temperature": 0.1, "seed": 1, "options": {"pool": {"min_p": 0.1, "priority": 1}}}, environ={}
    )
    own.add("test", model)

    @llm.call("test/m", registry=own, temperature=0.2, options={"pool": {"min_p": 0.2}}, extra={"a": 1, "b": 1})
    def question() -> str:
        return "hello"

    def sent() -> dict[str, Any]:
        return {name: value for name, value in model.requests[-1].items() if name not in ("model", "messages")}

    question()
    assert sent() == {"temperature": 0.2, "seed": 1, "min_p": 0.2, "priority": 1, "a": 1, "b": 1}
    changed = question.with_(temperature=0.3, seed=None, extra={"b": 2})
    changed()
    assert sent() == {"temperature": 0.3, "min_p": 0.2, "priority": 1, "a": 1, "b": 2}
    with llm.using(temperature=0.4, options={"pool": {"priority": None}}):  # type: ignore[arg-type]
        changed()
        assert sent() == {"temperature": 0.4, "min_p": 0.2, "a": 1, "b": 2}
        with llm.using(temperature=None, extra=None, options=None):
            changed()
            assert sent() == {}
        changed()
        assert sent()["temperature"] == 0.4
    changed.with_(extra={"a": None})()
    assert sent()["a"] is None
    question()
    assert sent()["temperature"] == 0.2


def test_what_was_given_does_not_change_with_its_giver() -> None:
    options: Any = {"pool": {"bad_words": ["a"]}}
    stop = ["x"]
    model = ScriptedModel([], then="ok")

    @llm.call("test/m", registry=registry_of(test=model), options=options, stop=stop)
    def question() -> str:
        return "hello"

    options["pool"]["bad_words"].append("b")
    stop.append("y")
    question()
    assert model.requests[0]["bad_words"] == ["a"]
    assert model.requests[0]["stop"] == ["x"]


_VALUES = st.one_of(st.none(), st.integers(0, 3))
_LAYERS = st.dictionaries(
    st.sampled_from(["seed", "top_k", "options", "extra"]), st.none() | st.integers(0, 3), max_size=4
).flatmap(
    lambda plain: st.tuples(
        st.just({name: value for name, value in plain.items() if name in ("seed", "top_k")}),
        st.none() | st.dictionaries(st.sampled_from("ab"), _VALUES, max_size=2),
        st.none() | st.dictionaries(st.sampled_from("fg"), st.none() | st.dictionaries(st.sampled_from("ab"), _VALUES)),
    ).map(lambda parts: {**parts[0], "extra": parts[1], "options": parts[2]})
)


@given(st.lists(_LAYERS, max_size=4), st.integers(0, 4))
def test_layers_may_be_laid_in_any_grouping(layers: list[dict[str, Any]], at: int) -> None:
    """with_ and using lay some of them together first; what is sent is the same."""
    assert merged(*layers) == merged(layered(*layers[:at]), layered(*layers[at:]))
    assert all(value is not None for value in merged(*layers).values())


@given(st.text(max_size=140))
def test_names_of_sessions_are_those_that_a_cluster_takes(text: str) -> None:
    assert all_params.is_label(text) == is_label(text)
