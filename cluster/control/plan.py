"""What a cluster shall be: one template per pool, made from the configuration, and the checks that need no process.

Used by `diptych serve` and by Serve deployments alike, before anything is started.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diptych.cluster.config import DiptychConfig, ModelSettings
from diptych.cluster.engine.spec import EngineSpec, check_cpu
from diptych.cluster.models import ModelFolder
from diptych.cluster.tasks import settle_tasks, text_facts
from diptych.protos.echo import ECHO
from diptych.protos.errors import StartupError
from diptych.protos.types import EngineId, Role

from . import cards, host
from .restarts import RestartTerms

NO_BFLOAT16 = "float32 instead of bfloat16: this CPU has no native bfloat16"
NO_SHM_OFF_UNIX = "KV crosses over gRPC instead of shared memory: engines.host is set"
PLAINTEXT = "prompts and KV leave this machine unencrypted: security.allow_plaintext is on"
FAULTS = "faults are injected: faults has rules or names a file"
NO_SHM = "KV crosses over gRPC instead of shared memory: transfer.transport is grpc"
NO_CARD = "computed on the CPU although this machine has a card: "
_SHARES = 10_000  # Ray's smallest part of a card


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


def plan_cluster(
    config: DiptychConfig, folders: Mapping[str, ModelFolder], run_dir: Path, *, present: cards.Cards | None = None
) -> ClusterPlan:
    """`folders` by model name; sockets go to `run_dir`. Raises StartupError when a model cannot be what is asked.

    `present`: cards of the machine that the engines will be on; None: this one's.
    """
    config = settle_tasks(config, folders)
    for name, settings in config.models.items():
        wanted, room = settings.max_context_tokens, folders[name].facts.max_context_tokens
        if wanted is not None and wanted > room:
            raise StartupError(
                f"models.{name}.max_context_tokens is {wanted}, and this model has {room} positions; "
                "lower it, or leave it out for all of them"
            )
    present = cards.find() if present is None else present
    models = _on_devices(config.models, present)
    pools = tuple(
        Pool(template=_template(config, name, settings, folders[name], run_dir, role), engines=engines)
        for name, settings in models.items()
        for role, engines in settings.pools().items()
    )
    for pool in pools:
        if pool.template.device == "cpu":
            check_cpu(pool.template)
    if present.is_hidden:
        reason = NO_CARD + present.why_none
        pools = tuple(
            _with_reason(pool, reason) if config.models[pool.model].device == "auto" else pool for pool in pools
        )
    engines = config.engines
    return ClusterPlan(
        pools=pools,
        start_timeout_s=config.ray.engine_timeout_s,
        drain_grace_s=config.router.drain_grace_s,
        silence_s=engines.silence_s,
        restarts=RestartTerms(enabled=engines.restart, limit=engines.max_restarts, backoff_s=engines.restart_backoff_s),
    )


def _with_reason(pool: Pool, reason: str) -> Pool:
    """An echo computes nothing that a card could."""
    if pool.template.settings.source == ECHO:
        return pool
    return replace(pool, template=replace(pool.template, degraded=(reason, *pool.template.degraded)))


def num_gpus(specs: Sequence[EngineSpec]) -> float:
    """Cards that these engines take together."""
    return sum(spec.gpu_share for spec in specs if spec.device == "cuda")


def _on_devices(models: Mapping[str, ModelSettings], present: cards.Cards) -> dict[str, ModelSettings]:
    """With the device and the part of a card decided. Raises StartupError where there are too few cards."""
    decided = {}
    for name, settings in models.items():
        device = settings.device
        if device == "auto":
            device = "cuda" if present.count and settings.source != ECHO else "cpu"
        elif device == "cuda" and not present.count:
            raise StartupError(
                f"models.{name}.device is cuda, and there is no card to compute on: {present.why_none}. "
                "`diptych doctor` tells more; device: cpu computes without"
            )
        decided[name] = settings.model_copy(update={"device": device})
    on_cards = {name: settings for name, settings in decided.items() if settings.device == "cuda"}
    share = _equal_share(on_cards, present.count)
    for name, settings in on_cards.items():
        decided[name] = settings.model_copy(update={"gpu_share": settings.gpu_share or share})
    return decided


def _equal_share(models: Mapping[str, ModelSettings], count: int) -> float:
    """Of engines whose configuration names none: a whole card, or parts of which as many fit on each as must."""
    named = sum(settings.gpu_share * _num_engines(settings) for settings in models.values() if settings.gpu_share)
    others = sum(_num_engines(settings) for settings in models.values() if not settings.gpu_share)
    left = count - named
    if left < -0.5 / _SHARES or (others and left * _SHARES < others):
        raise StartupError(
            f"the engines of {', '.join(models)} share {count} card{'s' if count != 1 else ''}, and those with a "
            f"gpu_share take {named:g} of that{f', which leaves nothing for {others} more' if left >= 0 else ''}; "
            "lower models.NAME.gpu_share, or use fewer engines"
        )
    shares = [share for one in models.values() if (share := one.gpu_share) for _ in range(_num_engines(one))]
    if not _fit(shares, count):
        raise StartupError(
            f"the parts of {', '.join(f'{share:g}' for share in shares)} that models.NAME.gpu_share gives engines do "
            f"not fit on {count} cards: each lies on one card; lower one, or use fewer engines"
        )
    if not others:
        return 1.0
    most = math.floor(_SHARES / -(-others // math.floor(left)) if left >= 1 else _SHARES * left / others)
    while most > 1 and not _fit([*shares, *[most / _SHARES] * others], count):
        most -= 1
    return most / _SHARES


def _fit(shares: Sequence[float], count: int) -> bool:
    """Whether so many cards hold these parts of one, the largest placed first."""
    left = [1.0] * count
    for share in sorted(shares, reverse=True):
        at = next((at for at, rest in enumerate(left) if share <= rest + 0.5 / _SHARES), None)
        if at is None:
            return False
        left[at] -= share
    return True


def _num_engines(settings: ModelSettings) -> int:
    return sum(settings.pools().values())


def cores_per_engine(num_engines: int) -> int:
    """A fair share of the cores that this process may use.

    More threads than cores is far slower than one thread each: OpenMP's spinning threads wait for descheduled ones.
    """
    return max(1, len(os.sched_getaffinity(0)) // max(num_engines, 1))


def choose_dtype(settings: ModelSettings, device: str) -> tuple[str, tuple[str, ...]]:
    """What auto means on that device, and what it costs. Vectors are compared with those of other days and programs."""
    if settings.dtype != "auto":
        return settings.dtype, ()
    if Role.EMBED in settings.pools():
        return "float32", ()
    if device == "cuda" or host.has_native_bfloat16():
        return "bfloat16", ()
    return "float32", (NO_BFLOAT16,)


def _template(
    config: DiptychConfig,
    name: str,
    settings: ModelSettings,
    folder: ModelFolder,
    run_dir: Path,
    role: Role,
) -> EngineSpec:
    dtype, costs = choose_dtype(settings, settings.device)
    degraded = list(costs)
    if settings.layout == "disaggregated" and role is not Role.EMBED:
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
        text=text_facts(name, settings, folder),
        dtype=dtype,
        run_dir=run_dir,
        host=config.engines.host,
        security=config.security,
        trace_file=config.telemetry.trace_file,
        degraded=tuple(degraded),
        faults=config.faults,
        step_stall_s=config.engines.step_stall_s,
    )
