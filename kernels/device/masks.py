"""What guides allow, on its way to the device; and what they are told of a step's tokens. The step thread's.

The mask of a row needs the token before it: where a step is launched ahead of that, its tokens are chosen when the step
before is collected, while the device computes (DeviceRunner).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from diptych.protos.constraint import Guide, fill_masks, mask_words

from .wire import Sampling

Guided = tuple[Guide, int]  # and the position of the token that it is asked about


def fill(masks_MW: Tensor, guided: Sequence[Guided]) -> None:
    """One mask for each, into host memory, int32."""
    fill_masks(guided, masks_MW.numpy().data.cast("B"))


def accept(sampled: Iterable[tuple[int, Guide, int, int | None]]) -> dict[int, tuple[int, ...]]:
    """Tell guides what was sampled: (row, guide, position, token). What is certain to follow, by row."""
    forced = {}
    for row, guide, position, token in sampled:
        if token is not None and (tokens := guide.accept(position, token)):
            forced[row] = tokens
    return forced


def accept_all(rows: Sequence[Sampling], tokens: Sequence[int | None]) -> Mapping[int, tuple[int, ...]]:
    """The same, of the rows of a layout and the tokens of its plan."""
    return accept(
        (one.row, one.spec.guide, one.spec.position, tokens[one.row]) for one in rows if one.spec.guide is not None
    )


class MaskBuffers:
    """Room for the masks of the steps that may be outstanding, made when the first guide comes."""

    def __init__(self, *, turns: int, max_rows: int, vocab: int, device: torch.device) -> None:
        self._shape = max_rows, mask_words(vocab)
        self._device = device
        self._sent: list[Tensor] = []
        self._turns = turns
        self._masks_MW = torch.zeros(1, self._shape[1], dtype=torch.int32, device=device)

    def put(self, turn: int, rows: Sequence[Sampling]) -> Tensor:
        """Masks of rows that have a guide, on the device, in their order; of one row that says nothing, if none has."""
        if not rows:
            return self._masks_MW
        if not self._sent:
            pinned = self._device.type == "cuda"
            self._masks_MW = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._sent = [torch.zeros(self._shape, dtype=torch.int32, pin_memory=pinned) for _ in range(self._turns)]
        sent = self._sent[turn][: len(rows)]
        fill(sent, [(one.spec.guide, one.spec.position) for one in rows if one.spec.guide is not None])
        masks = self._masks_MW[: len(rows)]
        masks.copy_(sent, non_blocking=True)
        return masks
