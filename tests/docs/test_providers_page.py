"""The providers' pages are what `make docs` would write now, name every provider and explain every word they use."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from providers_page import DOCS, FAMILIES, INDEX, MAKERS, pages

from diptych.cluster.config import load_config
from diptych.cluster.providers.registry import Registry
from diptych.cluster.providers.table import built_in
from diptych.protos.providers.codecs import CODECS

PAGES = pages()
FAMILY_PAGES = [name for name in PAGES if name != INDEX]


def anchors(text: str) -> list[str]:
    found = re.findall(r"^## (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in found]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name], "run `make docs`"


def test_there_is_a_page_for_each_family_and_none_besides() -> None:
    assert {entry.family for entry in built_in().values()} == FAMILIES.keys()
    assert {f"providers/{path.name}" for path in (DOCS / "providers").iterdir()} == set(FAMILY_PAGES)


def test_every_provider_has_a_section_and_the_index_leads_there() -> None:
    titles = {name: re.findall(r"^## (.*)$", PAGES[name], re.MULTILINE) for name in FAMILY_PAGES}
    assert sorted(title for found in titles.values() for title in found) == sorted(
        entry.title for entry in built_in().values()
    )
    linked = re.findall(r"\[([a-z0-9_.-]+)\]\((providers/[a-z-]+\.md)#([a-z0-9-]+)\)", PAGES[INDEX])
    assert [name for name, _, _ in linked] == list(built_in())
    for _, page, anchor in linked:
        assert anchors(PAGES[page]).count(anchor) == 1


@pytest.mark.parametrize("name", FAMILY_PAGES)
def test_the_example_of_a_page_is_a_configuration(name: str, tmp_path: Path) -> None:
    """One that could not be loaded, or that names a target which there is none of, taught nobody anything."""
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", PAGES[name], re.MULTILINE | re.DOTALL)
    file = tmp_path / "diptych.yaml"
    file.write_text(example)
    config = load_config(file)
    registry = Registry.load(config.providers, {})
    route = config.gateway.routes["chat"]
    for target in [*(member.target for member in route.targets), *route.fallback]:
        provider, _ = registry.target(target)
        assert not provider.lacks


def test_every_word_of_a_difference_is_explained() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", PAGES[INDEX], re.MULTILINE))
    used = {name for entry in built_in().values() for name in entry.quirks}
    assert used <= rows.keys()
    assert all(rows.values())


def test_what_a_format_can_say_is_told_of_every_format() -> None:
    assert [built_in()[name].codec for name in MAKERS] == list(CODECS)
    for field in ("temperature", "tools"):
        assert re.search(rf"^\| `{field}` \|( yes \|){{{len(CODECS)}}}$", PAGES[INDEX], re.MULTILINE)
