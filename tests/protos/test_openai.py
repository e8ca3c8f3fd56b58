"""What the request schemas honour, accept at its default, and refuse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from diptych.protos.errors import InvalidRequest
from diptych.protos.openai import FIXED, ChatRequest, CompletionRequest, parse_chat, parse_completion
from diptych.protos.openai_output import FORM_FIELDS
from diptych.protos.openai_template import TEMPLATE_FIELDS
from diptych.protos.openai_tools import TOOL_FIELDS

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "hi"}


def chat(**fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({**CHAT, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse_completion(json.dumps({**TEXT, **fields}).encode())


def blamed(**fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param is None or caught.value.param in str(caught.value)
    return caught.value.param


# Of openai 3.54's CompletionCreateParams of chat, and at values that change nothing.
FIELDS = """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
metadata modalities moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options
prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier stop store stream
stream_options temperature tool_choice tools top_logprobs top_p user verbosity web_search_options""".split()
USUAL: dict[str, Any] = {
    "prompt_cache_options": {"mode": "implicit"},
    "prompt_cache_retention": "in_memory",
    "verbosity": "medium",
}


def test_every_field_of_the_client_is_known() -> None:
    """Some were refused as unknown, or at the value that is OpenAI's default."""
    for field in FIELDS:
        chat(**{field: None})
    assert chat(**USUAL, prompt_cache_key="k").prompt_cache_key == "k"
    for field in ("moderation", *USUAL):
        assert blamed(**{field: {"mode": "other"}}) == field


HONOURED: list[tuple[str, Any]] = [
    ("max_tokens", 7),
    ("max_completion_tokens", 7),
    ("temperature", 0),
    ("temperature", 1.5),
    ("top_p", 0.5),
    ("top_k", 40),
    ("min_p", 0.05),
    ("repetition_penalty", 1.1),
    ("presence_penalty", -2),
    ("frequency_penalty", 2),
    ("n", 16),
    ("logprobs", True),
    ("prompt_logprobs", 20),
    ("min_tokens", 3),
    ("include_stop_str_in_output", True),
    ("priority", -5),
    ("timeout_s", 1.5),
    ("explain", True),
    ("seed", -(2**63)),
    ("stream", True),
    ("ignore_eos", True),
    ("user", "u"),
    ("safety_identifier", "s"),
    ("include_reasoning", False),
]


@pytest.mark.parametrize(("name", "value"), HONOURED)
def test_a_field_in_the_table_reaches_the_request_unchanged(name: str, value: Any) -> None:
    assert getattr(chat(**{name: value}), name) == value


@pytest.mark.parametrize("name", sorted(ChatRequest.fixed))
def test_a_fixed_field_is_accepted_at_each_of_its_defaults_and_refused_otherwise(name: str) -> None:
    for default in FIXED[name]:
        assert chat(**{name: default}) == chat()
    assert blamed(**{name: {"anything": "else"}}) == name


