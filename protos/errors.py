"""The one exception tree. Every floor raises from it; the API turns it into a status and a body.

DiptychError
|-- RequestError            the client must change the request
|   |-- InvalidRequest      400, names the field
|   |-- Unauthorized        401, no key or none of ours
|   |-- Forbidden           403, a key that does not open this
|   |-- ContextTooLong      400
|   |-- UnknownModel        404
|   |-- RequestTooLarge     413
|   |-- KeyReused           422, an Idempotency-Key with another request
|   |-- AnswerNotKept       422, what an Idempotency-Key stands for was too large
|   `-- Quarantined         422, engines failed over it
|-- CapacityError           try again later
|   |-- Overloaded          503 with retry-after
|   |-- OverShare           429, the queue is full of this tenant's own
|   |-- RateLimited         429, a key or a tenant asks too often
|   |-- KeyInWork           409, an Idempotency-Key whose request is being answered
|   |-- ShuttingDown        503, nothing of the request was begun
|   |-- StoreUnavailable    503, the database cannot be used
|   `-- NoBlocks            503
|-- DeadlineExceeded        504
|   `-- FirstTokenTimeout   504, no token in the time that the request gave it
|-- Cancelled               499, nobody reads it
|-- TransferError           the hinge; never reaches a client when a fallback exists
|   |-- LayoutMismatch
|   |-- PeerLost
|   |-- ChecksumMismatch
|   `-- TransferTimeout
|-- EngineError
|   |-- EngineLost          503
|   |-- EngineFault         500, the step raised
|   |   `-- Disagreement    two engines told different tokens; the answer goes on from what was told first
|   `-- Fenced              503, another life of the engine was meant
`-- StartupError            serve ends with this sentence and exit code 1
"""

from __future__ import annotations

from typing import ClassVar


class DiptychError(Exception):
    """Root. `str(error)` is the message for the client; `detail` is for the log only.

    Errors cross processes by pickle and by (code, message): all arguments reach `super().__init__`.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    is_lasting: ClassVar[bool] = False  # until the server's operator does something about it
    kind: ClassVar[str] = "server_error"  # the `type` of OpenAI's error body

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message, detail)
        self.message = message
        self.detail = detail

    def __str__(self) -> str:
        return self.message


class RequestError(DiptychError):
    """The request itself is wrong. `param` names the field in dotted form where there is one."""

    code = "invalid_request"
    http_status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None, detail: str = "") -> None:
        DiptychError.__init__(self, message, detail)
        self.args = (message, param, detail)
        self.param = param


class InvalidRequest(RequestError):
    """A field has a wrong type or value, or is not known."""


class Unauthorized(RequestError):
    """The request shows no key that this server knows."""

    code = "unauthorized"
    http_status = 401
    kind = "authentication_error"


class Forbidden(RequestError):
    """The key is known and does not open this."""

    code = "forbidden"
    http_status = 403
    kind = "permission_error"


class ContextTooLong(RequestError):
    """Prompt and wanted output do not fit into the model's context."""

    code = "context_length_exceeded"


class UnknownModel(RequestError):
    """No model of that name is served."""

    code = "model_not_found"
    http_status = 404


class RequestTooLarge(RequestError):
    """The body is larger than the limit."""

    code = "request_too_large"
    http_status = 413


class Quarantined(RequestError):
    """Engines died, or a step raised, whenever they worked on this request; for a while none gets it again."""

    code = "request_quarantined"
    http_status = 422


class KeyReused(RequestError):
    """An Idempotency-Key came with another request than before."""

    code = "idempotency_key_reused"
    http_status = 422


class AnswerNotKept(RequestError):
    """The request with this Idempotency-Key was answered, and the answer was too large to be kept."""

    code = "idempotent_answer_not_kept"
    http_status = 422


class CapacityError(DiptychError):
    """There is no room now. `retry_after_s` is an honest estimate in seconds."""

    code = "overloaded"
    http_status = 503
    retryable = True
    kind = "overloaded_error"

    def __init__(self, message: str, retry_after_s: float = 1.0, detail: str = "") -> None:
        DiptychError.__init__(self, message, detail)
        self.args = (message, retry_after_s, detail)
        self.retry_after_s = retry_after_s


