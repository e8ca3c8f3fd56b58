"""The scripts that judge constrained answers and tell what they cost, in small.

Guards a judge that calls everything valid, figures of other tokens than those that were timed, a memory section whose
schemas are all the same one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import llguidance
import pytest

from diptych.cluster.api.prepared import Checks, Prepared
from diptych.cluster.api.testing import byte_level_tokenizer
from diptych.cluster.constraints import trial
from diptych.cluster.constraints.schema import judge
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.constraint import Constraint
from diptych.protos.errors import DiptychError
from diptych.protos.types import Finish, FinishReason, Role, TransferKey

TOKENIZER = byte_level_tokenizer()
END = TOKENIZER.token_to_id("<|im_end|>")
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
}


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    """The echo model's files; its words are a vocabulary like any other."""
    return resolve("echo", tmp_path)


@pytest.fixture
def maskbench(tmp_path: Path) -> Path:
    """A folder of files as MaskBench has them: one twice, one that is no schema, one that nothing matches."""
    folder = tmp_path / "maskbench"
    folder.mkdir()
    tests = [{"valid": True, "data": {"age": 7, "name": "Ada"}}, {"valid": False, "data": {}}]
    never = {"type": "integer", "minimum": 2, "maximum": 1}
    for name, schema in (("a", PERSON), ("b", PERSON), ("c", {"type": "strnig"}), ("d", never)):
        text = json.dumps({"schema": schema, "tests": tests if schema is PERSON else []})
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def options(folder: Path | None = None, **more: Any) -> argparse.Namespace:
    known = {"schemas": folder, "most": None, "only": ["masks"], "at_once": 3, "tokens": 12, "step_ms": 0.0}
    return argparse.Namespace(**known | {"repeats": 1, "unique": 6} | more)


def written(answers: ModuleType, text: str | bytes, reason: FinishReason = FinishReason.STOP) -> Any:
    data = text.encode() if isinstance(text, str) else text
    plain = llguidance.LLTokenizer(TOKENIZER.to_str())
    ids = plain.tokenize_bytes(data)
    finish = Finish(key=TransferKey(bytes(16)), role=Role.DECODE, reason=reason)
    return answers.Written(tokens=[*ids, *([END] if reason is FinishReason.STOP else [])], finish=finish)


