"""Numbers and lists beyond every bound, at every endpoint that reads them: 400 by the field's name and with the limit,
at once and without memory (exam row S13); token ids that no vocabulary has, beside streams (S15); and prompts in
another form than text or ids (S20).

It guards against a limit that is looked at after the work that it was to save, and against an endpoint that forgot one.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.router.rig import until

CHAT, TEXT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"
SAID = [{"role": "user", "content": "hello"}]
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "echo", "messages": SAID},
    TEXT: {"model": "echo", "prompt": "hello"},
    MESSAGES: {"model": "echo", "messages": SAID, "max_tokens": 4},
    RESPONSES: {"model": "echo", "input": "hello"},
    "/v1/messages/count_tokens": {"model": "echo", "messages": SAID},
    "/v1/responses/input_tokens": {"model": "echo", "input": "hello"},
    "/v1/tokenize": {"prompt": "hello"},
    "/v1/detokenize": {"tokens": [1]},
}
LARGE = [10**5, 10**9, 2**63]
WORDS = ["NaN", "Infinity", "-Infinity", "1e999"]
CALLS = 10_000  # of functions; half of the shortest list, so that nobody looks at each of its members
MEMORY = 64 << 20


def tool(at: int) -> dict[str, Any]:
    return {"type": "function", "function": {"name": f"f{at}"}}


def number_cases() -> Iterator[tuple[str, str, object]]:
    """Path, field, value."""
    for path in (CHAT, TEXT):
        for field in ("n", "prompt_logprobs", "top_k", "min_tokens"):
            for value in LARGE if field in ("n", "prompt_logprobs") else LARGE[2:]:
                yield path, field, value
    for value in LARGE:
        yield TEXT, "best_of", value
        yield TEXT, "logprobs", value
        yield CHAT, "top_logprobs", value
        yield TEXT, "max_tokens", value
        yield CHAT, "max_tokens", value
        yield CHAT, "max_completion_tokens", value
        yield RESPONSES, "max_output_tokens", value
        yield RESPONSES, "top_logprobs", value
    yield MESSAGES, "max_tokens", 2**63
    for path in (CHAT, TEXT, RESPONSES):
        for field, values in {
            "repetition_penalty": (0, -1, 101),
            "presence_penalty": (-3, 3, 10**9),
            "frequency_penalty": (-3, 3, 10**9),
            "temperature": (-1, 3, 10**9),
            "top_p": (-1, 0, 2),
            "min_p": (-1, 2),
            "seed": (2**63, -(2**63) - 1),
            "priority": (2**63,),
            "timeout_s": (0, -1, 10**9),
            "first_token_timeout_s": (0, -1, 10**9),
        }.items():
            for value in values:
                yield path, field, value
    for value in (-1, 3):
        yield MESSAGES, "temperature", value
    for path in (CHAT, TEXT, RESPONSES, MESSAGES):
        for field, value in (("cache_salt", "x" * 7), ("fps", 10**9), ("mm_processor_kwargs", {"num_frames": 10**9})):
            yield path, field, value


def list_cases() -> Iterator[tuple[str, str, object]]:
    for path in (CHAT, TEXT, RESPONSES):
        yield path, "stop", ["x"] * 10**5
        yield path, "bad_words", ["x"] * 10**5
        yield path, "logit_bias", {str(at): 1 for at in range(10**5)}
        yield path, "stop_token_ids", [1] * 10**5
        yield path, "allowed_token_ids", [1] * 10**6
    yield MESSAGES, "stop_sequences", ["x"] * 10**5
    yield TEXT, "prompt", ["x"] * 10**5
    yield TEXT, "prompt", [1] * 10**6
    yield CHAT, "tools", [tool(at) for at in range(20_000)]
    yield CHAT, "tools", [tool(0)] * 40_000
    yield CHAT, "functions", [{"name": f"f{at}"} for at in range(60_000)]
    yield RESPONSES, "tools", [{"type": "function", "name": f"f{at}"} for at in range(60_000)]
    yield MESSAGES, "tools", [{"name": f"f{at}", "input_schema": {}} for at in range(30_000)]
    for path in (CHAT, MESSAGES, "/v1/messages/count_tokens"):
        yield path, "messages", SAID * 60_000
        yield path, "messages", SAID * 90_000
    for path in (RESPONSES, "/v1/responses/input_tokens"):
        yield path, "input", SAID * 60_000
        yield path, "input", SAID * 90_000
    for path in (CHAT, TEXT):
        yield path, "guided_choice", [str(at) for at in range(10**5)]
        yield path, "guided_regex", "a" * 10**6
        yield path, "guided_grammar", "a" * 10**6
        yield path, "guided_json", {"enum": [str(at) for at in range(10**5)]}
        yield path, "metadata", {str(at): "x" for at in range(10**5)}
    yield RESPONSES, "metadata", {str(at): "x" for at in range(10**5)}
    yield CHAT, "chat_template_kwargs", {f"a{'b' * at}": 1 for at in range(30)}
    yield "/v1/tokenize", "prompt", "x" * 3_000_000
    yield "/v1/tokenize", "messages", SAID * 60_000
    yield "/v1/detokenize", "tokens", [1] * 10**6


CASES = [*number_cases(), *list_cases()]
# What stands beside a field so that nothing else is wrong.
BESIDES: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
    "best_of": {},
    "/v1/tokenize messages": {"prompt": None},
}


def sent(path: str, field: str, value: object) -> bytes:
    beside = BESIDES.get(f"{path} {field}", BESIDES.get(field, {}) if path == CHAT else {})
    if (path, field) == (RESPONSES, "top_logprobs"):
        beside = {"include": ["message.output_text.logprobs"]}
    return json.dumps({**BASES[path], **beside, field: value}, separators=(",", ":")).encode()


def peak_reset() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def memory(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def blamed(body: dict[str, Any]) -> str:
    """The field, in either shape of errors."""
    error = body["error"]
    return str(error["param"] if "param" in error else error["details"]["param"])


class Work:
    """What this thread and those that it starts call, in C and in Python. A count is the same on every machine."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, frame: object, event: str, argument: object) -> None:
        self.calls += event in ("call", "c_call")

    def __enter__(self) -> Work:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("path", sorted({path for path, _, _ in CASES}))
