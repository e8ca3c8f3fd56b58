"""The operations of files and of batches."""

from __future__ import annotations

from diptych.cluster.api import batches as batch_pages
from diptych.cluster.api import files as file_pages
from diptych.protos.openai_batches import ENDED, ENDPOINTS, LIVE, MAX_LABELS
from diptych.protos.openai_files import (
    BATCH_OUTPUT,
    LEAST_EXPIRY_S,
    MAX_NAME_CHARS,
    MOST_EXPIRY_S,
    PURPOSES,
)

from .answers import COUNT, NULL, answer
from .generation import IDEMPOTENCY_KEY, REQUEST_ID
from .pages import in_path, ok
from .shapes import (
    Field,
    JsonObject,
    Operation,
    Reply,
    Shape,
    flag,
    many,
    mapping,
    may,
    need,
    nullable,
    one_of,
    text,
    told,
    whole,
)

_ID = text(1, 256)
_TIME = nullable(COUNT)
_SECONDS = whole(LEAST_EXPIRY_S, MOST_EXPIRY_S)
UPLOAD = Shape(
    name="FileUpload",
    words="A form with one file.",
    fields=(
        need("file", {"type": "string", "format": "binary"}, "the contents, in a part with a filename"),
        need("purpose", one_of(*PURPOSES), "what the file is for"),
        Field(
            name="expires_after[anchor]",
            schema=one_of("created_at"),
            words="from when the seconds count; both or neither",
        ),
        Field(name="expires_after[seconds]", schema=_SECONDS, words="until it is deleted", default="batches: 30 days"),
    ),
)
FILE = answer(
    "File",
    "A file.",
    told("id", text(1, pattern="^file-[0-9a-f]{32}$")),
    told("object", one_of("file")),
    told("bytes", COUNT),
    told("created_at", COUNT, "Unix seconds"),
    told("expires_at", _TIME),
    told("filename", text(1, MAX_NAME_CHARS)),
    told("purpose", one_of(*PURPOSES, BATCH_OUTPUT)),
    told("status", one_of("processed")),
    told("status_details", NULL),
)


def page_of(name: str, entry: Shape, words: str) -> Shape:
    """A page of a list."""
    return answer(
        name,
        words,
        told("object", one_of("list")),
        told("data", many(entry.ref)),
        told("first_id", nullable(text(1))),
        told("last_id", nullable(text(1)), "the next page begins after it"),
        told("has_more", flag()),
    )


FILE_LIST = page_of("FileList", FILE, "A page of the tenant's files.")
DELETED_FILE = answer(
    "DeletedFile", "It is gone.", told("id", text(1)), told("object", one_of("file")), told("deleted", one_of(True))
)
EXPIRY = Shape(
    name="ExpiresAfter",
    words="When a file is deleted.",
    fields=(
        need("anchor", one_of("created_at"), "from when the seconds count"),
        need("seconds", _SECONDS, "an hour to 30 days"),
    ),
)
LABELS: JsonObject = mapping(text(0, 512), most=MAX_LABELS, names={"minLength": 1, "maxLength": 64})
BATCH_REQUEST = Shape(
    name="BatchRequest",
    words="Requests that are answered when there is room, from a file of one request per line.",
    fields=(
        need("input_file_id", _ID, "a file of purpose batch"),
        need("endpoint", one_of(*ENDPOINTS), "what answers every line"),
        need(
            "completion_window",
            text(2, 6, pattern="^[1-9][0-9]{0,4}[mhd]$", example="24h"),
            "24h, or another number of minutes, hours or days up to 7d",
        ),
        may("metadata", LABELS, "labels that are kept and told again"),
        may("output_expires_after", EXPIRY.ref, "when the files of results are deleted", "30 days"),
    ),
)
BATCH_ERROR = answer(
    "BatchError",
    "Why a line cannot be a request.",
    told("code", text(1)),
    told("message", text(1)),
    told("param", nullable(text())),
    told("line", nullable(whole(1))),
)
BATCH_ERRORS = answer(
    "BatchErrors", "What was wrong with the input.", told("object", one_of("list")), told("data", many(BATCH_ERROR.ref))
)
COUNTS = answer("BatchCounts", "Requests.", told("total", COUNT), told("completed", COUNT), told("failed", COUNT))
BATCH_USAGE = answer(
    "BatchUsage",
    "Tokens of all answers.",
    told("input_tokens", COUNT),
    told("input_tokens_details", answer("", "", told("cached_tokens", COUNT)).schema()),
    told("output_tokens", COUNT),
    told("output_tokens_details", answer("", "", told("reasoning_tokens", COUNT)).schema()),
    told("total_tokens", COUNT),
)
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
BATCH = answer(
    "Batch",
    "A batch.",
    told("id", text(1, pattern="^batch_[0-9a-f]{32}$")),
    told("object", one_of("batch")),
    told("endpoint", one_of(*ENDPOINTS)),
    told("model", nullable(text(1))),
    told("errors", nullable(BATCH_ERRORS.ref)),
    told("input_file_id", text(1)),
    told("completion_window", text(1)),
    told("status", one_of(*LIVE, *ENDED)),
    told("output_file_id", nullable(text(1))),
    told("error_file_id", nullable(text(1))),
    told("created_at", COUNT),
    told("expires_at", COUNT),
    *(told(f"{state}_at", _TIME) for state in _TIMES),
    told("request_counts", COUNTS.ref),
    told("usage", BATCH_USAGE.ref),
    told("metadata", nullable(mapping(text()))),
)
BATCH_LIST = page_of("BatchList", BATCH, "A page of the tenant's batches.")

