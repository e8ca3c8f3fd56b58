"""`make docs`: write docs/api-fields.md and docs/limits.md from the declarations of the API. tests/docs compares."""

from __future__ import annotations

from pathlib import Path

import diptych.cluster.api.app  # noqa: F401  the errors that documents name are those that are loaded
from diptych.cluster.api.description import bounds, tables

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {"api-fields.md": tables.page, "limits.md": bounds.page}


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())


if __name__ == "__main__":
    main()
