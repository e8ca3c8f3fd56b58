"""The results of a batch, written as two files: what was answered, and what was refused or never answered.

Called by run.py. Files are written whole before their rows are; what a dying router leaves is swept.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from diptych.cluster.store import batches
from diptych.cluster.store.contents import Content, Contents, Draft, at_disk
from diptych.cluster.store.database import Store
from diptych.protos.openai_batches import line_id_of, result_line

PIECE_LINES: Final = 200
PIECE_BYTES: Final = 4 << 20  # an answer with logprobs may have as many alone


@dataclass(frozen=True, slots=True)
class Results:
    """What was written; None: there was no such line."""

    output: Content | None
    error: Content | None

    def contents(self) -> list[Content]:
        """Both."""
        return [content for content in (self.output, self.error) if content is not None]


async def write_results(store: Store, contents: Contents, number: int, batch_id: str) -> Results:
    """In the order of the input. Raises StorageFull and what the store raises; nothing is left behind then."""
    drafts: dict[bool, Draft] = {}
    try:
        after = 0
        piece = partial(batches.results, number=number, most=PIECE_LINES, most_bytes=PIECE_BYTES)
        while rows := await store.read(partial(piece, after=after)):
            after = rows[-1][0]
            await at_disk(_write, contents, drafts, batch_id, rows)
        return await at_disk(_finish, drafts)
    except BaseException:
        await at_disk(_abandon, drafts)
        raise


def _write(
    contents: Contents, drafts: dict[bool, Draft], batch_id: str, rows: list[tuple[int, str, str, bytes]]
) -> None:
    for line, custom_id, state, answer in rows:
        is_done = state == batches.DONE
        if is_done not in drafts:
            drafts[is_done] = contents.draft()
        if not answer:
            answer = result_line(line_id_of(batch_id, line), custom_id, error=batches.unanswered(state))
        drafts[is_done].write(answer)


def _finish(drafts: dict[bool, Draft]) -> Results:
    done = {is_done: draft.finish() for is_done, draft in drafts.items()}
    return Results(done.get(True), done.get(False))


def _abandon(drafts: dict[bool, Draft]) -> None:
    for draft in drafts.values():
        draft.abandon()
