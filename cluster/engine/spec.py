"""What an engine is told at birth and what it reports when it is ready. Crosses Ray by pickle; no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from diptych.cluster.config import ModelSettings, SecuritySettings
from diptych.cluster.control import cards
from diptych.cluster.models import ModelFacts
from diptych.cluster.models.texts import TextFacts
from diptych.kvtransfer.layout import KvLayout
from diptych.protos.echo import ECHO
from diptych.protos.errors import StartupError
from diptych.protos.faults import FaultSettings
from diptych.protos.settings import (
    CPU_KV_MIB,
    DecodeSettings,
    Device,
    KvSettings,
    PrefillSettings,
    TransferSettings,
)
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything that `compose` needs. `dtype` is decided (never auto); paths are absolute. What a setting leaves to
    the device is decided here, for all who ask.

    The arena's size and all else that a pool sets are those of the roles at birth, whatever roles come later.
    """

    engine_id: EngineId
    epoch: int
    roles: frozenset[Role]
    more_roles: frozenset[Role] = frozenset()  # that it can take later, without loading the model again
    model: str
    settings: ModelSettings
    transfer: TransferSettings
    folder: Path
    facts: ModelFacts
    text: TextFacts | None = None  # of an engine of the role embed
    dtype: str
    run_dir: Path
    host: str | None = None  # None: a unix socket in run_dir
    port: int = 0  # at `host`; 0: the engine takes a free one
    security: SecuritySettings = field(default_factory=SecuritySettings)
    secret_id: str = ""  # engines with another secret than the cluster's present one are replaced
    cores: int = 0  # this engine's share of the machine; 0: all that the process may use
    trace_file: Path | None = None
    degraded: tuple[str, ...] = ()
    faults: FaultSettings = field(default_factory=FaultSettings)
    step_stall_s: float = 60.0  # a step that takes longer ends the engine
    by_hand: bool = True  # False: on a card transformers' forward computes, which is slower; for comparison

    @property
    def possible_roles(self) -> frozenset[Role]:
        """What `Engine.set_roles` may ask for."""
        return self.roles | self.more_roles

    @property
    def kv(self) -> KvSettings:
        """The arena's settings: its pool's own, where an engine has one role."""
        return self.settings.pool_kv(next(iter(self.roles)) if len(self.roles) == 1 else Role.DECODE)

    @property
    def kv_key(self) -> str:
        """Where the configuration sets `kv`."""
        role = next(iter(self.roles))
        own = len(self.roles) == 1 and self.kv is not self.settings.kv
        return f"models.{self.model}.{f'{role}.' if own else ''}kv"

    @property
    def ref(self) -> EngineRef:
        """This life of the engine; the epoch in the socket's name keeps a dead life's socket out of the way."""
        target = f"unix:{self.run_dir / f'{self.engine_id}-{self.epoch}.sock'}"
        if self.host is not None:
            target = f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
        return EngineRef(self.engine_id, self.epoch, target)

    @property
    def device(self) -> Device:
        """What it computes on. A plan has decided; elsewhere auto is a card where this process could use one."""
        wanted = self.settings.device
        if wanted == "auto":
            return "cuda" if self.settings.source != ECHO and cards.is_there() else "cpu"
        return wanted

    @property
    def gpu_share(self) -> float:
        """Part of its card, where it has one. A plan has decided; elsewhere the engines of a layout share a card."""
        return self.settings.gpu_share or 1 / len(self.settings.pools())

    @property
    def decode(self) -> DecodeSettings:
        """Of its worker."""
        return self.settings.decode.on(self.device)

    @property
    def prefill(self) -> PrefillSettings:
        """Of its worker."""
        return self.settings.prefill.on(self.device)

    @property
    def max_slots(self) -> int:
        """Sequences in the runner at once, over all roles that it can take."""
        of = {Role.PREFILL: self.prefill.max_running, Role.DECODE: self.decode.max_running}
        return sum(of[role] for role in self.possible_roles)

    @property
    def step_tokens(self) -> int:
        """Of the largest step of any role that it can take."""
        of = {Role.PREFILL: self.prefill.step_tokens, Role.DECODE: self.decode.step_tokens}
        return max(of[role] for role in self.possible_roles)

    @property
    def kv_bytes(self) -> int | None:
        """Of the arena; None: what the card's other uses leave."""
        wanted = self.kv.memory_mib
        if wanted is None and self.device == "cpu":
            wanted = CPU_KV_MIB
        return None if wanted is None else wanted << 20

    def num_blocks(self, layout: KvLayout) -> int:
        """Blocks that `kv_bytes` pays for, which is no question of a card's rest. StartupError: less than one."""
        assert self.kv_bytes is not None
        blocks = self.kv_bytes // layout.bytes_per_block
        if blocks < 1:
            raise StartupError(
                f"{self.kv_key}.memory_mib: {self.kv_bytes >> 20} MiB hold no single block of "
                f"{layout.bytes_per_block / 2**20:.1f} MiB; raise it"
            )
        return blocks

    @property
    def wanted_context_tokens(self) -> int:
        """Prompt and output together: what the model and the setting allow."""
        if self.text is not None:
            return self.text.max_tokens
        return min(self.facts.max_context_tokens, self.settings.max_context_tokens or self.facts.max_context_tokens)

    def max_context_tokens(self, num_blocks: int) -> int:
        """The same within the arena."""
        return min(self.wanted_context_tokens, num_blocks * self.kv.block_tokens)

    @property
    def threads(self) -> int:
        """CPU threads of the engine: the larger wish of its roles, else its share of the cores."""
        settings = self.settings
        of = {
            Role.PREFILL: settings.prefill.threads,
            Role.DECODE: settings.decode.threads,
            Role.EMBED: settings.embed.threads,
        }
        wishes = [of[role] for role in self.roles]
        return max(wishes) or self.cores or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """An engine that takes orders: what it is, and where its start-up time went (name, seconds)."""

    info: EngineInfo
    timeline: tuple[tuple[str, float], ...]
    memory_plan: str = ""  # of its card, for people; empty on a CPU


def check_cpu(spec: EngineSpec) -> None:
    """StartupError where an engine on the CPU is asked for what only a card's engine has."""
    if spec.settings.deterministic:
        raise StartupError(
            f"models.{spec.model}.deterministic: answers that do not depend on what is computed beside them need a "
            "card; a CPU's products of matrices depend on how many rows they have. Remove this key, or write "
            "device: cuda"
        )
