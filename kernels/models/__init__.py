"""Decoders written for a device: they read a StepTensors and nothing else of a step, and can be captured in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # shape.py is read where no torch is loaded
    from torch import Tensor

    from ..device.step import StepTensors


class DeviceDecoder(Protocol):
    """A causal language model on its device, with the buffers of its largest step. One stream at a time uses it.

    Made by LoadedModel.decoder(max_tokens=).
    """

    capturable: bool  # False: something in it asks the device, or decides by values, so that no graph can hold it

    def forward(self, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]], logits_NV: Tensor) -> None:
        """Compute all layers: keys and values of every token go to `kv` (pair i is KV layer i of the arena: K and V,
        [blocks, kv heads, block_tokens, head size]), logits of the tokens `step.kept_N` to `logits_NV` (model's dtype).
        """
        ...
