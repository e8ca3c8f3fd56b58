"""The documentation is true: its examples run, its links lead somewhere, its index is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fences import DOCS, RUNNABLE, SHOWN, Example, examples, of_kind, pages

from diptych.cluster.config import load_config

LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("example", of_kind("python"), ids=str)
def test_an_example_without_a_cluster_runs(example: Example) -> None:
    exec(compile(example.code, str(example), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("example", of_kind("yaml"), ids=str)
def test_a_configuration_is_accepted(example: Example, tmp_path: Path) -> None:
    file = tmp_path / "diptych.yaml"
    file.write_text(example.code)
    load_config(file)


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_is_short_and_has_an_example_that_runs(page: Path) -> None:
    kinds = [example.kind for example in examples(page)]
    assert any(kind in RUNNABLE for kind in kinds), f"{page.name} has no example that runs"
    assert all(kind in RUNNABLE + SHOWN for kind in kinds), kinds
    assert 20 <= page.read_text().count("\n") <= 100


@pytest.mark.parametrize("page", [DOCS / "README.md", *pages()], ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    missing = [page.name for page in pages() if f"(concepts/{page.name})" not in index]
    assert not missing
