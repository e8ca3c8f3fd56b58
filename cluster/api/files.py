"""POST /v1/files and what is asked of files afterwards: lists, one file, its contents, its end.

Uploads go to disk as they arrive, then into the store; what breaks off leaves nothing. A tenant sees its own alone.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import BinaryIO, Final
from urllib.parse import quote
from weakref import WeakValueDictionary

from sqlalchemy import Connection
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from diptych.cluster.batches.settings import FileSettings
from diptych.cluster.config import LimitSettings
from diptych.cluster.store import batches, files
from diptych.cluster.store.contents import Content, Contents, ContentsLost, Draft, at_disk
from diptych.cluster.store.database import Store
from diptych.cluster.store.files import KeptFile, Quota
from diptych.protos.errors import DiptychError, Overloaded, OverShare, RequestTooLarge
from diptych.protos.openai_files import (
    ALL_PURPOSES,
    BATCH,
    FILE_ID,
    StoredFile,
    deleted_object,
    file_object,
    page_object,
    read_paging,
    read_purpose,
    read_upload,
    unknown_file,
)

from .access import tenant_of
from .body import header, refuse_body
from .errors import BodyTimeout
from .multipart import FORM_BYTES, FileForm

PIECE_BYTES: Final = 256 << 10
LISTED: Final = 10_000  # as OpenAI's
OWN_SHARE: Final = 3
UPLOAD_RETRY_S: Final = 2.0
_QUERIES: Final = ("after", "limit", "order", "purpose")


def contents_of(store: Store, settings: FileSettings) -> Contents:
    """Where the contents of files are."""
    return Contents(store.folder / "files", keep_free_bytes=settings.keep_free_bytes)


def new_file(
    kind: str, name: str, content: Content, *, tenant: str, expires_after_s: float | None, now: int
) -> KeptFile:
    """A file's row."""
    file = StoredFile(
        id="file-" + os.urandom(16).hex(),
        purpose=kind,
        name=name,
        num_bytes=content.num_bytes,
        created_at=now,
        expires_at=None if expires_after_s is None else now + int(expires_after_s),
    )
    return KeptFile(file=file, tenant=tenant, content=content.name, sha256=content.sha256)