@pytest.fixture
def judged(answers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Judges one text as an answer of a schema: the row that it counts in."""
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    judge_of = answers.Judge(tmp_path, frozenset({END}))

    def judged(schema: Any, text: str | bytes, reason: FinishReason = FinishReason.STOP, grammar: str = "") -> Any:
        monkeypatch.setitem(answers.SCHEMAS, "x", ("", schema))
        verdict = judge(schema)
        constraint = Constraint(grammar=grammar or trial.json_grammar(verdict.schema))
        prepared = Prepared(prompts=[(1,)], constraint=constraint, checks=Checks(content=schema))
        row = answers.Row(verdict.coverage)
        judge_of.judge(answers.Asked("x", prepared, written(answers, text, reason)), row)
        return row

    return judged


def test_fifty_schemas_that_can_be_followed_most_of_them_wholly(schemas: ModuleType) -> None:
    assert len(schemas.SCHEMAS) == 50
    partial = [name for name, (_, schema) in schemas.SCHEMAS.items() if judge(schema).coverage == "partial"]
    assert 1 <= len(partial) <= 5


def test_a_valid_answer_is_valid(judged: Any) -> None:
    row = judged(PERSON, '{"name": "Ada", "age": 7}')
    assert (row.finished, row.invalid, row.quoted) == (1, 0, [])


@pytest.mark.parametrize(
    "text", ['{"name": "Ada", "age": -7}', '{"name": "Ada"}', '{"name": "Ada", "age": 7', '{"age": 7, "name": "Ada"}']
)
def test_an_answer_that_its_grammar_or_its_schema_refuses_is_told(judged: Any, text: str) -> None:
    wide = trial.json_grammar({}) if '"age": -7' in text else ""
    row = judged(PERSON, text, grammar=wide)
    assert row.invalid
    assert row.quoted[0]["answer"] == text


def test_what_partial_coverage_lets_through_is_no_fault_of_the_engine(judged: Any) -> None:
    row = judged({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]")
    assert (row.coverage, row.faulty, row.invalid) == ("partial", 1, 0)


def test_of_a_name_that_occurs_twice_the_last_one_counts(judged: Any) -> None:
    row = judged({"type": "object"}, '{"a": 1, "a": 2}')
    assert (row.finished, row.faulty, row.disputed) == (1, 0, 0)


def test_what_was_cut_off_must_be_a_beginning_in_bytes(judged: Any) -> None:
    half = '{"name": "Zo\u00eb"'.encode()[:-2]  # ends inside a character
    assert judged(PERSON, half, FinishReason.LENGTH).invalid == 0
    row = judged(PERSON, '{"name": 7', FinishReason.LENGTH)
    assert (row.truncated, row.no_beginning, row.invalid) == (1, 1, 1)


def test_an_answer_that_failed_is_invalid(judged: Any) -> None:
    assert judged(PERSON, "{", FinishReason.ERROR).invalid == 1


def test_the_table_has_a_line_for_each_schema_and_their_sum(answers: ModuleType) -> None:
    rows = {"a": answers.Row("full", finished=2, tokens=10, forced=5), "b": answers.Row("partial", 1, 0, 1)}
    told = {name: {"coverage": row.coverage} | answers._told(row) for name, row in rows.items()}
    total = answers._told(answers._sum(list(rows.values())))
    lines = answers.table({"schemas": told, "total": total}).splitlines()
    assert lines[2] == "| a | 2 | 0 | 0 | 10 | 50 % |"
    assert "found by the check" in lines[3]
    assert lines[4].startswith("| **all** | 3 | 0 | 0 |")


def test_masks_follow_the_instances_in_the_schemas_order(
    costs: ModuleType, model: ModelFolder, maskbench: Path
) -> None:
    found = asyncio.run(costs.masks(model, options(maskbench)))
    counts = found["counts"]
    assert counts["schemas"] == 3  # one of the two that are equal
    assert counts["refused"] == 2
    assert (counts["instances"], counts["followed"]) == (1, 1)
    assert found["masks"] > 0
    assert found["wall_us"]["max"] >= found["fill_us"]["max"] > 0


@pytest.mark.parametrize("schema", [{"type": "integer"}, {"type": "object", "required": ["city"]}])
def test_an_instance_that_the_grammar_refuses_is_not_followed(
    costs: ModuleType, model: ModelFolder, schema: Any
) -> None:
    async def is_followed() -> bool:
        guides = costs.guides_of(model)
        request = costs.request_of(Constraint(grammar=trial.json_grammar(schema)), model.facts.eos_token_ids)
        try:
            return bool(costs.Follower(model).follow(await guides.open(request), '{"name": "Ada"}'))
        finally:
            guides.close()

    assert not asyncio.run(is_followed())


@pytest.mark.usefixtures("_home")
def test_guided_and_free_batches_have_the_same_tokens_and_forced_ones_are_told(costs: ModuleType) -> None:
    found = asyncio.run(costs.batch(options()))
    assert set(found) == {*costs.FORMS, "objects, none forced"}
    for told in found.values():
        assert told["free"]["steps"] >= told["guided"]["steps"] > 0
        assert "fill_ms" not in told["free"]
        assert told["guided"]["fill_ms"] > 0
    assert found["objects"]["guided"]["forced_share"] > 0.3
    assert found["objects, none forced"]["guided"]["forced_share"] == found["pattern"]["guided"]["forced_share"] == 0
    assert "target" in costs.table({"batch": found}, options())


def test_memory_is_read_after_schemas_that_all_differ(costs: ModuleType, model: ModelFolder, maskbench: Path) -> None:
    readings = iter(range(100))
    found = asyncio.run(costs.memory(model, options(maskbench, unique=10), lambda: float(next(readings))))
    assert list(found["resident_mib"]) == [0, 1, 2, 5, 8, 10]
    assert (found["followed"], found["refused"]) == (4, 6)  # of three schemas in turn two are refused
    known = [("a", PERSON, []), ("b", {"type": "integer", "$schema": "x"}, [7])]
    made = [json.dumps(one) for one in costs.unique_schemas(known, 10)]
    assert len(set(made)) == 10


@pytest.fixture
def _home(costs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("one_engine.CACHE", tmp_path)


def test_a_watched_guide_is_the_guide(engine: ModuleType) -> None:
    class Fixed:
        error: DiptychError | None = None

        def accept(self, position: int, token: int) -> tuple[int, ...]:
            return (8, 9) if position == 4 else ()

        def fill(self, position: int, mask: memoryview) -> None:
            mask[0] = 5

    watched, mask = engine.WatchedGuide(Fixed(), 4), bytearray(4)
    watched.fill(4, memoryview(mask))
    assert mask[0] == 5
    assert [watched.accept(position, 7) for position in (4, 5, 6, 7)] == [(8, 9), (), (), ()]
    assert watched.forced == [1, 2]
    assert (len(watched.fills), len(watched.accepts)) == (1, 2)
