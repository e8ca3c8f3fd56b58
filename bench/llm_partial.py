"""What partial results of a stream cost the client: CPU time of one thread, for one object that comes in pieces.

Regime: an object of 17.9 KB (a report with 60 sections), then ones of 2 and 4 times as many sections, cut into pieces
of 4 characters; each way is fed the same pieces and gives what it knows after each of them. Medians of the repeats,
taken in turn. No network: the pieces are in memory.
ours          Assembler, texts shown as they grow
ours, read    the same, and each view is written out as text of ten of its fields by a reader
ours, closed  finished parts alone, from the text
ours, told    finished parts as a cluster tells them; the cluster's side of it is not in it
jiter         the whole text so far parsed anew at each piece (from_json, trailing-strings)
pydantic      the same into a TypedDict with all fields optional (validate_json, allow_partial)
instructor    its Partial model of the same type (1.17), where it is installed
stream        llm.call(...).stream().partials() whole, with a scripted model as the upstream: events, steps, threads
Run: python bench/llm_partial.py [--repeats 5] [--json FILE]; exit code 1 if ours takes 0.1 s or more of the first
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from typing_extensions import TypedDict

from diptych.agents import llm
from diptych.agents.llm.assembling import Assembler
from diptych.agents.llm.output import Output
from diptych.agents.llm.testing.scripted import Said, ScriptedModel
from diptych.cluster.bench.figures import regime, save_result
from diptych.cluster.bench.provenance import provenance
from diptych.protos.closed_paths import ClosedPaths
from diptych.protos.deltas import Content, Structured

MOST_S = 0.1
NUM_SECTIONS = 60


class Section(BaseModel):
    """A part of a report."""

    id: int
    title: str
    score: float
    tags: list[str]
    body: str


class Report(BaseModel):
    """What is streamed."""

    name: str
    is_final: bool
    sections: list[Section]


class SectionDict(TypedDict, total=False):
    """As pydantic reads half an object."""

    id: int
    title: str
    score: float
    tags: list[str]
    body: str


class ReportDict(TypedDict, total=False):
    """See SectionDict."""

    name: str
    is_final: bool
    sections: list[SectionDict]


def document(num_sections: int) -> str:
    """The object's JSON."""
    sections = [
        {
            "id": 1000 + at,
            "title": f"Section {at}: what was seen there",
            "score": at * 0.25,
            "tags": ["alpha", "beta", f"tag-{at}"],
            "body": 'The river rose by a metre in one night, and the "old" bridge held.\n' * 2 + "It is open. " * 3,
        }
        for at in range(num_sections)
    ]
    return json.dumps({"name": "Floods", "is_final": True, "sections": sections})


def pieces_of(text: str, num_chars: int = 4) -> list[str]:
    """`text`, cut."""
    return [text[at : at + num_chars] for at in range(0, len(text), num_chars)]


def told_of(pieces: Sequence[str]) -> list[Content | Structured]:
    """As a cluster would stream them."""
    paths, found = ClosedPaths(), list[Content | Structured]()
    for piece in pieces:
        found.append(Content(piece))
        if parts := paths.feed(piece):
            found.append(Structured(parts))
    return found


def ours(events: Sequence[Content | Structured], *, grows: bool, reads: bool = False) -> Iterator[Any]:
    """Each view."""
    assembler = Assembler(Output(Report), grows=grows)
    for event in events:
        assembler.add(event)
        for partial in assembler.taken():
            if reads:
                last = partial.sections[-1] if partial.sections else partial
                repr((partial.name, partial.is_final, last))
            yield partial


def by_jiter(pieces: Sequence[str]) -> Iterator[Any]:
    """Parsed anew each time."""
    import jiter

    text = b""
    for piece in pieces:
        text += piece.encode()
        yield jiter.from_json(text, partial_mode="trailing-strings")


def by_pydantic(pieces: Sequence[str]) -> Iterator[Any]:
    """See by_jiter."""
    adapter, text = TypeAdapter(ReportDict), ""
    for piece in pieces:
        text += piece
        yield adapter.validate_json(text, experimental_allow_partial="trailing-strings")


