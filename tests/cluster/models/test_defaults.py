"""What generation_config.json gives to requests that say nothing, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diptych.cluster.models import NO_DEFAULTS, SamplingDefaults
from diptych.cluster.models.facts import read_facts
from diptych.protos.errors import StartupError


def defaults(folder: Path, **config: Any) -> SamplingDefaults:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return read_facts(folder, "tiny").defaults


def test_without_the_file_there_are_none(folder: Path) -> None:
    assert read_facts(folder, "tiny").defaults == NO_DEFAULTS
    assert NO_DEFAULTS.given() == {}


def test_sampling_values_are_taken_and_other_keys_are_named(folder: Path) -> None:
    found = defaults(
        folder,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        min_p=0,
        repetition_penalty=1.05,
        eos_token_id=[2, 3],
        transformers_version="4.51.0",
        max_new_tokens=2048,
        num_beams=4,
        guidance_scale=None,
    )
    assert found.given() == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0, "repetition_penalty": 1.05}
    assert found.ignored == ("max_new_tokens", "num_beams")
    assert read_facts(folder, "tiny").eos_token_ids == (2, 3)


def test_a_model_that_does_not_sample_is_greedy_by_default(folder: Path) -> None:
    assert defaults(folder, do_sample=False, temperature=0.7).given() == {"temperature": 0.0}
    assert defaults(folder, do_sample=True).given() == {}


def test_top_k_minus_one_keeps_every_token(folder: Path) -> None:
    assert defaults(folder, top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 20.0),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("do_sample", "no"),
    ],
)
def test_a_value_that_no_request_could_have_is_refused_by_file_and_key(folder: Path, key: str, value: Any) -> None:
    with pytest.raises(StartupError, match=rf"generation_config\.json: {key} is"):
        defaults(folder, **{key: value})
