"""`diptych chat` with piped input, against a front door of echo engines."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor, front_door
from diptych.cluster.chat import TEMPERATURE, Conversation, chat
from diptych.cluster.client import Client, ServerUnreachable
from diptych.cluster.models import SamplingDefaults
from diptych.cluster.router.rig import until
from diptych.protos.errors import EngineError


async def talk(url: str, lines: str, **options: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = await asyncio.to_thread(chat, url, stdin=io.StringIO(lines), stdout=out, stderr=err, **options)
    return code, out.getvalue(), err.getvalue()


def prompts(door: FrontDoor) -> list[str]:
    return [door.tokenizer.decode(order.request.prompt, skip_special_tokens=False) for order in door.decode.orders]


async def test_each_line_is_a_question_and_the_conversation_grows() -> None:
    async with front_door() as door:
        code, out, err = await talk(door.listener.url, "hello\n\nagain\n", system="be brief", max_tokens=200)
        assert (code, err) == (0, "")
        assert out == "system\nbe brief\nsystem\nbe brief\n"  # the echo ends at the first turn's end token
        first, second = prompts(door)
        assert first.count("<|im_end|>") == 2
        assert second.startswith(first)
        assert second.count("<|im_end|>") == 4
        assert door.decode.orders[0].request.sampling.max_tokens == 200


async def test_exit_leaves_before_the_input_ends() -> None:
    async with front_door() as door:
        assert (await talk(door.listener.url + "/v1/", "/exit\nhello\n"))[0] == 0
        assert door.decode.orders == []


async def test_bytes_that_are_no_utf8_do_not_end_the_conversation() -> None:
    async with front_door() as door:
        code, _, err = await talk(door.listener.url, "caf\udcff\nhello\n")
        assert (code, err) == (0, "")
        assert "caf?" in prompts(door)[0]
        assert len(prompts(door)) == 2


def test_a_closed_input_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    err = io.StringIO()
    assert chat("http://127.0.0.1:9", stdout=io.StringIO(), stderr=err) == 1
    assert err.getvalue() == "chat needs an input and an output; both must be open\n"


async def test_no_server_is_said_in_one_sentence() -> None:
    code, out, err = await talk("http://127.0.0.1:9", "hello\n")
    assert code == 1
    assert out == ""
    assert "no server answers" in err
    assert "diptych serve" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "http://"])
async def test_an_address_that_is_none_is_said_in_one_sentence(url: str) -> None:
    code, _, err = await talk(url, "hello\n")
    assert code == 1
    assert err.count("\n") == 1


async def test_a_refusal_is_shown_and_the_next_question_goes_on() -> None:
    async with front_door() as door:
        long = "x" * 9000
        code, out, err = await talk(door.listener.url, f"{long}\nhello\n")
        assert code == 1
        assert "context holds 2048" in err
        assert out == "user\nhello\n"


async def test_an_unknown_model_is_named() -> None:
    async with front_door() as door:
        _, _, err = await talk(door.listener.url, "hello\n", model="gpt-99")
        assert "gpt-99" in err


async def test_an_answer_that_breaks_is_told_and_forgotten() -> None:
    async with front_door() as door:
        door.decode.faults.error = EngineError("the engine gives up")
        door.decode.faults.error_at = 3
        code, _, err = await talk(door.listener.url, "hello\n")
        assert code == 1
        assert "the engine gives up" in err


async def test_an_interrupted_answer_stops_the_engines_and_is_kept() -> None:
    async with front_door(step_s=0.005) as door:

        def interrupted() -> Conversation:
            with Client(door.listener.url, timeout_s=10) as client:
                conversation = Conversation(client, "echo", max_tokens=1000)
                pieces = conversation.ask("a long question that is echoed for a while")
                next(pieces)
                pieces.close()
                return conversation

        conversation = await asyncio.to_thread(interrupted)
        assert [turn["role"] for turn in conversation.turns] == ["user", "assistant"]
        await until(lambda: door.router.in_flight == {} and bool(door.decode.cancels))


async def test_a_stream_without_an_end_is_no_answer() -> None:
    event = json.dumps({"choices": [{"delta": {"content": "half"}}]})
    transport = httpx2.MockTransport(lambda request: httpx2.Response(200, text=f"data: {event}\n\n"))
    with Client("http://x", transport=transport) as client:
        conversation = Conversation(client, "m")
        with pytest.raises(ServerUnreachable, match="broke off"):
            list(conversation.ask("hi"))
        assert conversation.turns == []


@pytest.mark.parametrize(
    ("own", "asked", "sent"),
    [(None, None, TEMPERATURE), (0.75, None, 0.75), (None, 1.5, 1.5), (0.75, 0.0, 0.0)],
)
async def test_the_temperature_is_the_persons_or_the_models_or_a_low_one(
    own: float | None, asked: float | None, sent: float
) -> None:
    async with front_door(defaults=SamplingDefaults(temperature=own)) as door:
        assert (await talk(door.listener.url, "hello\n", temperature=asked))[0] == 0
        assert door.decode.orders[0].request.sampling.temperature == pytest.approx(sent)
