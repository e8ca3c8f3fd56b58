"""The load client against a real front door with echo engines, and against servers that fail in every way."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from diptych.cluster.api.testing import front_door
from diptych.cluster.bench.fleet import Load
from diptych.cluster.bench.serve import ServeOptions, arrivals, run_serve_bench, summary
from diptych.cluster.bench.stream import Streamed, Target, stream
from diptych.cluster.config import LimitSettings
from diptych.protos.errors import EngineError, StartupError

FIELDS = {
    *("client", "url", "model", "requests", "rate", "concurrency", "input", "output", "seed", "completed", "failed"),
    *("failures", "duration_s", "requests_s", "output_tok_s", "total_tok_s", "ttft_ms", "itl_ms", "tpot_ms"),
    *("send_late_ms", "events", "client_cpu", "date", "commit", "dirty", "versions", "machine", "card", "card_state"),
}


async def bench(tmp_path: Path, expect: int = 0, **options: object) -> dict[str, object]:
    """In a thread: the verb brings its own event loop, and the server lives in this one."""
    out = tmp_path / "out.json"
    settings = ServeOptions(json_out=out, **options)  # type: ignore[arg-type]
    assert await asyncio.to_thread(run_serve_bench, settings) == expect
    result = json.loads(out.read_text())
    assert set(result) == FIELDS
    assert result["completed"] + result["failed"] == result["requests"]
    assert sum(result["failures"].values()) == result["failed"]
    return dict(result)


@pytest.mark.parametrize("rate", [math.inf, 400.0])
@pytest.mark.parametrize("concurrency", [None, 3])
async def test_every_request_is_answered_and_counted(tmp_path: Path, rate: float, concurrency: int | None) -> None:
    async with front_door() as door:
        result = await bench(
            tmp_path,
            url=door.listener.url,
            requests=40,
            rate=rate,
            concurrency=concurrency,
            input=20,
            output=12,
            vocab=200,
        )
    assert (result["completed"], result["failures"]) == (40, {})
    assert result["model"] == "echo"
    for name in ("ttft_ms", "itl_ms", "tpot_ms"):
        figures = result[name]
        assert isinstance(figures, dict)
        assert 0 <= figures["p50"] <= figures["p90"] <= figures["p99"] <= figures["max"]
    duration, rate_out = result["duration_s"], result["output_tok_s"]
    assert isinstance(duration, float)
    assert isinstance(rate_out, float)
    assert duration * rate_out == pytest.approx(40 * 12, rel=0.05)


@pytest.mark.parametrize("concurrency", [None, 5])
async def test_several_processes_share_the_requests_and_each_is_counted_once(
    tmp_path: Path, concurrency: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    async with front_door() as door:
        result = await bench(
            tmp_path,
            url=door.listener.url,
            requests=11,
            rate=500.0,
            concurrency=concurrency,
            clients=3,
            input=20,
            output=5,
            vocab=200,
        )
    assert (result["completed"], result["failures"]) == (11, {})
    assert len(result["client_cpu"]) == 3  # type: ignore[arg-type]
    assert 11 <= result["events"] <= 11 * 5  # type: ignore[operator]
    assert "client: 3 processes" in capsys.readouterr().out


async def test_more_processes_than_requests_may_be_in_work_are_refused(tmp_path: Path) -> None:
    async with front_door() as door:
        with pytest.raises(StartupError, match="--clients 4"):
            await bench(tmp_path, url=door.listener.url, requests=9, concurrency=3, clients=4)


def test_shares_of_a_load_are_in_turn_and_add_up() -> None:
    bodies = [b"%d" % at for at in range(10)]
    load = Load(
        target=Target.parse("http://h"),
        bodies=bodies,
        offsets=[0.1 * at for at in range(10)],
        concurrency=5,
        timeout_s=1,
    )
    shares = [load.share(at, 3) for at in range(3)]
    assert shares[1].bodies == [b"1", b"4", b"7"]
    assert shares[1].offsets == load.offsets[1::3]
    assert sorted(body for share in shares for body in share.bodies) == bodies
    assert [share.concurrency for share in shares] == [2, 2, 1]


async def test_prompts_come_from_a_file_as_texts_and_ids(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "hello world"}\n{"prompt": [5, 6, 7]}\n{"prompt": "a"}\n')
    async with front_door() as door:
        result = await bench(tmp_path, url=door.listener.url, prompts=file, output=3)
        assert (result["completed"], result["input"]) == (3, "prompts.jsonl")
        fewer = await bench(tmp_path, url=door.listener.url, prompts=file, output=3, requests=2)
        assert fewer["completed"] == 2
        with pytest.raises(StartupError, match="3 lines"):
            await bench(tmp_path, url=door.listener.url, prompts=file, requests=4)


@pytest.mark.parametrize(("error_at", "told"), [(4, "error event"), (0, "status 500")])
async def test_requests_that_an_engine_fails_are_counted_and_the_others_measured(
    tmp_path: Path, error_at: int, told: str
) -> None:
    """An event in the stream once token 0 is out. One engine tells token and failure in order; two would race."""
    async with front_door() as door:
        await door.decode_alone()
        door.decode.faults.error = EngineError("broken by the test")
        door.decode.faults.error_at = error_at
        door.decode.faults.error_count = 3
        result = await bench(tmp_path, url=door.listener.url, requests=10, input=20, output=8, vocab=200)
    assert (result["completed"], result["failed"]) == (7, 3)
    assert list(result["failures"]) == [f"{told}: broken by the test"]  # type: ignore[call-overload]


async def test_refusals_are_counted_with_the_servers_words(tmp_path: Path) -> None:
    async with front_door(LimitSettings(max_running=1, max_waiting=0), step_s=0.05) as door:
        result = await bench(tmp_path, url=door.listener.url, requests=6, input=20, output=4, vocab=200)
        assert result["completed"]
        assert result["failed"]
        assert all(str(why).startswith("status 503: ") for why in result["failures"])  # type: ignore[attr-defined]
        nothing = await bench(tmp_path, expect=1, url=door.listener.url, requests=2, vocab=10_000_000)
    assert nothing["completed"] == 0
    assert nothing["output_tok_s"] is None
    assert all(str(why).startswith("status 400: ") for why in nothing["failures"])  # type: ignore[attr-defined]


async def test_a_url_that_nobody_answers_is_a_sentence(tmp_path: Path, unused_tcp_port: int) -> None:
    with pytest.raises(StartupError, match="does not answer"):
        await bench(tmp_path, url=f"http://127.0.0.1:{unused_tcp_port}")
    result = await bench(tmp_path, expect=1, url=f"http://127.0.0.1:{unused_tcp_port}", model="x", requests=2)
    (why,) = result["failures"]  # type: ignore[misc]
    assert str(why).startswith("connection: ")


# ---- one stream against scripted servers ------------------------------------------------------

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def event(text: str, finish: str | None = None) -> bytes:
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, "usage": None}).encode() + b"\n\n"


def usage(tokens_in: int, tokens_out: int) -> bytes:
    counts = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return b"data: " + json.dumps({"choices": [], "usage": counts}).encode() + b"\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


DONE = b"data: [DONE]\n\n"
WHOLE = event("a") + event("bc") + event("", "length") + usage(4, 3) + DONE


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[Target]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            await answer(writer)
        finally:
            writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    try:
        yield Target("127.0.0.1", port, "", tls=False)
    finally:
        listening.close()


async def ask(data: bytes, piece: int = 1 << 20, timeout_s: float = 20.0, hang: bool = False) -> Streamed:
    gone = asyncio.Event()

    async def answer(writer: asyncio.StreamWriter) -> None:
        for start in range(0, len(data), piece):
            writer.write(data[start : start + piece])
            await writer.drain()
        if hang:
            await gone.wait()

    async with server(answer) as target:
        outcome = await stream(target, b"{}", timeout_s)
        gone.set()
        return outcome


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("whole_in_one_chunk", [True, False])
async def test_events_are_found_wherever_the_bytes_are_cut(piece: int, whole_in_one_chunk: bool) -> None:
    body = chunk(WHOLE) if whole_in_one_chunk else b"".join(chunk(WHOLE[i : i + 5]) for i in range(0, len(WHOLE), 5))
    outcome = await ask(HEAD + body + chunk(b""), piece)
    assert outcome.failure == ""
    assert (outcome.prompt_tokens, outcome.completion_tokens) == (4, 3)
    assert len(outcome.texts) == 2
    assert outcome.sent <= outcome.texts[0] <= outcome.texts[1]


async def test_an_answer_of_special_tokens_alone_has_its_end_as_its_first_event() -> None:
    outcome = await ask(HEAD + chunk(event("", "length") + usage(4, 1) + DONE) + chunk(b""))
    assert (outcome.failure, len(outcome.texts)) == ("", 1)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "the connection ended before the answer"),
        (b"nonsense\r\n\r\n", "not HTTP"),
        (HEAD + chunk(event("a")), "the connection ended before the answer"),
        (HEAD + chunk(event("a")) + chunk(b""), "the stream ended before its end mark"),
        (HEAD + chunk(b"data: {]\n\n"), "an event that is no completion chunk"),
        (HEAD + chunk(b'data: {"choices": [{}]}\n\n'), "an event that is no completion chunk"),
        (HEAD + chunk(b'data: {"error": {"message": "m"}}\n\n'), "error event: m"),
        (HEAD + chunk(b"data: 3\n\n"), "an event that is no completion chunk"),
        (HEAD + chunk(b"x" * (1 << 21)), "an event without an end"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 4\r\n\r\noops", "status 500: oops"),
        (b'HTTP/1.1 429 No\r\ncontent-length: 29\r\n\r\n{"error": {"message": "full"}}', "status 429: "),
    ],
)
async def test_whatever_a_server_does_wrong_is_a_failure_with_a_reason(data: bytes, why: str) -> None:
    outcome = await ask(data)
    assert why in outcome.failure


async def test_a_server_that_falls_silent_is_given_up() -> None:
    outcome = await ask(HEAD + chunk(event("a")), timeout_s=0.3, hang=True)
    assert outcome.failure == "no end within 0.3 s"


# ---- arithmetic -------------------------------------------------------------------------------


def test_arrivals_are_poissons_and_repeatable() -> None:
    times = arrivals(20_000, 50.0, seed=1)
    assert times == arrivals(20_000, 50.0, seed=1) != arrivals(20_000, 50.0, seed=2)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.02, rel=0.03)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.05), "of an exponential distribution the two are equal"
    assert arrivals(3, math.inf, seed=1) == [0.0, 0.0, 0.0]


def test_figures_are_of_whole_answers_and_short_ones_are_failures() -> None:
    good = Streamed(sent=10.0, texts=[10.5, 10.6, 10.9], prompt_tokens=7, completion_tokens=5)
    short = Streamed(sent=10.0, texts=[10.1], prompt_tokens=7, completion_tokens=4)
    broken = Streamed(sent=9.0, texts=[9.5], failure="status 500: x")
    result = summary([good, short, broken], output=5)
    assert (result["completed"], result["failed"]) == (1, 2)
    assert result["failures"] == {"4 tokens instead of 5": 1, "status 500: x": 1}
    assert result["ttft_ms"]["p50"] == pytest.approx(500)
    assert result["itl_ms"]["p50"] == pytest.approx(300)
    assert result["itl_ms"]["max"] == pytest.approx(300)
    assert result["tpot_ms"]["p50"] == pytest.approx(100)
    assert result["duration_s"] == pytest.approx(1.9)
    assert result["total_tok_s"] == pytest.approx(12 / 1.9, abs=0.1)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://h", Target("h", 80, "", tls=False)),
        ("http://h:9/v1/", Target("h", 9, "", tls=False)),
        ("https://h/a/v1", Target("h", 443, "/a", tls=True)),
        ("http://[::1]:8000", Target("::1", 8000, "", tls=False)),
    ],
)
def test_urls_are_read_with_and_without_their_version(url: str, target: Target) -> None:
    assert Target.parse(url) == target


@pytest.mark.parametrize("url", ["", "h:80", "ftp://h", "http://", "http://h:99999"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(StartupError, match="--url"):
        Target.parse(url)
