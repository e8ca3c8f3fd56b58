"""One request's way through a decode engine: what it knows, where its KV is, in which state it is."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from enum import Enum

from diptych.kvtransfer.pool import BlockTable
from diptych.protos.fair_line import Place
from diptych.protos.lifecycle import RowMaker, StageTimer
from diptych.protos.types import DecodeOrder, GenerateRequest, TransferKey


class State(Enum):
    """Where a sequence is; the picture is in the README."""

    FETCHING = "fetching"  # a transfer is expected; holds its cached prefix
    WANTING = "wanting"  # its KV is ready over there; in line for all its blocks
    GRANTED = "granted"  # the receiver writes into its blocks
    WAITING = "waiting"  # in line to be computed here; holds nothing
    READY = "ready"  # holds all its blocks, whatever is computed in them; in line for a seat
    RUNNING = "running"  # a seat: in the steps, with a slot
    DRAINING = "draining"  # its Finish is out; the receiver or a step may still write into its blocks
    DONE = "done"


IN_TRANSFER = frozenset({State.FETCHING, State.WANTING, State.GRANTED})


@dataclass(slots=True, eq=False)
class Sequence:
    """Prompt and generated tokens, and how many of them have KV in the table.

    tokens    | known ids                                | pending: sampled by a step that was not collected
    positions | computed            | under_way          | missing                                           |
    """

    order: DecodeOrder
    place: Place
    timer: StageTimer
    rows: RowMaker
    tokens: list[int]  # ids known so far: the prompt, what others had generated, then what was generated since
    state: State
    limit: int  # tokens that it may come to have, by its max_tokens or the context
    since: float  # when its order came
    table: BlockTable | None = None
    computed: int = 0  # positions 0 .. computed - 1 have KV in the table
    under_way: int = 0  # positions from there on whose KV is computed by steps not collected yet
    pending: int = 0  # tokens that these steps sample
    foretold: int = 0  # rows in these steps whose sample is in `tokens` already: its guide was certain of it
    is_forced: bool = False  # its guide was certain of tokens since it has the table: more than that had room for
    in_flight: int = 0  # rows that it has in them; slot and blocks stay while there are any
    slot: int | None = None
    charged: bool = False  # its tenant has paid for the known tokens; later ones are paid for as they come
    preemptions: int = 0
    cached_tokens: int | None = None  # of the order's tokens, when its computation or its transfer began; None before
    transfer_bytes: int = 0
    transport: str = ""

    @property
    def request(self) -> GenerateRequest:
        """What was asked for."""
        return self.order.request

    @property
    def key(self) -> TransferKey:
        """The request's name."""
        return self.order.request.key

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.order.request.prompt)

    @property
    def num_known(self) -> int:
        """Tokens that the order came with, whose KV a transfer brings."""
        return self.num_prompt + len(self.order.request.resume)

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt, wherever they were computed."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_new(self) -> int:
        """Those of them that the order did not come with."""
        return len(self.tokens) - self.num_known

    @property
    def launched(self) -> int:
        """Positions whose KV is computed or under way."""
        return self.computed + self.under_way

    @property
    def length(self) -> int:
        """Tokens, those included that are sampled by steps under way."""
        return len(self.tokens) + self.pending

    @property
    def missing(self) -> int:
        """Tokens whose KV nobody computes: 1 while decoding, more while a prompt is computed here."""
        return self.length - self.launched

    @property
    def is_full(self) -> bool:
        """It ends with a token that is under way, whatever that turns out to be: no step may follow."""
        return self.length >= self.limit

    @property
    def blocks(self) -> AbstractSequence[int]:
        """The table's blocks, in order of position."""
        return [] if self.table is None else self.table.blocks
