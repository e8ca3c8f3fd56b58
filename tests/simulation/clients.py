"""What clients ask in a run, what they do while they read, and what they must have got in the end."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import invariants
from invariants import Violation
from runner import POISON_SEED, STOP_TOKEN, answer_of

from diptych.cluster.router.call import GenerateCall
from diptych.cluster.router.placement import Placement
from diptych.protos.errors import DiptychError, EngineFault, EngineLost, Fenced, NoBlocks, Overloaded, Quarantined
from diptych.protos.types import FinishReason, Role, SamplingParams

if TYPE_CHECKING:
    from world import World

MODEL = "echo"
LATE_S = 0.25  # so long after its deadline a call must have ended
MAX_TOKENS = 12
MOST_FELLED = 4  # by one request: its first attempt has a fallback on the decode engine, then three are enough
LIMIT = 2  # router.migration_limit
GIVEN_UP = frozenset({EngineLost.code, EngineFault.code, Fenced.code})


@dataclass(slots=True)
class Client:
    """One call. `cancel_at` and `stop_at` count tokens received."""

    name: str
    starts_at: float
    prompt: tuple[int, ...]
    max_tokens: int
    stop: bool
    tenant: str
    timeout_s: float | None = None
    cancel_after_s: float | None = None
    cancel_at: int | None = None
    stop_at: int | None = None
    is_poison: bool = False  # every step that samples for it raises, or kills its engine
    siblings: list[Client] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    outcome: str = ""

    def call(self, pin: Placement | None) -> GenerateCall:
        """In the router's words."""
        sampling = SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0,
            seed=POISON_SEED if self.is_poison else 0,
            stop_token_ids=frozenset({STOP_TOKEN} if self.stop else ()),
        )
        return GenerateCall(
            model=MODEL,
            prompt=self.prompt,
            sampling=sampling,
            salt=self.tenant.encode(),
            tenant=self.tenant,
            timeout_s=self.timeout_s,
            traceparent=self.name,
            pin=pin,
        )


def draw(rng: random.Random, requests: int, span_s: float) -> list[Client]:
    """Two tenants, three families of prompts with shared beginnings; some are cancelled, some late, some siblings. In
    one run of six there is a poisonous one on top.
    """
    families = [[rng.randrange(40) for _ in range(rng.choice((4, 8, 12)))] for _ in range(3)]
    clients: list[Client] = []
    count = 0
    while count < requests:
        prompt = (*rng.choice(families), *(rng.randrange(40) for _ in range(rng.randrange(0, 12))))
        first = _one(rng, f"c{count}", rng.uniform(0, span_s), prompt)
        count += 1
        for _ in range(rng.choice((0, 0, 0, 0, 1, 2))):
            other = _one(rng, f"c{count}", 0.0, prompt)
            other.tenant = first.tenant
            first.siblings.append(other)
            count += 1
        clients.append(first)
    if rng.random() < 1 / 6:
        prompt = (*rng.choice(families), *(rng.randrange(40) for _ in range(4)))
        clients.append(Client("poison", rng.uniform(0, span_s), prompt, 6, False, "", is_poison=True))
    return clients


def _one(rng: random.Random, name: str, starts_at: float, prompt: tuple[int, ...]) -> Client:
    client = Client(
        name, starts_at, prompt, rng.randrange(1, MAX_TOKENS + 1), rng.random() < 0.5, rng.choice(("", "other"))
    )
    draw = rng.random()
    if draw < 0.05:
        client.timeout_s = rng.uniform(0.01, 0.6)
    elif draw < 0.13:
        client.cancel_at = rng.randrange(0, client.max_tokens + 1)
    elif draw < 0.20:
        client.cancel_after_s = rng.uniform(0.0, 0.8)
    elif draw < 0.25:
        client.stop_at = rng.randrange(1, client.max_tokens + 1)
    return client


async def serve(world: World, client: Client, pin: Placement | None = None) -> None:
    """Call, read, end; check what came."""
    await asyncio.sleep(client.starts_at)
    began = world.loop.time()
    siblings: list[asyncio.Task[None]] = []
    try:
        reading = _read(world, client, pin, siblings)
        if client.cancel_after_s is None:
            await reading
        else:
            async with asyncio.timeout(client.cancel_after_s):
                await reading
    except TimeoutError:
        client.outcome = "cancelled"
    except DiptychError as error:
        client.outcome = error.code
        world.note(None, client.name, None, error)
        _check_failure(world, client, error)
    except Violation as wrong:
        world.violated(wrong)
    took = world.loop.time() - began
    world.note(None, client.name, None, f"{client.outcome} {client.tokens}")
    if client.timeout_s is not None and took > client.timeout_s + LATE_S:
        world.violated(Violation("i7", f"{client.name} took {took:.3f} s with a deadline of {client.timeout_s:.3f}"))
    if client.outcome == "done":
        _check_whole(world, client)
    if client.is_poison:
        _check_poison(world, client)
    world.ended(client)
    for task in siblings or [asyncio.ensure_future(serve(world, one)) for one in client.siblings]:
        await task


