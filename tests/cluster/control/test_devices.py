"""What each engine computes on, which part of a card it asks Ray for, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from diptych.cluster.config import load_config
from diptych.cluster.control.cards import Card, Cards
from diptych.cluster.control.kept import keep, read_kept
from diptych.cluster.control.memory import CARD_PROCESS, MIB, plan_memory
from diptych.cluster.control.plan import NO_BFLOAT16, NO_CARD, ClusterPlan, num_gpus, plan_cluster
from diptych.cluster.control.testing import FACTS, FakeStore, World, plan
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder
from diptych.protos.errors import StartupError
from diptych.protos.types import Role


def specs(*overrides: str, num_cards: int = 1, names: tuple[str, ...] = ("m",)) -> list[EngineSpec]:
    return plan(*overrides, names=names, num_cards=num_cards).engines()


def colocated(name: str = "m", engines: int = 1) -> tuple[str, str]:
    return f"models.{name}.layout=colocated", f"models.{name}.decode.engines={engines}"


def test_auto_is_a_card_where_there_is_one_and_cpu_is_a_choice() -> None:
    assert {spec.device for spec in specs()} == {"cuda"}
    assert {spec.device for spec in specs(num_cards=0)} == {"cpu"}
    assert {spec.device for spec in specs("models.m.device=cpu")} == {"cpu"}


def test_echo_stays_on_the_cpu() -> None:
    folders = {"echo": ModelFolder(Path("/e"), FACTS)}
    config = load_config(None, ["models={echo: {source: echo}}"])
    hidden = Cards((), why_none="no compiler", is_hidden=True)
    for present in (Cards((Card("x"),)), hidden):
        engines = plan_cluster(config, folders, Path("/r"), present=present).engines()
        assert {spec.device for spec in engines} == {"cpu"}
        assert not any(NO_CARD in line for spec in engines for line in spec.degraded)


def test_sizes_are_those_of_the_device_over_all_roles_that_an_engine_can_take() -> None:
    [lone] = specs(*colocated())
    assert (lone.decode.max_running, lone.step_tokens, lone.kv_bytes) == (512, 8192, None)
    assert lone.max_slots == 512
    prefill, decode = specs(num_cards=0)
    assert (decode.decode.max_running, decode.step_tokens, decode.kv_bytes) == (64, 512, 512 * MIB)
    assert prefill.max_slots == decode.max_slots == 64 + 16, "either can become the other"
    [own] = specs(*colocated(), "models.m.kv.memory_mib=9", "models.m.decode.step_tokens=100")
    assert (own.kv_bytes, own.step_tokens) == (9 * MIB, 100)


def test_a_card_computes_in_bfloat16_whatever_the_cpu_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diptych.cluster.control.host.has_native_bfloat16", lambda: False)
    [spec] = specs(*colocated())
    assert (spec.dtype, spec.degraded) == ("bfloat16", ())
    [spec] = specs(*colocated(), num_cards=0)
    assert (spec.dtype, spec.degraded) == ("float32", (NO_BFLOAT16,))
    [spec] = specs(*colocated(), "models.m.dtype=float32")
    assert spec.dtype == "float32"


@pytest.mark.parametrize(
    ("engines", "num_cards", "share"),
    [(1, 1, 1.0), (1, 8, 1.0), (2, 1, 0.5), (3, 1, 0.3333), (3, 2, 0.5), (8, 8, 1.0), (9, 8, 0.5)],
)
def test_engines_get_whole_cards_or_parts_of_which_enough_fit_on_each(
    engines: int, num_cards: int, share: float
) -> None:
    found = specs(*colocated(engines=engines), num_cards=num_cards)
    assert {spec.gpu_share for spec in found} == {share}
    assert math.floor(1 / share + 1e-9) * num_cards >= engines, "Ray places them all"
    assert num_gpus(found) == pytest.approx(engines * share)


def test_two_pools_of_one_model_share_one_card() -> None:
    assert [spec.gpu_share for spec in specs()] == [0.5, 0.5]
    assert [spec.gpu_share for spec in specs("models.m.device=cpu", num_cards=1)] == [0.5, 0.5]
    assert num_gpus(specs("models.m.device=cpu", num_cards=1)) == 0


def test_a_configured_share_stays_and_others_get_what_it_leaves() -> None:
    overrides = ("models.a.gpu_share=0.7", *colocated("a"), *colocated("b"))
    big, small = specs(*overrides, names=("a", "b"))
    assert (big.gpu_share, small.gpu_share) == (0.7, 0.3)
    big, small = specs(*overrides, names=("a", "b"), num_cards=2)
    assert (big.gpu_share, small.gpu_share) == (0.7, 1.0)


def test_every_part_lies_on_one_card() -> None:
    shares = ("models.a.gpu_share=0.6", *colocated("a", engines=2), *colocated("b"))
    assert [spec.gpu_share for spec in specs(*shares, names=("a", "b"), num_cards=2)] == [0.6, 0.6, 0.4]
    three = ("models.a.gpu_share=0.6", *colocated("a", engines=3))
    with pytest.raises(StartupError, match=r"0\.6, 0\.6, 0\.6 that .* do not fit on 2 cards"):
        specs(*three, names=("a",), num_cards=2)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("models.a.gpu_share=0.6", "models.b.gpu_share=0.6"), "those with a gpu_share take 1.2 of that; lower"),
        (("models.a.gpu_share=1",), "take 1 of that, which leaves nothing for 1 more"),
    ],
)
def test_more_than_there_is_is_refused_with_the_numbers(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(StartupError) as refusal:
        specs(*overrides, *colocated("a"), *colocated("b"), names=("a", "b"))
    assert words in str(refusal.value)
    assert "share 1 card" in str(refusal.value)


def test_a_wanted_card_that_is_not_there_is_refused_with_the_reason() -> None:
    with pytest.raises(StartupError, match=r"models\.m\.device is cuda, and there is no card.*it is a test.*doctor"):
        specs("models.m.device=cuda", num_cards=0)


def test_a_card_that_cannot_be_used_is_told_where_nobody_asked_for_the_cpu() -> None:
    hidden = Cards((), why_none="the package triton is missing", is_hidden=True)
    folders = {name: ModelFolder(Path(f"/{name}"), dataclasses.replace(FACTS, name=name)) for name in "ab"}
    config = load_config(None, ["models={a: {source: /a}, b: {source: /b, device: cpu}}"])
    told = {
        spec.model: any(line == f"{NO_CARD}the package triton is missing" for line in spec.degraded)
        for spec in plan_cluster(config, folders, Path("/r"), present=hidden).engines()
    }
    assert told == {"a": True, "b": False}


def test_deterministic_needs_a_card() -> None:
    assert specs("models.m.deterministic=true")[0].settings.deterministic
    with pytest.raises(StartupError, match=r"models\.m\.deterministic: .* need a card"):
        specs("models.m.deterministic=true", num_cards=0)


def test_the_machines_plan_has_neither_weights_nor_kv_of_a_card() -> None:
    prefill, decode = specs()
    rows = plan_memory([prefill, decode], (10_000 * MIB, "free memory"), False).rows
    assert [(row.weights, row.arena, row.process) for row in rows[:2]] == [(0, 0, CARD_PROCESS)] * 2
    assert (rows[0].ring, rows[1].ring) == (64 * MIB, 0), "the ring is the machine's memory"
    with pytest.raises(StartupError, match="To change that serve a smaller model, use fewer engines") as refusal:
        plan_memory([prefill, decode], (1000 * MIB, "free memory"), False).check()
    assert "memory_mib" not in str(refusal.value)


def test_a_kept_plan_has_the_same_devices_and_shares() -> None:
    made = plan("models.m.decode.pace=throughput", num_cards=1)
    store = FakeStore()
    keep(store, ("me", made, made.pools))
    owner, kept, pools = read_kept(store)
    assert (owner, kept, pools) == ("me", made, made.pools)
    assert [pool.template.gpu_share for pool in pools] == [0.5, 0.5]


async def applied(made: ClusterPlan, gpus: float) -> World:
    world = World()
    world.gpus = gpus
    await world.pools.apply(made)
    assert not (await world.pools.settled()).failed
    return world


async def test_one_more_engine_is_refused_where_ray_has_no_card_left() -> None:
    world = await applied(plan(*colocated(), num_cards=1), 1.0)
    with pytest.raises(
        StartupError, match=r"not enough cards for 1 more engine of m: the present ones take 1 of the 1 that Ray has"
    ):
        await world.pools.scale("m", Role.DECODE, 2)
    assert len(world.made) == 1
    world.gpus = 2.0
    assert len((await world.pools.scale("m", Role.DECODE, 2)).started) == 1


async def test_parts_of_a_card_that_add_up_to_a_whole_fit() -> None:
    world = await applied(plan(*colocated(engines=3), num_cards=1), 1.0)
    assert len(world.made) == 3
    with pytest.raises(StartupError, match="not enough cards"):
        await world.pools.scale("m", Role.DECODE, 4)


async def test_without_a_second_card_another_plan_replaces_engines_one_after_the_other() -> None:
    world = await applied(plan(num_cards=1), 1.0)
    await world.pools.apply(plan("models.m.kv.memory_mib=64", num_cards=1))
    assert len((await world.pools.exchanged()).ended) == 2
    starts = [process.spec.engine_id for process in world.made]
    assert len(starts) == 4
    assert all("stop" in process.calls for process in world.made[:2])


async def test_the_only_engine_of_a_card_is_not_restarted_into_nothing() -> None:
    world = await applied(plan(*colocated(), num_cards=1), 1.0)
    done = await world.pools.restart()
    assert not done.ended
    assert "stays, it is the only one of its pool: not enough cards" in done.failed[0]


def test_what_ray_has_is_told_where_it_has_too_few_cards() -> None:
    from diptych.cluster.control.engines import check_gpus

    on_cards = specs(*colocated(engines=2), num_cards=2)
    check_gpus(on_cards, {"GPU": 2.0, "CPU": 1.0})
    check_gpus(specs(num_cards=0), {})
    check_gpus(specs(*colocated(engines=3)), {"GPU": 1.0})
    with pytest.raises(
        StartupError, match=r"take 2 GPUs of Ray, and it has 1 free \(it says: CPU 8, GPU 1\).*device: cpu"
    ):
        check_gpus(on_cards, {"GPU": 1.0, "CPU": 8.0, "memory": 9.0})
    with pytest.raises(StartupError, match=r"and it has 0 free \(it says: nothing\)"):
        check_gpus(on_cards, {})


def test_our_own_ray_is_given_the_cards_that_engines_ask_it_for() -> None:
    from diptych.cluster.config import RaySettings
    from diptych.cluster.control.launch import _command

    assert "--num-gpus=2" in _command(Path("/r"), RaySettings(), 2, {})
