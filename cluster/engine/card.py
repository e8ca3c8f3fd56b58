"""One engine's model on its card: what fits is found out before it is loaded, and KV gets what its steps leave.

Called by compose. The order: plan, load, rehearse the largest step on one block, size the arena, capture graphs.
"""

from __future__ import annotations

import logging
import os

import torch

from diptych.cluster.control import cards
from diptych.kernels.device.build import StepLimits, build_runner
from diptych.kernels.device.memory_plan import GIB, DevicePlan, plan_after_loading
from diptych.kernels.device.runner import DeviceOptions, DeviceRunner
from diptych.kernels.model import LoadedModel, load_model
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout
from diptych.protos.errors import StartupError

from .card_plan import card_bytes, check_card, plan_card
from .spec import EngineSpec

log = logging.getLogger(__name__)


def find_card(spec: EngineSpec) -> str:
    """The device of an engine that is to compute on one. StartupError says why this process cannot reach any."""
    why = cards.why_unusable()
    if not why and not torch.cuda.is_available():
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "torch finds no card" + ("" if listed is None else f", and CUDA_VISIBLE_DEVICES is {listed!r}")
    if why:
        raise StartupError(
            f"models.{spec.model}.device is cuda, and engine {spec.engine_id} cannot compute on a card: {why}. "
            "`diptych doctor` tells more; device: cpu computes without"
        )
    return "cuda:0"


class Card:
    """`load`, then `num_blocks`, `capture`, `measure` and `runner`, each once."""

    def __init__(self, spec: EngineSpec) -> None:
        """StartupError: the process has no card."""
        self.degraded: list[str] = []  # complete once the first graphs are there
        self.device = find_card(spec)
        self._spec = spec
        free, total = torch.cuda.mem_get_info(self.device)
        self._free = card_bytes(spec, free=free, total=total)  # for this engine
        self._free_before, self._reserved_before = free, torch.cuda.memory_reserved(self.device)
        self.layout = KvLayout(
            layers=spec.facts.layers,
            kv_heads=spec.facts.kv_heads,
            head_dim=spec.facts.head_dim,
            dtype=spec.dtype,
            block_tokens=spec.kv.block_tokens,
        )
        self._model: LoadedModel
        self._runner: DeviceRunner
        self._plan: DevicePlan

    def load(self, random_seed: int | None) -> LoadedModel:
        """Raises StartupError before anything is allocated where the model and some KV cannot fit, and as load_model
        does.
        """
        spec = self._spec
        plan = plan_card(spec, self._free)
        log.info("%s", plan.table())
        check_card(spec, plan)
        self._model = load_model(
            spec.folder,
            dtype=spec.dtype,
            device=self.device,
            random_seed=random_seed,
            deterministic=spec.settings.deterministic,
        )
        self.degraded.extend(self._model.degraded)
        return self._model

    def num_blocks(self) -> int:
        """KV blocks that there is room for, or that are configured, beside what the largest step was seen to take.
        StartupError: too few.
        """
        spec = self._spec
        limits = StepLimits(
            max_slots=spec.max_slots,
            max_step_tokens=spec.step_tokens,
            max_context_tokens=spec.wanted_context_tokens,
            block_tokens=spec.kv.block_tokens,
        )
        arena = KvArena(self.layout, 0, self.device, spare_blocks=1)
        self._runner = build_runner(self._model, arena.layers, limits, DeviceOptions(depth=2))
        self._runner.rehearse()
        block = (self.layout.bytes_per_block, self.layout.block_tokens)
        weights = self._model.weights_bytes
        steps = max(0, self._taken() - weights)
        self._plan = plan_after_loading(weights, steps, free=self._free, block=block, wanted_kv=spec.kv_bytes)
        check_card(spec, self._plan)
        log.info("%s", self._plan.table())
        return self._plan.num_blocks

    def capture(self, arena: KvArena) -> None:
        """Compute in `arena` from now on, with the first graphs."""
        self._runner.use_arena(arena.layers)
        self._runner.capture()
        self.degraded.extend(self._runner.degraded)

    def measure(self, arena: KvArena) -> None:
        """Learn what steps cost."""
        self._runner.measure()
        log.info("%.2f GiB of the card are taken, with all but the later graphs", self._taken() / GIB)

    def runner(self) -> DeviceRunner:
        """Ready for its first step."""
        return self._runner

    def memory_plan(self) -> str:
        """For people, as it was once the largest step had run."""
        return self._plan.table(f"{self._spec.engine_id}'s card")

    def _taken(self) -> int:
        """Bytes of the card that the engine has. Of a card that it has alone, libraries and kernels count, too."""
        if self._spec.gpu_share < 1:
            return torch.cuda.memory_reserved(self.device) - self._reserved_before
        return self._free_before - torch.cuda.mem_get_info(self.device)[0]
