"""What a request and the model's own defaults become in an engine's order, and what only a vocabulary can refuse."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.models import SamplingDefaults
from diptych.cluster.router.call import GenerateCall, TokenDelta
from diptych.protos.types import SamplingParams

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"


async def ordered(http: httpx2.AsyncClient, door: FrontDoor, **fields: Any) -> SamplingParams:
    """What the engines are told; both the same."""
    body = {"model": "echo", "prompt": "hello world", "max_tokens": 4, **fields}
    response = await http.post(TEXT, json=body)
    assert response.status_code == 200, response.text
    sampling = door.decode.orders[-1].request.sampling
    assert door.prefill.orders[-1].request.sampling == sampling
    return sampling


async def refused(http: httpx2.AsyncClient, path: str = TEXT, headers: Any = None, **fields: Any) -> tuple[str, str]:
    body = {"model": "echo", "prompt": "hello", **fields}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    response = await http.post(path, json=body, headers=headers)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["param"], error["message"]


async def test_every_field_reaches_both_engines(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    sampling = await ordered(
        http,
        door,
        temperature=0.5,
        top_k=-1,
        top_p=0.75,
        min_p=0.125,
        seed=-1,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={"9": 5, "3": -100},
        allowed_token_ids=[40, 30, 9],
        stop_token_ids=[30],
        min_tokens=2,
    )
    assert sampling == SamplingParams(
        max_tokens=4,
        temperature=0.5,
        top_p=0.75,
        min_p=0.125,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias=((3, -100.0), (9, 5.0)),
        allowed_token_ids=(9, 30, 40),
        stop_token_ids=frozenset({30, door.end_token()}),
        min_tokens=2,
    )


async def test_what_is_not_given_is_openais_default(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    sampling = await ordered(http, door, seed=1)
    assert sampling == SamplingParams(max_tokens=4, seed=1, stop_token_ids=frozenset({door.end_token()}))


async def test_ignoring_the_end_token_keeps_the_requests_own(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    assert (await ordered(http, door, ignore_eos=True, stop_token_ids=[7])).stop_token_ids == {7}


async def test_the_models_defaults_hold_for_what_a_request_does_not_say() -> None:
    own = SamplingDefaults(temperature=0.0, top_p=0.5, top_k=20, min_p=0.25, repetition_penalty=1.5)
    async with front_door(defaults=own) as door, httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as http:
        sampling = await ordered(http, door)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.5, 20)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
        sampling = await ordered(http, door, temperature=1, top_p=1, top_k=0, min_p=0, repetition_penalty=1)
        assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
        assert (sampling.min_p, sampling.repetition_penalty) == (0.0, 1.0)
        (card,) = (await http.get("/v1/models")).json()["data"]
        assert card["sampling_defaults"] == own.given()


async def test_a_bad_word_is_barred_at_the_start_and_after_a_space(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(door.tokenizer.encode(text, add_special_tokens=False).ids)

    sampling = await ordered(http, door, bad_words=["world", " fox", "  "])
    assert sampling.bad_words == (ids("world"), ids(" world"), ids("fox"), ids(" fox"), ids("  "))


async def test_long_lists_of_bad_words_are_tokenised_alike(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    words = ["q" * 250 + str(i) for i in range(40)]
    assert len((await ordered(http, door, bad_words=words)).bad_words) == 80


@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"allowed_token_ids": [1, 9999]}, "allowed_token_ids"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
    ],
)
async def test_an_id_outside_the_vocabulary_is_refused_with_the_number(
    http: httpx2.AsyncClient, door: FrontDoor, path: str, fields: dict[str, Any], param: str
) -> None:
    name, message = await refused(http, path, **fields)
    assert name == param
    assert "9999" in message
    assert str(door.served.vocab_size - 1) in message


async def test_what_cannot_be_is_refused(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    assert await refused(http, min_tokens=5, max_tokens=4) == (
        "min_tokens",
        "min_tokens is 5, more than the 4 that max_tokens allows",
    )
    assert (await refused(http, stop_token_ids=[-1]))[0] == "stop_token_ids"
    end = door.end_token()
    assert (await refused(http, allowed_token_ids=[end], min_tokens=1))[0] == "allowed_token_ids"
    (hello,) = door.tokenizer.encode("q").ids
    param, message = await refused(http, allowed_token_ids=[hello], bad_words=["q"], min_tokens=1)
    assert param == "allowed_token_ids"
    assert message == "no token is left by the rules: allowed_token_ids and bad_words exclude every one"
    # A bad word of several tokens bars its last one where the prompt ends in the ones before.
    x, z = door.tokenizer.encode("x").ids[0], door.tokenizer.encode("z").ids[0]
    barred = {"prompt": "x", "allowed_token_ids": [z], "bad_words": ["xz"]}
    assert (await refused(http, **barred))[0] == "allowed_token_ids"
    assert (await ordered(http, door, **{**barred, "prompt": "z"})).bad_words[0] == (x, z)
    assert (await ordered(http, door, allowed_token_ids=[end])).allowed_token_ids == (end,)


async def test_tenant_session_priority_and_deadline_travel_with_the_call(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    body = {"model": "echo", "prompt": "hello", "max_tokens": 2, "priority": -3, "timeout_s": 5}
    headers = {"x-tenant": "team-a", "x-session-id": "s 1"}
    for path, more in ((TEXT, {}), (CHAT, {"messages": [{"role": "user", "content": "hello"}]})):
        fields = {**body, **more}
        if more:
            del fields["prompt"]
        assert (await http.post(path, json=fields, headers=headers)).status_code == 200
        request = door.decode.orders[-1].request
        assert (request.tenant, request.salt, request.priority) == ("team-a", b"team-a", -3)
        assert request.deadline is not None
    await http.post(TEXT, json={"model": "echo", "prompt": "hello"})
    request = door.decode.orders[-1].request
    assert (request.tenant, request.salt, request.priority) == ("", b"", 0)


async def test_a_prompt_cache_key_is_a_session_where_no_header_names_one(
    http: httpx2.AsyncClient, door: FrontDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chat refused OpenAI's field as unknown, and responses alone honoured it."""
    generate, seen = door.router.generate, []

    def watched(call: GenerateCall) -> AsyncGenerator[TokenDelta, bool | None]:
        seen.append(call.session)
        return generate(call)

    monkeypatch.setattr(door.router, "generate", watched)
    said = {"messages": [{"role": "user", "content": "hello"}]}
    for path, asked in ((CHAT, said), (TEXT, {"prompt": "hello"}), ("/v1/responses", {"input": "hello"})):
        body = {"model": "echo", "prompt_cache_key": "k", **asked}
        assert (await http.post(path, json=body)).status_code == 200
    await http.post(CHAT, json={**said, "model": "echo", "prompt_cache_key": "k"}, headers={"x-session-id": "s"})
    await http.post(CHAT, json={**said, "model": "echo"})
    assert len(set(seen[:3])) == 1
    assert "k" != seen[0] != ""
    assert seen[3:] == ["s", ""]


@pytest.mark.parametrize("name", ["x-tenant", "x-session-id"])
@pytest.mark.parametrize("value", [b"", b"x" * 129, b"caf\xe9", b"a\tb"])
async def test_a_header_that_names_nothing_printable_is_refused_by_its_name(
    http: httpx2.AsyncClient, name: str, value: bytes
) -> None:
    param, message = await refused(http, headers=[(name.encode(), value)])
    assert param == name
    assert "128 printable ASCII characters" in message


async def test_two_tenants_of_one_request_are_refused(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    """Which of them counts would depend on who reads it: a proxy in front or this server."""
    param, message = await refused(http, headers=[(b"x-tenant", b"a"), (b"x-tenant", b"b")])
    assert (param, message) == ("x-tenant", "the header x-tenant is given 2 times; send it once")
    assert door.decode.orders == []


async def test_a_deadline_that_passes_is_504(http: httpx2.AsyncClient, door: FrontDoor) -> None:
    door.prefill.faults.silent = door.decode.faults.silent = True
    body = {"model": "echo", "prompt": "hello", "timeout_s": 0.05}
    response = await http.post(TEXT, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


async def test_stop_strings_can_be_shown_and_wait_for_min_tokens(http: httpx2.AsyncClient) -> None:
    async def text(**fields: Any) -> str:
        body = {"model": "echo", "prompt": "ab ab ab ab", "max_tokens": 20, **fields}
        return str((await http.post(TEXT, json=body)).json()["choices"][0]["text"])

    assert await text(stop="b a") == "a"
    assert await text(stop="b a", include_stop_str_in_output=True) == "ab a"
    whole = await text()
    late = await text(stop="b a", min_tokens=6)
    assert whole.startswith(late)
    assert len(late) > len("ab a")


async def test_an_explanation_comes_only_when_asked(http: httpx2.AsyncClient) -> None:
    body = {"model": "echo", "prompt": "hello", "max_tokens": 2}
    assert "diptych" not in (await http.post(TEXT, json=body)).json()
    (told,) = (await http.post(TEXT, json={**body, "explain": True})).json()["diptych"]["choices"]
    assert (told["prefill_engine"], told["decode_engine"], told["reason"]) == ("prefill-0", "decode-0", "length")
    assert told["num_tokens"] == 2
