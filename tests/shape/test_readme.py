"""Every folder's README names each of its files, so that a newcomer finds the place of the next change."""

from __future__ import annotations

from pathlib import Path

import pytest
from sources import FLOORS, ROOT, python_files

WITH_CODE = [f for f in FLOORS if python_files(f)]


def readme_of(path: Path) -> Path:
    """The nearest README.md at or above the file's folder."""
    return next(p / "README.md" for p in [path.parent, *path.parents] if (ROOT / p / "README.md").exists())


@pytest.mark.parametrize("path", [p for p in python_files(*WITH_CODE) if p.name != "__init__.py"], ids=str)
def test_the_nearest_readme_names_the_file(path: Path) -> None:
    readme = readme_of(path)
    text = (ROOT / readme).read_text()
    inside = path.relative_to(readme.parent)
    assert path.name in text or str(inside.parent) in text, f"{readme} does not mention {inside}"


@pytest.mark.parametrize("folder", WITH_CODE)
def test_a_floor_has_a_readme_of_one_page(folder: str) -> None:
    lines = (ROOT / folder / "README.md").read_text().count("\n")
    assert lines <= 120, f"{folder}/README.md has {lines} lines"