async def _read(world: World, client: Client, pin: Placement | None, siblings: list[asyncio.Task[None]]) -> None:
    right = answer_of(client.prompt, max_tokens=client.max_tokens, stop=client.stop)
    async with aclosing(world.router.generate(client.call(pin))) as deltas:
        word: bool | None = None
        while True:
            delta = await deltas.asend(word)
            word = None
            if delta.finish is not None:
                client.outcome = "done" if client.stop_at is None else "stopped"
                if client.outcome == "done" and delta.finish.num_tokens != len(client.tokens):
                    raise Violation("i4", f"{client.name} got {len(client.tokens)} of {delta.finish.num_tokens} tokens")
                _check_reason(client, delta.finish.reason)
                return
            client.tokens += delta.tokens
            world.progress(client)
            if client.tokens != right[: len(client.tokens)]:
                raise Violation("i4", f"{client.name} got {client.tokens} instead of {right}")
            if not siblings and client.siblings:
                siblings += [asyncio.ensure_future(serve(world, one, delta.placement)) for one in client.siblings]
            if client.cancel_at is not None and len(client.tokens) >= client.cancel_at:
                client.outcome = "cancelled"
                return
            word = client.stop_at is not None and len(client.tokens) >= client.stop_at


def _check_failure(world: World, client: Client, error: DiptychError) -> None:
    """By a known code, and for a reason that the world knows of, too."""
    deaths, steps, odd = world.strikes_of(client.name)
    if error.code not in invariants.ALLOWED_CODES:
        world.violated(Violation("i7", f"{client.name} failed with {error.code}: {error}"))
    elif error.code == Quarantined.code:
        what = (client.prompt, client.max_tokens, client.stop)
        if what not in world.convicted and deaths + steps < 2:
            world.violated(
                Violation("i7", f"{client.name} is innocent and quarantined: {deaths} deaths, {steps} steps")
            )
        world.convicted.add(what)
        world.counters["quarantined by a coincidence"] += not client.is_poison
    elif error.code in GIVEN_UP and client.tokens and deaths + odd <= LIMIT and not world.is_hopeless:
        world.violated(Violation("i7", f"{client.name} was given up in its midst after {deaths} deaths: {error}"))


def _check_poison(world: World, client: Client) -> None:
    """It is convicted before it has cost much, as long as the router hears anybody and is heard."""
    world.counters[f"poison: {client.outcome}"] += 1
    # Engines that it does not harm may bring its tokens one by one, if others are in trouble each time it is moved.
    is_lucky = client.outcome == "done" and Role.PREFILL not in world.poison.roles
    deaths, _, odd = world.strikes_of(client.name)
    is_spent = deaths + odd > LIMIT  # more engines died under it, of whatever, than it may move
    is_refused = client.outcome in {Overloaded.code, NoBlocks.code}
    is_caught = client.outcome == Quarantined.code or is_refused or is_lucky or is_spent or world.is_hopeless
    # A silence that proves nothing costs another attempt, which may fell one more.
    most = MOST_FELLED + world.false_losses(client.name)
    if not is_caught or world.poison.num_felled > most:
        words = f"the poison ended with {client.outcome} and {world.poison.num_felled} engines or steps felled"
        world.violated(Violation("i7", words))


def _check_reason(client: Client, reason: FinishReason) -> None:
    if client.stop_at is None:
        stopped = client.stop and client.tokens[-1:] == [STOP_TOKEN]
        if reason is not (FinishReason.STOP if stopped else FinishReason.LENGTH):
            raise Violation("i4", f"{client.name} ended with {reason} after {client.tokens}")


def _check_whole(world: World, client: Client) -> None:
    right = answer_of(client.prompt, max_tokens=client.max_tokens, stop=client.stop)
    if client.tokens != right:
        world.violated(Violation("i4", f"{client.name} got {client.tokens} instead of {right}"))
