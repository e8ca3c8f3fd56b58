"""`llm.wrap` around the real client of Anthropic: the same as around OpenAI's, in the other wire format.

Guards against blocks of an earlier answer, system texts and thinking that the way through our messages would lose, and
against forms that older models do not know.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from diptych.agents import llm

anthropic = pytest.importorskip("anthropic")
pytestmark = pytest.mark.slow  # the package is among those of `make test-slow`

MESSAGES: list[Any] = [{"role": "user", "content": "Jason is 25"}]
GOOD, BAD = '{"name": "Jason", "age": 25}', '{"name": "Jason", "age": "old"}'
NEW, OLD = "claude-sonnet-4-6", "claude-3-5-haiku-latest"

TWICE = llm.Retries(attempts=2, base_s=0)


class User(BaseModel):
    name: str
    age: int


def message(text: str, *before: dict[str, Any], stop: str = "end_turn") -> dict[str, Any]:
    content = [*before, {"type": "text", "text": text}]
    usage = {"input_tokens": 3, "output_tokens": 2}
    told = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": content, "usage": usage}
    return {**told, "stop_reason": stop, "stop_sequence": None}


def streamed(*pieces: str) -> httpx2.Response:
    begun = {**message("")}
    begun["content"] = []
    events: list[dict[str, Any]] = [{"type": "message_start", "message": begun}]
    events.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
    for piece in pieces:
        delta = {"type": "text_delta", "text": piece}
        events.append({"type": "content_block_delta", "index": 0, "delta": delta})
    events.append({"type": "content_block_stop", "index": 0})
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    events.append({"type": "message_delta", "delta": ended, "usage": {"output_tokens": 9}})
    events.append({"type": "message_stop"})
    text = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
    return httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


class Server:
    """What a client of Anthropic talks to."""

    def __init__(self, *entries: dict[str, Any] | httpx2.Response) -> None:
        self.entries = list(entries)
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.bodies.append(json.loads(request.content))
        entry = self.entries.pop(0)
        return entry if isinstance(entry, httpx2.Response) else httpx2.Response(200, json=entry)

    async def wait(self, request: httpx2.Request) -> httpx2.Response:
        return self(request)

    def client(self) -> Any:
        http = httpx2.Client(transport=httpx2.MockTransport(self))
        return anthropic.Anthropic(base_url="http://127.0.0.1:9", api_key="k", http_client=http)

    def waiting(self) -> Any:
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(self.wait))
        return anthropic.AsyncAnthropic(base_url="http://127.0.0.1:9", api_key="k", http_client=http)


def test_the_result_is_typed_and_every_argument_arrives_as_it_was_given() -> None:
    server = Server(message(GOOD))
    before = copy.deepcopy(MESSAGES)
    user, native = llm.wrap(server.client()).messages.create_with_completion(
        model=NEW,
        response_model=User,
        messages=MESSAGES,
        system="Be brief.",
        max_tokens=100,
        extra_body={"temperature": 0.5},
        metadata={"user_id": "u"},
        output_config={"effort": "low"},
    )
    assert user == User(name="Jason", age=25)
    assert isinstance(native, anthropic.types.Message)
    assert before == MESSAGES
    (body,) = server.bodies
    assert body["output_config"]["effort"] == "low"
    assert body["output_config"]["format"]["schema"]["properties"].keys() == {"name", "age"}
    assert (body["max_tokens"], body["temperature"], body["metadata"]) == (100, 0.5, {"user_id": "u"})
    assert "Be brief." in json.dumps(body["system"])
    assert "Jason is 25" in json.dumps(body["messages"])


def test_an_invalid_answer_is_told_and_asked_again_and_blocks_of_answers_may_be_sent_back() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "proof"}
    server = Server(message("hello", thought), message(BAD), message(GOOD))
    client = llm.wrap(server.client(), model=NEW)
    first = client.messages.create(messages=MESSAGES, max_tokens=100)
    assert isinstance(first, anthropic.types.Message)
    history = [*MESSAGES, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Who?"}]
    assert client.messages.create(messages=history, max_tokens=100, response_model=User, max_retries=1).age == 25
    sent, again = server.bodies[1]["messages"], server.bodies[2]["messages"]
    assert thought in sent[1]["content"]
    assert again[: len(sent)] == sent
    assert "/age" in json.dumps(again[-1])
    assert history[1]["content"] is first.content


def test_leading_system_messages_are_the_system_text() -> None:
    server = Server(message(GOOD))
    told = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    llm.wrap(server.client()).create(model=NEW, messages=told, max_tokens=100, response_model=User)
    assert "Be brief." in json.dumps(server.bodies[0]["system"])
    assert [one["role"] for one in server.bodies[0]["messages"]] == ["user"]


@pytest.mark.filterwarnings("ignore:The model:DeprecationWarning")
def test_a_model_without_structured_answers_is_told_the_schema_in_words() -> None:
    server = Server(message(f"Here it is:\n```json\n{GOOD}\n```"))
    user = llm.wrap(server.client()).create(model=OLD, messages=MESSAGES, max_tokens=100, response_model=User)
    assert user.age == 25
    assert "output_config" not in server.bodies[0]
    assert "integer" in json.dumps(server.bodies[0]["system"])


def test_errors_are_ours_and_asked_again_by_one_owner() -> None:
    busy = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    server = Server(*(httpx2.Response(529, json=busy) for _ in range(2)))
    with pytest.raises(llm.ProviderError) as failed:
        llm.wrap(server.client()).create(
            model=NEW,
            messages=MESSAGES,
            max_tokens=9,
            response_model=User,
            max_retries=TWICE,
        )
    assert failed.value.failure.kind == "overloaded"
    assert len(server.bodies) == 2


async def test_the_asynchronous_client_and_pieces() -> None:
    server = Server(streamed('{"name": "Ja', 'son", "age"', ": 25}"), message(GOOD))
    async with server.waiting() as made:
        client = llm.wrap(made, model=NEW)
        seen = [
            found
            async for found in client.messages.create_partial(messages=MESSAGES, max_tokens=100, response_model=User)
        ]
        assert seen[-1] == User(name="Jason", age=25)
        assert await client.create(messages=MESSAGES, max_tokens=100, response_model=User) == seen[-1]
    server = Server(streamed('{"name": "Ja', 'son", "age"', ": 25}"))
    found = list(
        llm.wrap(server.client(), model=NEW).create_partial(messages=MESSAGES, max_tokens=9, response_model=User)
    )
    assert found[-1] == User(name="Jason", age=25)
