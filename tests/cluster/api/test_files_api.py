"""POST /v1/files and the rest of files over HTTP: uploads that break off, lie, or are too much leave nothing behind.

Guards against contents that outlive a failed upload, names that become paths, and one tenant's files seen by another.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from diptych.cluster.api.testing import FrontDoor
from diptych.cluster.batches.settings import FileSettings
from diptych.cluster.router.rig import until
from diptych.cluster.store import contents as contents_module

BOUNDARY = "form-boundary-0123456789"
NO_FILE = "file-" + "0" * 32


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    """One part of a form."""
    more = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + data + b"\r\n"


def form(data: bytes = b"abc", *, filename: str = "a.txt", purpose: str = "user_data") -> bytes:
    """A whole form, the file before its purpose."""
    return part("file", data, filename) + part("purpose", purpose.encode()) + f"--{BOUNDARY}--\r\n".encode()


HEADERS = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


async def upload(http: httpx2.AsyncClient, data: bytes = b"abc", **more: Any) -> dict[str, Any]:
    reply = await http.post("/v1/files", content=form(data, **more), headers=HEADERS)
    assert reply.status_code == 200, reply.text
    told: dict[str, Any] = reply.json()
    return told


def on_disk(door: FrontDoor) -> list[Path]:
    """Everything that uploads left."""
    folder = door.store.folder / "files"
    return sorted(folder.iterdir()) if folder.exists() else []


def limit(door: FrontDoor, **settings: Any) -> None:
    """Other settings for uploads of a door that runs already."""
    for route in door.listener._server.config.app.routes:  # type: ignore[union-attr]
        if route.path == "/v1/files" and "POST" in route.methods:
            route.endpoint._settings = FileSettings(**settings)
            route.endpoint._contents = contents_module.Contents(
                door.store.folder / "files", keep_free_bytes=route.endpoint._settings.keep_free_bytes
            )


async def test_what_was_uploaded_comes_back_byte_for_byte(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    data = os.urandom(3 << 20)
    told = await upload(http, data, filename="d\u00e9j\u00e0;vu$(id).bin")
    assert told["bytes"] == len(data)
    assert told["filename"] == "d\u00e9j\u00e0;vu$(id).bin"
    assert told["expires_at"] is None
    assert (await http.get(f"/v1/files/{told['id']}")).json() == told
    reply = await http.get(f"/v1/files/{told['id']}/content")
    assert reply.content == data
    assert reply.headers["content-length"] == str(len(data))
    assert reply.headers["content-disposition"].startswith("attachment; filename*=UTF-8''d%C3%A9")
    assert reply.headers["x-content-type-options"] == "nosniff"
    (file,) = on_disk(door)
    assert hashlib.sha256(file.read_bytes()).digest() == hashlib.sha256(data).digest()
    assert file.stat().st_mode & 0o777 == 0o600
    assert told["id"].removeprefix("file-") not in file.name, "names on the disk are nobody's to guess"


async def test_a_file_of_no_bytes_is_a_file(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    told = await upload(http, b"")
    assert told["bytes"] == 0
    assert (await http.get(f"/v1/files/{told['id']}/content")).content == b""


async def test_a_deleted_file_is_gone_from_everywhere(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    told = await upload(http)
    reply = await http.delete(f"/v1/files/{told['id']}")
    assert reply.json() == {"id": told["id"], "object": "file", "deleted": True}
    assert on_disk(door) == []
    assert (await http.get("/v1/files")).json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert (await http.request(method, f"/v1/files/{told['id']}{path}")).status_code == 404


async def test_a_file_that_is_being_read_is_read_to_its_end(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    data = os.urandom(8 << 20)
    told = await upload(http, data)
    async with http.stream("GET", f"/v1/files/{told['id']}/content") as reply:
        await http.delete(f"/v1/files/{told['id']}")
        assert b"".join([piece async for piece in reply.aiter_bytes()]) == data


async def test_pages_hold_all_files_in_order_once(http: httpx2.AsyncClient) -> None:
    ids = [(await upload(http, filename=f"{i}", purpose="user_data" if i % 2 else "batch"))["id"] for i in range(7)]
    for order, wanted in (("asc", ids), ("desc", ids[::-1])):
        found: list[str] = []
        query: dict[str, Any] = {"limit": 3, "order": order}
        while True:
            page = (await http.get("/v1/files", params=query)).json()
            found += [file["id"] for file in page["data"]]
            if not page["has_more"]:
                break
            assert page["last_id"] == found[-1]
            query["after"] = page["last_id"]
        assert found == wanted
    page = (await http.get("/v1/files", params={"purpose": "batch", "order": "asc"})).json()
    assert [file["id"] for file in page["data"]] == ids[::2]
    for sql in ("' OR '1'='1", "batch' --", "batch\x00"):
        assert (await http.get("/v1/files", params={"purpose": sql})).json()["data"] == []
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "sideways"}, {"else": 1}):
        assert (await http.get("/v1/files", params=wrong)).status_code == 400
    for after in (NO_FILE, "x", "' OR 1=1"):
        assert (await http.get("/v1/files", params={"after": after})).status_code == 404


async def test_another_tenant_sees_and_touches_nothing(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    """Row S24: an id of another is as unknown as one that never was, to the last byte."""
    mine = await upload(http)
    other = {"x-tenant": "b"}
    assert (await http.get("/v1/files", headers=other)).json()["data"] == []
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        theirs = await http.request(method, f"/v1/files/{mine['id']}{path}", headers=other)
        never = await http.request(method, f"/v1/files/{NO_FILE}{path}", headers=other)
        assert theirs.status_code == never.status_code == 404
        assert theirs.text.replace(mine["id"], NO_FILE) == never.text
    assert (await http.get("/v1/files", params={"after": mine["id"]}, headers=other)).status_code == 404
    body = {"input_file_id": mine["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    theirs = await http.post("/v1/batches", json=body, headers=other)
    never = await http.post("/v1/batches", json={**body, "input_file_id": NO_FILE}, headers=other)
    assert theirs.status_code == never.status_code == 404
    assert theirs.text.replace(mine["id"], NO_FILE) == never.text
    assert (await http.get(f"/v1/files/{mine['id']}/content")).content == b"abc"


PATHS = [
    "../x",
    "/etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "a%00b",
    "$(touch x)",
    "`id`",
    "file-../../x",
    "file-" + "0" * 31,
]


@pytest.mark.parametrize("name", PATHS)
async def test_ids_are_never_paths(door: FrontDoor, http: httpx2.AsyncClient, name: str) -> None:
    """Row S25."""
    await upload(http)
    before = on_disk(door)
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        reply = await http.request(method, f"/v1/files/{name}{path}")
        assert reply.status_code in (400, 404, 405), reply.text
    assert on_disk(door) == before


@pytest.mark.parametrize("name", ["../x", "/etc/cron.d/x", "..", "a/b", "a\\b"])
async def test_upload_names_that_are_paths_are_refused(door: FrontDoor, http: httpx2.AsyncClient, name: str) -> None:
    reply = await http.post("/v1/files", content=form(filename=name), headers=HEADERS)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "file"
    assert on_disk(door) == []


async def test_a_link_in_the_folder_is_not_followed(door: FrontDoor, http: httpx2.AsyncClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("canary")
    told = await upload(http, b"canary")
    (content,) = on_disk(door)
    content.unlink()
    content.symlink_to(secret)
    reply = await http.get(f"/v1/files/{told['id']}/content")
    assert reply.status_code == 500
    assert "canary" not in reply.text
    await http.delete(f"/v1/files/{told['id']}")
    assert secret.read_text() == "canary"


WHOLE = form()
BROKEN: list[tuple[str, bytes, dict[str, str]]] = [
    ("no boundary", WHOLE, {"content-type": "multipart/form-data"}),
    ("another type", WHOLE, {"content-type": "application/json"}),
    ("no type", WHOLE, {}),
    ("another boundary", WHOLE, {"content-type": "multipart/form-data; boundary=else"}),
    ("endless boundary", WHOLE, {"content-type": "multipart/form-data; boundary=" + "x" * 300}),
    ("nothing", b"", HEADERS),
    ("cut in a header", WHOLE[:60], HEADERS),
    ("cut in the file", WHOLE[:110], HEADERS),
    ("no last boundary", WHOLE[: -len(BOUNDARY) - 6], HEADERS),
    ("no file", part("purpose", b"batch") + f"--{BOUNDARY}--\r\n".encode(), HEADERS),
    ("two files", part("file", b"a", "a") + WHOLE, HEADERS),
    ("a file of another name", part("data", b"a", "a") + WHOLE, HEADERS),
    ("a file without a name", part("file", b"a") + WHOLE, HEADERS),
    ("no purpose", part("file", b"a", "a") + f"--{BOUNDARY}--\r\n".encode(), HEADERS),
    ("purpose twice", part("purpose", b"batch") + WHOLE, HEADERS),
    ("an unknown field", part("more", b"1") + WHOLE, HEADERS),
    ("a long field", part("purpose", b"x" * 5000) + WHOLE, HEADERS),
    ("many fields", b"".join(part(f"f{i}", b"") for i in range(100)) + WHOLE, HEADERS),
    ("no name", f"--{BOUNDARY}\r\n\r\nx\r\n".encode() + WHOLE, HEADERS),
    ("many headers", f"--{BOUNDARY}\r\n".encode() + b"a: b\r\n" * 50 + WHOLE[len(BOUNDARY) + 4 :], HEADERS),
    ("a long header", f"--{BOUNDARY}\r\na: ".encode() + b"b" * 9000 + b"\r\n" + WHOLE[len(BOUNDARY) + 4 :], HEADERS),
    ("not UTF-8", part("file", b"a", "a").replace(b'"a"', b'"\xff"'), HEADERS),
    ("random bytes", os.urandom(5000), HEADERS),
    ("base64", WHOLE.replace(b"\r\n\r\nabc", b"\r\ncontent-transfer-encoding: base64\r\n\r\nYWJj"), HEADERS),
    ("a purpose that is refused", form(purpose="fine-tune"), HEADERS),
]


@pytest.mark.parametrize(("what", "body", "headers"), BROKEN, ids=[row[0] for row in BROKEN])
async def test_a_form_that_is_none_is_refused_and_leaves_nothing(
    door: FrontDoor, http: httpx2.AsyncClient, what: str, body: bytes, headers: dict[str, str]
) -> None:
    reply = await http.post("/v1/files", content=body, headers=headers)
    assert reply.status_code in (400, 413), (what, reply.text)
    assert reply.json()["error"]["message"]
    assert on_disk(door) == []
    assert (await http.get("/v1/files")).json()["data"] == []
    await upload(http)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
async def test_a_form_means_the_same_in_pieces_of_any_size(
    door: FrontDoor, http: httpx2.AsyncClient, size: int
) -> None:
    data = b"\r\n--" + BOUNDARY[:-1].encode() + b"\r\n\r\n-\r\n--" * 5

    async def pieces() -> AsyncIterator[bytes]:
        whole = form(data)
        for at in range(0, len(whole), size):
            yield whole[at : at + size]

    reply = await http.post("/v1/files", content=pieces(), headers=HEADERS)
    assert reply.status_code == 200, reply.text
    assert (await http.get(f"/v1/files/{reply.json()['id']}/content")).content == data


async def test_an_upload_that_breaks_off_leaves_nothing(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    """The client's machine is switched off in the middle."""
    _, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    body = form(b"x" * (2 << 20))
    head = (
        f"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\ncontent-type: {HEADERS['content-type']}"
    )
    writer.write(head.encode() + b"\r\n\r\n" + body[: 1 << 20])
    await writer.drain()
    async with asyncio.timeout(20):
        while not on_disk(door):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    writer.close()
    async with asyncio.timeout(20):
        while on_disk(door):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await http.get("/v1/files")).json()["data"] == []


