"""What came of a step: counts, times, the verdict. Filled by drive.py, soak.py and cancels.py, read by the report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from load import Answer
from oracle import Verdict

MAX_FAILED = 0.001  # of all requests of a run
MAX_DETECTION_S = 1.5
MAX_SILENCE_S = 5.0


def quantile(numbers: Iterable[float], part: float) -> float | None:
    """The smallest number that `part` of them do not exceed; None of none."""
    ordered = sorted(numbers)
    return ordered[max(0, math.ceil(part * len(ordered)) - 1)] if ordered else None


def p99(numbers: Iterable[float]) -> float | None:
    """See quantile."""
    return quantile(numbers, 0.99)


@dataclass
class Tally:
    """One line of the report. Times in seconds."""

    name: str
    covers: tuple[str, ...] = ()
    phase: str = ""
    what: str = ""
    requests: int = 0
    whole: int = 0
    left: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    may_break: bool = False
    verdict: Verdict = field(default_factory=Verdict)
    examples: list[str] = field(default_factory=list)  # of what was wrong
    leaked: list[str] = field(default_factory=list)
    moves: int = 0
    deaths: int = 0
    wanted_deaths: int | None = None
    detection: list[float] = field(default_factory=list)
    undetected: int = 0  # deaths that the router's list of losses does not name
    silence: list[float] = field(default_factory=list)  # of streams in work, from a death to their next token
    quiet_s: float | None = None  # until nothing was held any more
    back_s: float | None = None  # until all engines were there again
    counters: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # the step itself could not be made

    def add(self, answers: Sequence[Answer]) -> None:
        """Count them."""
        for answer in answers:
            self.requests += 1
            self.moves += answer.moves
            verdict = answer.verdict
            self.verdict += verdict
            if not verdict.is_right and len(self.examples) < 5:
                self.examples.append(_example(answer, verdict))
            if answer.failure:
                self.failed[answer.failure] += 1
            elif answer.has_left:
                self.left += 1
            else:
                self.whole += 1

    def absorb(self, other: Tally) -> None:
        """Another round of the same step."""
        self.requests += other.requests
        self.whole += other.whole
        self.left += other.left
        self.failed += other.failed
        self.verdict += other.verdict
        self.examples = (self.examples + other.examples)[:5]
        self.leaked += other.leaked
        self.moves += other.moves
        self.deaths += other.deaths
        if self.wanted_deaths is not None and other.wanted_deaths is not None:
            self.wanted_deaths += other.wanted_deaths
        self.detection += other.detection
        self.undetected += other.undetected
        self.silence += other.silence
        self.quiet_s = max(self.quiet_s or 0, other.quiet_s or 0)
        self.back_s = max(self.back_s or 0, other.back_s or 0)
        self.counters = dict(Counter(self.counters) + Counter(other.counters))
        self.notes += other.notes
        self.problems += other.problems

    @property
    def num_failed(self) -> int:
        """Requests that ended in an error although they should not have."""
        return 0 if self.may_break else sum(self.failed.values())

    @property
    def is_broken(self) -> bool:
        """A wrong, doubled, missing or leaked one: what must never be."""
        return not self.verdict.is_right or bool(self.leaked)

    @property
    def lacks_deaths(self) -> bool:
        """Fewer engines ended than should have."""
        return self.wanted_deaths is not None and self.deaths < self.wanted_deaths

    def missed(self) -> list[str]:
        """Promises about time and number that were not kept, in words."""
        found = list(self.problems)
        if self.wanted_deaths is not None and self.deaths != self.wanted_deaths:
            found.append(f"{self.deaths} engines ended instead of {self.wanted_deaths}")
        if self.undetected:
            found.append(f"{self.undetected} deaths are not among the losses that the router tells")
        if (late := p99(self.detection)) is not None and late > MAX_DETECTION_S:
            found.append(f"detection p99 {late:.2f} s, promised {MAX_DETECTION_S:g} s")
        if (worst := p99(self.silence)) is not None and worst > MAX_SILENCE_S:
            found.append(f"a stream was silent for {worst:.2f} s, promised {MAX_SILENCE_S:g} s")
        if faults := self.counters.get("kv_thread_faults_total"):
            found.append(f"{faults:g} exceptions in transfer threads")
        return found


@dataclass
class Matrix:
    """All lines of a run."""

    lines: list[Tally] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return sum(line.requests for line in self.lines)

    @property
    def num_failed(self) -> int:
        return sum(line.num_failed for line in self.lines)

    @property
    def verdict(self) -> Verdict:
        return sum((line.verdict for line in self.lines), Verdict())

    @property
    def num_leaked(self) -> int:
        return sum(len(line.leaked) for line in self.lines)

    def exit_code(self) -> int:
        """1: something wrong, doubled, missing, leaked, or too many failed; 2: a promise of time was missed; else 0."""
        if not self.lines or any(line.is_broken for line in self.lines):
            return 1
        if self.num_failed > MAX_FAILED * self.requests:
            return 1
        return 2 if any(line.missed() for line in self.lines) else 0


def _example(answer: Answer, verdict: Verdict) -> str:
    ask = answer.ask
    return (
        f"prompt of {len(ask.prompt)} tokens {list(ask.prompt[:6])}..., {verdict}: "
        f"expected {list(ask.expected)}, got {answer.tokens}, told {answer.told}, failure {answer.failure!r}"
    )