@pytest.mark.parametrize("name", sorted(CompletionRequest.fixed))
def test_a_fixed_field_of_completions_is_accepted_at_each_of_its_defaults(name: str) -> None:
    for default in FIXED[name]:
        assert completion(**{name: default}) == completion()
    with pytest.raises(InvalidRequest, match=name):
        completion(**{name: {"anything": "else"}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", True),
        ("n", 0),
        ("n", 17),
        ("best_of", 1),
        ("echo", True),
        ("n", 10**300),
        ("logprobs", 1),
        ("top_logprobs", 21),
        ("top_logprobs", 1),
        ("prompt_logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", True),
        ("min_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1000),
        ("presence_penalty", 2.01),
        ("frequency_penalty", -2.01),
        ("logit_bias", []),
        ("logit_bias", {"1": 100.5}),
        ("logit_bias", {"1": True}),
        ("logit_bias", {"1": "2"}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"01": 1}),
        ("logit_bias", {" 1": 1}),
        ("logit_bias", {"\u0661": 1}),
        ("logit_bias", {"9" * 11: 1}),
        ("logit_bias", {str(i): 1 for i in range(1025)}),
        ("bad_words", "word"),
        ("bad_words", [""]),
        ("bad_words", [1]),
        ("bad_words", ["x"] * 129),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [True]),
        ("allowed_token_ids", "1"),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", 1),
        ("stop_token_ids", list(range(129))),
        ("min_tokens", -1),
        ("priority", 2**31),
        ("priority", 0.5),
        ("timeout_s", 0),
        ("timeout_s", "1"),
        ("explain", 1),
        ("include_stop_str_in_output", "yes"),
        ("skip_special_tokens", False),
        ("frequency_penalty", False),
        ("documents", [{"text": "x"}]),
        ("guided_decoding_backend", "outlines"),
        ("guided_whitespace_pattern", "[ ]?"),
        ("include_reasoning", 1),
        ("structured", "yes"),
        ("tool_use", None),
        ("output_form", None),
        ("template", None),
        ("chat_template", "{{ 1 }}"),
        ("prompt", "hi"),
        ("temperature", "0"),
        ("temperature", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_k", True),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 5.0),
        ("max_tokens", "5"),
        ("max_tokens", 2**63),
        ("seed", 2**63),
        ("seed", 1.0),
        ("stream", 1),
        ("stream", "true"),
        ("stop", 1),
        ("stop", [""]),
        ("stop", ["a", 1]),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("user", 1),
        ("metadata", {"a": 1}),
        ("metadata", []),
        ("metadata", {str(i): "" for i in range(17)}),
        ("model", None),
        ("model", ""),
        ("messages", []),
        ("messages", {}),
        ("messages", "hi"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(name: str, value: Any) -> None:
    assert blamed(**{name: value}) == name


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hi", "messages[0]"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": []}, "messages[0].content"),
        ({"role": "user", "content": "x", "extra": 1}, "messages[0].extra"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content[0].image_url.url"),
        ({"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}, "messages[0].content[0].y"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "messages[0].content[0].text"),
        (
            {"role": "user", "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": {"mode": "x"}}]},
            "messages[0].content[0].prompt_cache_breakpoint",
        ),
    ],
)
def test_a_bad_message_is_refused_with_its_path(message: Any, param: str) -> None:
    assert blamed(messages=[message]) == param


def test_what_clients_echo_back_from_an_answer_is_accepted() -> None:
    echoed: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "tool_calls": None,
        "annotations": [],
        "audio": None,
    }
    assert chat(messages=[echoed]).messages[0].content == "x"


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).messages[0].content == "ab"


def test_the_two_names_of_max_tokens_may_not_differ() -> None:
    assert chat(max_tokens=3, max_completion_tokens=3).wanted_tokens == ("max_completion_tokens", 3)
    assert chat(max_tokens=3).wanted_tokens == ("max_tokens", 3)
    assert blamed(max_tokens=3, max_completion_tokens=4) == "max_tokens"


def test_stream_options_need_a_stream() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={}).include_usage
    assert blamed(stream_options={"include_usage": True}) == "stream_options"
    assert blamed(stream=True, stream_options={"include_obfuscation": True}) == "stream_options.include_obfuscation"
    assert blamed(stream=True, stream_options={"x": 1}) == "stream_options.x"


def test_stop_is_one_string_or_a_list_without_repetitions() -> None:
    assert chat(stop=None).stop == ()
    assert chat(stop="a").stop == ("a",)
    assert chat(stop=["a", "b", "a"]).stop == ("a", "b")


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("hi", ("hi",)),
        (["hi"], ("hi",)),
        ([1, 2], ((1, 2),)),
        ([[1, 2]], ((1, 2),)),
        ([-1, 2**31], ((-1, 2**31),)),
        (["a", "b"], ("a", "b")),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [1]], ("a", (1,))),
    ],
)
def test_prompts_are_texts_or_lists_of_ids(prompt: Any, wanted: Any) -> None:
    assert completion(prompt=prompt).prompt == wanted


def test_a_request_has_so_many_answers_at_most() -> None:
    assert len(completion(prompt=["a"] * 128).prompt) == 128
    for fields, told in (
        ({"prompt": ["a"] * 129}, "prompt holds 129 prompts; 128 is the limit"),
        ({"prompt": ["a"] * 65, "n": 2}, "65 prompts with n: 2 make 130 choices; 128 is the limit"),
    ):
        with pytest.raises(InvalidRequest, match=told):
            completion(**fields)


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], ["a", ""], [[1], []], [1.0], [True], [None], [1, "a"], {}, 1, None, [[["a"]]]]
)
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


def test_every_fixed_field_of_the_table_belongs_to_an_endpoint() -> None:
    assert ChatRequest.fixed | CompletionRequest.fixed == FIXED.keys()


