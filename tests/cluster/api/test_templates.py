"""Conversations with tools, reasoning and odd orders of roles reach every style of chat template, whole."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cluster.api.render import Renderer, ends_inside
from diptych.cluster.api.template import MAX_RENDER_S, Budget, TooMuch
from diptych.cluster.api.testing import TEMPLATE, byte_level_tokenizer
from diptych.cluster.config import default_cache_dir
from diptych.cluster.models import resolve
from diptych.cluster.models.trial import check_template
from diptych.protos.anthropic_messages import parse_messages
from diptych.protos.errors import InvalidRequest, StartupError
from diptych.protos.openai import ChatRequest, parse_chat

# Written for these tests in the style of the families they are named after.
QWEN = """\
{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{{- '# Tools\n<tools>' }}
{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}
{%- if message.reasoning_content is string and loop.last %}
{{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
{%- endif %}{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{%- endif %}{{- '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif message.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
LLAMA = """\
{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" + system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{%- if loop.first and tools is not none %}{{- "Functions:\n\n" }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}{%- endif %}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}
{%- if not message.tool_calls | length == 1 %}{{- raise_exception("Only single tool-calls!") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
{%- else %}{{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
{%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
{%- else %}{{- message.content }}{%- endif %}{{- "<|eot_id|>" }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
MISTRAL = """\
{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
{%- if message["role"] == "user" or (message["role"] == "assistant" and not message.tool_calls is defined) %}
{%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
{{- raise_exception("roles must alternate user/assistant/user/assistant/...") }}{%- endif %}
{%- set ns.index = ns.index + 1 %}
{%- elif message["role"] not in ["assistant", "tool"] %}{{- raise_exception("Only user, assistant and tool roles!") }}
{%- endif %}{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
{%- if message["role"] == "user" %}
{%- if tools is not none and (message == user_messages[-1]) %}
{{- "[AVAILABLE_TOOLS] " + (tools | tojson) + "[/AVAILABLE_TOOLS]" }}
{%- endif %}
{%- if loop.last and system_message is defined %}
{{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
{%- elif message.tool_calls is defined and message.tool_calls is not none %}{{- "[TOOL_CALLS] [" }}
{%- for call in message.tool_calls %}{%- set out = call.function | tojson %}{{- out[:-1] }}
{%- if not call.id is defined or call.id | length != 9 %}{{- raise_exception("ids have length 9!") }}{%- endif %}
{{- ', "id": "' + call.id + '"}' }}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{{- "]" + eos_token }}
{%- elif message["role"] == "assistant" %}{{- " " + message["content"] | trim + eos_token }}
{%- elif message["role"] == "tool" %}
{%- if not message.tool_call_id is defined or message.tool_call_id | length != 9 %}
{{- raise_exception("ids have length 9!") }}
{%- endif %}{{- '[TOOL_RESULTS] {"content": ' + message.content | string + ', "call_id": "' + message.tool_call_id }}
{{- '"}' + "[/TOOL_RESULTS]" }}{%- endif %}{%- endfor %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{%- if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
DEEPSEEK = """\
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(system_prompt='', first=true) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system_prompt = ns.system_prompt + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token + ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{- '<User>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}
{%- for tool in message['tool_calls'] %}
{{- '<Assistant><call>' + tool['type'] + '<sep>' + tool['function']['name'] + '\n' + tool['function']['arguments'] }}
{{- '</call>' }}{%- endfor %}{{- '<end>' }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is not none %}
{%- set content = message['content'] %}{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1] %}
{%- endif %}{{- '<Assistant>' + content + '<end>' }}{%- endif %}
{%- if message['role'] == 'tool' %}{{- '<output>' + message['content'] + '</output>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<Assistant><think>\n' }}{%- endif %}"""
PARTS = """\
{% for message in messages %}{{ '[' + message.role + ']' }}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '[end]' }}
{%- endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"""
DROPS = """\
{% for message in messages %}{% if message.role == 'system' and loop.first %}{{ '<S>' + message.content }}
{%- elif message.role == 'user' %}{{ '<U>' + message.content }}
{%- elif message.role == 'assistant' %}{{ '<A>' + message.content }}{% endif %}{% endfor %}{{ '<A>' }}"""
EVERY = {
    "chatml": TEMPLATE,
    "qwen": QWEN,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "deepseek": DEEPSEEK,
    "parts": PARTS,
    "drops": DROPS,
}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ANSWER = {"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a thing"}
SYSTEM = {"role": "system", "content": "be brief"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
ARGUMENTS = '{"city":"K\u00f6ln",  "days":[1,2]}'
CALLING: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "content": '{"sky": "blue"}'}


def request(messages: list[Any], **fields: Any) -> ChatRequest:
    return parse_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode())


@contextlib.contextmanager
def renderer_of(template: str) -> Iterator[Renderer]:
    renderer = Renderer(byte_level_tokenizer(), template, variables=VARIABLES)
    try:
        yield renderer
    finally:
        renderer.close()


def written(template: str, messages: list[Any], instruction: str | None = None, **fields: Any) -> str:
    asked = request(messages, **fields)
    with renderer_of(template) as renderer:
        return renderer.chat_text(asked.messages, tools=asked.tool_use, options=asked.template, instruction=instruction)


@pytest.mark.parametrize("name", EVERY)
def test_a_template_that_takes_a_conversation_writes_what_transformers_writes(name: str) -> None:
    """A key too many, None for a missing field or a text for an object would show here."""
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    conversations: list[tuple[list[Any], Any]] = [([USER], None), ([USER, ANSWER, USER], None)]
    if name in ("qwen", "llama", "mistral"):
        told = {**CALLING, "content": "", "tool_calls": json.loads(json.dumps(CALLING["tool_calls"]))}
        told["tool_calls"][0]["function"]["arguments"] = json.loads(ARGUMENTS)
        conversations += [([USER], TOOLS), ([USER, told, RESULT], TOOLS)]
    if name in ("qwen", "llama", "chatml", "deepseek"):
        conversations.append(([SYSTEM, USER], None))
    for messages, tools in conversations:
        sent = [CALLING if "tool_calls" in message else message for message in messages]
        given = messages
        if name == "parts":
            given = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        wanted, _ = theirs([given], tools=tools, chat_template=EVERY[name], add_generation_prompt=True, **VARIABLES)
        fields = {"tools": tools} if tools else {}
        assert written(EVERY[name], sent, **fields) == wanted[0]


@pytest.mark.parametrize("name", EVERY)
def test_calls_and_results_reach_every_template(name: str) -> None:
    """Templates without a form for them left them out, or raised over a content that is None."""
    text = written(EVERY[name], [USER, CALLING, RESULT], tools=TOOLS)
    for part in ("what is it", "weather", "K\u00f6ln", "sky", "Tells the weather."):
        assert part in text


def test_a_template_that_joins_arguments_to_a_text_gets_the_clients_own() -> None:
    """DeepSeek's templates add the arguments to a text, others look into them."""
    assert f"weather\n{ARGUMENTS}</call>" in written(DEEPSEEK, [USER, CALLING, RESULT])
    assert written("{{ messages[0].tool_calls[0].function.arguments }}", [CALLING]) == ARGUMENTS
    assert written("{{ messages[0].tool_calls[0].function.arguments.city }}", [CALLING]) == "K\u00f6ln"


@pytest.mark.parametrize("place", [0, 1, 2, 3])
@pytest.mark.parametrize("name", EVERY)
def test_a_system_message_anywhere_arrives(name: str, place: int) -> None:
    """Mistral's and Gemma's templates refuse it, others leave it out without a word."""
    messages = [USER, ANSWER, USER]
    messages.insert(place, {"role": "system", "content": "only in verse"})
    text = written(EVERY[name], messages)
    assert text.count("only in verse") == 1
    assert text.count("what is it") == 2
    assert text.count("a thing") == 1


def test_where_a_later_system_message_goes() -> None:
    later = {"role": "system", "content": "VERSE"}
    assert "[INST] VERSE\n\nwhat is it[/INST]" in written(MISTRAL, [USER, ANSWER, later, USER])
    assert "[INST] what is it\n\nVERSE[/INST] a thing" in written(MISTRAL, [USER, later, ANSWER])
    assert written(MISTRAL, [USER, ANSWER, later]).endswith("a thing</s>[INST] VERSE[/INST]")
    amid = written(MISTRAL, [USER, CALLING, RESULT, later, later], tools=TOOLS)
    assert "[INST] what is it\n\nVERSE\n\nVERSE[/INST][TOOL_CALLS]" in amid
    assert written(MISTRAL, [SYSTEM, later, USER]) == "<s>[INST] be brief\n\nVERSE\n\nwhat is it[/INST]"
    assert "<start_of_turn>user\nbe brief\n\nwhat is it<end_of_turn>" in written(GEMMA, [SYSTEM, USER])
    assert "<|im_start|>system\nVERSE<|im_end|>" in written(QWEN, [USER, ANSWER, later, USER])


def test_two_turns_of_a_role_become_one_only_where_a_template_refuses_them() -> None:
    assert "[INST] what is it\n\nwhat is it[/INST]" in written(MISTRAL, [USER, USER])
    assert written(QWEN, [USER, USER]).count("<|im_start|>user") == 2


def test_ids_that_a_template_refuses_are_made_short() -> None:
    """Mistral's templates take ids of nine characters alone; clients send the ids of any server."""
    long = json.loads(json.dumps([USER, CALLING, RESULT]).replace("abcdefgh1", "call_0123456789abcdef"))
    text = written(MISTRAL, long, tools=TOOLS)
    assert "call_0123456789abcdef" not in text
    short = text.split('"id": "')[1][:9]
    assert text.count(short) == 2
    assert "abcdefgh1" in written(MISTRAL, [USER, CALLING, RESULT], tools=TOOLS)


def test_a_refusal_in_every_form_is_told_in_the_templates_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        written(MISTRAL, [ANSWER, USER])
    both = {**CALLING, "tool_calls": [dict(CALLING["tool_calls"][0], id=f"abcdefgh{i}") for i in range(2)]}
    with pytest.raises(InvalidRequest, match="Only single tool-calls"):
        written(LLAMA, [USER, both])


def test_a_developer_is_the_system_unless_the_template_knows_better() -> None:
    developer = {"role": "developer", "content": "be brief"}
    assert written(QWEN, [developer, USER]) == written(QWEN, [SYSTEM, USER])
    knows = "{% for m in messages %}{{ m.role }}{% if m.role == 'developer' %}!{% endif %} {{ m.content }} {% endfor %}"
    assert written(knows, [developer, USER]) == "developer! be brief user what is it "


def test_a_template_without_tools_is_told_of_them_in_words() -> None:
    with renderer_of(TEMPLATE) as plain, renderer_of(QWEN) as knowing:
        assert (plain.knows_tools, knowing.knows_tools) == (False, True)
    text = written(TEMPLATE, [SYSTEM, USER], tools=TOOLS)
    assert text.startswith('<|im_start|>system\nbe brief\n\nYou can call these functions:\n{"name": "weather"')
    assert "answer with nothing but this JSON" in text
    assert "JSON list" in text
    assert "JSON list" not in written(TEMPLATE, [USER], tools=TOOLS, parallel_tool_calls=False)
    assert written(TEMPLATE, [USER], tools=TOOLS, tool_choice="required").count("Answer with a call") == 1
    text = written(TEMPLATE, [USER, CALLING, RESULT])
    assert f'<|im_start|>assistant\n{{"name": "weather", "arguments": {ARGUMENTS}}}<|im_end|>' in text
    assert '<|im_start|>user\nResult of weather (abcdefgh1):\n{"sky": "blue"}<|im_end|>' in text


@pytest.mark.parametrize("name", EVERY)
def test_tools_that_may_not_be_called_are_not_told(name: str) -> None:
    assert written(EVERY[name], [USER], tools=TOOLS, tool_choice="none") == written(EVERY[name], [USER])


@pytest.mark.parametrize("name", EVERY)
def test_an_instruction_joins_the_system_message(name: str) -> None:
    assert "be brief\n\nAs JSON." in written(EVERY[name], [SYSTEM, USER], instruction="As JSON.")
    alone = written(EVERY[name], [USER], instruction="As JSON.")
    assert alone.count("As JSON.") == 1
    assert alone.index("As JSON.") < alone.index("what is it")


def test_reasoning_and_its_switches_reach_the_template() -> None:
    thought = {**ANSWER, "reasoning_content": "hm"}
    assert "<think>\nhm\n</think>\n\na thing" in written(QWEN, [USER, thought])
    assert "<think>\nhm\n</think>\n\na thing" in written(QWEN, [USER, {**ANSWER, "reasoning": "hm"}])
    off = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert written(QWEN, [USER], chat_template_kwargs={"enable_thinking": False}).endswith(off)
    assert written(QWEN, [USER], reasoning_effort="none").endswith(off)
    assert not written(QWEN, [USER], reasoning_effort="high").endswith(off)
    silent = parse_messages(json.dumps({"model": "m", "max_tokens": 9, "messages": [USER]}).encode())
    with renderer_of(QWEN) as renderer:  # what the format means by its silence, which no provider is told
        assert renderer.chat_text(silent.messages, tools=None, options=silent.template).endswith(off)
    assert silent.template.variables == {}
    assert written("{{ reasoning_effort }}", [USER], reasoning_effort="low") == "low"
    assert "1 May" in written(LLAMA, [USER], chat_template_kwargs={"date_string": "1 May"})
    assert written(TEMPLATE, [USER], chat_template_kwargs={"thinking": True}) == written(TEMPLATE, [USER])
    with pytest.raises(InvalidRequest, match="reads no such variable") as told:
        written(QWEN, [USER], chat_template_kwargs={"date_string": "1 May"})
    assert told.value.param == "chat_template_kwargs.date_string"


@pytest.mark.parametrize("name", EVERY)
def test_an_answer_goes_on_where_the_last_message_ended(name: str) -> None:
    text = written(EVERY[name], [USER, {**ANSWER, "content": "a thing that"}], continue_final_message=True)
    assert text.endswith("a thing that")
    assert "what is it" in text


def test_a_last_text_keeps_its_spaces_where_the_template_does() -> None:
    spaced = {**ANSWER, "content": "  a thing \n"}
    assert written(TEMPLATE, [USER, spaced], continue_final_message=True).endswith("assistant\n  a thing \n")
    assert written(GEMMA, [USER, spaced], continue_final_message=True).endswith("model\na thing")
    with pytest.raises(InvalidRequest, match="does not write the last message"):
        written("{{ messages[0].content }}", [USER, ANSWER], continue_final_message=True)
    with pytest.raises(InvalidRequest, match="does not write the last message"):
        written(DEEPSEEK, [USER, {**ANSWER, "content": "<think>x</think>y"}], continue_final_message=True)


def test_a_rendering_may_end_behind_the_last_message() -> None:
    assert written(TEMPLATE, [USER], add_generation_prompt=False).endswith("what is it<|im_end|>\n")


@pytest.mark.parametrize(
    ("text", "inside"),
    [("", False), ("<think>", True), ("<think>\n", True), ("<think></think>", False), ("</think><think>x", True)],
)
def test_a_text_ends_inside_what_began_last(text: str, inside: bool) -> None:
    assert ends_inside(text, "<think>", "</think>") is inside


def test_a_user_who_writes_a_marker_begins_no_reasoning() -> None:
    """A look at the whole prompt would take the answer for reasoning to its end."""
    for template, begins in ((QWEN, False), (DEEPSEEK, True)):
        with renderer_of(template) as renderer:
            for content in ("what is <think>?", "x", "", "<think>", "Assistant", "<Assistant><think>\n"):
                asked = request([SYSTEM, {"role": "user", "content": content}])
                lead = renderer.answer_lead(renderer.chat_text(asked.messages), asked.messages)
                assert ends_inside(lead, "<think>", "</think>") is begins
            asked = request([USER, {**ANSWER, "content": "<think>so"}], continue_final_message=True)
            text = renderer.chat_text(asked.messages, options=asked.template)
            assert ends_inside(renderer.answer_lead(text, asked.messages, asked.template), "<think>", "</think>")
            asked = request([{"role": "user", "content": "<think>"}], add_generation_prompt=False)
            text = renderer.chat_text(asked.messages, options=asked.template)
            assert not ends_inside(renderer.answer_lead(text, asked.messages, asked.template), "<think>", "</think>")
    off = request([USER], chat_template_kwargs={"enable_thinking": False})
    with renderer_of(QWEN) as renderer:
        text = renderer.chat_text(off.messages, options=off.template)
        lead = renderer.answer_lead(text, off.messages, off.template)
        assert lead == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_a_system_message_that_a_template_forgets_after_results_is_told_by_the_user() -> None:
    """Mistral's templates write it with the last message where that is the user's, and else not at all."""
    assert "[INST] be brief\n\nwhat is it[/INST]" in written(MISTRAL, [SYSTEM, USER, CALLING, RESULT], tools=TOOLS)
    escaping = "{{ messages | map(attribute='content') | list | tojson }}"
    assert written(escaping, [{"role": "system", "content": 'say "a b"\n'}, USER]).startswith('["say \\"a b\\"\\n"')


BAIT = ["{{ 7 * 7 }}", "{% for x in y %}", "{{ ''.__class__ }}", "__class__", "<|im_end|>", "%s", "{0.__class__}"]


@pytest.mark.parametrize("bait", BAIT)
@pytest.mark.parametrize("name", EVERY)
def test_what_a_client_sends_is_data(name: str, bait: str) -> None:
    """A name of a parameter, a description or a result that is run would read the router's memory."""
    tool = json.loads(json.dumps(TOOLS[0]))
    tool["function"]["description"] = bait
    tool["function"]["parameters"]["properties"][bait] = {"type": "string", "description": bait}
    call = json.loads(json.dumps(CALLING))
    call["tool_calls"][0]["function"]["arguments"] = json.dumps({bait: bait})
    text = written(EVERY[name], [USER, call, {**RESULT, "content": bait}], tools=[tool])
    assert bait in text or json.dumps(bait)[1:-1] in text
    assert "49" not in text
    assert "<class" not in text


def test_a_template_that_a_client_makes_write_too_much_or_too_long_is_the_clients_400() -> None:
    """A loop over data that wrote nothing was not held by any clock."""
    hungry = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}x"
    pairs = "{% for a in messages %}{% for b in messages %}{% if a.content == b.content %}{% endif %}"
    slow = pairs + "{% endfor %}{% endfor %}"
    many = [{"role": "user", "content": "z" * 900}] * 4096
    for template in (hungry, slow):
        before = time.process_time()
        with contextlib.suppress(InvalidRequest):  # a fast machine may come to the end of one
            written(template, many)
        assert time.process_time() - before < 4
    deep: Any = 0
    for _ in range(50):
        deep = [deep]
    wide = {"a": [deep] * 900}
    call = json.loads(json.dumps(CALLING))
    call["tool_calls"][0]["function"]["arguments"] = json.dumps(wide)
    with pytest.raises(InvalidRequest, match="too much"):
        written("{{ messages[0].tool_calls[0].function | tojson(indent=16) }}", [call])


def test_a_pass_of_the_collector_is_no_templates_time_but_buys_time_once_only() -> None:
    """A pass over all that a process held took up to 0.45 s; what met one could be refused as too much."""
    now_s = 0.0
    budget = Budget(0, lambda: now_s)
    gc.collect()
    now_s = MAX_RENDER_S * 1.5
    budget.check()
    now_s = MAX_RENDER_S * 2.25
    budget.check()
    gc.collect()
    now_s = MAX_RENDER_S * 2.75
    with pytest.raises(TooMuch):
        budget.check()


@pytest.mark.parametrize("where", ["tools", "messages[1].tool_calls", "messages[2].role == 'tool'"])
def test_the_trial_sees_what_a_template_does_with_tools(where: str) -> None:
    """A template that behaves until there are tools passed it."""
    hog = "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}"
    with pytest.raises(StartupError):
        check_template(f"hello{{% if {where} %}}{hog}{{% endif %}}")


def test_the_default_model_is_told_of_tools_in_words() -> None:
    """Its template has no form for tools, calls or results, and joins every content to a text."""
    folder = resolve("smollm2-135m-instruct", default_cache_dir(), lambda _: None)
    assert folder.facts.chat_template is not None
    text = written(folder.facts.chat_template, [USER, CALLING, RESULT], tools=TOOLS)
    assert text.startswith("<|im_start|>system\nYou can call these functions:")
    assert text.count("<|im_start|>") == 5
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_marks_of_what_is_trained_on_are_no_text() -> None:
    """Templates with the tag kept a cluster from starting."""
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert written(marked, [USER]) == "what is it"


def test_thousands_of_turns_are_folded_in_linear_time() -> None:
    """Joining texts two at a time copied the long one for each short one."""
    many = [{"role": role, "content": "w" * 400} for _ in range(2000) for role in ("user", "system")]
    with renderer_of(MISTRAL) as renderer:
        messages = request(many).messages
        before = time.process_time()
        text = renderer.chat_text(messages)
        assert time.process_time() - before < 1.5
    assert text.count("w") == 400 * 4000


@pytest.mark.parametrize(
    "said",
    [
        [USER, SYSTEM | {"content": "it"}, ANSWER, USER],
        [SYSTEM, USER, ANSWER, SYSTEM, USER],
        [USER, CALLING, SYSTEM | {"content": "<<h1>>"}, RESULT | {"tool_call_id": "abcdefgh1"}],
        [USER, SYSTEM | {"content": "thing"}, ANSWER, SYSTEM | {"content": "a thing"}, USER],
    ],
)
def test_a_system_turn_that_says_what_another_turn_says_is_not_lost(said: list[Any]) -> None:
    """Its words were found in the other turn, or in the id of a call, and so it was taken for told."""
    said = json.loads(json.dumps(said).replace(CALLING["tool_calls"][0]["id"], "abcdefgh1"))
    text = written(DROPS, said)
    for word in {str(turn["content"]) for turn in said if turn["role"] == "system"}:
        own = [str(turn.get("content", "")) for turn in said]
        assert text.count(word) >= sum(content.count(word) for content in own)


def test_a_system_turn_that_its_template_writes_stays_where_it_is() -> None:
    """Also where its words are somebody else's too."""
    said = [SYSTEM | {"content": "it"}, USER, ANSWER, USER]
    assert written(DROPS, said).startswith("<S>it<U>what is it<A>")


TEXTS = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=6)


ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool"])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(EVERY)),
    st.lists(st.tuples(ROLES, TEXTS), min_size=1, max_size=9),
)
def test_no_text_of_any_conversation_is_lost(name: str, turns: list[tuple[str, str]]) -> None:
    """Whatever is folded or merged: every text arrives once, or the client is told why not."""
    messages: list[Any] = [dict(CALLING, content="")] if any(role == "tool" for role, _ in turns) else []
    messages = [USER, *messages] if messages else []
    for place, (role, text) in enumerate(turns):
        message = {"role": role, "content": f"<<{text}{place}>>"}
        messages.append(message | ({"tool_call_id": "abcdefgh1"} if role == "tool" else {}))
    text = ""
    with contextlib.suppress(InvalidRequest):
        text = written(EVERY[name], messages)
    for place, (_, word) in enumerate(turns):
        assert not text or text.count(f"<<{word}{place}>>") == 1


SAID_BEFORE = st.sampled_from(["<it>", "<what is it>", "<abcdefgh1>", "<it> <it>", "<User>", "<weather>"])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(EVERY)), st.lists(st.tuples(ROLES, SAID_BEFORE), min_size=1, max_size=9))
def test_nothing_is_lost_where_turns_say_the_same(name: str, turns: list[tuple[str, str]]) -> None:
    """A text that is found is not yet the text of the turn that was looked for."""
    messages: list[Any] = [USER, dict(CALLING, content="")] if any(role == "tool" for role, _ in turns) else []
    messages += [
        {"role": role, "content": word} | ({"tool_call_id": "abcdefgh1"} if role == "tool" else {})
        for role, word in turns
    ]
    text = ""
    with contextlib.suppress(InvalidRequest):
        text = written(EVERY[name], messages)
    for word in {word for _, word in turns}:
        assert not text or text.count(word) >= sum(other.count(word) for _, other in turns)