async def test_what_is_beyond_a_bound_is_400_by_its_name_at_once_and_without_memory(
    http: httpx2.AsyncClient, door: FrontDoor, path: str
) -> None:
    wrong = []
    with Work() as work:  # before a thread of the loop's is there
        await http.post(path, json=BASES[path])  # what is imported and compiled once is no request's
        orders = len(door.prefill.orders)
        for field, value in ((field, value) for at, field, value in CASES if at == path):
            body = sent(path, field, value)
            peak_reset()
            before, work.calls = memory("VmRSS"), 0
            reply = await http.post(path, content=body, headers={"content-type": "application/json"})
            calls, more = work.calls, memory("VmHWM") - before
            if reply.status_code != 400 or not blamed(reply.json()).startswith(field) or len(reply.content) > 2000:
                wrong.append(f"{field} {str(value)[:20]}: {reply.status_code} {reply.text[:200]}")
            if calls > CALLS or more > MEMORY:
                wrong.append(f"{field} {str(value)[:20]}: {calls} calls, {more >> 20} MiB")
    assert not wrong, "\n".join(wrong)
    assert len(door.prefill.orders) == orders


def test_there_are_as_many_as_the_exam_asks_for() -> None:
    assert len(CASES) + len(NUMBERS) >= 120


NUMBERS = [
    (path, field, word)
    for path, fields in {
        CHAT: ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "top_p"),
        TEXT: ("temperature", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        RESPONSES: ("temperature", "presence_penalty"),
        MESSAGES: ("temperature", "top_p"),
    }.items()
    for field in fields
    for word in WORDS
]


