"""Media behind addresses become bytes where the provider reads none, each address once, and nothing else changes."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Collection

import pytest

from diptych.cluster.providers.fetch import Fetched
from diptych.cluster.providers.inlined_media import MAX_AT_ONCE, inlined
from diptych.protos.errors import InvalidRequest, RequestTooLarge
from diptych.protos.messages import Media, Message, Text, ToolResult, said
from diptych.protos.openai import ChatRequest

URL = "https://cdn.test/a.png"


def picture(url: str = URL, place: int = 0) -> Media:
    return Media(kind="image", path=f"messages[0].content[{place}]", url=url, detail="low")


def request(*messages: Message) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": messages})


class Shelf:
    """Fetches from nowhere; counts."""

    def __init__(self, data: bytes = b"png") -> None:
        self.asked: list[str] = []
        self.most_at_once = 0
        self._data = data
        self._now = 0

    async def __call__(
        self, url: str, path: str, media_types: Collection[str], most_bytes: int | None = None
    ) -> Fetched:
        self.asked.append(url)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        await asyncio.sleep(0)
        self._now -= 1
        if "bad" in url:
            raise InvalidRequest(f"{path}: no", path)
        return Fetched(self._data, "image/png")


async def test_an_address_that_is_there_twice_is_fetched_once_and_put_in_both_places() -> None:
    shelf = Shelf()
    result = ToolResult(call_id="c", name="f", parts=(Text("see"), picture(place=1)))
    asked = request(
        said("system", "be kind"),
        Message(role="user", parts=(Text("what is it"), picture())),
        Message(role="tool", parts=(result,)),
    )
    told = await inlined(asked, shelf)
    assert shelf.asked == [URL]
    data = base64.b64encode(b"png").decode()
    for media in (told.messages[1].media[0], told.messages[2].media[0]):
        assert (media.url, media.data, media.media_type, media.detail) == ("", data, "image/png", "low")
    assert told.messages[0] is asked.messages[0]
    assert told.messages[1].parts[0] == Text("what is it")
    assert asked.messages[1].media[0].url == URL


async def test_what_the_provider_reads_itself_is_left_to_it() -> None:
    shelf = Shelf()
    asked = request(Message(role="user", parts=(picture("gs://bucket/a.png"), picture())))
    assert await inlined(asked, shelf, reads=("gs://", "https://")) is asked
    told = await inlined(asked, shelf, reads=("gs://",))
    assert [media.url for media in told.messages[0].media] == ["gs://bucket/a.png", ""]
    assert shelf.asked == [URL]


async def test_one_that_cannot_be_fetched_is_told_by_its_field_and_ends_the_others() -> None:
    parts = [picture(f"https://cdn.test/{i}.png", i) for i in range(8)]
    shelf = Shelf()
    await inlined(request(Message(role="user", parts=tuple(parts))), shelf)
    assert shelf.most_at_once == MAX_AT_ONCE
    parts[1] = picture("https://cdn.test/bad.png", 1)
    with pytest.raises(InvalidRequest) as caught:
        await inlined(request(Message(role="user", parts=tuple(parts))), Shelf())
    assert caught.value.param == "messages[0].content[1]"


async def test_all_files_of_a_request_together_have_a_limit() -> None:
    parts = tuple(picture(f"https://cdn.test/{i}.png", i) for i in range(3))
    asked = request(Message(role="user", parts=parts))
    assert await inlined(asked, Shelf(b"x" * 10), most_bytes=30)
    with pytest.raises(RequestTooLarge, match="more than 29 bytes"):
        await inlined(asked, Shelf(b"x" * 10), most_bytes=29)


async def test_a_file_counts_as_often_as_it_is_sent() -> None:
    """One large image at a thousand places of a request was a body of a thousand times its size."""
    asked = request(Message(role="user", parts=tuple(picture(place=i) for i in range(3))))
    shelf = Shelf(b"x" * 10)
    assert await inlined(asked, shelf, most_bytes=30)
    assert len(shelf.asked) == 1
    with pytest.raises(RequestTooLarge, match="more than 29 bytes"):
        await inlined(asked, Shelf(b"x" * 10), most_bytes=29)
