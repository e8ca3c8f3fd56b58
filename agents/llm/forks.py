"""One conversation, gone on from several times at once: see `Reply.fork`.

All requests are of one session and begin with the same messages, so that a cluster that has their KV from the first
answer computes none of it again. It knows nothing of what the answers are for.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import UsageError
from .exchange import exchange
from .machine import Machine
from .params import merged
from .together import together
from .travel import check_whole

if TYPE_CHECKING:
    from .draft import Draft
    from .reply import Reply

T = TypeVar("T")


def forked(reply: Reply[T], count: int, content: Any, params: Mapping[str, Any]) -> Machine[list[Reply[T]]]:
    """The replies, in the order of their seeds. Raises UsageError before anything is sent; the first CallFailed."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise UsageError(f"{reply.draft.name}: fork(n) takes how many answers are wanted, not {count!r}", "n")
    draft = again(reply, params) if content is None else reply.followed(content, params)
    session = draft.params.get("session") or secrets.token_hex(8)
    return (yield from together([exchange(_numbered(draft, session, at)) for at in range(count)]))


def again(reply: Reply[T], params: Mapping[str, Any]) -> Draft[T]:
    """The draft of the reply's own turn, to be answered anew by the model that answered it."""
    from .draft import with_params
    from .registry import current

    check_whole(reply.draft)
    override = current()
    draft = replace(
        reply.draft,
        model=override.model or reply.model,
        registry=override.registry or reply.draft.registry,
    )
    return with_params(draft, {**override.params, **params}, "fork(...)")


def _numbered(draft: Draft[T], session: str, at: int) -> Draft[T]:
    """Where a seed is set, each answer has its own: else all would be the same."""
    seed = draft.params.get("seed")
    own = {"session": session} if seed is None else {"session": session, "seed": seed + at}
    return replace(draft, params=merged(draft.params, own))
