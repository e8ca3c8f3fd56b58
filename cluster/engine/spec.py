"""What an engine is told at birth and what it reports when it is ready. Crosses Ray by pickle; no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from diptych.cluster.config import ModelSettings, SecuritySettings
from diptych.cluster.models import ModelFacts
from diptych.kvtransfer.layout import KvLayout
from diptych.protos.errors import StartupError
from diptych.protos.faults import FaultSettings
from diptych.protos.settings import KvSettings, TransferSettings
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything that `compose` needs. `dtype` is decided (never auto); paths are absolute.

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

    def num_blocks(self, layout: KvLayout) -> int:
        """Blocks that `kv.memory_mib` pays for. Raises StartupError when it is less than one."""
        blocks = (self.kv.memory_mib << 20) // layout.bytes_per_block
        if blocks < 1:
            raise StartupError(
                f"{self.kv_key}.memory_mib: {self.kv.memory_mib} MiB hold no single block of "
                f"{layout.bytes_per_block / 2**20:.1f} MiB; raise it"
            )
        return blocks

    @property
    def wanted_context_tokens(self) -> int:
        """Prompt and output together: what the model and the setting allow."""
        return min(self.facts.max_context_tokens, self.settings.max_context_tokens or self.facts.max_context_tokens)

    def max_context_tokens(self, num_blocks: int) -> int:
        """The same within the arena."""
        return min(self.wanted_context_tokens, num_blocks * self.kv.block_tokens)

    @property
    def threads(self) -> int:
        """CPU threads of the engine: the larger wish of its roles, else its share of the cores."""
        wishes = [
            self.settings.prefill.threads if role is Role.PREFILL else self.settings.decode.threads
            for role in self.roles
        ]
        return max(wishes) or self.cores or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class EngineStarted:
    """An engine that takes orders: what it is, and where its start-up time went (name, seconds)."""

    info: EngineInfo
    timeline: tuple[tuple[str, float], ...]
