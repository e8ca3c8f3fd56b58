"""What an engine is told at birth and what it reports when it is ready. Crosses Ray by pickle; no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from diptych.cluster.config import ModelSettings
from diptych.cluster.models import ModelFacts
from diptych.kvtransfer.layout import KvLayout
from diptych.protos.errors import StartupError
from diptych.protos.settings import TransferSettings
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """Everything that `compose` needs. `dtype` is decided (never auto); paths are absolute."""

    engine_id: EngineId
    epoch: int
    roles: frozenset[Role]
    model: str
    settings: ModelSettings
    transfer: TransferSettings
    folder: Path
    facts: ModelFacts
    dtype: str
    run_dir: Path
    cores: int = 0  # this engine's share of the machine; 0: all that the process may use
    trace_file: Path | None = None
    degraded: tuple[str, ...] = ()

    @property
    def ref(self) -> EngineRef:
        """This life of the engine; the epoch in the socket's name keeps a dead life's socket out of the way."""
        return EngineRef(self.engine_id, self.epoch, f"unix:{self.run_dir / f'{self.engine_id}-{self.epoch}.sock'}")

    def num_blocks(self, layout: KvLayout) -> int:
        """Blocks that `kv.memory_mib` pays for. Raises StartupError when it is less than one."""
        blocks = (self.settings.kv.memory_mib << 20) // layout.bytes_per_block
        if blocks < 1:
            raise StartupError(
                f"models.{self.model}.kv.memory_mib: {self.settings.kv.memory_mib} MiB hold no single block of "
                f"{layout.bytes_per_block / 2**20:.1f} MiB; raise it"
            )
        return blocks

    def max_context_tokens(self, num_blocks: int) -> int:
        """Prompt and output together: what the model, the setting and the arena allow."""
        limits = [self.facts.max_context_tokens, num_blocks * self.settings.kv.block_tokens]
        if self.settings.max_context_tokens is not None:
            limits.append(self.settings.max_context_tokens)
        return min(limits)

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
