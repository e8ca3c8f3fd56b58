"""docs/configuration.md is what `make docs` would write now, and what it says of a key is so."""

from __future__ import annotations

import pytest
from configuration_page import PAGE, groups, render

from diptych.cluster.config import DEFAULT_MODEL, load_config
from diptych.protos.errors import StartupError

# What else a group needs to be one.
REQUIRED = {
    "gateway.routes.somebody": "targets: [pool/x]",
    "gateway.prices.lab/x": "input_per_mtok: 1, output_per_mtok: 1",
    "gateway.pools.somebody": "per_device_hour: 1",
    "gateway.budgets.somebody": "amount_usd: 1",
    "gateway.limits.somebody": "concurrency: 1, requests_per_minute: 1",
}
KEYS = [key for group in groups() for key in group.keys]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run `make docs`"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_a_key_takes_its_default_and_is_described(key) -> None:  # type: ignore[no-untyped-def]
    path = key.path.replace("models.NAME", f'models."{DEFAULT_MODEL}"').replace("prices.NAME", "prices.lab/x")
    path = path.replace("NAME", "somebody")
    around = [f"{group}={{{required}}}" for group, required in REQUIRED.items() if path.startswith(f"{group}.")]
    if key.default == "required":
        with pytest.raises(StartupError, match=f"{path} is missing"):
            load_config(overrides=[f"{path.rpartition('.')[0]}={{}}"])
    else:
        load_config(overrides=[*around, f"{path}={key.default}"])
    with pytest.raises(StartupError, match="not a known key"):
        load_config(overrides=[*around, f"{path}_=1"])
    assert key.meaning
