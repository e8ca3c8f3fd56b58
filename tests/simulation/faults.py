"""What goes wrong in a run, drawn from its seed: each kind is a function of the world and happens at its moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from network import Burst
from session import ROUTER

from diptych.protos.types import Role

if TYPE_CHECKING:
    from world import World


def kill(world: World) -> str:
    """kill -9 of an engine."""
    engine = world.rng.choice(world.members.current() or [None])
    if engine is None:
        return "nobody"
    engine.kill()
    world.members.died(engine)
    return engine.name


def stop(world: World) -> str:
    """SIGSTOP, and SIGCONT later: shorter or longer than anybody waits."""
    engine = world.rng.choice(world.members.current() or [None])
    if engine is None:
        return "nobody"
    seconds = world.rng.uniform(0.2, 5.0)
    engine.stop()
    world.members.hangs(engine)
    world.loop.call_later(seconds, engine.resume)
    return f"{engine.name} {seconds:.3f}"


def part(world: World) -> str:
    """A prefill and a decode engine, or the router and an engine, lose each other: both ways or one way only."""
    rng = world.rng
    pairs = [(p, d) for p in ("p0", "p1") for d in ("d0", "d1")] + [(ROUTER, e) for e in ("p0", "p1", "d0", "d1")]
    one, other = rng.choice(pairs)
    until = world.loop.time() + rng.choice((0.3, 1.0, 3.0, 6.0)) * rng.random()
    way = rng.choice(("both", "there", "back"))
    if way != "back":
        world.network.cut(one, other, until)
    if way != "there":
        world.network.cut(other, one, until)
    return f"{one} {other} {way}"


def cut_off(world: World) -> str:
    """The router loses all engines at once, both ways or one way: for longer or shorter than anybody waits."""
    rng = world.rng
    until = world.loop.time() + rng.choice((0.5, 1.5, 3.0, 6.0)) * rng.random()
    way = rng.choice(("both", "there", "back"))
    for name in ("p0", "p1", "d0", "d1"):
        if way != "back":
            world.network.cut(ROUTER, name, until)
        if way != "there":
            world.network.cut(name, ROUTER, until)
    return f"{way} {until:.3f}"


def stall(world: World) -> str:
    """Decode engines stand still one after another, too long for the router and not for the manager: none is dead."""
    rng, names = world.rng, []
    for turn in range(rng.randrange(1, 5)):
        at, seconds = turn * rng.uniform(1.0, 1.4), rng.uniform(1.02, 1.45)
        names.append(f"d{turn % 2} {at:.3f} {seconds:.3f}")
        world.loop.call_later(at, _stand, world, turn % 2, seconds)
    return ", ".join(names)


def _stand(world: World, number: int, seconds: float) -> None:
    for engine in world.members.current(Role.DECODE)[number : number + 1]:
        if not engine.is_stopped:
            engine.stop()
            world.loop.call_later(seconds, engine.resume)


def burst(world: World) -> str:
    """Single messages of the hinge are lost, doubled, overtaken."""
    rng = world.rng
    until = world.loop.time() + rng.uniform(0.1, 1.5)
    world.network.burst = Burst(until, rng.choice((0.0, 0.05, 0.2)), rng.choice((0.0, 0.3)), rng.choice((0.0, 0.3)))
    return f"{until:.3f}"


def flip(world: World) -> str:
    """Bits of staged chunks change."""
    count = world.rng.randrange(1, 6)
    world.flip(count)
    return str(count)


def hang_up(world: World) -> str:
    """One end of a hinge channel closes it; the other learns of it later, and may read on."""
    engine = world.rng.choice(world.members.current() or [None])
    return "nobody" if engine is None else f"{engine.name} {engine.lose_channel()}"


def break_session(world: World) -> str:
    """An engine gives a router's stream up."""
    engine = world.rng.choice(world.members.current() or [None])
    if engine is None:
        return "nobody"
    engine.routes.break_one()
    return engine.name


def drain(world: World) -> str:
    """Scale down, with more or less time; another engine takes the place."""
    role = world.rng.choice((Role.PREFILL, Role.DECODE))
    engines = world.members.current(role)
    if len(engines) < 2:
        return "nobody"
    engine = world.rng.choice(engines)
    world.members.dismiss(engine, world.rng.choice((0.0, 0.2, 5.0)))
    return engine.name


def step_fault(world: World) -> str:
    """The next step of an engine raises."""
    engine = world.rng.choice(world.members.current() or [None])
    if engine is None:
        return "nobody"
    engine.runner.fault = True
    return engine.name


def restart_manager(world: World) -> str:
    """The directory is away for a while."""
    world.members.restart_manager(world.rng.uniform(0.1, 3.0))
    return ""


KINDS: tuple[Callable[[World], str], ...] = (
    kill,
    kill,
    stop,
    part,
    part,
    cut_off,
    stall,
    burst,
    burst,
    flip,
    hang_up,
    break_session,
    drain,
    step_fault,
    step_fault,
    restart_manager,
)


def plan(world: World, count: int, span_s: float) -> float:
    """`count` faults or a few more, while the requests are on their way; the moment of the last one."""
    rng, last = world.rng, 0.0
    for _ in range(count + rng.randrange(3)):
        handle = world.loop.call_later(rng.uniform(0.0, span_s + 0.5), _strike, world, rng.choice(KINDS))
        last = max(last, handle.when())
    return last


def _strike(world: World, kind: Callable[[World], str]) -> None:
    detail = kind(world)
    while detail == "nobody":  # is there to be struck by this one
        kind = world.rng.choice((part, burst, flip))
        detail = kind(world)
    world.counters[f"fault {kind.__name__}"] += 1
    world.note(None, "fault", kind.__name__, detail)
