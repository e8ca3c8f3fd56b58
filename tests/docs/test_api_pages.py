"""docs/api-fields.md and docs/limits.md are what `make docs` would write now."""

from __future__ import annotations

import pytest
from api_pages import DOCS, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_the_api_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), "run `make docs`"
