"""schemathesis over the API's own description, against a whole front door with echo engines.

`python tests/fuzz --examples 2000` writes a report to docs/reports; test_api_fuzz.py does the same with few.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import datetime
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from diptych.cluster.api.testing import front_door
from diptych.cluster.config import LimitSettings
from diptych.cluster.gateway.settings import GatewaySettings

ROUTE = "chat"  # a model of the gateway, which leads to the served one
GATEWAY = GatewaySettings.model_validate({"routes": {ROUTE: {"targets": ["pool/echo"]}}})
ROOT = Path(__file__).resolve().parents[2]
HOOKS = Path(__file__).with_name("fuzz_hooks.py")
REFUSALS = [400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 429, 431]


@dataclass(frozen=True)
class Outcome:
    """`counts`: answers by operation and status. `output`: what schemathesis printed."""

    code: int
    counts: dict[str, dict[int, int]]
    output: str
    seconds: float
    orders: int  # requests that reached an engine

    def cases(self, operation: str) -> int:
        return sum(self.counts.get(operation, {}).values())


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The description with values by which more of what is valid reaches the engines: the served model, and no key by
    which one answer stands for all.
    """
    for schema in document["components"]["schemas"].values():
        for name in schema.get("properties", {}) if schema.get("additionalProperties") is False else ():
            if name == "model":
                schema["properties"][name] = {
                    "enum": ["echo", ROUTE] if name in schema.get("required", ()) else ["echo", ROUTE, None]
                }
    for path in document["paths"].values():
        for operation in path.values():
            kept = [one for one in operation.get("parameters", ()) if one["name"] != "Idempotency-Key"]
            operation["parameters"] = kept
    return document


async def fuzz(examples: int, *, seed: int, phases: str = "examples,coverage,fuzzing,stateful") -> Outcome:
    """One run of all phases, `examples` cases of each operation in the phase that draws them."""
    limits = LimitSettings(max_waiting=4096)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with (
            front_door(limits, gateway=GATEWAY) as door,
            httpx2.AsyncClient(base_url=door.listener.url, timeout=30) as http,
        ):
            document = narrowed((await http.get("/openapi.json")).json())
            (folder / "openapi.json").write_text(json.dumps(document))
            (folder / "schemathesis.toml").write_text(
                f"[checks]\nnegative_data_rejection.expected-statuses = {REFUSALS}\n"
                "positive_data_acceptance.enabled = false\n"
            )
            command = [
                *(
                    sys.executable,
                    "-m",
                    "schemathesis.cli",
                    "--config-file",
                    "schemathesis.toml",
                    "run",
                    "openapi.json",
                ),
                *("--url", door.listener.url, "--phases", phases, "--max-examples", str(examples)),
                *("--seed", str(seed), "--no-shrink", "--continue-on-failure", "--suppress-health-check", "all"),
                *("--request-timeout", "60", "--warnings", "off"),
            ]
            environment = {
                **os.environ,
                "SCHEMATHESIS_HOOKS": str(HOOKS),
                "API_FUZZ_COUNTS": str(folder / "counts.json"),
                "COLUMNS": "200",
            }
            began = time.monotonic()
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=folder,
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            seconds = time.monotonic() - began
            orders = len(door.prefill.orders)
        counts: dict[str, dict[int, int]] = collections.defaultdict(dict)
        for key, number in json.loads((folder / "counts.json").read_text()).items():
            operation, _, status = key.rpartition(" ")
            counts[operation][int(status)] = number
    assert process.returncode is not None
    return Outcome(process.returncode, dict(counts), output.decode(errors="replace"), seconds, orders)


def report(outcome: Outcome, examples: int, seed: int) -> str:
    """As a page of docs/reports."""
    version = importlib.metadata.version("schemathesis")
    total = sum(outcome.cases(operation) for operation in outcome.counts)
    wrong = sum(number for by in outcome.counts.values() for status, number in by.items() if status >= 500)
    lines = [
        f"# The API under schemathesis {version}, {datetime.datetime.now(datetime.UTC).date()}",
        "",
        f"`python tests/fuzz --examples {examples} --seed {seed}`: all phases over `GET /openapi.json`, valid and",
        "invalid data, against a front door with echo engines. Checks: no 5xx, declared statuses, types, headers,",
        "bodies and events, invalid data refused, methods and `Allow`, no use after deletion.",
        "",
        f"{total} requests in {outcome.seconds:.0f} s, {outcome.orders} of them reached an engine, {wrong} answered "
        f"with 5xx; schemathesis ended with {'no failure' if outcome.code == 0 else 'FAILURES'}.",
        "",
        "| operation | requests | answers by status |",
        "|---|---|---|",
    ]
    for operation in sorted(outcome.counts):
        told = ", ".join(f"{status}: {number}" for status, number in sorted(outcome.counts[operation].items()))
        lines.append(f"| {operation} | {outcome.cases(operation)} | {told} |")
    if outcome.code:
        lines += ["", "```", *re.findall(r"[^\n]+", outcome.output)[-200:], "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful")
    parser.add_argument("--to", type=Path, help="the page; docs/reports/api-fuzz-DATE.md without")
    given = parser.parse_args()
    outcome = asyncio.run(fuzz(given.examples, seed=given.seed, phases=given.phases))
    page = given.to or ROOT / "docs" / "reports" / f"api-fuzz-{datetime.datetime.now(datetime.UTC).date()}.md"
    page.write_text(report(outcome, given.examples, given.seed))
    print(outcome.output[-4000:] if outcome.code else f"no failure: {page}")
    return outcome.code
