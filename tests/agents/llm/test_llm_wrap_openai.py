"""`llm.wrap` around the real client of OpenAI: requests, types, attempts, events, what passes through untouched.

Guards against messages that are changed under their owner, attempts of two owners that multiply, arguments that get
lost on the way, threads that wait for one another, and connections that outlive a reader who left.
"""

from __future__ import annotations

import asyncio
import copy
import enum
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import httpx2
import openai
import pytest
from pydantic import BaseModel, ValidationInfo, field_validator
from typing_extensions import TypedDict

from diptych.agents import llm
from diptych.cluster.api.testing import front_door

URL = "http://127.0.0.1:9/v1"
MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Jason is 25"}]
NOW = llm.Retries(attempts=3, base_s=0)


class User(BaseModel):
    name: str
    age: int


class Color(enum.Enum):
    RED = "red"


class Place(TypedDict, total=False):
    city: str


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": more.pop("finish", "stop")}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {"id": "c1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def streamed(*pieces: str) -> httpx2.Response:
    def chunk(delta: dict[str, Any], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        told = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
        return f"data: {json.dumps(told)}\n\n"

    text = "".join([*(chunk({"content": piece}) for piece in pieces), chunk({}, "stop"), "data: [DONE]\n\n"])
    return httpx2.Response(200, text=text, headers={"content-type": "text/event-stream"})


Entry = str | dict[str, Any] | httpx2.Response


class Server:
    """What a client of OpenAI talks to: each request gets the next of the answers."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = list(entries)
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx2.Headers] = []
        self.timeouts: list[Any] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.bodies.append(json.loads(request.content))
        self.headers.append(request.headers)
        self.timeouts.append(request.extensions["timeout"])
        entry = self.entries.pop(0)
        if isinstance(entry, httpx2.Response):
            return entry
        return httpx2.Response(200, json=completion(entry) if isinstance(entry, str) else entry)

    async def wait(self, request: httpx2.Request) -> httpx2.Response:
        return self(request)

    def client(self) -> openai.OpenAI:
        http = httpx2.Client(transport=httpx2.MockTransport(self))
        return openai.OpenAI(base_url=URL, api_key="k", http_client=http)

    def waiting(self) -> openai.AsyncOpenAI:
        http = httpx2.AsyncClient(transport=httpx2.MockTransport(self.wait))
        return openai.AsyncOpenAI(base_url=URL, api_key="k", http_client=http)


GOOD = '{"name": "Jason", "age": 25}'
BAD = '{"name": "Jason", "age": "old"}'


def failing(status: int, **headers: str) -> httpx2.Response:
    body = {"error": {"message": f"no: {status}", "type": "x", "code": None, "param": None}}
    return httpx2.Response(status, json=body, headers=headers)


def test_the_result_is_typed_and_every_argument_arrives_as_it_was_given() -> None:
    server = Server(GOOD)
    before = copy.deepcopy(MESSAGES)
    user = llm.wrap(server.client()).chat.completions.create(
        model="gpt-x",
        response_model=User,
        messages=MESSAGES,
        temperature=0.25,
        max_tokens=40,
        logit_bias={"5": -1},
        seed=7,
        extra_body={"min_p": 0.1},
        extra_headers={"x-mine": "1"},
        user=openai.omit,
    )
    assert user == User(name="Jason", age=25)
    assert before == MESSAGES
    (body,) = server.bodies
    form = body.pop("response_format")
    assert form["type"] == "json_schema"
    assert form["json_schema"]["schema"]["properties"].keys() == {"name", "age"}
    assert body == {
        "model": "gpt-x",
        "messages": MESSAGES,
        "temperature": 0.25,
        "max_tokens": 40,
        "logit_bias": {"5": -1},
        "seed": 7,
        "min_p": 0.1,
    }
    assert server.headers[0]["x-mine"] == "1"


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (list[User], f'{{"value": [{GOOD}]}}', [User(name="Jason", age=25)]),
        (Iterable[User], f'{{"value": [{GOOD}]}}', [User(name="Jason", age=25)]),
        (Literal["a", "b"], '{"value": "b"}', "b"),
        (int, '{"value": 3}', 3),
        (User | int, '{"value": 3}', 3),
        (Color, '{"value": "red"}', Color.RED),
        (Place, '{"city": "Oslo"}', {"city": "Oslo"}),
        (dict[str, int], '{"a": 1}', {"a": 1}),
    ],
)
def test_results_of_every_kind(kind: Any, text: str, value: object) -> None:
    found, native = llm.wrap(Server(text).client(), model="m").create_with_completion(
        response_model=kind, messages=MESSAGES
    )
    assert found == value
    assert isinstance(native, openai.types.chat.ChatCompletion)
    assert native.choices[0].message.content == text


def test_max_retries_counts_attempts_beyond_the_first_and_the_error_is_a_turn() -> None:
    server = Server(BAD, GOOD)
    user, native = llm.wrap(server.client(), model="m").create_with_completion(
        response_model=User, messages=MESSAGES, max_retries=1
    )
    assert user.age == 25
    assert native.choices[0].message.content == GOOD
    first, second = (body["messages"] for body in server.bodies)
    assert second[: len(first)] == first == MESSAGES
    assert second[2] == {"role": "assistant", "content": BAD}
    assert "/age" in second[3]["content"]

    server = Server(BAD, BAD)
    with pytest.raises(llm.InvalidOutput) as failed:
        llm.wrap(server.client(), model="m").create(response_model=User, messages=MESSAGES, max_retries=1)
    assert [one.number for one in failed.value.attempts] == [1, 2]
    assert failed.value.report.value == {"name": "Jason", "age": "old"}
    server = Server(BAD)
    with pytest.raises(llm.InvalidOutput):
        llm.wrap(server.client(), model="m").create(response_model=User, messages=MESSAGES, max_retries=0)
    assert len(server.bodies) == 1


def test_the_clients_own_attempts_are_off_so_that_none_multiply() -> None:
    server = Server(*(failing(503) for _ in range(3)), GOOD)
    client = server.client()
    assert client.max_retries == 2
    with pytest.raises(llm.ProviderError) as failed:
        llm.wrap(client, model="m").create(response_model=User, messages=MESSAGES, max_retries=NOW)
    assert len(server.bodies) == len(failed.value.attempts) == 3
    assert failed.value.failure.status == 503
    assert client.max_retries == 2


@pytest.mark.parametrize(("status", "kind"), [(401, "auth"), (404, "not_found"), (400, "bad_request")])
def test_what_no_second_attempt_mends_is_asked_once(status: int, kind: str) -> None:
    server = Server(failing(status))
    with pytest.raises(llm.ProviderError) as failed:
        llm.wrap(server.client(), model="m").create(response_model=User, messages=MESSAGES)
    assert failed.value.failure.kind == kind
    assert isinstance(failed.value.__cause__.__cause__, openai.APIStatusError)  # type: ignore[union-attr]
    assert len(server.bodies) == 1


def test_a_place_that_is_not_there_is_told_as_such() -> None:
    with (
        openai.OpenAI(base_url=URL, api_key="k") as client,
        pytest.raises(llm.ProviderError) as failed,
    ):
        llm.wrap(client, model="m").create(response_model=User, messages=MESSAGES, max_retries=0)
    assert failed.value.failure.kind == "connect"


def test_budgets_and_timeouts() -> None:
    server = Server(BAD, BAD, BAD)
    with pytest.raises(llm.BudgetExceeded) as failed:
        llm.wrap(server.client(), model="m").create(
            response_model=User, messages=MESSAGES, max_retries=5, token_budget=10, timeout=30
        )
    assert failed.value.limit == "tokens"
    assert len(server.bodies) == 2
    assert 29 < server.timeouts[0]["read"] <= 30
    assert server.timeouts[1]["read"] <= server.timeouts[0]["read"]


def test_context_reaches_validators_and_is_no_template(caplog: pytest.LogCaptureFixture) -> None:
    class Quote(BaseModel):
        words: str

        @field_validator("words")
        @classmethod
        def stands_there(cls, words: str, info: ValidationInfo) -> str:
            assert info.context is not None
            if words not in info.context["source"]:
                raise ValueError("these words are not in the source")
            return words

    server = Server('{"words": "no"}', '{"words": "sea"}')
    messages = [{"role": "user", "content": "Quote {{ source }}"}]
    found = llm.wrap(server.client(), model="m").create(
        response_model=Quote, messages=messages, context={"source": "by the sea"}
    )
    assert found.words == "sea"
    assert server.bodies[0]["messages"] == messages
    assert "messages are no templates" in caplog.text


def test_lax_on_request() -> None:
    text = '{"name": "Jason", "age": "25"}'
    assert llm.wrap(Server(text).client(), model="m").create(
        response_model=User, messages=MESSAGES, strict=False
    ) == User(name="Jason", age=25)


def test_events_are_told_in_order_in_the_callers_thread_and_a_broken_handler_breaks_nothing() -> None:
    heard: list[tuple[str, Any]] = []

    def hear(name: Any) -> Callable[..., None]:
        def handler(*args: Any, **told: Any) -> None:
            assert threading.current_thread() is threading.main_thread()
            heard.append((name, args[0] if args else told))

        return handler

    def broken(response: Any) -> None:
        raise RuntimeError("a handler's own")

    server = Server(failing(503), BAD, GOOD)
    client = llm.wrap(server.client(), model="m", max_retries=NOW)
    names = ["completion:kwargs", "completion:response", "completion:usage", "completion:error", "parse:error"]
    handlers = {name: hear(name) for name in [*names, "completion:last_attempt"]}
    for name, handler in handlers.items():
        client.on(name, handler)  # type: ignore[arg-type]
    client.on("completion:response", broken)
    numbers: list[tuple[int, bool]] = []
    client.on(
        "parse:error",
        lambda error, *, attempt_number, is_last_attempt: numbers.append((attempt_number, is_last_attempt)),
    )
    assert client.create(response_model=User, messages=MESSAGES).age == 25
    kwargs, error, _, response, usage, parse, _, _, last = heard
    assert [name for name, _ in heard] == [
        "completion:kwargs",
        "completion:error",
        "completion:kwargs",
        "completion:response",
        "completion:usage",
        "parse:error",
        "completion:kwargs",
        "completion:response",
        "completion:usage",
    ]
    assert kwargs[1]["messages"] == MESSAGES
    assert isinstance(error[1], llm.ProviderError)
    assert isinstance(response[1], openai.types.chat.ChatCompletion)
    assert isinstance(parse[1], llm.InvalidOutput)
    assert (usage[1].tokens, last[1].tokens) == (5, 10)
    assert numbers == [(2, False)]

    heard.clear()
    client.clear("completion:response")
    client.off("completion:kwargs", handlers["completion:kwargs"])
    server.entries = [BAD]
    of_this_call = llm.WrapHooks()
    of_this_call.on("completion:kwargs", hear("mine"))
    with pytest.raises(llm.InvalidOutput):
        client.create(response_model=User, messages=MESSAGES, max_retries=0, hooks=of_this_call)
    assert [name for name, _ in heard] == ["mine", "completion:usage", "parse:error", "completion:last_attempt"]
    with pytest.raises(llm.UsageError, match="did you mean completion:error"):
        client.on("completion:eror", broken)  # type: ignore[arg-type]


def test_without_a_response_model_everything_is_the_clients_own() -> None:
    server = Server("hello", streamed("hel", "lo"))
    plain = server.client()
    client = llm.wrap(plain, model="m")
    answer = client.chat.completions.create(messages=MESSAGES, n=1)
    assert isinstance(answer, openai.types.chat.ChatCompletion)
    assert answer.choices[0].message.content == "hello"
    chunks = client.chat.completions.create(messages=MESSAGES, stream=True)
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["hel", "lo", None]
    assert client.models is plain.models
    assert client.chat.completions.with_raw_response is plain.chat.completions.with_raw_response
    assert client.api_key == "k"
    with pytest.raises(AttributeError):
        client.nothing_of_the_kind  # noqa: B018
    with pytest.raises(llm.UsageError, match=r"max_retries= is for calls with response_model="):
        client.create(messages=MESSAGES, max_retries=1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tools": [{}]}, "no tools= beside response_model=: .*@llm.call"),
        ({"mode": "json"}, "there are no modes"),
        ({"n": 2}, "one answer gives one result"),
        ({"stream": True}, "create_partial"),
        ({"messages": "hi"}, "messages is a list"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, r"messages\[0\].role"),
        ({"max_retries": object()}, "attempts beyond the first, or llm.Retries"),
        ({"max_retries": llm.Retries(fallback=["a/b"])}, "has one place to ask"),
        ({"model": None}, "which model"),
        ({"temprature": 1}, "did you mean temperature"),
        ({"min_p": 1}, "go by extra_body"),
        ({"context": {}, "validation_context": {}}, "one thing"),
        ({"hooks": 3}, r"hooks is llm\.WrapHooks"),
        ({"strict": "x"}, "strict is true or false"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_sent(given: dict[str, Any], words: str) -> None:
    server = Server()
    with pytest.raises(llm.UsageError, match=words):
        llm.wrap(server.client()).create(**{"model": "m", "response_model": User, "messages": MESSAGES, **given})
    assert not server.bodies


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(llm.UsageError, match=r"make one, OpenAI\(\)"):
        llm.wrap(openai.OpenAI)  # type: ignore[call-overload]
    with pytest.raises(llm.UsageError, match=r"not a builtins\.str"):
        llm.wrap("openai")  # type: ignore[call-overload]
    with pytest.raises(llm.UsageError, match="wrapped already"):
        llm.wrap(llm.wrap(Server().client()))


def test_a_server_without_schemas_is_told_in_words() -> None:
    server = Server(GOOD)
    llm.wrap(server.client(), model="m", schemas=False).create(response_model=User, messages=MESSAGES)
    assert server.bodies[0]["response_format"] == {"type": "json_object"}
    assert "integer" in json.dumps(server.bodies[0]["messages"][0])


def test_a_refusal_and_a_cut_answer_have_errors_of_their_own() -> None:
    declined = completion(None, message={"refusal": "I will not"})
    with pytest.raises(llm.Refused, match="I will not"):
        llm.wrap(Server(declined).client(), model="m").create(response_model=User, messages=MESSAGES)
    server = Server(completion('{"name": "Ja', finish="length"), GOOD)
    assert llm.wrap(server.client(), model="m").create(response_model=User, messages=MESSAGES, max_tokens=8).age == 25
    assert [body["max_tokens"] for body in server.bodies] == [8, 16]


def test_pieces_of_an_object_and_objects_of_a_list() -> None:
    server = Server(streamed('{"name": "Ja', 'son", "a', 'ge": 25}'))
    *_, last = llm.wrap(server.client(), model="m").create_partial(response_model=User, messages=MESSAGES)
    assert last == User(name="Jason", age=25)
    assert server.bodies[0]["stream"] is True
    server = Server(streamed('{"value": [', f"{GOOD}, ", GOOD, "]}"))
    users = llm.wrap(server.client(), model="m").create_iterable(response_model=User, messages=MESSAGES)
    assert next(users) == User(name="Jason", age=25)
    assert len(list(users)) == 1


async def test_the_asynchronous_client_does_the_same() -> None:
    server = Server(BAD, GOOD, streamed('{"name": "Ja', 'son", "age": 25}'), "plain")
    async with server.waiting() as made:
        client = llm.wrap(made, model="m")
        user, native = await client.chat.completions.create_with_completion(response_model=User, messages=MESSAGES)
        assert user.age == 25
        assert native.choices[0].message.content == GOOD
        seen = [found async for found in client.create_partial(response_model=User, messages=MESSAGES)]
        assert seen[-1] == user
        answer = await client.create(messages=MESSAGES)
        assert answer.choices[0].message.content == "plain"
        server.entries = [GOOD] * 50
        many = [client.create(response_model=User, messages=MESSAGES) for _ in range(50)]
        assert await asyncio.gather(*many) == [user] * 50


def test_calls_of_many_threads_are_under_way_at_once() -> None:
    together = threading.Barrier(24, timeout=30)

    def answer(request: httpx2.Request) -> httpx2.Response:
        together.wait()
        return httpx2.Response(200, json=completion(GOOD))

    with openai.OpenAI(
        base_url=URL, api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    ) as made:
        client = llm.wrap(made, model="m")
        found: list[User] = []
        threads = [
            threading.Thread(target=lambda: found.append(client.create(response_model=User, messages=MESSAGES)))
            for _ in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 24


@asynccontextmanager
async def hanging() -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A server that begins a stream and says no more; whether its client has left."""
    left = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = streamed('{"name": "Ja').text.split("\n\n")[0] + "\n\n"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + body.encode())
        await writer.drain()
        while await reader.read(1 << 16):
            pass
        left.set()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", left


