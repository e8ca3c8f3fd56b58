"""Guards against files that are not what they are called, addresses that lead into this machine, and parts that lose
their wish to be kept.
"""

from __future__ import annotations

import base64
import os
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from diptych.agents import llm
from diptych.agents.llm.testing.scripted import ScriptedModel

PNG = b"\x89PNG\r\n\x1a\n" + bytes(8)
JPEG = b"\xff\xd8\xff\xe0" + bytes(8)
WAV = b"RIFF\x10\0\0\0WAVEfmt "
PDF = b"%PDF-1.7\n"


def archive(*members: str) -> bytes:
    held = BytesIO()
    with zipfile.ZipFile(held, "w") as written:
        for member in members:
            written.writestr(member, "x")
    return held.getvalue()


@pytest.mark.parametrize(
    ("verb", "data", "media_type"),
    [
        (llm.image, PNG, "image/png"),
        (llm.image, JPEG, "image/jpeg"),
        (llm.image, b"GIF89a\0", "image/gif"),
        (llm.image, b"RIFF\0\0\0\0WEBPVP8 ", "image/webp"),
        (llm.image, b"\0\0\0\x18ftypheic\0\0", "image/heic"),
        (llm.image, bytearray(PNG), "image/png"),
        (llm.image, memoryview(PNG), "image/png"),
        (llm.audio, WAV, "audio/wav"),
        (llm.audio, b"ID3\4\0", "audio/mpeg"),
        (llm.audio, b"\xff\xfb\x90\0", "audio/mpeg"),
        (llm.audio, b"\xff\xf1\x50\x80", "audio/aac"),
        (llm.audio, b"OggS\0", "audio/ogg"),
        (llm.audio, b"fLaC\0", "audio/flac"),
        (llm.audio, b"FORM\0\0\0\0AIFFCOMM", "audio/aiff"),
        (llm.audio, b"\0\0\0\x18ftypM4A \0", "audio/mp4"),
        (llm.document, PDF, "application/pdf"),
        (llm.document, b"<html>", "text/html"),
        (llm.document, "Gr\u00fc\u00dfe".encode(), "text/plain"),
        (
            llm.document,
            archive("word/document.xml"),
            "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
        ),
        (llm.document, archive("xl/workbook.xml"), "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"),
    ],
)
def test_the_first_bytes_say_what_it_is(verb: Any, data: Any, media_type: str) -> None:
    made = verb(data=data)
    assert (made.media_type, base64.b64decode(made.data), made.url) == (media_type, bytes(data), "")


