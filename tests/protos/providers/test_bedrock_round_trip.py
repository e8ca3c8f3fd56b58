"""Converse there and back, for conversations and answers of any shape; botocore's model of the service is the judge.

Guards against fields that the service does not know or that lack what it demands, paths that are quoted otherwise than
Amazon's client does, and answers whose parts do not come back as they were.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diptych.protos.messages import Media, Message, Reasoning, Text, ToolCall, ToolResult
from diptych.protos.openai import ChatRequest
from diptych.protos.openai_output import OutputForm
from diptych.protos.openai_tools import Mode, Tool, ToolUse
from diptych.protos.providers.aws_stream import encoded_event
from diptych.protos.providers.bedrock import ConverseCodec
from diptych.protos.providers.codec import ServerEvent
from diptych.protos.providers.quirks import Quirks
from diptych.protos.replies import Reply, ReplyBuilder
from diptych.protos.wire_checks import compact

CODEC = ConverseCodec()
QUIRKS = Quirks(family="bedrock", media=frozenset({"image", "file"}))
FEW = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MODELS = (
    "us.anthropic.claude-sonnet-4-5-20250929-v1:0",
    "anthropic.claude-opus-5-5",
    "amazon.nova-2-lite-v1:0",
    "us.meta.llama3-3-70b-instruct-v1:0",
    "mistral.mistral-large-3-675b",
    "arn:aws:bedrock:us-east-1:123456789012:application-inference-profile/abc123",
)
SIGNED = b"signed"

MODES: st.SearchStrategy[Mode] = st.sampled_from(("none", "auto", "required"))
words = st.text('ab .\u00f6\n"\\{', min_size=1, max_size=8).map(lambda text: f"x{text}y")
names = st.sampled_from(("f", "g_1", "tool-2"))
objects = st.dictionaries(words, st.none() | st.integers(-9, 9) | words | st.lists(words, max_size=2), max_size=2)
images = st.just(Media(kind="image", path="", media_type="image/png", data="aGk="))
files = st.builds(lambda name: Media(kind="file", path="", media_type="text/csv", data="aGk=", name=name), words)


@st.composite
def requests(draw: st.DrawFn) -> ChatRequest:
    messages: list[Message] = [
        Message(
            role="user", parts=tuple(draw(st.lists(st.builds(Text, words) | images | files, min_size=1, max_size=3)))
        )
    ]
    for turn in range(draw(st.integers(0, 2))):
        thought = draw(st.lists(st.builds(Reasoning, words, st.just("EqQB")), max_size=1))
        parts: list[Any] = [*thought, Text(draw(words))]
        calls = []
        for number in range(draw(st.integers(0, 2))):
            arguments = draw(objects)
            calls.append(
                ToolCall(id=f"t:{turn}.{number}", name=draw(names), arguments=arguments, text=compact(arguments))
            )
        messages.append(Message(role="assistant", parts=(*parts, *calls)))
        for call in calls:
            inner = tuple(draw(st.lists(st.builds(Text, words) | images, max_size=2)))
            result = ToolResult(call_id=call.id, name=call.name, parts=inner, is_error=draw(st.booleans()))
            messages.append(Message(role="tool", parts=(result,)))
        messages.append(Message(role="user", parts=(Text(draw(words)),)))
    fields: dict[str, Any] = {
        "messages": (Message(role="system", parts=(Text("s"),)), *messages),
        "model": "m",
        "max_tokens": draw(st.none() | st.just(4000)),
        "temperature": draw(st.sampled_from((None, 0.5, 1, 2))),
        "top_p": draw(st.sampled_from((None, 0.5))),
        "top_k": draw(st.sampled_from((None, 5))),
        "stop": draw(st.sampled_from(((), ("a", "b")))),
        "user": draw(st.sampled_from((None, "u", "\u00f6"))),
        "reasoning_budget": draw(st.sampled_from((None, 2000))),
    }
    if draw(st.booleans()):
        tools = tuple(
            Tool(name=name, description=draw(st.sampled_from((None, " ", "d"))), parameters={"type": "object"})
            for name in ("f", "g_1", "tool-2")
        )
        mode: Mode = draw(MODES)
        every = () if mode == "none" else tuple(tool.name for tool in tools)
        fields["tool_use"] = ToolUse(tools=tools, mode=mode, names=every, parallel=draw(st.booleans()))
    if draw(st.booleans()):
        schema = compact({"type": "object", "properties": {"a": {"type": "string"}}})
        fields["output_form"] = OutputForm(kind="json_schema", value=schema, path="response_format", name="a b")
    return ChatRequest.model_construct(**fields)


@pytest.fixture(scope="module")
def service() -> Any:
    loaders, model = pytest.importorskip("botocore.loaders"), pytest.importorskip("botocore.model")
    return model.ServiceModel(loaders.Loader().load_service_model("bedrock-runtime", "service-2"))


def test_the_service_takes_each_request(service: Any) -> None:
    serialize, validate = pytest.importorskip("botocore.serialize"), pytest.importorskip("botocore.validate")
    operations = {False: service.operation_model("Converse"), True: service.operation_model("ConverseStream")}
    serializer = serialize.create_serializer("rest-json", include_validation=False)

    def with_bytes(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                name: base64.b64decode(inner) if name in ("bytes", "redactedContent") else with_bytes(inner)
                for name, inner in value.items()
            }
        return [with_bytes(inner) for inner in value] if isinstance(value, list) else value

    @FEW
    @given(requests(), st.sampled_from(MODELS), st.booleans())
    def judge(request: ChatRequest, model: str, stream: bool) -> None:
        sent = CODEC.encode(request, model=model, stream=stream, quirks=QUIRKS)
        params = {"modelId": model, **with_bytes(sent.body)}
        report = validate.ParamValidator().validate(params, operations[stream].input_shape)
        assert not report.has_errors(), report.generate_report()
        made = serializer.serialize_to_request(params, operations[stream])
        assert made["url_path"] == sent.path
        assert json.loads(made["body"]) == sent.body

    judge()


texts = st.builds(lambda text: {"text": text}, words)
cited = st.builds(
    lambda text: {"citationsContent": {"content": [{"text": text}], "citations": [{"title": "t"}]}}, words
)
thoughts = st.builds(lambda text: {"reasoningContent": {"reasoningText": {"text": text, "signature": "EqQB"}}}, words)
redacted = st.just({"reasoningContent": {"redactedContent": base64.b64encode(SIGNED).decode()}})
served = st.just({"toolUse": {"toolUseId": "s", "name": "n", "input": {"q": 1}, "type": "server_tool_use"}})
found = st.just({"toolResult": {"toolUseId": "s", "type": "r", "content": [{"json": {"a": 1}}]}})
pictures = st.builds(
    lambda data: {"image": {"format": "png", "source": {"bytes": base64.b64encode(data).decode()}}},
    st.binary(min_size=1, max_size=9),
)
calls = st.builds(
    lambda name, arguments: {"toolUse": {"toolUseId": "", "name": name, "input": arguments}}, names, objects
)


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    content = draw(
        st.lists(texts | cited | thoughts | redacted | served | found | pictures | calls, min_size=1, max_size=6)
    )
    content = json.loads(json.dumps(content))
    for i, block in enumerate(content):
        if "toolUse" in block and "type" not in block["toolUse"]:
            block["toolUse"]["toolUseId"] = f"t{i}"
    return {
        "output": {"message": {"role": "assistant", "content": content}},
        "stopReason": draw(st.sampled_from(("end_turn", "max_tokens", "guardrail_intervened"))),
        "usage": {
            "inputTokens": draw(st.integers(0, 9)),
            "outputTokens": 3,
            "totalTokens": 9,
            "cacheReadInputTokens": 2,
        },
        "metrics": {"latencyMs": 1},
    }


def stream_of(body: dict[str, Any], size: int) -> list[tuple[str, dict[str, Any]]]:
    """As Bedrock would send it, in pieces of `size` characters."""
    sent: list[tuple[str, dict[str, Any]]] = [("messageStart", {"role": "assistant"})]

    def pieces(text: str) -> list[str]:
        return [text[at : at + size] for at in range(0, len(text), size)]

    for index, block in enumerate(body["output"]["message"]["content"]):
        at = {"contentBlockIndex": index}
        deltas: list[dict[str, Any]] = []
        match block:
            case {"text": text}:
                deltas = [{"text": piece} for piece in pieces(text)]
            case {"citationsContent": told}:
                deltas = [{"text": piece} for piece in pieces(told["content"][0]["text"])]
                deltas += [{"citation": one} for one in told["citations"]]
            case {"reasoningContent": {"reasoningText": told}}:
                deltas = [{"reasoningContent": {"text": piece}} for piece in pieces(told["text"])]
                deltas.append({"reasoningContent": {"signature": told["signature"]}})
            case {"reasoningContent": told}:
                deltas = [{"reasoningContent": told}]
            case {"toolUse": told}:
                begun = {name: value for name, value in told.items() if name != "input"}
                sent.append(("contentBlockStart", {"start": {"toolUse": begun}, **at}))
                deltas = [{"toolUse": {"input": piece}} for piece in pieces(compact(told["input"]))]
            case {"toolResult": told}:
                begun = {name: value for name, value in told.items() if name != "content"}
                sent.append(("contentBlockStart", {"start": {"toolResult": begun}, **at}))
                deltas = [{"toolResult": told["content"]}]
            case {"image": told}:
                sent.append(("contentBlockStart", {"start": {"image": {"format": told["format"]}}, **at}))
                data = base64.b64decode(told["source"]["bytes"])
                cut = [data[place : place + size] for place in range(0, len(data), size)]
                deltas = [{"image": {"source": {"bytes": base64.b64encode(piece).decode()}}} for piece in cut]
        sent += [("contentBlockDelta", {"delta": delta, **at}) for delta in deltas]
        sent.append(("contentBlockStop", at))
    sent.append(("messageStop", {"stopReason": body["stopReason"]}))
    return [*sent, ("metadata", {"usage": body["usage"], "metrics": body["metrics"]})]


def decoded(events: list[tuple[str, dict[str, Any]]]) -> Reply:
    decoder, builder = CODEC.decoder(QUIRKS), ReplyBuilder()
    for kind, told in events:
        for made in decoder.feed(ServerEvent(json.dumps(told), kind)):
            builder.add(made)
    for made in decoder.finish():
        builder.add(made)
    assert decoder.skipped == 0
    return builder.reply()


@FEW
@given(bodies(), st.integers(1, 5))
def test_a_stream_in_any_pieces_is_the_whole_answer(body: dict[str, Any], size: int) -> None:
    reply = CODEC.reply(body, QUIRKS)
    assert decoded(stream_of(body, size)) == reply
    builder = ReplyBuilder()
    for made in reply.events():
        builder.add(made)
    assert builder.reply() == reply


@FEW
@given(bodies())
def test_an_answer_goes_back_as_it_came(body: dict[str, Any]) -> None:
    user = Message(role="user", parts=(Text("a"),))
    request = ChatRequest.model_construct(messages=(user, CODEC.reply(body, QUIRKS).message, user), model="m")
    sent = CODEC.encode(request, model="anthropic.claude-opus-5", stream=False, quirks=QUIRKS)
    assert sent.body["messages"][1] == body["output"]["message"]


def test_the_fixtures_are_the_services(service: Any) -> None:
    """botocore reads the same blocks from a stream of our framing."""
    eventstream, parsers = pytest.importorskip("botocore.eventstream"), pytest.importorskip("botocore.parsers")
    shape = service.operation_model("ConverseStream").output_shape.members["stream"]
    parser = parsers.EventStreamJSONParser()

    @FEW
    @given(bodies())
    def judge(body: dict[str, Any]) -> None:
        events = stream_of(body, 3)
        buffer = eventstream.EventStreamBuffer()
        buffer.add_data(b"".join(encoded_event(kind, json.dumps(told).encode()) for kind, told in events))
        read = [parser.parse(message.to_response_dict(), shape) for message in buffer]
        assert [list(one) for one in read] == [[kind] for kind, _ in events]
        texts = [one["contentBlockDelta"]["delta"].get("text", "") for one in read if "contentBlockDelta" in one]
        reply = CODEC.reply(body, QUIRKS)
        assert "".join(texts) == reply.message.content

    judge()