def test_columns_of_ids_are_sorted_without_repetitions() -> None:
    request = chat(logit_bias={"7": -100, "3": 0.5}, allowed_token_ids=[9, 2, 9], stop_token_ids=[5, 1, 5])
    assert request.logit_bias == ((3, 0.5), (7, -100.0))
    assert request.allowed_token_ids == (2, 9)
    assert request.stop_token_ids == (1, 5)
    assert chat(bad_words=["b", "a", "b"]).bad_words == ("b", "a")
    assert chat(logit_bias=None, allowed_token_ids=None, stop_token_ids=None, bad_words=None) == chat()


@pytest.mark.parametrize("top_k", [0, -1])
def test_both_ways_to_say_every_token_are_one(top_k: int) -> None:
    assert chat(top_k=top_k).top_k == 0


def test_logprobs_are_asked_for_in_each_endpoints_own_way() -> None:
    assert chat().wanted_logprobs is None
    assert chat(logprobs=False, top_logprobs=0).wanted_logprobs is None
    assert chat(logprobs=True).wanted_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).wanted_logprobs == 20
    assert completion(logprobs=0).logprobs == 0
    assert completion(logprobs=20).logprobs == 20
    for wrong in (21, -1, True):
        with pytest.raises(InvalidRequest, match="logprobs"):
            completion(logprobs=wrong)


def test_best_of_is_n_or_nothing() -> None:
    assert completion(n=3, best_of=3).num_choices == 3
    assert completion(best_of=1).num_choices == 1
    for fields in ({"best_of": 2}, {"n": 3, "best_of": 4}, {"n": 3, "best_of": 1}, {"best_of": True}):
        with pytest.raises(InvalidRequest, match="best_of"):
            completion(**fields)


def test_no_token_is_asked_for_only_to_score_a_prompt() -> None:
    assert completion(max_tokens=0, echo=True).wanted_tokens == ("max_tokens", 0)
    with pytest.raises(InvalidRequest, match="max_tokens: 0 is for requests with echo"):
        completion(max_tokens=0)


def test_prompt_logprobs_are_not_streamed() -> None:
    assert blamed(prompt_logprobs=1, stream=True) == "prompt_logprobs"


def test_who_names_no_number_of_tokens_wants_none_in_particular() -> None:
    assert completion().wanted_tokens is None
    assert chat().wanted_tokens is None


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("n", 1.0, "n: should be a whole number"),
        ("seed", "1", "seed: should be a whole number"),
        ("timeout_s", "5", "timeout_s: should be a number"),
        ("explain", "yes", "explain: should be true or false"),
        ("model", 5, "model: should be a string"),
        ("model", "", "model: should have at least 1 character"),
        ("model", "m" * 257, "model: should have at most 256 characters"),
        ("n", 0, "n: should be greater than or equal to 1"),
        ("stream_options", 1, "stream_options: should be an object"),
    ],
)
def test_a_wrong_type_is_told_in_the_words_of_json(name: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        chat(**{name: value})
    assert str(told.value) == words


ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.0, 1.5, -0.0, 2**31, 2**63, 2**64, 10**40, -(10**40), 1e308, 5e-324),
    *("", "5", "x" * 600, "\x00", "\u2028", "\U0001f600"),
    *([], {}, [None], [[]], [[[]]], [True], [1.0], [""], ["x"] * 200, [1] * 200, [10**40]),
    *({"a": 1}, {"": None}, {"1": 1}, {"1": True}, {"01": 1}, {"-1": 1}, {" 1": 1}, {"\u0661": 1}, {"1" * 300: 1}),
]


GROUPED = TOOL_FIELDS | FORM_FIELDS | TEMPLATE_FIELDS
FLAGS = {"parallel_tool_calls", "add_generation_prompt", "continue_final_message"}
NAMES = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *FIXED, *GROUPED}


@pytest.mark.parametrize("name", sorted({*NAMES, "zzz"}))
def test_no_value_is_taken_for_another_type_or_ends_in_another_exception(name: str) -> None:
    for parse, base in ((parse_chat, CHAT), (parse_completion, TEXT)):
        for value in ODD:
            refusal = None
            try:
                request = parse(json.dumps({**base, name: value}).encode())
            except InvalidRequest as exc:
                refusal = exc
            if refusal is not None:
                assert refusal.param is not None, (value, str(refusal))
                assert refusal.param.split(".")[0].split("[")[0] == name
                assert len(str(refusal)) < 400
                continue
            if name in GROUPED:  # read with others into one value
                assert not isinstance(value, bool) or name in FLAGS, value
                continue
            taken = getattr(request, name, None)
            if isinstance(taken, bool) or isinstance(value, bool):
                assert taken is value or name in FIXED, value
            if isinstance(taken, int | float):
                assert taken == value or (name, value) == ("top_k", -1)