_AFTER = Field(name="after", schema=text(0), words="the id that the page begins after")


def _limit(most: int, default: int) -> Field:
    return Field(name="limit", schema=whole(1, most), words="entries of a page", default=str(default))


def _links(of: str, *operations: str) -> JsonObject:
    return {name: {"operationId": name, "parameters": {"id": f"$response.body#/{of}"}} for name in operations}


_TAG_FILES, _TAG_BATCHES = "Files", "Batches"
_FILE_ID, _BATCH_ID = in_path("id", "of a file"), in_path("id", "of a batch")
_FOUND = frozenset({400, 404})
_UPLOADED = Reply(
    status=200,
    words="the file",
    media={"application/json": FILE.ref},
    links=_links("id", "getFile", "getFileContent", "deleteFile"),
)
_MADE = Reply(
    status=200,
    words="the batch, which is validated next",
    media={"application/json": BATCH.ref},
    headers={"idempotent-replayed": REQUEST_ID["idempotent-replayed"]},
    links=_links("id", "getBatch", "cancelBatch"),
)
_CONTENT_HEADERS = {"content-disposition": "the file's name", "x-content-type-options": "nosniff"}


def _of_files(
    name: str, method: str, path: str, words: str, reply: Reply, *, fields: tuple[Field, ...] = (_FILE_ID,)
) -> Operation:
    return Operation(
        id=name,
        method=method,
        path=path,
        tag=_TAG_FILES,
        words=words,
        scope="files",
        path_fields=fields,
        replies=(reply,),
        errors=_FOUND,
    )


OPERATIONS = (
    Operation(
        id="uploadFile",
        method="POST",
        path="/v1/files",
        tag=_TAG_FILES,
        words="upload a file",
        scope="files",
        body=UPLOAD,
        body_media="multipart/form-data",
        replies=(_UPLOADED,),
        errors=frozenset({400, 403, 408, 413, 429, 507}),
    ),
    Operation(
        id="listFiles",
        method="GET",
        path="/v1/files",
        tag=_TAG_FILES,
        words="the tenant's files",
        scope="files",
        query=(
            _AFTER,
            _limit(file_pages.LISTED, file_pages.LISTED),
            Field(name="order", schema=one_of("asc", "desc"), words="by age", default="desc"),
            Field(name="purpose", schema=text(), words="only those of this purpose"),
        ),
        replies=(ok(FILE_LIST, "a page"),),
        errors=_FOUND,
    ),
    _of_files("getFile", "GET", "/v1/files/{id}", "one file", ok(FILE, "the file")),
    _of_files(
        "getFileContent",
        "GET",
        "/v1/files/{id}/content",
        "what was uploaded, byte for byte",
        Reply(
            status=200,
            words="the contents",
            media={"application/octet-stream": {"type": "string", "format": "binary"}},
            headers=_CONTENT_HEADERS,
        ),
    ),
    _of_files("deleteFile", "DELETE", "/v1/files/{id}", "end a file", ok(DELETED_FILE, "it is gone")),
    Operation(
        id="createBatch",
        method="POST",
        path="/v1/batches",
        tag=_TAG_BATCHES,
        words="have the requests of a file answered",
        scope="files",
        body=BATCH_REQUEST,
        headers=(IDEMPOTENCY_KEY,),
        replies=(_MADE,),
        errors=frozenset({400, 404, 408, 409, 413, 422, 429}),
    ),
    Operation(
        id="listBatches",
        method="GET",
        path="/v1/batches",
        tag=_TAG_BATCHES,
        words="the tenant's batches, the newest first",
        scope="files",
        query=(_AFTER, _limit(batch_pages.MOST_LISTED, batch_pages.LISTED)),
        replies=(ok(BATCH_LIST, "a page"),),
        errors=_FOUND,
    ),
    Operation(
        id="getBatch",
        method="GET",
        path="/v1/batches/{id}",
        tag=_TAG_BATCHES,
        words="one batch",
        scope="files",
        path_fields=(_BATCH_ID,),
        replies=(ok(BATCH, "the batch"),),
        errors=_FOUND,
    ),
    Operation(
        id="cancelBatch",
        method="POST",
        path="/v1/batches/{id}/cancel",
        tag=_TAG_BATCHES,
        words="begin no further request; what is answered stays",
        scope="files",
        path_fields=(_BATCH_ID,),
        replies=(ok(BATCH, "the batch"),),
        errors=_FOUND | {409},
    ),
)