def by_instructor(pieces: Sequence[str]) -> Iterator[Any]:
    """Its Partial of the same model."""
    from instructor.dsl.partial import Partial

    partial: Any = Partial[Report]
    found: Iterator[Any] = partial.model_from_chunks(iter(pieces))
    return found


def by_stream(pieces: Sequence[str]) -> Iterator[Any]:
    """The whole way of a stream."""
    registry = llm.Registry(environ={})
    registry.add("test", ScriptedModel([Said(text="".join(pieces), pieces=tuple(pieces))]))

    @llm.call("test/m", output=Report, registry=registry)
    def report() -> str:
        return "Report, please."

    yield from report.stream().partials()


def ways(pieces: Sequence[str]) -> dict[str, Callable[[], Iterator[Any]]]:
    """By name."""
    contents, told = [Content(piece) for piece in pieces], told_of(pieces)
    found: dict[str, Callable[[], Iterator[Any]]] = {
        "ours": lambda: ours(contents, grows=True),
        "ours, read": lambda: ours(contents, grows=True, reads=True),
        "ours, closed": lambda: ours(contents, grows=False),
        "ours, told": lambda: ours(told, grows=False),
        "stream": lambda: by_stream(pieces),
        "pydantic": lambda: by_pydantic(pieces),
    }
    for name, module, way in (("jiter", "jiter", by_jiter), ("instructor", "instructor", by_instructor)):
        try:
            __import__(module)
        except ImportError:
            print(f"{name}: not installed", file=sys.stderr)
        else:
            found[name] = lambda way=way: way(pieces)  # type: ignore[misc]
    return found


def measured(way: Callable[[], Iterator[Any]]) -> tuple[float, int]:
    """CPU seconds of all threads, and how many views there were."""
    began = time.process_time()
    num = sum(1 for _ in way())
    return time.process_time() - began, num


def run(num_sections: int, repeats: int) -> dict[str, Any]:
    """One size."""
    text = document(num_sections)
    pieces = pieces_of(text)
    by_name = ways(pieces)
    seconds: dict[str, list[float]] = {name: [] for name in by_name}
    views: dict[str, int] = {}
    for at in range(repeats):
        for name, way in by_name.items():
            if name == "instructor" and at >= 2:  # seconds each
                continue
            took, views[name] = measured(way)
            seconds[name].append(took)
    base = statistics.median(seconds["ours"])
    return {
        "chars": len(text),
        "pieces": len(pieces),
        "cpu_s": {name: round(statistics.median(took), 4) for name, took in seconds.items()},
        "times_ours": {name: round(statistics.median(took) / base, 1) for name, took in seconds.items()},
        "views": views,
    }


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    head = regime()
    found = {f"{factor * NUM_SECTIONS} sections": run(factor * NUM_SECTIONS, options.repeats) for factor in (1, 2, 4)}
    sizes = list(found.values())
    first = sizes[0]
    print(f"{head}\n\n{'way':14}{'x ours':>8}" + "".join(f"{one['chars']:>10}" for one in sizes) + "  characters")
    for name, times in first["times_ours"].items():
        print(f"{name:14}{times:>8}" + "".join(f"{one['cpu_s'][name]:>10.4f}" for one in sizes) + "  CPU seconds")
    config = {"repeats": options.repeats, "chars_of_a_piece": 4, "most_s": MOST_S}
    result = {"bench": "llm_partial", "config": config} | provenance() | {"peers": peers(), "results": found}
    save_result(result, options.json)
    print(json.dumps(result))
    return 0 if max(first["cpu_s"][name] for name in ("ours", "stream")) < MOST_S else 1


def peers() -> dict[str, str | None]:
    """Versions of what stands beside."""
    found: dict[str, str | None] = {}
    for name in ("pydantic", "jiter", "instructor"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


if __name__ == "__main__":
    sys.exit(main())
