"""What a cluster shall be: one template per pool, made from the configuration, and the checks that need no process.

Used by `diptych serve` and by Serve deployments alike, before anything is started.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from diptych.cluster.config import DiptychConfig
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder
from diptych.protos.errors import StartupError
from diptych.protos.types import EngineId, Role

from . import host
from .restarts import RestartTerms

NO_BFLOAT16 = "float32 instead of bfloat16: this CPU has no native bfloat16"
NO_SHM_OFF_UNIX = "KV crosses over gRPC instead of shared memory: engines.host is set"
PLAINTEXT = "prompts and KV leave this machine unencrypted: security.allow_plaintext is on"
FAULTS = "faults are injected: faults has rules or names a file"
NO_SHM = "KV crosses over gRPC instead of shared memory: transfer.transport is grpc"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The engines of one role of one model. `template` lacks what differs: id, epoch, cores."""

    template: EngineSpec
    engines: int

    @property
    def model(self) -> str:
        """The model's name."""
        return self.template.model

    @property
    def role(self) -> Role:
        """The one role of these engines."""
        return next(iter(self.template.roles))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """All pools, how long their engines may take to start, to answer and to end, and what follows a death."""

    pools: tuple[Pool, ...]
    start_timeout_s: float
    drain_grace_s: float
    silence_s: float  # an engine that does not answer its manager this long is replaced
    restarts: RestartTerms

    def with_secret(self, secret_id: str) -> ClusterPlan:
        """The same for engines that hold that secret."""
        pools = (replace(pool, template=replace(pool.template, secret_id=secret_id)) for pool in self.pools)
        return replace(self, pools=tuple(pools))

    def engines(self) -> list[EngineSpec]:
        """Every engine of the plan with its id; ids are numbered over all models. Epochs come later."""
        count = dict.fromkeys(Role, 0)
        cores = cores_per_engine(sum(pool.engines for pool in self.pools))
        specs = []
        for pool in self.pools:
            for _ in range(pool.engines):
                name = engine_name(pool.role, count[pool.role])
                specs.append(replace(pool.template, engine_id=name, cores=cores))
                count[pool.role] += 1
        return specs


def engine_name(role: Role, number: int) -> EngineId:
    """The name of an engine, unique among those that live."""
    return EngineId(f"{role}-{number}")


def plan_cluster(config: DiptychConfig, folders: Mapping[str, ModelFolder], run_dir: Path) -> ClusterPlan:
    """`folders` by model name; sockets go to `run_dir`. Raises StartupError when a model cannot be what is asked."""
    for name, settings in config.models.items():
        wanted, room = settings.max_context_tokens, folders[name].facts.max_context_tokens
        if wanted is not None and wanted > room:
            raise StartupError(
                f"models.{name}.max_context_tokens is {wanted}, and this model has {room} positions; "
                "lower it, or leave it out for all of them"
            )
    pools = tuple(
        Pool(template=_template(config, name, folders[name], run_dir, role), engines=engines)
        for name, settings in config.models.items()
        for role, engines in settings.pools().items()
    )
    engines = config.engines
    return ClusterPlan(
        pools=pools,
        start_timeout_s=config.ray.engine_timeout_s,
        drain_grace_s=config.router.drain_grace_s,
        silence_s=engines.silence_s,
        restarts=RestartTerms(enabled=engines.restart, limit=engines.max_restarts, backoff_s=engines.restart_backoff_s),
    )


def cores_per_engine(num_engines: int) -> int:
    """A fair share of the cores that this process may use.

    More threads than cores is far slower than one thread each: OpenMP's spinning threads wait for descheduled ones.
    """
    return max(1, len(os.sched_getaffinity(0)) // max(num_engines, 1))


def _template(config: DiptychConfig, name: str, folder: ModelFolder, run_dir: Path, role: Role) -> EngineSpec:
    settings = config.models[name]
    degraded = []
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if host.has_native_bfloat16() else "float32"
        degraded += [NO_BFLOAT16] if dtype == "float32" else []
    if settings.layout == "disaggregated":
        degraded += [NO_SHM] if config.transfer.transport == "grpc" else []
        degraded += [NO_SHM_OFF_UNIX] if config.engines.host and config.transfer.transport == "auto" else []
    if config.engines.leaves_host and config.security.tls is None:
        degraded.append(PLAINTEXT)
    degraded += [FAULTS] if not config.faults.is_empty else []
    return EngineSpec(
        engine_id=EngineId(""),
        epoch=0,
        roles=frozenset({role}),
        # A certificate names one role, and an engine shows one certificate.
        more_roles=frozenset(settings.pools()) - {role} if config.security.tls is None else frozenset(),
        model=name,
        settings=settings.without_sizes(),
        transfer=config.transfer,
        folder=folder.path,
        facts=folder.facts,
        dtype=dtype,
        run_dir=run_dir,
        host=config.engines.host,
        security=config.security,
        trace_file=config.telemetry.trace_file,
        degraded=tuple(degraded),
        faults=config.faults,
        step_stall_s=config.engines.step_stall_s,
    )