@pytest.mark.parametrize(
    ("name", "content", "media_type"),
    [
        ("a.csv", b"a,b", "text/csv"),
        ("a.md", b"# a", "text/markdown"),
        ("a.json", b'{"a": 1}', "application/json"),
        ("a.json", b"a: 1", "text/plain"),
        ("a.png", b"plain words", "text/plain"),
        ("a.txt", PDF, "application/pdf"),
        ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(8), "application/msword"),
    ],
)
def test_a_name_chooses_among_texts_alone(tmp_path: Path, name: str, content: bytes, media_type: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    made = llm.document(path=file)
    assert (made.media_type, made.name) == (media_type, name)
    assert llm.document(path=str(file), name="b").name == "b"


@pytest.mark.parametrize(
    ("verb", "given", "field", "words"),
    [
        (llm.image, {}, "", "exactly one of url=, path= and data=; it got none"),
        (llm.image, {"data": PNG, "url": "https://a.example/b"}, "url", "it got url and data"),
        (llm.image, {"data": PDF}, "data", "llm.image(data=...) holds application/pdf: that is llm.document(...)"),
        (llm.image, {"data": WAV}, "data", "holds audio/wav: that is llm.audio(...)"),
        (llm.image, {"data": b"<svg"}, "data", "begins with b'<svg', which is no image that models take"),
        (llm.audio, {"data": PNG}, "data", "that is llm.image(...)"),
        (llm.audio, {"data": b"\xff\xfea\0"}, "data", "which is no sound that models take"),
        (llm.document, {"data": PNG}, "data", "that is llm.image(...)"),
        (llm.document, {"data": b"\0\1\2"}, "data", "which is no document that models take"),
        (llm.document, {"data": archive("a.txt")}, "data", "which is no document"),
        (llm.document, {"data": b"PK\3\4broken"}, "data", "which is no document"),
        (llm.document, {"data": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"}, "data", "which is no document"),
        (llm.image, {"data": b""}, "data", "is empty"),
        (llm.image, {"data": "aGk="}, "data", "takes bytes, not text: base64.b64decode"),
        (llm.image, {"data": 3}, "data", "takes bytes, not a int"),
        (llm.image, {"data": PNG, "limit_bytes": 15}, "data", "has more than 15 bytes"),
        (llm.image, {"data": PNG, "keep": "2h"}, "keep", """for "5m" or "1h", not '2h'"""),
        (llm.image, {"data": PNG, "detail": "best"}, "detail", "auto, low or high, not 'best'"),
        (llm.document, {"data": PDF, "name": "a\nb"}, "name", "printable characters"),
        (llm.image, {"url": "file:///etc/passwd"}, "url", "a file of this machine is path="),
        (llm.image, {"url": "/etc/passwd"}, "url", "a file of this machine is path="),
        (llm.image, {"url": "ftp://a.example/b"}, "url", "not of http or https"),
        (llm.image, {"url": "FILE:///etc/passwd"}, "url", "a file of this machine is path="),
        (llm.image, {"url": "javascript:1"}, "url", "not of http or https"),
        (llm.image, {"url": "http://u:p@a.example/b"}, "url", "a name or a password"),
        (llm.image, {"url": "http://127.1/b"}, "url", "host is a number"),
        (llm.image, {"url": "https://a.example/b c"}, "url", "letters that an address cannot"),
        (llm.image, {"url": "data:image/png;base64,AA"}, "url", "as data="),
        (llm.image, {"url": b"https://a.example"}, "url", "is a text, not a bytes"),
        (llm.image, {"path": 3}, "path", "3 is no path"),
        (llm.image, {"path": "/dev/zero"}, "path", "is no file"),
        (llm.image, {"path": "not/there.png"}, "path", "is not there"),
        (llm.text, {"words": 3}, "words", "takes a text, not a int"),
        (llm.text, {"words": "a", "keep": 5}, "keep", "not 5"),
    ],
)
def test_what_cannot_be_is_told_by_argument(verb: Any, given: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(llm.UsageError) as caught:
        verb(**given)
    assert words in str(caught.value)
    assert caught.value.field == field


def test_no_more_of_a_file_is_read_than_the_limit(tmp_path: Path) -> None:
    """A sparse file of a terabyte: to read it whole would end the process."""
    file = tmp_path / "large.png"
    file.write_bytes(PNG)
    os.truncate(file, 1 << 40)
    with pytest.raises(llm.UsageError, match="has more than 20,971,520 bytes"):
        llm.image(path=file)
    with pytest.raises(llm.UsageError, match="is no file"):
        llm.image(path=tmp_path)


def test_an_address_stays_one() -> None:
    """Nothing is fetched where a prompt is written: who answers reads it, or the guarded fetcher."""
    made = llm.image(url="https://a.example/b.png?c=1", detail="low")
    assert (made.url, made.data, made.media_type, made.detail) == ("https://a.example/b.png?c=1", "", "", "low")
    assert llm.image(url="https://a.example/b.png").detail == ""


@pytest.mark.parametrize("url", ["https://127.0.0.1/a.png", "https://localhost/a.png"])
def test_an_address_that_has_to_be_fetched_never_leads_into_this_network(url: str) -> None:
    @llm.call("google/gemini-2.5-pro", registry=llm.Registry(keys={"google": "key"}, environ={}))
    def ask() -> object:
        return ["look", llm.image(url=url)]

    with pytest.raises(llm.UsageError, match=r"ask: messages\[0\]\.content\[1\]: .* cannot be fetched") as caught:
        ask.request()
    assert caught.value.field == "messages[0].content[1]"


def test_an_archive_with_a_list_of_millions_is_not_read() -> None:
    """Its list alone would take seconds and a gigabyte."""
    content = b"PK\x03\x04" + b"PK\x05\x06" + bytes(8) + (1 << 24).to_bytes(4, "little") + bytes(6)
    with pytest.raises(llm.UsageError, match="which is no document"):
        llm.document(data=content)


def test_what_is_to_be_kept_is_marked_on_the_wire_of_who_knows_it() -> None:
    model = ScriptedModel(["yes"] * 2, codec_name="anthropic.messages")
    registry = llm.Registry(environ={})
    registry.add("test", model)

    @llm.call("test/m", registry=registry, max_tokens=10)
    def ask(*parts: Any) -> object:
        return [llm.system(llm.text("rules", keep="1h")), llm.user(*parts)]

    ask(llm.kept("5m", "long"), "q")
    ask(llm.kept("1h", llm.image(data=PNG)), llm.document(data=PDF, keep="5m"), "q")
    first, second = model.requests
    assert first["system"][0]["cache_control"] == {"type": "ephemeral", "ttl": "1h"}
    marks = [[block.get("cache_control") for block in one["messages"][0]["content"]] for one in (first, second)]
    five = {"type": "ephemeral"}
    assert [[mark and mark["type"] for mark in row] for row in marks] == [
        ["ephemeral", None],
        ["ephemeral"] * 2 + [None],
    ]
    assert marks[0][0] in (five, {**five, "ttl": "5m"})
    assert marks[1][0]["ttl"] == "1h"


@pytest.mark.parametrize(
    ("how_long", "part", "field"),
    [("2h", "a", "keep"), ("", "a", "how_long"), ("5m", 3, "part"), ("5m", ["a"], "part")],
)
def test_what_cannot_be_kept_is_told(how_long: Any, part: Any, field: str) -> None:
    with pytest.raises(llm.UsageError) as caught:
        llm.kept(how_long, part)
    assert caught.value.field == field


def test_parts_reach_the_wire() -> None:
    model = ScriptedModel(["yes"])
    registry = llm.Registry(environ={})
    registry.add("test", model)

    @llm.call("test/m", registry=registry)
    def ask() -> object:
        return ["look", llm.image(data=PNG, detail="high"), llm.audio(data=WAV), llm.document(data=PDF, name="a.pdf")]

    ask()
    words, picture, sound, paper = model.requests[0]["messages"][0]["content"]
    assert words == {"type": "text", "text": "look"}
    told = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert picture == {"type": "image_url", "image_url": {"url": told, "detail": "high"}}
    assert sound["input_audio"]["format"] == "wav"
    assert paper["file"]["filename"] == "a.pdf"


def test_an_address_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(llm.UsageError, match="holds a name or a password") as refused:
        llm.image(url="https://ann:hidden@host/a.png")
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("limit", ["5", None, 0, True])
def test_a_limit_that_is_no_number_of_bytes_is_refused(limit: Any) -> None:
    with pytest.raises(llm.UsageError, match=r"llm\.image\(limit_bytes=\.\.\.\) is a number of bytes"):
        llm.image(data=b"\x89PNG\r\n\x1a\n" + bytes(16), limit_bytes=limit)