class FilesPages:
    """All routes but the upload. `clock`: seconds since 1970."""

    def __init__(self, store: Store, settings: FileSettings, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._contents = contents_of(store, settings)
        self._clock = clock
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by tenant

    async def list(self, request: Request) -> Response:
        """The tenant's files."""
        paging = read_paging(request.query_params.multi_items(), known=_QUERIES, most=LISTED, default=LISTED)
        if paging.after is not None and not FILE_ID.fullmatch(paging.after):
            raise unknown_file(paging.after, "after")
        if paging.purpose not in (None, *ALL_PURPOSES):  # of another text no database need hear
            return JSONResponse(page_object([], has_more=False))
        tenant, now = tenant_of(request.scope), int(self._clock())

        def told(connection: Connection) -> bytes:
            page, has_more = files.listed(connection, tenant, paging, now=now)
            return bytes(JSONResponse(page_object([file_object(file) for file in page], has_more=has_more)).body)

        # A page of ten thousand takes long: in the reader's thread, and of one tenant one at a time.
        turn = self._turns.setdefault(tenant, asyncio.Lock())
        async with turn:
            return Response(await self._store.read(told), media_type="application/json")

    async def one(self, request: Request) -> Response:
        """One file."""
        return JSONResponse(file_object((await self._find(request)).file))

    async def content(self, request: Request) -> Response:
        """What was uploaded, byte for byte."""
        kept = await self._find(request)
        try:
            source = await at_disk(self._contents.open, kept.content)
        except ContentsLost as exc:
            if (await self._find(request)).content == kept.content:
                raise DiptychError("the contents of this file are lost on the server", str(exc)) from exc
            raise
        headers = {
            "content-length": str(kept.file.num_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(kept.file.name, safe='')}",
            "x-content-type-options": "nosniff",
        }
        return StreamingResponse(_pieces(source), headers=headers, media_type="application/octet-stream")

    async def delete(self, request: Request) -> Response:
        """From now on nobody can ask for it. A batch that reads it goes on."""
        file_id, tenant, now = _id_of(request), tenant_of(request.scope), int(self._clock())

        def remove(connection: Connection) -> str | None:
            content = files.remove(connection, file_id, tenant, now=now)
            return None if batches.reads(connection, [content]) else content

        content = await self._store.write(remove)
        if content is not None:
            await at_disk(self._contents.remove, content)
        return JSONResponse(deleted_object(file_id))

    async def _find(self, request: Request) -> KeptFile:
        file_id, tenant, now = _id_of(request), tenant_of(request.scope), int(self._clock())
        return await self._store.read(lambda c: files.find(c, file_id, tenant, now=now))


def _id_of(request: Request) -> str:
    file_id: str = request.path_params["id"]
    if not FILE_ID.fullmatch(file_id):
        raise unknown_file(file_id)
    return file_id


async def _pieces(source: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while piece := await at_disk(source.read, PIECE_BYTES):
            yield piece
    finally:
        source.close()


class _Body:
    """A request's body, and whether all of it was received."""

    def __init__(self, receive: Receive) -> None:
        self.is_over = False
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_over = not message.get("more_body", False)
        return message


class FileUpload:
    """The ASGI application of POST /v1/files."""

    def __init__(
        self, store: Store, settings: FileSettings, limits: LimitSettings, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._settings = settings
        self._limits = limits
        self._contents = contents_of(store, settings)
        self._clock = clock
        self._uploads: Counter[str] = Counter()  # under way, by tenant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        body = _Body(receive)
        try:
            form, draft = await self._received(scope, body.receive)
        except ClientDisconnect:
            return
        except DiptychError as exc:
            if body.is_over:
                raise
            await refuse_body(exc, scope, receive, send)
            return
        try:
            kept = await self._kept(scope, form, draft)
        except BaseException:
            await at_disk(draft.abandon)
            raise
        await JSONResponse(file_object(kept.file))(scope, receive, send)

    async def _received(self, scope: Scope, receive: Receive) -> tuple[FileForm, Draft]:
        """The whole form, its file on disk. Raises what is wrong with it as soon as that is known."""
        tenant = tenant_of(scope)
        form = FileForm(header(scope, b"content-type"))
        declared = header(scope, b"content-length")
        if declared.isdecimal():
            self._check_size(int(declared) - FORM_BYTES)
        self._check_places(tenant)
        self._uploads[tenant] += 1
        draft: Draft | None = None
        try:
            least = max(int(declared) - FORM_BYTES, 0) if declared.isdecimal() else 0
            await self._store.read(lambda c: files.check_quota(c, tenant, self._quota(), least))
            draft = await at_disk(self._contents.draft)
            async with asyncio.timeout(self._settings.upload_timeout_s):
                await self._pour(receive, form, draft)
        except BaseException as exc:
            if draft is not None:
                await at_disk(draft.abandon)
            if isinstance(exc, TimeoutError):
                words = f"the upload did not arrive within {self._settings.upload_timeout_s:g} s"
                raise BodyTimeout(words) from None
            raise
        finally:
            self._uploads[tenant] -= 1
            if not self._uploads[tenant]:
                del self._uploads[tenant]
        return form, draft

    def _check_places(self, tenant: str) -> None:
        """An upload may last an hour: nobody has more than three times the places that he leaves to others."""
        number, own = self._uploads.total(), self._uploads[tenant]
        free = self._settings.max_uploads - number
        if free <= 0:
            raise Overloaded(f"{number} uploads are under way, which is this router's limit", UPLOAD_RETRY_S)
        if own >= OWN_SHARE * free:
            raise OverShare(
                f"{own} uploads of this tenant are under way; others have the {free} places", UPLOAD_RETRY_S
            )

    async def _pour(self, receive: Receive, form: FileForm, draft: Draft) -> None:
        pieces: list[bytes] = []
        size = waiting = beside = 0
        more, is_unread = True, True
        while more:
            try:
                async with asyncio.timeout(self._limits.body_timeout_s):
                    message = await receive()
            except TimeoutError:
                words = f"nothing of the upload arrived for {self._limits.body_timeout_s:g} s"
                raise BodyTimeout(words) from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            data, more = message.get("body", b""), message.get("more_body", False)
            found = form.feed(data)
            if is_unread and "purpose" in form.fields:  # most clients send it first
                read_purpose(form.fields["purpose"])
                is_unread = False
            pieces += found
            number = sum(map(len, found))
            size, waiting, beside = size + number, waiting + number, beside + len(data) - number
            self._check_size(size)
            if beside > FORM_BYTES:
                raise RequestTooLarge(f"the form has more than {FORM_BYTES} bytes beside the file")
            if waiting >= PIECE_BYTES or (not more and waiting):
                await at_disk(draft.write, b"".join(pieces))
                pieces, waiting = [], 0

    def _check_size(self, number: int) -> None:
        if number > self._settings.max_bytes:
            raise RequestTooLarge(f"the file is larger than {self._settings.max_bytes} bytes")

    def _quota(self) -> Quota:
        return Quota(self._settings.tenant_bytes, self._settings.tenant_files)

    async def _kept(self, scope: Scope, form: FileForm, draft: Draft) -> KeptFile:
        fields, name, tenant = read_upload(form.fields), form.finish(), tenant_of(scope)
        expires_after_s: float | None = fields.expires_after_s
        if expires_after_s is None and fields.purpose == BATCH:
            expires_after_s = self._settings.batch_expires_s
        content = await at_disk(draft.finish)
        now = int(self._clock())
        kept = new_file(fields.purpose, name, content, tenant=tenant, expires_after_s=expires_after_s, now=now)
        try:
            await self._store.write(lambda c: files.add(c, kept, self._quota()))
        except DiptychError as exc:
            if exc.http_status < 500:  # of others it is not known whether the row is there: the sweeper looks later
                await at_disk(self._contents.remove, content.name)
            raise
        return kept
