"""One engine's model on its card: what fits is found out before it is loaded, and KV gets what its steps leave.

Called by compose. The order: plan, load, rehearse the largest step on one block, size the arena, capture graphs.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import replace

import torch

from diptych.cluster.control import cards
from diptych.kernels.device.ahead import AheadOf, KernelsAhead
from diptych.kernels.device.build import StepLimits, build_runner
from diptych.kernels.device.memory_plan import GIB, DevicePlan, plan_after_loading
from diptych.kernels.device.runner import DeviceOptions, DeviceRunner
from diptych.kernels.model import LoadedModel, load_model
from diptych.kernels.models.shape import GenericOnly
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import ITEM_BYTES, KvLayout
from diptych.protos.errors import StartupError
from diptych.protos.ports import StepCost

from .card_plan import card_bytes, check_card, num_weights, plan_card
from .spec import EngineSpec

log = logging.getLogger(__name__)


def find_card(spec: EngineSpec) -> str:
    """The device of an engine that is to compute on one. StartupError says why this process cannot reach any."""
    why = cards.why_unusable()
    if not why and not torch.cuda.is_available():
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "torch finds no card" + ("" if listed is None else f", and CUDA_VISIBLE_DEVICES is {listed!r}")
    if not why:
        why = cards.why_too_small(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    if why:
        raise StartupError(
            f"models.{spec.model}.device is cuda, and engine {spec.engine_id} cannot compute on a card: {why}. "
            "`diptych doctor` tells more; device: cpu computes without"
        )
    return "cuda:0"


class Card:
    """`load`, then `wait_kernels`, `num_blocks`, `capture`, `measure` and `runner`, each once."""

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
        self._limits = StepLimits(
            max_slots=spec.max_slots,
            max_step_tokens=spec.step_tokens,
            max_context_tokens=spec.wanted_context_tokens,
            block_tokens=spec.kv.block_tokens,
        )
        self._ahead: KernelsAhead | None = None
        self._plain_cost: StepCost | None = None  # of steps that are not deterministic, where this engine's are
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
        if spec.by_hand:
            self._compile_ahead(plan)
        self._model = load_model(
            spec.folder,
            dtype=spec.dtype,
            device=self.device,
            random_seed=random_seed,
            by_hand=spec.by_hand,
            deterministic=spec.settings.deterministic,
        )
        self.degraded.extend(self._model.degraded)
        return self._model

    def wait_kernels(self) -> None:
        """Until those are there that were begun before the weights."""
        if self._ahead is not None:
            self._ahead.join()
            self._ahead = None

    def num_blocks(self) -> int:
        """KV blocks that there is room for, or that are configured, beside what the largest step was seen to take.
        StartupError: too few.
        """
        spec = self._spec
        if spec.settings.deterministic:
            self._plain_cost = self._cost_without()
        self._runner = self._rehearsed(self._model, DeviceOptions(depth=2))
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
        if self._plain_cost is not None and self._runner.cost is not None:
            self.degraded.append(self._told_cost(self._runner.cost, self._plain_cost))
        log.info("%.2f GiB of the card are taken, with all but the later graphs", self._taken() / GIB)

    def runner(self) -> DeviceRunner:
        """Ready for its first step."""
        return self._runner

    def memory_plan(self) -> str:
        """For people, as it was once the largest step had run."""
        return self._plan.table(f"{self._spec.engine_id}'s card")

    def _compile_ahead(self, plan: DevicePlan) -> None:
        """While weights are loaded, where KV's memory has room for a few layers meanwhile."""
        spec = self._spec
        wanted = AheadOf(
            folder=spec.folder,
            dtype=spec.dtype,
            device=self.device,
            deterministic=spec.settings.deterministic,
            limits=self._limits,
        )
        try:
            ahead = KernelsAhead(wanted)
        except GenericOnly:
            return
        beside_weights = sum(size for _, size in plan.rows[1:])
        if num_weights(ahead.shape) * ITEM_BYTES[spec.dtype] + beside_weights < plan.free - plan.used:
            ahead.begin()
            self._ahead = ahead

    def _rehearsed(self, model: LoadedModel, options: DeviceOptions) -> DeviceRunner:
        arena = KvArena(self.layout, 0, self.device, spare_blocks=1)
        runner = build_runner(model, arena.layers, self._limits, options)
        runner.rehearse()
        return runner

    def _cost_without(self) -> StepCost | None:
        """Of the same model's steps as they would be, were they not deterministic."""
        runner = self._rehearsed(replace(self._model, deterministic=False), DeviceOptions(graphs=False))
        runner.measure()
        cost = runner.cost
        del runner
        gc.collect()
        torch.cuda.empty_cache()
        return cost

    def _told_cost(self, cost: StepCost, plain: StepCost) -> str:
        rows, tokens = self._limits.max_slots, self._limits.max_step_tokens

        def times(decode_rows: int, prompt_tokens: int) -> float:
            ours, theirs = (
                one.seconds(decode_rows=decode_rows, prompt_tokens=prompt_tokens, kv_tokens=0, prompt_kv=0)
                for one in (cost, plain)
            )
            return ours / theirs

        return (
            f"deterministic: a step of {rows:,} sequences takes {times(rows, 0):.2f} times as long as it would, "
            f"one of {tokens:,} prompt tokens {times(0, tokens):.2f} times"
        )

    def _taken(self) -> int:
        """Bytes of the card that the engine has. Of a card that it has alone, libraries and kernels count, too."""
        if self._spec.gpu_share < 1:
            return torch.cuda.memory_reserved(self.device) - self._reserved_before
        return self._free_before - torch.cuda.mem_get_info(self.device)[0]
