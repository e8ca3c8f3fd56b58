"""Launch tables: what is looked up, kept, and refused. Nothing here times or launches."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diptych.kernels.ops import configs
from diptych.kernels.ops.configs import LIBRARY, MEASURED, Config, choose, nearest, read_tuned, write_tuned
from diptych.kernels.ops.moe.cuda import DOWN_OP, UP_OP, fitting

SHARED_BYTES = 232_448  # of a block on an H100, H200 or B200
A, B = Config(16, 64, 128, 2, 4, 4), Config(32, 64, 64, 1, 8, 3)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a card that is not there; nothing of it is remembered afterwards."""
    path = tmp_path / "cache" / "card.json"
    monkeypatch.setattr(configs, "tuned_file", lambda: path)
    monkeypatch.setattr(configs, "_tuned", None)
    monkeypatch.setattr(configs, "_found", {})
    return path


def test_an_exact_row_is_taken_whatever_lies_near() -> None:
    for rows in MEASURED.values():
        for shape, config in rows.items():
            assert nearest(rows, shape) is config


def test_the_nearest_row_is_that_of_the_smallest_factors() -> None:
    rows = {(1, 4096): A, (64, 4096): B}
    assert nearest(rows, (4, 4096)) is A
    assert nearest(rows, (16, 4096)) is B
    assert nearest(rows, (1, 10**6)) is A
    assert nearest(rows, (0, 4096)) is A
    assert nearest({(2, 2): A, (8, 2): B}, (4, 2)) is A  # equally near: the first


@pytest.mark.parametrize("op", ["attend_rows", "attend_prompts", "attend_tiles"])
@pytest.mark.parametrize("item", [2, 4])
def test_the_tiles_of_every_head_size_fit_a_multiprocessor(op: str, item: int) -> None:
    """Queries and, of each stage, keys and values; compiled for sm_90 the kernels take this and 1 KiB."""
    for head in range(8, 257, 8):
        for rows in (1, 64, 512) if op == "attend_rows" else (None,):
            config = nearest(MEASURED[op], (head, item) if rows is None else (rows, head, item))
            wide = max(16, 1 << (head - 1).bit_length())
            assert item * wide * (config.block_m + 2 * config.stages * config.block_n) + 1024 <= SHARED_BYTES


@pytest.mark.parametrize("op", [UP_OP, DOWN_OP])
@pytest.mark.parametrize("item", [2, 4])
def test_the_tiles_of_experts_fit_a_multiprocessor(op: str, item: int) -> None:
    """Of each stage tokens and weights, gate's and up's; compiled for sm_90 the kernels take no more than this."""
    for load in (1, 16, 64, 100, 128, 256, 512, 3000, 4096, 8192, 10**6):
        config = fitting(op, (load, 1024, 2048), item)
        config = config._replace(block_m=fitting(UP_OP, (load, 1024, 2048), item).block_m)  # of both projections
        weights = (2 if op == UP_OP else 1) * config.block_n
        assert item * config.stages * config.block_k * (config.block_m + weights) <= SHARED_BYTES


@given(st.sampled_from(sorted(MEASURED)), st.data())
def test_every_shape_has_a_row(op: str, data: st.DataObject) -> None:
    size = len(next(iter(MEASURED[op])))
    shape = tuple(data.draw(st.lists(st.integers(0, 10**6), min_size=size, max_size=size)))
    assert nearest(MEASURED[op], shape) in MEASURED[op].values()


def test_a_shape_of_another_length_or_an_unknown_op_is_an_error(file: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        nearest({(1, 2): A}, (1, 2, 3))
    with pytest.raises(KeyError):
        choose("nonsense", (1,))


def test_rows_of_one_op_speak_of_the_same_sizes_and_can_be_launched() -> None:
    for op, rows in MEASURED.items():
        assert len({len(shape) for shape in rows}) == 1, op
        for config in rows.values():
            if config is not LIBRARY:
                assert config.warps in (1, 2, 4, 8, 16), (op, config)
                assert 1 <= config.stages <= 8, (op, config)
                assert all(size & (size - 1) == 0 for size in config[:3]), (op, config)


def test_what_was_tuned_goes_before_the_table_and_the_rest_stays(file: Path) -> None:
    shape = (1, 4096, 4096)
    assert choose("linear", shape) is MEASURED["linear"][shape]
    assert write_tuned({"linear": {shape: B}}) == file
    assert choose("linear", shape) == B
    assert choose("linear", (64, 4096, 4096)) is MEASURED["linear"][64, 4096, 4096]
    write_tuned({"linear": {(2, 2, 2): LIBRARY}, "other": {(3,): A}})
    assert choose("linear", shape) == B
    assert choose("linear", (2, 2, 2)) == LIBRARY
    assert choose("other", (3,)) == A
    assert list(file.parent.iterdir()) == [file]


def test_tuned_rows_of_shapes_that_were_looked_up_before_hold_from_then_on(file: Path) -> None:
    shape = (3, 1000, 1000)
    before = choose("linear", shape)
    write_tuned({"linear": {shape: Config(1, 2, 4, 1, 2, 3)}})
    assert choose("linear", shape) == Config(1, 2, 4, 1, 2, 3) != before


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"linear": 3}', '{"linear": [[[1, 2, 3], [1, 2]]]}', '{"linear": [[["a"], [1,2,3,4,5,6]]]}', "\0"],
)
def test_a_file_that_is_none_of_ours_is_told_and_not_used(
    file: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    file.parent.mkdir()
    file.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_tuned() == {}
    assert str(file) in caplog.text
    assert choose("linear", (1, 4096, 4096)) is MEASURED["linear"][1, 4096, 4096]
    write_tuned({"linear": {(1, 4096, 4096): B}})
    assert json.loads(file.read_text()) == {"linear": [[[1, 4096, 4096], list(B)]]}
    assert read_tuned() == {"linear": {(1, 4096, 4096): B}}


def test_a_library_row_stays_one_through_the_file(file: Path) -> None:
    """It is told by identity where a kernel is chosen."""
    write_tuned({"linear": {(5, 5, 5): LIBRARY}})
    assert choose("linear", (5, 5, 5)) is LIBRARY