async def test_whoever_leaves_a_stream_closes_its_connection() -> None:
    async with hanging() as (url, left), asyncio.timeout(30), openai.AsyncOpenAI(base_url=url, api_key="k") as made:
        pieces = llm.wrap(made, model="m").create_partial(response_model=User, messages=MESSAGES)
        async for _ in pieces:
            break
        await pieces.aclose()
        await left.wait()

    def read(url: str) -> None:
        with openai.OpenAI(base_url=url, api_key="k") as made:
            for _ in llm.wrap(made, model="m").create_partial(response_model=User, messages=MESSAGES):
                break

    async with hanging() as (url, left), asyncio.timeout(30):
        await asyncio.to_thread(read, url)
        await left.wait()


async def test_a_stream_that_says_no_more_ends_with_the_time_of_the_call() -> None:
    async with hanging() as (url, left), asyncio.timeout(30), openai.AsyncOpenAI(base_url=url, api_key="k") as made:
        pieces = llm.wrap(made, model="m").create_partial(response_model=User, messages=MESSAGES, timeout=0.2)
        with pytest.raises(llm.CallFailed) as failed:
            async for _ in pieces:
                pass
        await left.wait()
    assert isinstance(failed.value, llm.BudgetExceeded)
    assert failed.value.limit == "seconds"


