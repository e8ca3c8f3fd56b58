"""The verb `diptych doctor`: what would keep a cluster from starting here, or slow it down, and what to do about it.

It starts nothing. A model of the configuration that was not converted yet is converted, as `diptych serve` would.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from diptych.cluster.config import DiptychConfig, load_config
from diptych.protos.errors import StartupError

from . import doctor_cluster, doctor_machine
from .doctor_machine import Finding, State

_WORDS = {State.OK: "ok", State.SLOW: "note", State.STOP: "STOP"}


def run_doctor(config: Path | None, overrides: Sequence[str], *, as_json: bool = False) -> int:
    """Print every finding; 1 when one of them would stop a start."""
    findings = examine(config, overrides)
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        print(render(findings))
    return int(any(finding.state is State.STOP for finding in findings))


def examine(config: Path | None, overrides: Sequence[str]) -> list[Finding]:
    """All findings: the machine's, then those of the configuration."""
    findings = doctor_machine.examine()
    try:
        loaded: DiptychConfig | None = load_config(config, overrides)
        findings.append(Finding("configuration", State.OK, str(config) if config is not None else "the defaults"))
    except StartupError as error:
        loaded = None
        findings.append(Finding("configuration", State.STOP, str(error), "correct this file or these keys"))
    if loaded is not None:
        findings += doctor_cluster.examine(loaded)
    return findings


def render(findings: Sequence[Finding]) -> str:
    """A line per finding, its remedy below it, and a conclusion."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_WORDS[finding.state]:<5} {finding.name:<{width}}  {finding.told}")
        if finding.remedy:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.remedy}")
    stops = sum(finding.state is State.STOP for finding in findings)
    lines.append("")
    lines.append(f"{stops} of these would stop `diptych serve`" if stops else "nothing here would stop `diptych serve`")
    return "\n".join(lines)