async def test_a_silent_upload_is_given_up(door: FrontDoor) -> None:
    limit(door, upload_timeout_s=0.3)
    reader, writer = await asyncio.open_connection(door.listener.host, door.listener.port)
    head = f"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 5000\r\ncontent-type: {HEADERS['content-type']}"
    writer.write(head.encode() + b"\r\n\r\n" + form(b"x" * 4000)[:3000])
    assert b" 408 " in await reader.readline()
    assert on_disk(door) == []
    writer.close()


async def test_a_file_that_is_too_large_is_refused_before_and_while_it_comes(
    door: FrontDoor, http: httpx2.AsyncClient
) -> None:
    limit(door, max_bytes=300_000)
    told = await upload(http, b"x" * 300_000)
    assert told["bytes"] == 300_000
    declared = await http.post("/v1/files", content=form(b"x" * 500_000), headers=HEADERS)
    assert declared.status_code == 413

    async def chunked() -> AsyncIterator[bytes]:
        whole = form(b"x" * 300_001)
        for at in range(0, len(whole), 50_000):
            yield whole[at : at + 50_000]

    assert (await http.post("/v1/files", content=chunked(), headers=HEADERS)).status_code == 413
    assert len(on_disk(door)) == 1


async def test_a_tenant_has_so_much_room_and_no_more(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    limit(door, tenant_bytes=1000, tenant_files=3)
    first = await upload(http, b"x" * 600)
    for size in (401, 200_000):
        reply = await http.post("/v1/files", content=form(b"x" * size), headers=HEADERS)
        assert (reply.status_code, reply.json()["error"]["code"]) == (403, "storage_quota_exceeded")
    assert len(on_disk(door)) == 1
    await http.delete(f"/v1/files/{first['id']}")
    for _ in range(3):
        await upload(http, b"x" * 300)
    reply = await http.post("/v1/files", content=form(b""), headers=HEADERS)
    assert reply.json()["error"]["code"] == "storage_quota_exceeded"
    other = await http.post("/v1/files", content=form(), headers={**HEADERS, "x-tenant": "b"})
    assert other.status_code == 200


@pytest.mark.parametrize("where", ["draft", "write", "finish", "room"])
async def test_a_full_disk_is_told_and_leaves_nothing(
    door: FrontDoor, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "room":
        limit(door, keep_free_bytes=1 << 60)
    elif where == "finish":
        monkeypatch.setattr(os, "fsync", full)
    elif where == "draft":
        monkeypatch.setattr(contents_module.Draft, "__init__", _raising(full))
    else:
        monkeypatch.setattr(os, "fdopen", _full_files(full))
    reply = await http.post("/v1/files", content=form(b"x" * (3 << 20)), headers=HEADERS)
    assert reply.status_code == 507, reply.text
    assert reply.json()["error"]["code"] == "storage_full"
    assert on_disk(door) == []
    assert (await http.get("/v1/files")).json()["data"] == []


def _raising(full: Callable[..., None]) -> Callable[..., None]:
    def begin(draft: object, contents: object, name: str) -> None:
        full()

    return begin


def _full_files(full: Callable[..., None]) -> Callable[..., Any]:
    real = os.fdopen

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> None:
            full()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    return lambda *args, **more: Full(real(*args, **more))


async def test_uploads_at_once_are_bounded(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    limit(door, max_uploads=1)
    ready, go = asyncio.Event(), asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        whole = form(b"x" * 1000)
        yield whole[:500]
        ready.set()
        await go.wait()
        yield whole[500:]

    first = asyncio.create_task(http.post("/v1/files", content=held(), headers=HEADERS))
    await ready.wait()
    async with asyncio.timeout(20):
        while True:
            second = await http.post("/v1/files", content=form(), headers=HEADERS)
            if second.status_code == 503:
                break
    assert int(second.headers["retry-after"]) >= 1
    go.set()
    assert (await first).status_code == 200
    await upload(http)


async def test_a_tenant_with_many_uploads_leaves_places_to_others(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    """An upload may take an hour: a few slow ones of one tenant kept everybody out."""
    limit(door, max_uploads=8)
    go = asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield form()[:50]
        await go.wait()
        yield form()[50:]

    async def held_by(tenant: str) -> httpx2.Response:
        return await http.post("/v1/files", content=held(), headers=HEADERS | {"x-tenant": tenant})

    async def at_once(tenant: str) -> httpx2.Response:
        return await http.post("/v1/files", content=form(), headers=HEADERS | {"x-tenant": tenant})

    slow = [asyncio.create_task(held_by("a")) for _ in range(6)]
    await until(lambda: len(on_disk(door)) == 6)
    refused = await at_once("a")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "tenant_over_share")
    assert int(refused.headers["retry-after"]) >= 1
    assert (await at_once("b")).status_code == 200
    go.set()
    assert [(await one).status_code for one in slow] == [200] * 6
    assert (await at_once("a")).status_code == 200


async def test_many_small_chunks_of_an_honest_upload_are_taken(door: FrontDoor, http: httpx2.AsyncClient) -> None:
    """64 KiB of framing was the limit of a body of 4 MiB; an upload has as much more as it is longer."""

    async def chunked() -> AsyncIterator[bytes]:
        whole = form(b"x" * (12 << 20))
        for at in range(0, len(whole), 1024):
            yield whole[at : at + 1024]

    reply = await http.post("/v1/files", content=chunked(), headers=HEADERS)
    assert reply.status_code == 200, reply.text
    assert reply.json()["bytes"] == 12 << 20


async def test_a_disk_that_many_uploads_wait_for_holds_up_no_other_request(
    door: FrontDoor, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against uploads that wait for a slow disk in the threads in which everybody's bodies are read."""
    disk = threading.Event()
    finish = contents_module.Draft.finish

    def slow(draft: contents_module.Draft) -> contents_module.Content:
        disk.wait(20)
        return finish(draft)

    monkeypatch.setattr(contents_module.Draft, "finish", slow)
    async with httpx2.AsyncClient(base_url=door.listener.url, timeout=20) as many:
        form = {"data": {"purpose": "user_data"}, "files": {"file": ("a", b"abc")}}
        uploads = [asyncio.create_task(many.post("/v1/files", **form)) for _ in range(24)]  # type: ignore[arg-type]
        folder = door.store.folder / "files"
        await until(lambda: folder.is_dir() and len(list(folder.iterdir())) >= contents_module.DISK_THREADS)
        body = {"model": "echo", "prompt": "hello", "max_tokens": 1, "user": "x" * 500, "stop": [], "suffix": None}
        long = json.dumps(body) + " " * 20_000
        reply = await http.post("/v1/completions", content=long, headers={"content-type": "application/json"})
        assert reply.status_code == 200, reply.text
        assert not any(upload.done() for upload in uploads)
        disk.set()
        assert {(await upload).status_code for upload in uploads} <= {200, 429}
