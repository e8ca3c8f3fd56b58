"""Builds the parts of one engine from its spec: model, arena, runner, pool, transfer drivers, workers.

The only place where all floors meet. Nothing runs yet when `compose` returns.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from diptych.cluster.security import engine_name
from diptych.decode.worker import DecodeWorker
from diptych.kvtransfer.arena import KvArena
from diptych.kvtransfer.layout import KvLayout, compat_digest
from diptych.kvtransfer.pool import BlockPool
from diptych.kvtransfer.receive import ReceiveDriver
from diptych.kvtransfer.send import SendDriver
from diptych.prefill.worker import PrefillWorker
from diptych.protos.channels import ENGINE_SERVICE, KV_SERVICE
from diptych.protos.constraint import Backend
from diptych.protos.echo import ECHO
from diptych.protos.faults import FaultPlan
from diptych.protos.pipeline import StepPipeline
from diptych.protos.ports import Clock, ReceiveEvent, Runner, SendEvent, Worker
from diptych.protos.status import EngineInfo
from diptych.protos.step import SlotPool
from diptych.protos.trust import Refusals, Trust
from diptych.protos.types import Role

from .faults import FaultyRunner, faulty_delivery
from .guides.guides import Guides
from .guides.matcher import Backend as GrammarBackend
from .guides.matcher import Llguidance
from .inbox import Inbox, TransferNews
from .outbox import Outbox
from .spec import EngineSpec, check_cpu

RANDOM_SEED = 0  # of weights that are made up: all engines of a model must have the same
_RANDOM = "weights are random: the answers are noise"
MAX_OUTPUTS_BEHIND = 4096  # steps that the asyncio thread may lag behind the step thread


@dataclass(frozen=True, slots=True)
class Brain:
    """What computes, loaded, before it has KV memory."""

    layout: KvLayout
    weights_digest: bytes
    attention: bytes  # the identity of what else shapes KV, see compat_digest
    degraded: Sequence[str]  # complete once the runner is there
    runner: Callable[[KvArena, int, int], Runner]  # (arena, max_slots, max_step_tokens)
    device: str = "cpu"
    num_blocks: Callable[[], int] | None = None  # None: what kv.memory_mib pays for
    spare_blocks: int = 0  # that the runner needs beside
    before_kv: tuple[tuple[str, Callable[[], None]], ...] = ()  # stages before its memory is divided
    with_kv: tuple[tuple[str, Callable[[KvArena], None]], ...] = ()  # stages between the arena and the runner
    memory_plan: Callable[[], str] = str  # for people; once there is an arena


BrainFactory = Callable[[EngineSpec], Brain]


@dataclass(slots=True, kw_only=True)
class EngineParts:
    """An engine before its threads start."""

    info: EngineInfo
    runner: Runner  # without injected faults
    pipeline: StepPipeline  # of all workers: the one way to the runner once the engine is warm
    pool: BlockPool
    slots: SlotPool
    inbox: Inbox
    outbox: Outbox
    clock: Clock
    trust: Trust
    refused: dict[str, Refusals]  # calls, by gRPC service
    guides: Guides
    faults: FaultPlan | None = None
    memory_plan: str = ""  # of its card, for people
    workers: dict[Role, Worker] = field(default_factory=dict)
    sender: SendDriver | None = None
    receiver: ReceiveDriver | None = None


def model_brain(spec: EngineSpec) -> Brain:
    """The real thing, on the device that the spec names. StartupError: it cannot compute there."""
    if spec.device == "cpu":
        check_cpu(spec)
        return _cpu_brain(spec)
    return _card_brain(spec)


def _card_brain(spec: EngineSpec) -> Brain:
    from .card import Card

    is_random = not spec.settings.has_weights
    card = Card(spec)
    if is_random:
        card.degraded.append(_RANDOM)
    model = card.load(RANDOM_SEED if is_random else None)
    transfers = () if spec.settings.layout == "colocated" else (("transfers", KvArena.rehearse),)
    return Brain(
        card.layout,
        model.weights_digest,
        model.architecture.encode() + (b" deterministic" if spec.settings.deterministic else b""),
        card.degraded,
        lambda arena, max_slots, max_step_tokens: card.runner(),
        device=card.device,
        num_blocks=card.num_blocks,
        spare_blocks=1,
        before_kv=(("kernels", card.wait_kernels),),
        with_kv=(("graphs", card.capture), ("cost", card.measure), *transfers),
        memory_plan=card.memory_plan,
    )


def _cpu_brain(spec: EngineSpec) -> Brain:
    from diptych.kernels.model import load_model
    from diptych.kernels.runner import ModelRunner

    is_random = not spec.settings.has_weights
    model = load_model(spec.folder, dtype=spec.dtype, random_seed=RANDOM_SEED if is_random else None)
    degraded = (_RANDOM,) if is_random else ()
    layout = KvLayout(
        layers=model.layers,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        dtype=model.dtype,
        block_tokens=spec.kv.block_tokens,
    )

    def runner(arena: KvArena, max_slots: int, max_step_tokens: int) -> Runner:
        return ModelRunner(
            model,
            arena.layers,
            block_tokens=layout.block_tokens,
            max_slots=max_slots,
            max_step_tokens=max_step_tokens,
        )

    return Brain(layout, model.weights_digest, model.architecture.encode(), degraded + model.degraded, runner)


def echo_brain(spec: EngineSpec) -> Brain:
    """No model: KV of any shape that hashes the prefix, tokens that hash the KV."""
    from diptych.kernels.echo.runner import EchoRunner

    facts, costs = spec.facts, spec.settings.echo
    layout = KvLayout(
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        dtype=spec.dtype,
        block_tokens=spec.kv.block_tokens,
    )

    def runner(arena: KvArena, max_slots: int, max_step_tokens: int) -> Runner:
        return EchoRunner(
            arena.bytes(),
            max_slots=max_slots,
            max_step_tokens=max_step_tokens,
            step_s=costs.step_s,
            token_s=costs.token_s,
        )

    return Brain(layout, ECHO.encode(), b"", ("model echo: nothing is computed, the answers are hashes",), runner)


def brain_of(spec: EngineSpec) -> BrainFactory:
    """What the source of the model asks for."""
    return echo_brain if spec.settings.source == ECHO else model_brain


def compose(
    spec: EngineSpec,
    *,
    brain: BrainFactory,
    mark: Callable[[str], None],
    trust: Trust | None = None,
    faults: FaultPlan | None = None,
    clock: Clock = time.monotonic,
) -> EngineParts:
    """Raises StartupError when the settings leave no room for KV. `mark(name)` is called after each costly stage.

    Without `trust` the engine talks to this process alone.
    """
    slots = SlotPool(spec.max_slots)
    guides = _guides(spec, clock)
    guides.warm_up()
    loaded = brain(spec)
    mark("weights")
    for stage, wait in loaded.before_kv:
        wait()
        mark(stage)
    num_blocks = spec.num_blocks(loaded.layout) if loaded.num_blocks is None else loaded.num_blocks()
    if loaded.num_blocks is not None:
        mark("rehearsal")
    arena = KvArena(loaded.layout, num_blocks, loaded.device, spare_blocks=loaded.spare_blocks)
    mark("arena")
    for stage, prepare in loaded.with_kv:
        prepare(arena)
        mark(stage)
    runner = loaded.runner(arena, slots.max_slots, spec.step_tokens)
    mark("runner")
    info = _info(spec, loaded, num_blocks)
    compat = compat_digest(loaded.layout, weights_digest=loaded.weights_digest, attention=loaded.attention)
    pool = BlockPool(
        num_blocks=num_blocks,
        block_tokens=spec.kv.block_tokens,
        root=compat,
        prefix_cache=spec.kv.prefix_cache,
    )
    parts = EngineParts(
        info=info,
        runner=runner,
        pipeline=StepPipeline(runner if faults is None else FaultyRunner(runner, faults), clock),
        pool=pool,
        slots=slots,
        inbox=Inbox(spec.prefill.max_waiting + spec.decode.max_waiting + slots.max_slots),
        outbox=Outbox(MAX_OUTPUTS_BEHIND),
        clock=clock,
        trust=trust or Trust.alone(engine_name(spec.possible_roles)),
        refused={name: Refusals(f"engine {spec.engine_id} ({name})") for name in (ENGINE_SERVICE, KV_SERVICE)},
        guides=guides,
        faults=faults,
        memory_plan=loaded.memory_plan(),
    )
    if Role.PREFILL in spec.possible_roles:
        _add_prefill(parts, spec, arena, compat)
    if Role.DECODE in spec.possible_roles:
        _add_decode(parts, spec, arena, compat)
    return parts


def _guides(spec: EngineSpec, clock: Clock) -> Guides:
    ends = tuple(spec.facts.eos_token_ids)
    file, vocab_size = spec.folder / "tokenizer.json", spec.facts.vocab_size
    backends: dict[Backend, Callable[[], GrammarBackend]] = {
        Backend.LLGUIDANCE: partial(Llguidance, file, vocab_size=vocab_size, end_tokens=ends),
        Backend.XGRAMMAR: partial(_xgrammar, file, vocab_size=vocab_size, end_tokens=ends),
    }
    return Guides(backends, end_tokens=ends, clock=clock)


def _xgrammar(file: Path, *, vocab_size: int, end_tokens: tuple[int, ...]) -> GrammarBackend:
    from .guides.xgrammar_matcher import Xgrammar

    return Xgrammar(file, vocab_size=vocab_size, end_tokens=end_tokens)


def _delivery(parts: EngineParts, role: Role) -> Callable[[SendEvent | ReceiveEvent], None]:
    """Where a transfer driver puts its news."""

    def deliver(event: SendEvent | ReceiveEvent) -> None:
        parts.inbox.put(TransferNews(role, event))

    return deliver if parts.faults is None else faulty_delivery(parts.faults, deliver)


def _add_prefill(parts: EngineParts, spec: EngineSpec, arena: KvArena, compat: bytes) -> None:
    parts.sender = SendDriver(
        me=spec.ref,
        layout=arena.layout,
        compat=compat,
        arena=arena,
        settings=spec.transfer,
        run_dir=spec.run_dir,
        deliver=_delivery(parts, Role.PREFILL),
        clock=parts.clock,
        faults=parts.faults,
    )
    parts.workers[Role.PREFILL] = PrefillWorker(
        settings=spec.prefill,
        pipeline=parts.pipeline,
        pool=parts.pool,
        slots=parts.slots,
        sender=parts.sender,
        emit=partial(parts.outbox.put, Role.PREFILL),
        clock=parts.clock,
        # Not the arena's bound: only the prompt must fit here, and the pool itself refuses one that does not.
        max_context_tokens=spec.wanted_context_tokens,
    )


def _add_decode(parts: EngineParts, spec: EngineSpec, arena: KvArena, compat: bytes) -> None:
    parts.receiver = ReceiveDriver(
        me=spec.ref,
        layout=arena.layout,
        compat=compat,
        arena=arena,
        settings=spec.transfer,
        deliver=_delivery(parts, Role.DECODE),
        clock=parts.clock,
        trust=parts.trust,
        faults=parts.faults,
    )
    parts.workers[Role.DECODE] = DecodeWorker(
        settings=spec.decode,
        pipeline=parts.pipeline,
        pool=parts.pool,
        slots=parts.slots,
        receiver=parts.receiver,
        emit=partial(parts.outbox.put, Role.DECODE),
        clock=parts.clock,
        max_context_tokens=parts.info.max_context_tokens,
    )


def _info(spec: EngineSpec, loaded: Brain, num_blocks: int) -> EngineInfo:
    max_context_tokens = spec.max_context_tokens(num_blocks)
    degraded = [*spec.degraded, *loaded.degraded]
    if max_context_tokens < spec.wanted_context_tokens:
        what = "context" if Role.DECODE in spec.roles else "prompts on the prefill engines"
        bound = "what the card has left for KV" if spec.kv_bytes is None else f"{spec.kv_key}.memory_mib"
        degraded.append(
            f"{what} of {max_context_tokens} tokens instead of {spec.wanted_context_tokens}: {bound} is the bound"
        )
    if find_spec("xgrammar") is None:
        degraded.append("the few schemas that llguidance cannot follow are refused: pip install 'diptych[xgrammar]'")
    if not spec.kv.prefix_cache:
        degraded.append(f"no prefix cache: {spec.kv_key}.prefix_cache is off")
    return EngineInfo(
        ref=spec.ref,
        roles=spec.roles,
        model=spec.model,
        pid=os.getpid(),
        host=socket.gethostname(),
        block_tokens=spec.kv.block_tokens,
        num_blocks=num_blocks,
        max_context_tokens=max_context_tokens,
        dtype=loaded.layout.dtype,
        degraded=tuple(degraded),
        layout=spec.settings.layout,
        seats=min(spec.decode.max_running, spec.decode.step_tokens) if Role.DECODE in spec.possible_roles else 0,
    )
