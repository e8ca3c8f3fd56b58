"""Any model that transformers computes, on a device: its own forward, our attention over the step's tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..attention import DeviceAttentionStep, run_module
from ..device.step import StepTensors


class GenericDecoder:
    """Computes a DeviceDecoder's forward by a loaded causal model of transformers. See DeviceDecoder.

    Whether a graph can hold it is found out by trying: some models ask the device (experts one by one).
    """

    def __init__(self, module: nn.Module, layer_ids: Sequence[int], *, capturable: bool) -> None:
        self.capturable = capturable
        self._module = module
        self._layer_ids = tuple(layer_ids)

    def forward(self, step: StepTensors, kv: Sequence[tuple[Tensor, Tensor]], logits_NV: Tensor) -> None:
        """See DeviceDecoder."""
        layers = dict(zip(self._layer_ids, kv, strict=True))
        seen = DeviceAttentionStep(step, layers, self._layer_ids[-1])
        logits_NV.copy_(run_module(self._module, step.ids_T[: step.num_tokens], seen, step.kept_N))
