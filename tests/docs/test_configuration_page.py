"""docs/configuration.md is what `make docs` would write now, and what it says of a key is so."""

from __future__ import annotations

import pytest
from configuration_page import PAGE, groups, render

from diptych.cluster.config import DEFAULT_MODEL, load_config
from diptych.protos.errors import StartupError

KEYS = [key for group in groups() for key in group.keys]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_a_key_takes_its_default_and_is_described(key) -> None:  # type: ignore[no-untyped-def]
    path = key.path.replace("models.NAME", f'models."{DEFAULT_MODEL}"').replace("NAME", "somebody")
    load_config(overrides=[f"{path}={key.default}"])
    with pytest.raises(StartupError, match="not a known key"):
        load_config(overrides=[f"{path}_=1"])
    assert key.meaning
