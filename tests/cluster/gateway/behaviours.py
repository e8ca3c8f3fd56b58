"""More than sixty ways in which a provider misbehaves, each in all formats that can; scripted.py does them.

Above each: what a client of the gateway must see, of a stream and of a whole answer, and the kind of the failure.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress

from scripted import BEHAVIOURS, HALF, REST, TEXT, Behaviour, Outcome, Wire, behaviour

WITH_AN_END = ("openai.chat", "openai.responses", "anthropic.messages", "bedrock.converse")  # an event that is the last


def status(name: str, line: str, error: str, outcome: Outcome, kind: str, **headers: str) -> None:
    """An answer of an error's status, with the format's own body."""

    async def act(wire: Wire) -> None:
        await wire.body(wire.dialect.error(error, "as told"), line, **headers)

    BEHAVIOURS[name] = Behaviour(act, outcome, outcome, kind)


status("status_400", "400 Bad Request", "bad", "refuses", "bad_request")
status("status_401", "401 Unauthorized", "auth", "moves", "auth")
status("status_402", "402 Payment Required", "quota", "moves", "quota|rate_limited")
status("status_403", "403 Forbidden", "auth", "moves", "auth")
status("status_404", "404 Not Found", "missing", "moves", "not_found")
status("status_413", "413 Content Too Large", "bad", "refuses", "bad_request|context_length")
status("status_422", "422 Unprocessable Content", "bad", "refuses", "bad_request")
status("status_429", "429 Too Many Requests", "rate_limit", "moves", "rate_limited")
status("status_429_in_an_hour", "429 Too Many Requests", "rate_limit", "moves", "rate_limited", retry_after="3600")
status(
    "status_429_by_date",
    "429 Too Many Requests",
    "rate_limit",
    "moves",
    "rate_limited",
    retry_after="Fri, 31 Dec 2100 23:59:59 GMT",
)
status("status_429_bad_date", "429 Too Many Requests", "rate_limit", "moves", "rate_limited", retry_after="soon")
status("status_429_quota", "429 Too Many Requests", "quota", "moves", "quota|rate_limited")
status("status_500", "500 Internal Server Error", "server", "moves", "server")
status("status_502", "502 Bad Gateway", "server", "moves", "server")
status("status_503", "503 Service Unavailable", "overloaded", "moves", "overloaded")
status("status_503_retry_after", "503 Service Unavailable", "overloaded", "moves", "overloaded", retry_after="1")
status("status_504", "504 Gateway Timeout", "server", "moves", "server|timeout_first_token")
status("status_520", "520 Web Server Returned an Unknown Error", "server", "moves", "server")
status("status_529", "529 Overloaded", "overloaded", "moves", "overloaded")
status("too_long_a_prompt", "400 Bad Request", "context", "refuses", "context_length")
status("filtered_prompt", "400 Bad Request", "policy", "refuses", "content_policy|bad_request")


@behaviour("moves")
async def html_of_a_proxy(wire: Wire) -> None:
    await wire.body(b"<html><h1>502 Bad Gateway</h1></html>", "502 Bad Gateway", content_type="text/html")


@behaviour("moves")
async def html_in_200(wire: Wire) -> None:
    await wire.body(b"<html>please log in</html>", content_type="text/html")


@behaviour("moves")
async def error_without_a_body(wire: Wire) -> None:
    await wire.body(b"", "500 Internal Server Error")


@behaviour("moves")
async def error_that_is_no_json(wire: Wire) -> None:
    await wire.body(b"upstream connect error \xff\xfe", "503 Service Unavailable", content_type="text/plain")


BEHAVIOURS["error_that_is_no_json"] = Behaviour(error_that_is_no_json, "moves", "moves", "overloaded|server")


@behaviour("answers")
async def once_500_then_well(wire: Wire) -> None:
    if wire.number == 0:
        return await wire.body(wire.dialect.error("server", "as told"), "500 Internal Server Error")
    await wire.well()


@behaviour("answers", kind="overloaded")
async def once_529_then_well(wire: Wire) -> None:
    if wire.number == 0:
        return await wire.body(wire.dialect.error("overloaded", "as told"), "529 Overloaded")
    await wire.well()


@behaviour("answers")
async def once_cut_then_well(wire: Wire) -> None:
    if wire.number == 0:
        return wire.cut()
    await wire.well()


BEHAVIOURS["once_cut_then_well"] = Behaviour(once_cut_then_well, "answers", "answers", "server|connect")


@behaviour("moves", kind="not_found|server|bad_request")
async def redirect(wire: Wire) -> None:
    await wire.body(b"", "307 Temporary Redirect", location="http://127.0.0.1:1/elsewhere")


@behaviour("moves")
async def status_204(wire: Wire) -> None:
    await wire.head("204 No Content")
    wire.keeps = True


@behaviour("moves")
async def empty_body(wire: Wire) -> None:
    await wire.body(b"")


@behaviour("moves")
async def no_json(wire: Wire) -> None:
    await wire.body(b'{"choices": [')


@behaviour("moves")
async def a_list(wire: Wire) -> None:
    await wire.body([1, 2])


@behaviour("moves")
async def an_object_of_nothing(wire: Wire) -> None:
    await wire.body({})


@behaviour("moves", kind="server|overloaded")
async def error_in_200(wire: Wire) -> None:
    await wire.body(wire.dialect.error("server", "as told"))


@behaviour("moves", kind="rate_limited")
async def rate_limit_in_200(wire: Wire) -> None:
    await wire.body(wire.dialect.error("rate_limit", "as told"))


@behaviour("moves", "answers")
async def error_event_first(wire: Wire) -> None:
    await wire.frames(wire.dialect.error_frame("server"))


@behaviour("moves", "answers", kind="overloaded|server")
async def overloaded_event_behind_the_role(wire: Wire) -> None:
    await wire.frames(*wire.dialect.opening(), wire.dialect.error_frame("overloaded"))


@behaviour("moves", "answers", kind="rate_limited")
async def rate_limit_event_first(wire: Wire) -> None:
    await wire.frames(wire.dialect.error_frame("rate_limit"))


@behaviour("breaks", "answers")
async def error_event_in_the_middle(wire: Wire) -> None:
    if await wire.started():
        await wire.chunks(wire.dialect.error_frame("server"))
        await wire.end()


@behaviour("answers")
async def whole_answer_where_a_stream_was_asked_for(wire: Wire) -> None:
    await wire.body(wire.dialect.whole(TEXT))


@behaviour("moves", kind="timeout_first_token", hangs="first")
async def hang_before_headers(wire: Wire) -> None:
    await wire.hang()


@behaviour("moves", kind="timeout_first_token|timeout_idle", hangs="first")
async def hang_after_headers(wire: Wire) -> None:
    await wire.head(content_type=wire.dialect.stream_type if wire.is_stream else "application/json", content_length="9")
    await wire.hang()


@behaviour("moves", "moves", kind="timeout_first_token|timeout_idle", hangs="first")
async def hang_behind_the_role(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.hang()
    await wire.begin()
    await wire.chunks(*wire.dialect.opening())
    await wire.hang()


@behaviour("moves", "moves", kind="timeout_first_token|timeout_idle", hangs="first")
async def pings_for_ever(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.hang()
    await wire.begin()
    with suppress(OSError):
        while not wire.writer.is_closing():
            await wire.chunks(
                b": ping\n\n" if "event-stream" in wire.dialect.stream_type[:20] else wire.dialect.opening()[0]
            )
            await asyncio.sleep(0.02)


@behaviour("breaks", "answers", kind="timeout_idle", hangs="later")
async def hang_in_the_middle(wire: Wire) -> None:
    if await wire.started():
        await wire.hang()


@behaviour("breaks", "answers", kind="timeout_idle", hangs="later")
async def hang_within_an_event(wire: Wire) -> None:
    if await wire.started():
        await wire.chunks(wire.dialect.piece(REST)[:20])
        await wire.hang()


@behaviour("answers")
async def slow_first_token(wire: Wire) -> None:
    if not wire.is_stream:
        await asyncio.sleep(0.05)
        return await wire.well()
    await wire.begin()
    await wire.chunks(*wire.dialect.opening())
    await asyncio.sleep(0.05)
    await wire.chunks(wire.dialect.piece(HALF), wire.dialect.piece(REST), *wire.dialect.closing())
    await wire.end()


@behaviour("answers")
async def in_small_pieces(wire: Wire) -> None:
    data = (
        b"".join(wire.dialect.stream(HALF, REST)) if wire.is_stream else json.dumps(wire.dialect.whole(TEXT)).encode()
    )
    kind = wire.dialect.stream_type if wire.is_stream else "application/json"
    await wire.head(content_type=kind, transfer_encoding="chunked")
    for at in range(0, len(data), 41):
        await wire.chunks(data[at : at + 41])
        await asyncio.sleep(0)
    await wire.end()


@behaviour("answers")
async def all_in_one_piece(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.well()
    await wire.begin()
    await wire.chunks(b"".join(wire.dialect.stream(HALF, REST)))
    await wire.end()


@behaviour("moves", kind="connect|server")
async def closed_at_once(wire: Wire) -> None:
    wire.writer.close()


@behaviour("moves", kind="connect|server")
async def reset_at_once(wire: Wire) -> None:
    wire.cut()


@behaviour("moves", kind="connect|server")
async def cut_within_the_headers(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 200 OK\r\ncontent-ty")


@behaviour("moves", kind="server")
async def cut_behind_the_headers(wire: Wire) -> None:
    await wire.head(
        content_type=wire.dialect.stream_type if wire.is_stream else "application/json", content_length="99"
    )


@behaviour("moves", kind="server")
async def cut_behind_the_role(wire: Wire) -> None:
    if not wire.is_stream:
        await wire.head(content_type="application/json", content_length="99")
        return await wire.send(b'{"id"')
    await wire.begin()
    await wire.chunks(*wire.dialect.opening())


@behaviour("breaks", "answers")
async def cut_in_the_middle(wire: Wire) -> None:
    await wire.started()


@behaviour("breaks", "answers")
async def reset_in_the_middle(wire: Wire) -> None:
    if await wire.started():
        await asyncio.sleep(0.05)  # or the reset would throw away what the client has not read
        wire.cut()


@behaviour("breaks", "answers")
async def cut_within_an_event(wire: Wire) -> None:
    if await wire.started():
        await wire.chunks(wire.dialect.piece(REST)[:20])


@behaviour("breaks", "answers")
async def end_within_an_event(wire: Wire) -> None:
    if await wire.started():
        await wire.chunks(wire.dialect.piece(REST)[:-9])
        await wire.end()


@behaviour("breaks", "answers")
async def end_without_a_finish(wire: Wire) -> None:
    if await wire.started():
        await wire.end()


@behaviour("moves", "answers")
async def empty_stream(wire: Wire) -> None:
    await wire.frames()


@behaviour("moves", "answers")
async def stream_of_a_role_alone(wire: Wire) -> None:
    await wire.frames(*wire.dialect.opening())


@behaviour("moves", kind="server|connect")
async def no_http(wire: Wire) -> None:
    await wire.send(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")


@behaviour("moves", kind="server|connect")
async def too_much_of_a_header(wire: Wire) -> None:
    await wire.body(wire.dialect.whole(TEXT), x_long="x" * 300_000)


@behaviour("breaks", "moves")
async def broken_chunks(wire: Wire) -> None:
    if wire.is_stream:
        await wire.started()
    else:
        await wire.head(content_type="application/json", transfer_encoding="chunked")
    await wire.send(b"zz\r\nno chunk\r\n")


@behaviour("moves", "moves")
async def shorter_than_told(wire: Wire) -> None:
    data = json.dumps(wire.dialect.whole(TEXT)).encode()
    await wire.head(content_type="application/json", content_length=str(len(data) + 50))
    await wire.send(data)


@behaviour("moves")
async def compressed_rubbish(wire: Wire) -> None:
    await wire.body(b"no gzip at all", content_encoding="gzip")


@behaviour("moves")
async def unknown_compression(wire: Wire) -> None:
    await wire.body(wire.dialect.whole(TEXT), content_encoding="zstd-not")


@behaviour("answers")
async def early_hints(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
    await wire.well()


@behaviour("answers")
async def shouted_content_type(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.body(wire.dialect.whole(TEXT), content_type="Application/JSON; Charset=UTF-8")
    await wire.begin(content_type=wire.dialect.stream_type.upper() + "; charset=UTF-8")
    await wire.chunks(*wire.dialect.stream(HALF, REST))
    await wire.end()


@behaviour("answers")
async def bad_line_between(wire: Wire) -> None:
    d = wire.dialect
    await wire.frames(*d.opening(), d.piece(HALF), d.bad_frame(), d.piece(REST), *d.closing())


@behaviour("answers")
async def unknown_events_between(wire: Wire) -> None:
    d = wire.dialect
    await wire.frames(*d.opening(), d.odd_frame(), d.piece(HALF), d.odd_frame(), d.piece(REST), *d.closing())


@behaviour("answers", only=("openai.chat", "openai.responses", "anthropic.messages", "gemini.generate"))
async def comments_between(wire: Wire) -> None:
    frames = wire.dialect.stream(HALF, REST)
    await wire.frames(b": hello\n\n", *(piece for frame in frames for piece in (frame, b": ping\n\n", b"retry: 9\n\n")))


@behaviour("answers", only=("openai.chat", "openai.responses", "anthropic.messages", "gemini.generate"))
async def lines_end_as_in_windows(wire: Wire) -> None:
    await wire.frames(*(frame.replace(b"\n", b"\r\n") for frame in wire.dialect.stream(HALF, REST)))


@behaviour("answers", only=WITH_AN_END)
async def all_again_behind_the_end(wire: Wire) -> None:
    d = wire.dialect
    await wire.frames(*d.stream(HALF, REST), d.piece(REST), *d.closing())


@behaviour("answers")
async def the_end_twice(wire: Wire) -> None:
    d = wire.dialect
    await wire.frames(*d.stream(HALF, REST), *d.closing())


@behaviour("answers", only=WITH_AN_END)
async def hang_behind_the_end(wire: Wire) -> None:
    if not wire.is_stream:
        return await wire.well()
    await wire.begin()
    await wire.chunks(*wire.dialect.stream(HALF, REST))
    await wire.hang()


@behaviour("answers")
async def unknown_finish(wire: Wire) -> None:
    d = wire.dialect
    if not wire.is_stream:
        return await wire.body(d.whole(TEXT, "made_up"))
    await wire.frames(*d.opening(), d.piece(HALF), d.piece(REST), *d.closing("made_up"))


@behaviour("answers")
async def cut_by_length(wire: Wire) -> None:
    d = wire.dialect
    if not wire.is_stream:
        return await wire.body(d.whole(TEXT, "length"))
    await wire.frames(*d.opening(), d.piece(HALF), d.piece(REST), *d.closing("length"))


@behaviour(
    "breaks",
    "answers",
    has_tools=True,
    only=("openai.chat", "openai.responses", "anthropic.messages", "bedrock.converse"),
)
async def half_a_call_that_claims_to_be_whole(wire: Wire) -> None:
    d = wire.dialect
    await wire.frames(*d.opening(), d.piece(HALF), *d.call(['{"city": ', '"Par']), *d.closing("tool_calls"))


@behaviour(
    "breaks",
    "answers",
    has_tools=True,
    only=("openai.chat", "openai.responses", "anthropic.messages", "bedrock.converse"),
)
async def cut_within_a_call(wire: Wire) -> None:
    d = wire.dialect
    if await wire.started():
        await wire.chunks(*d.call(['{"city": ', '"Par'])[:-1])


@behaviour("answers", "moves", has_tools=True, only=("openai.chat", "openai.responses"))
async def half_a_call_in_a_whole_answer(wire: Wire) -> None:
    if wire.is_stream:
        return await wire.well()
    await wire.body(wire.dialect.whole_call('{"city": "Par'))