class Overloaded(CapacityError):
    """A bounded queue is full."""


class OverShare(CapacityError):
    """The queue is full, above all of this tenant's own requests; what others send is still taken."""

    code = "tenant_over_share"
    http_status = 429
    kind = "rate_limit_error"


class RateLimited(CapacityError):
    """A key, a tenant or an address has used up what it may ask for a while; `retry_after_s` is when it may again."""

    code = "rate_limit_exceeded"
    http_status = 429
    kind = "rate_limit_error"


class KeyInWork(CapacityError):
    """The request with this Idempotency-Key is being answered."""

    code = "idempotency_key_in_use"
    http_status = 409
    kind = "invalid_request_error"


class ShuttingDown(CapacityError):
    """This server ends; another one, or the next life of this one, may take the request."""

    code = "shutting_down"


class StoreUnavailable(CapacityError):
    """The database of keys, files and records cannot be read or written now; whether a write was done is unknown."""

    code = "store_unavailable"


class NoBlocks(CapacityError):
    """The KV pool cannot hold the request now."""

    code = "no_kv_blocks"


class DeadlineExceeded(DiptychError):
    """The request's deadline passed; its work was stopped."""

    code = "deadline_exceeded"
    http_status = 504
    kind = "timeout_error"


class FirstTokenTimeout(DeadlineExceeded):
    """No token came within the request's first_token_timeout_s; its work was stopped."""

    code = "first_token_timeout"


class Cancelled(DiptychError):
    """The client went away or asked to stop."""

    code = "cancelled"
    http_status = 499


class TransferError(DiptychError):
    """KV did not cross the hinge. The decode engine may compute the prompt itself instead."""

    code = "transfer_failed"
    http_status = 503
    retryable = True


class LayoutMismatch(TransferError):
    """Two engines do not agree on the KV layout or the model; the pair is never formed."""

    code = "layout_mismatch"
    retryable = False


class PeerLost(TransferError):
    """The other engine of the pair is gone or unreachable."""

    code = "peer_lost"


class ChecksumMismatch(TransferError):
    """A chunk arrived altered, twice."""

    code = "kv_checksum"


class TransferTimeout(TransferError):
    """The other engine stopped making progress."""

    code = "transfer_timeout"


class EngineError(DiptychError):
    """An engine cannot go on with this request."""

    code = "engine_error"


class EngineLost(EngineError):
    """The engine's process is gone."""

    code = "engine_lost"
    http_status = 503
    retryable = True


class EngineFault(EngineError):
    """A step raised; the requests in it end there, the engine goes on."""

    code = "engine_fault"
    retryable = True


class Disagreement(EngineFault):
    """Two engines computed different tokens for one place of an answer: sums in another order round otherwise."""

    code = "engines_disagree"


class Fenced(EngineError):
    """A message named another life of this engine than the present one."""

    code = "fenced"
    http_status = 503
    retryable = True


class StartupError(DiptychError):
    """`diptych serve` cannot start; the message says what to do."""

    code = "startup_failed"


def _tree(root: type[DiptychError]) -> dict[str, type[DiptychError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found |= {code: cls for code, cls in _tree(child).items() if code not in found}
    return found


_BY_CODE = _tree(DiptychError) | {InvalidRequest.code: InvalidRequest}  # a code that its base shares


def error_from_code(code: str, message: str, param: str = "") -> DiptychError:
    """The exception that a peer process named by (code, message), with the field of the request where one is to blame;
    an unknown code gives EngineError.
    """
    kind = _BY_CODE.get(code, EngineError)
    return kind(message, param or None) if issubclass(kind, RequestError) else kind(message)


def param_of(error: DiptychError) -> str:
    """The field of the request that is to blame for the error; empty where none is."""
    return (error.param or "") if isinstance(error, RequestError) else ""
