"""The examples of docs/concepts: fenced blocks by what runs them.

```python              alone              ```python cluster      against the running cluster, whose URL replaces URL
```yaml                is a diptych.yaml  ```bash cluster        the same in a shell that finds `diptych`
```python embeddings   against small models that embed and rank, in the same way
```python anthropic    with the client that tests/clients has; so ```python openai
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
URL = "http://127.0.0.1:8000"
RUNNABLE = (
    "python",
    "python cluster",
    "python anthropic",
    "python openai",
    "python embeddings",
    "bash cluster",
    "yaml",
)
SHOWN = ("", "text")
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Example:
    """One fenced block."""

    page: Path
    line: int
    kind: str
    code: str

    def __str__(self) -> str:
        return f"{self.page.stem}:{self.line}"


def pages() -> list[Path]:
    """One per concept."""
    return sorted((DOCS / "concepts").glob("*.md"))


def examples(page: Path) -> list[Example]:
    """All fenced blocks of a page."""
    text = page.read_text()
    return [
        Example(page, text[: found.start()].count("\n") + 1, found[1].strip(), found[2])
        for found in _FENCE.finditer(text)
    ]


def of_kind(*kinds: str) -> list[Example]:
    """The blocks of all pages that are of one of the kinds."""
    return [example for page in pages() for example in examples(page) if example.kind in kinds]