async def test_an_own_front_door_answers_the_real_client() -> None:
    async with front_door() as door:

        def ask() -> tuple[Any, llm.ProviderError]:
            with openai.OpenAI(base_url=f"{door.listener.url}/v1", api_key="none") as made:
                client = llm.wrap(made, model="echo")
                plain = client.create(messages=MESSAGES, max_tokens=4)
                with pytest.raises(llm.ProviderError) as failed:
                    client.create(response_model=User, messages=MESSAGES, model="nobody")
                return plain, failed.value

        plain, error = await asyncio.to_thread(ask)
    assert plain.usage.completion_tokens == 4
    assert error.failure.kind == "not_found"
    assert "nobody" in str(error)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "diptych-llm-stream":
            thread.join(30)
            assert not thread.is_alive()


def test_an_answer_that_is_no_json_is_the_servers_failure_and_asked_again() -> None:
    server = Server(httpx2.Response(200, text="not json", headers={"content-type": "application/json"}), GOOD)
    client = llm.wrap(server.client(), model="m", max_retries=llm.Retries(attempts=2, base_s=0.001))
    assert client.create(response_model=User, messages=MESSAGES).name == "Jason"
    assert len(server.bodies) == 2


def test_handlers_that_come_later_are_heard_and_cannot_change_what_is_sent() -> None:
    server, hooks, heard = Server(GOOD), llm.WrapHooks(), list[str]()
    client = llm.wrap(server.client(), model="m", hooks=hooks)

    def clear(**told: Any) -> None:
        heard.append(told["model"])
        told["messages"].clear()

    hooks.on("completion:kwargs", clear)
    client.create(response_model=User, messages=MESSAGES)
    assert heard == ["m"]
    assert server.bodies[0]["messages"]
    with pytest.raises(llm.UsageError, match="a handler of completion:kwargs is a function"):
        hooks.on("completion:kwargs", 3)  # type: ignore[arg-type]
    with pytest.raises(llm.UsageError, match=r"hooks is llm\.WrapHooks"):
        llm.wrap(server.client(), hooks=3)  # type: ignore[call-overload]
