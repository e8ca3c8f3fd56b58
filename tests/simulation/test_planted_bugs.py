"""Twelve bugs, planted one after the other: the simulation finds each by its name, and nothing without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import engine
import planted
import pytest
from world import run

from diptych.protos.types import Role

MOST_SEEDS = 200
# bug, by which name it is caught, a seed that is known to catch it
CAUGHT: list[tuple[Callable[[Any], None], str, int]] = [
    (planted.a_reference_is_not_lowered_on_abort, "i5", 1),
    (planted.a_block_is_freed_while_a_copy_may_write, "write_after_free", 8),
    (planted.the_sweep_stops_after_the_first_expiry, "i5", 19),
    (planted.a_second_completion_frees_again, "i1", 0),
    (planted.the_salt_is_missing_from_the_root, "tenant_hit", 0),
    (planted.a_late_completion_is_accepted, "write_after_free", 6),
    (planted.a_retried_call_allocates_twice, "i5", 0),
    (planted.a_torn_slot_is_accepted, "i3", 1),
    (planted.an_old_epoch_is_accepted, "i6", 8),
    (planted.a_grant_per_chunk_fills_the_pool, "no_progress", 0),
    (planted.a_block_is_named_before_its_commit, "i3", 0),
    (planted.a_moved_request_repeats_a_token, "i4", 0),
    (planted.silence_convicts, "i7", 13),
    (planted.silence_uses_up_the_moves, "i7", 13),
    (planted.a_step_that_raises_is_the_answer, "i7", 2),
]


@pytest.mark.parametrize(("bug", "name", "first"), CAUGHT, ids=[bug.__name__ for bug, _, _ in CAUGHT])
def test_a_planted_bug_is_caught_by_its_name(
    bug: Callable[[Any], None], name: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(first, first + MOST_SEEDS):
        with monkeypatch.context() as patch:
            bug(patch)
            found = run(seed).violation
        if found is not None and found.name == name:
            break
        assert found is None or bug is planted.a_retried_call_allocates_twice, f"seed {seed}: {found}"
    else:
        pytest.fail(f"{MOST_SEEDS} seeds did not find it")
    assert run(seed).violation is None, "the seed fails without the bug too"


def test_the_small_pool_alone_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.SHAPES, Role.PREFILL, planted.SMALL_POOL)
    for seed in range(4):
        assert run(seed).violation is None
