"""Who is a member of the cluster: pure accounting of engines, their lives (epochs) and states. manager_actor.py is its
Ray shell.

starting --ready--> ready --drain--> draining --left--> forgotten
    `------------------`-----------------`-----dead--> dead
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Protocol

from diptych.protos.errors import Fenced
from diptych.protos.status import EngineInfo
from diptych.protos.types import EngineId, EngineRef, Role

from .plan import engine_name

_COUNTER_KEY = "epoch"
_MEMBERS_KEY = "members"
# Versions of one life of the manager start above all those of the lives before it.
_VERSIONS_PER_LIFE = 1 << 32


class KeyValue(Protocol):
    """A store that outlives the manager."""

    def get(self, key: str) -> bytes | None:
        """The value, or None."""

    def put(self, key: str, value: bytes) -> None:
        """Durable when it returns."""


class EngineState(StrEnum):
    """Where an engine's life stands."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


VISIBLE = (EngineState.READY, EngineState.DRAINING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One life of one engine. `info` is there from `ready` on; `reason` says why it is dead.

    `has_been` are the roles that it ever had, those of its birth first: what a role uses stays in use.
    """

    engine_id: EngineId
    epoch: int
    roles: frozenset[Role]
    model: str
    state: EngineState
    info: EngineInfo | None = None
    reason: str = ""
    has_been: tuple[Role, ...] = ()


class PoolManager:
    """Members by engine id. A report about another life than the present one raises Fenced and changes nothing."""

    def __init__(self, store: KeyValue) -> None:
        self._store = store
        self._members: dict[EngineId, Member] = {}
        for raw in json.loads(store.get(_MEMBERS_KEY) or b"[]"):
            member = _member_from_json(raw)
            self._members[member.engine_id] = member
        self._version = self._mint() * _VERSIONS_PER_LIFE

    @property
    def version(self) -> int:
        """Grows with every change that a router can see."""
        return self._version

    def members(self) -> list[Member]:
        """All known engines, the dead ones included."""
        return list(self._members.values())

    def engines(self) -> list[EngineInfo]:
        """What routers see: the engines that take new requests, and those that are draining, marked so."""
        return [
            replace(m.info, draining=m.state is EngineState.DRAINING)
            for m in self._members.values()
            if m.state in VISIBLE and m.info is not None
        ]

    def free_id(self, role: Role) -> EngineId:
        """The first name that no living engine has."""
        taken = {m.engine_id for m in self._members.values() if m.state is not EngineState.DEAD}
        return next(name for n in itertools.count() if (name := engine_name(role, n)) not in taken)

    def register(self, engine_id: EngineId, roles: Iterable[Role], model: str) -> int:
        """A new life of an engine begins; the epoch that it must carry. The life before is over."""
        epoch, has_been = self._mint(), tuple(sorted(set(roles)))
        member = Member(
            engine_id=engine_id,
            epoch=epoch,
            roles=frozenset(has_been),
            model=model,
            state=EngineState.STARTING,
            has_been=has_been,
        )
        self._replace(member)
        return epoch

    def report_ready(self, info: EngineInfo) -> None:
        """The engine takes orders."""
        member = self._living(info.ref.engine_id, info.ref.epoch)
        if member.state is not EngineState.STARTING:
            raise Fenced(f"engine {member.engine_id} is {member.state} and cannot become ready")
        self._replace(replace(member, state=EngineState.READY, info=info))

    def report_draining(self, engine_id: EngineId, epoch: int) -> None:
        """The engine takes no new requests. Repeating it changes nothing."""
        member = self._living(engine_id, epoch)
        if member.state is not EngineState.DRAINING:
            self._replace(replace(member, state=EngineState.DRAINING))

    def report_roles(self, info: EngineInfo) -> None:
        """A draining engine takes orders again, of the roles in `info`."""
        member = self._living(info.ref.engine_id, info.ref.epoch)
        has_been = (*member.has_been, *sorted(info.roles - set(member.has_been)))
        self._replace(replace(member, state=EngineState.READY, roles=info.roles, info=info, has_been=has_been))

    def report_dead(self, engine_id: EngineId, epoch: int, reason: str) -> bool:
        """This life is over. False: that was known, or another life has begun since; nothing changes."""
        member = self._members.get(engine_id)
        if member is None or member.epoch != epoch or member.state is EngineState.DEAD:
            return False
        self._replace(replace(member, state=EngineState.DEAD, reason=reason))
        return True

    def report_left(self, engine_id: EngineId, epoch: int) -> None:
        """The engine ended because it was asked to; it is forgotten. About another life: nothing changes."""
        member = self._members.get(engine_id)
        if member is not None and member.epoch == epoch:
            del self._members[engine_id]
            self._changed(member.state)

    def _living(self, engine_id: EngineId, epoch: int) -> Member:
        member = self._members.get(engine_id)
        if member is None or member.epoch != epoch or member.state is EngineState.DEAD:
            present = "unknown" if member is None else f"{member.state} in epoch {member.epoch}"
            raise Fenced(f"engine {engine_id} is {present}; the report is about epoch {epoch}")
        return member

    def _replace(self, member: Member) -> None:
        before = self._members.get(member.engine_id)
        self._members[member.engine_id] = member
        self._changed(member.state, *(() if before is None else (before.state,)))

    def _changed(self, *states: EngineState) -> None:
        self._store.put(_MEMBERS_KEY, json.dumps([_member_to_json(m) for m in self._members.values()]).encode())
        if any(state in VISIBLE for state in states):
            self._version += 1

    def _mint(self) -> int:
        """The next number of the one counter that epochs and lives of the manager share. Stored before it is used."""
        number = int(self._store.get(_COUNTER_KEY) or b"0") + 1
        self._store.put(_COUNTER_KEY, str(number).encode())
        return number


def _member_to_json(member: Member) -> dict[str, Any]:
    raw = asdict(member)
    raw["roles"] = sorted(member.roles)
    if member.info is not None:
        raw["info"]["roles"] = sorted(member.info.roles)
    return raw


def _member_from_json(raw: dict[str, Any]) -> Member:
    info = raw["info"]
    if info is not None:
        ref = EngineRef(**info["ref"])
        roles = frozenset(map(Role, info["roles"]))
        info = EngineInfo(**(info | {"ref": ref, "roles": roles, "degraded": tuple(info["degraded"])}))
    roles, has_been = frozenset(map(Role, raw["roles"])), tuple(map(Role, raw["has_been"]))
    return Member(**(raw | {"roles": roles, "has_been": has_been, "state": EngineState(raw["state"]), "info": info}))