async def test_what_is_no_number_of_json_is_400_by_the_fields_name(http: httpx2.AsyncClient) -> None:
    for path, field, word in NUMBERS:
        body = json.dumps(BASES[path])[:-1].encode() + f', "{field}": {word}}}'.encode()
        reply = await http.post(path, content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400, (path, field, word)
        assert blamed(reply.json()) == field


VICTIM = {"model": "echo", "prompt": [5] * 20, "max_tokens": 200, "ignore_eos": True, "stream": True, "seed": 3}
WRONG_IDS: list[object] = [-1, 294, 404, 2**31, 2**63, 1.5, True, "7", None]


async def test_token_ids_that_nobody_has_are_400_and_streams_beside_them_are_the_same_bit_for_bit() -> None:
    async with (
        front_door(step_s=0.001) as door,
        httpx2.AsyncClient(base_url=door.listener.url, timeout=60) as http,
    ):

        async def answer() -> list[Any]:
            """The pieces; how many come in one event depends on who was busy when."""
            lines = (await http.post(TEXT, json=VICTIM)).text.split("\n\n")
            assert lines[-2] == "data: [DONE]"
            found = [json.loads(line[6:])["choices"][0] for line in lines if line[6:7] == "{"]
            return ["".join(one["text"] for one in found), found[-1]["finish_reason"]]

        alone = await answer()
        victims = [asyncio.create_task(answer()) for _ in range(8)]
        await until(lambda: len(door.decode.orders) == len(door.prefill.orders) == 9)
        for wrong in WRONG_IDS:
            for path, fields in (
                (TEXT, {"prompt": [1, wrong, 2]}),
                (TEXT, {"prompt": [[1], [wrong]]}),
                (TEXT, {"stop_token_ids": [wrong]}),
                (TEXT, {"allowed_token_ids": [wrong]}),
                (CHAT, {"stop_token_ids": [wrong]}),
                (CHAT, {"allowed_token_ids": [wrong]}),
                (CHAT, {"logit_bias": {str(wrong): 1}}),
                (CHAT, {"logit_bias": {"1": float("nan") if wrong is None else 1000}}),
                (RESPONSES, {"stop_token_ids": [wrong]}),
                (RESPONSES, {"logit_bias": {str(wrong): 1}}),
                ("/v1/detokenize", {"tokens": [wrong]}),
            ):
                body = json.dumps({**BASES[path], **fields}).encode()
                if "logit_bias" in fields and wrong == "7" and "7" in fields["logit_bias"]:
                    continue
                reply = await http.post(path, content=body, headers={"content-type": "application/json"})
                assert reply.status_code == 400, (path, fields, reply.text)
        assert len(door.prefill.orders) == 9
        assert [await victim for victim in victims] == [alone] * 8


EMBEDS: list[tuple[str, dict[str, object]]] = [
    (TEXT, {"prompt_embeds": "gASVCgAAAAAAAACMBHBvc2mUjAZzeXN0ZW2Uk5Q="}),
    (TEXT, {"prompt_embeds": ["aGVsbG8="]}),
    (TEXT, {"prompt": {"prompt_embeds": "aGVsbG8="}}),
    (TEXT, {"prompt": [[0.5, 0.25]]}),
    (TEXT, {"prompt": [{"prompt_embeds": "aGVsbG8="}]}),
    (CHAT, {"prompt_embeds": "aGVsbG8="}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "aGVsbG8="}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "prompt_embeds", "data": "aGVsbG8="}]}]}),
    (RESPONSES, {"prompt_embeds": "aGVsbG8="}),
    (MESSAGES, {"prompt_embeds": "aGVsbG8="}),
]


async def test_prompts_are_text_or_ids_and_vectors_are_refused_by_name_64_at_once(
    http: httpx2.AsyncClient, door: FrontDoor
) -> None:
    """There is nothing that would unpickle or reshape them (S20)."""

    async def one(path: str, fields: dict[str, object]) -> None:
        reply = await http.post(path, json={**BASES[path], **fields})
        assert reply.status_code == 400, reply.text
        assert blamed(reply.json()).split("[")[0].split(".")[0] in fields

    await asyncio.gather(*(one(*EMBEDS[at % len(EMBEDS)]) for at in range(64)))
    assert door.prefill.orders == door.decode.orders == []


def test_the_memory_of_a_process_is_measured_where_it_is() -> None:
    assert memory("VmHWM") <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY
