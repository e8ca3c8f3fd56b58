"""One engine's model on its card: what fits is found out before it is loaded, and KV gets what its steps leave.

Called by compose. The order: plan, load, rehearse the largest step on one block, size the arena, capture graphs.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import torch

from diptych.kernels.device.build import StepLimits, build_runner
from diptych.kernels.device.memory_plan import DevicePlan, StepNeeds, plan_after_loading, plan_before_loading
from diptych.kernels.device.runner import DeviceOptions, DeviceRunner
from diptych.kernels.device.state import state_bytes
from diptych.kernels.model import DTYPES, LoadedModel, load_model
from diptych.kernels.models.shape import DecoderShape, GenericOnly, read_shape
from diptych.kernels.models.tensors import allocate
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout

from .spec import EngineSpec

_WIDEST = 12  # numbers of a token that live at once, by hidden size, where the model's own are not known

log = logging.getLogger(__name__)


def find_card() -> str | None:
    """The device that engines compute on where there is one; None: they compute on the CPU."""
    return "cuda:0" if torch.cuda.is_available() else None


class Card:
    """`load`, then `num_blocks`, then `runner`, each once."""

    def __init__(self, spec: EngineSpec, device: str, *, max_slots: int, max_step_tokens: int) -> None:
        self.degraded: list[str] = []  # complete once the runner is there
        self._spec = spec
        self._device = device
        self._free, _ = torch.cuda.mem_get_info(device)
        self._limits = StepLimits(
            max_slots=max_slots,
            max_step_tokens=max_step_tokens,
            max_context_tokens=spec.wanted_context_tokens,
            block_tokens=spec.kv.block_tokens,
        )
        self._model: LoadedModel
        self.layout: KvLayout  # of the KV; once the model is loaded
        self._runner: DeviceRunner

    def load(self, random_seed: int | None) -> LoadedModel:
        """Raises StartupError before anything is allocated where the model and some KV cannot fit, and as load_model
        does.
        """
        spec, facts = self._spec, self._spec.facts
        layout = KvLayout(
            layers=facts.layers,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            dtype=spec.dtype,
            block_tokens=spec.kv.block_tokens,
        )
        plan = self._first_plan(layout)
        plan.check(least_tokens=self._least_tokens)
        log.info("%s", plan.table())
        self._model = load_model(spec.folder, dtype=spec.dtype, device=self._device, random_seed=random_seed)
        self.layout = layout
        self.degraded.extend(self._model.degraded)
        return self._model

    def num_blocks(self) -> int:
        """KV blocks that there is room for, or that are configured, beside what the largest step was seen to take.
        StartupError: none.
        """
        arena = KvArena(self.layout, 0, self._device, spare_blocks=1)
        self._runner = build_runner(self._model, arena.layers, self._limits, DeviceOptions(depth=2))
        self._runner.rehearse()
        free, _ = torch.cuda.mem_get_info(self._device)
        weights = self._model.weights_bytes
        steps = max(0, self._free - free - weights)
        plan = plan_after_loading(weights, steps, free=self._free, block=self._block, wanted_kv=self._wanted_kv)
        plan.check(least_tokens=self._least_tokens)
        log.info("%s", plan.table())
        return plan.num_blocks

    def runner(self, arena: KvArena) -> DeviceRunner:
        """Computing in `arena`, with its first graphs and an idea of what steps cost."""
        self._runner.use_arena(arena.layers)
        self._runner.capture()
        self._runner.measure()
        self.degraded.extend(self._runner.degraded)
        return self._runner

    @property
    def _block(self) -> tuple[int, int]:
        return self.layout.bytes_per_block, self.layout.block_tokens

    @property
    def _wanted_kv(self) -> int | None:
        """The configured size; without one an engine that has the card alone takes what is left."""
        kv = self._spec.kv
        if self._spec.settings.layout == "colocated" and "memory_mib" not in kv.model_fields_set:
            return None
        return kv.memory_mib << 20

    @property
    def _least_tokens(self) -> int:
        return min(self._limits.max_context_tokens, self._limits.max_step_tokens)

    def _first_plan(self, layout: KvLayout) -> DevicePlan:
        limits, facts, dtype = self._limits, self._spec.facts, DTYPES[self._spec.dtype]
        config: dict[str, Any] = json.loads((self._spec.folder / "config.json").read_text(encoding="utf-8"))
        try:
            shape = read_shape(config)
        except GenericOnly:
            hidden = next((config[key] for key in ("hidden_size", "n_embd", "d_model") if key in config), 8192)
            weights, widest = facts.num_parameters * dtype.itemsize, _WIDEST * int(hidden)
        else:
            weights = sum(tensor.nbytes for _, tensor in allocate(shape, dtype, torch.device("meta")).each())
            widest = _widest(shape)
        needs = StepNeeds(
            step_tokens=limits.max_step_tokens,
            max_rows=limits.max_slots,
            vocab_size=facts.vocab_size,
            widest=widest,
            item_bytes=dtype.itemsize,
        )
        state = state_bytes(
            max_slots=limits.max_slots,
            max_context_tokens=limits.max_context_tokens,
            block_tokens=limits.block_tokens,
        )
        block = (layout.bytes_per_block, layout.block_tokens)
        return plan_before_loading(weights, state, needs=needs, free=self._free, block=block, wanted_kv=self._wanted_kv)


def _widest(shape: DecoderShape) -> int:
    """Numbers of one token in the buffers of a hand-written decoder."""
    heads = shape.heads * shape.head_dim
    width = 2 * shape.hidden + 2 * heads + 2 * shape.kv_heads * shape.head_dim
    if not all(shape.sparse):
        width += 3 * shape.intermediate
    if shape.experts is not None:
        width += shape.experts.top_k * (shape.experts.intermediate + 2 * shape.hidden)
    return width
