"""A card's memory: KV gets what is left, and a model that does not fit is told what is missing and what would fit."""

from __future__ import annotations

import pytest

from diptych.kernels.device.memory_plan import GIB, DevicePlan, StepNeeds, plan_after_loading, plan_before_loading

BLOCK = (2 << 20, 16)  # llama-8b's
NEEDS = StepNeeds(step_tokens=8192, max_rows=512, vocab_size=128256, widest=57344, item_bytes=2)


def plan(free_gib: float, wanted_gib: float | None = None, weights: int = 15 * GIB) -> DevicePlan:
    wanted = None if wanted_gib is None else int(wanted_gib * GIB)
    return plan_before_loading(weights, GIB // 4, needs=NEEDS, free=int(free_gib * GIB), block=BLOCK, wanted_kv=wanted)


def test_kv_gets_all_that_is_left_but_the_spare_block_and_the_reserve() -> None:
    found = plan(139)
    left = 139 * GIB - found.used
    assert 0 <= left - (found.num_blocks + 1) * BLOCK[0] < BLOCK[0]
    assert found.used > 15 * GIB + GIB + NEEDS.activations + NEEDS.logits
    assert found.missing(131_072) < 0
    assert f"KV of {found.num_blocks * 16:,} tokens" in found.table()


def test_a_configured_size_is_kept_where_it_fits() -> None:
    assert plan(139, 2).num_blocks == 1024
    assert plan(139, 2).missing(8192) < 0


def test_the_parts_of_the_table_add_up_to_what_is_free() -> None:
    *parts, total = plan(100).table().splitlines()[1:]
    sizes = [float(line[36:46]) for line in parts]
    assert sum(sizes) == pytest.approx(float(total[36:46]), abs=0.06)
    assert float(total[36:46]) == pytest.approx(100, abs=0.01)


@pytest.mark.parametrize(("free", "wanted"), [(18.0, None), (20.0, 40.0), (139.0, 139.0)])
def test_what_does_not_fit_is_refused_with_what_is_missing_and_what_would_fit(
    free: float, wanted: float | None
) -> None:
    found = plan(free, wanted)
    assert found.missing(8192) > 0
    message = str(found.refusal(8192, ["this (so much)", "that"]))
    assert f"{found.missing(8192) / GIB:.2f} GiB are missing" in message
    assert f"{free:.2f} GiB are free; would fit: this (so much), or that." in message
    assert found.table() in message
    assert "choose a smaller model" in str(found.refusal(8192, []))


def test_room_is_what_could_be_had_whatever_is_wanted() -> None:
    assert plan(139, 2).room == plan(139).room == plan(139).num_blocks
    assert plan(10).room < 0


def test_just_enough_is_enough_and_a_byte_less_is_not() -> None:
    used = plan(100).used
    needed = used + 8192 * BLOCK[0] // 16 + 2 * BLOCK[0]

    def with_free(free: int) -> DevicePlan:
        return plan_before_loading(15 * GIB, GIB // 4, needs=NEEDS, free=free, block=BLOCK, wanted_kv=None)

    assert with_free(needed).missing(8192) == 0
    assert with_free(needed).num_blocks * 16 >= 8192
    assert with_free(needed - 1).missing(8192) == 1


def test_the_plan_after_loading_knows_what_the_largest_step_took() -> None:
    found = plan_after_loading(15 * GIB, 2 * GIB, free=139 * GIB, block=BLOCK, wanted_kv=None)
    more = plan_after_loading(15 * GIB, 3 * GIB, free=139 * GIB, block=BLOCK, wanted_kv=None)
    assert found.num_blocks - more.num_blocks == GIB // BLOCK[0]
