"""Whether a client notices that the engine of its stream is killed: kill -9 of decode engines under streams of a route.

Regime: the shipped binary with a prefill engine and several decode engines of a small checkpoint (seeded random
weights, float32, the real kernels) or of the echo model, which computes in integers; streams over HTTP through a route
of the gateway to the pool, half greedy, half seeded. Engines are killed in turns at random moments. Each stream is held
against the whole answer to the same request on the quiet cluster, byte by byte. Requests with a choice that the last
bits of float sums decide, see `margin`, are left out before the first kill. Exit code 1 when a stream differs, repeats
or lacks a piece, or tells an error. Run: python bench/kills.py [--kills 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "e2e"))

from serving import Cluster, start_cluster, stop_cluster  # noqa: E402 - a script beside the tests, no package

from diptych.cluster.api.testing import TEMPLATE, byte_level_tokenizer  # noqa: E402
from diptych.cluster.api.text import TokenTable  # noqa: E402
from diptych.cluster.bench.figures import regime, save_result, spread  # noqa: E402
from diptych.cluster.bench.provenance import provenance  # noqa: E402
from diptych.kernels.ops.sampling.philox import uniform  # noqa: E402

MODEL, ROUTE = "small", "chat"
CALL = "/v1/chat/completions"
LEAST_LIFE_S = 11.0  # who dies sooner after its start comes back after a pause
ANSWER_S = 120.0
READY_S = 90.0
TOP_K = 8  # of seeded requests
LEAST_MARGIN = 5e-5  # ten times what float32 sums of this model were seen to differ by, see `margin`
MAX_TOLD = 5  # wrong streams that the result quotes
SIZES = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 256}
DIVERSE = {"initializer_range": 0.1, "tie_word_embeddings": False}  # greedy answers that do not go in circles
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A request and the answer to it that nothing disturbed."""

    body: Json
    text: str
    tokens: int


@dataclass(slots=True, eq=False)
class Stream:
    """One stream as its client sees it. `at_kills`: the pieces that were there when some engine was killed."""

    question: Question
    pieces: list[str] = field(default_factory=list)
    at_kills: list[int] = field(default_factory=list)
    finish: str | None = None
    is_done: bool = False
    wrong: str = ""
    tokens: int = 0
    moves: int = 0  # to other engines after the first token
    placements: int = 0  # before it
    attempts: int = 0  # of the gateway
    longest_pause_s: float = 0.0

    def read(self, data: str) -> None:
        """An event's data."""
        if data == "[DONE]":
            self.is_done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.wrong = f"error: {event['error']}"
        for choice in event.get("choices", []):
            if self.finish is not None:
                self.wrong = self.wrong or "a piece behind the finish"
            if text := choice["delta"].get("content"):
                self.pieces.append(text)
            self.finish = choice["finish_reason"]
        if event.get("usage"):
            self.tokens = event["usage"]["completion_tokens"]
        if "diptych" in event:
            self._explained(event["diptych"]["choices"][0])

    def _explained(self, told: Json) -> None:
        attempts = told.get("attempts")
        if isinstance(attempts, list):  # of a route: each with its pool's explanation
            self.attempts = len(attempts)
            told = attempts[-1].get("explanation", {})
        self.moves = told.get("migrations", 0)
        self.placements = told.get("attempts", 0)

    def judge(self) -> str:
        """What is wrong with it, in a phrase; empty where nothing is."""
        text = "".join(self.pieces)
        if self.wrong:
            return self.wrong
        if text.encode() != self.question.text.encode():
            pairs = zip(text, self.question.text, strict=False)
            same = next((at for at, (got, wanted) in enumerate(pairs) if got != wanted), len(text))
            return f"differs from character {same} of {len(self.question.text)}: {text[same : same + 40]!r}"
        if self.finish != "length" or not self.is_done:
            return f"no end: finish {self.finish}, [DONE] {self.is_done}"
        if self.tokens != self.question.tokens:
            return f"{self.tokens} tokens are told, {self.question.tokens} were made"
        if self.attempts > 1:
            return f"{self.attempts} attempts of the gateway"
        return ""


@dataclass(slots=True)
class Run:
    """What came of it."""

    kills: list[tuple[str, float]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    open: set[Stream] = field(default_factory=set)
    left_out: int = 0  # requests with more than one answer

    @property
    def broken(self) -> list[Stream]:
        """Those that lost their engine after their first token."""
        return [one for one in self.streams if one.moves]

    @property
    def wrong(self) -> list[tuple[Stream, str]]:
        """With the reason."""
        return [(one, why) for one in self.streams if (why := one.judge())]


def make_model(folder: Path) -> Path:
    """A model folder with a tokenizer of bytes and a chat template."""
    from diptych.kernels.testing import make_tiny_checkpoint

    tokenizer = byte_level_tokenizer()
    make_tiny_checkpoint(folder, "llama", seed=7, vocab_size=tokenizer.get_vocab_size(), **SIZES, **DIVERSE)
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def configuration(model: Path | None, *, decode: int, is_routed: bool) -> Json:
    """Of the cluster; without a folder its model is the echo."""
    pools: Json = {"kv": {"memory_mib": 64}, "decode": {"engines": decode}}
    if model is None:
        pools |= {"source": "echo", "echo": {"step_s": 0.005}}
    else:
        pools |= {"source": str(model), "dtype": "float32"}
    settings: Json = {
        "models": {MODEL: pools},
        "engines": {"max_restarts": 1000},
        # Each kill takes from the budget what a whole fleet of engines would lose in a day.
        "router": {"retry_budget": 1.0, "retry_burst": 1000},
    }
    if is_routed:
        settings["gateway"] = {"routes": {ROUTE: {"targets": [f"pool/{MODEL}"], "timeouts": {"idle_s": 60}}}}
    return settings


@contextmanager
def served(folder: Path, settings: Mapping[str, Any]) -> Iterator[Cluster]:
    """Running, and stopped afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "diptych.yaml"
    file.write_text(json.dumps(settings))
    cluster = start_cluster(folder, "--config", str(file))
    try:
        yield cluster
    finally:
        stop_cluster(cluster)


def bodies(number: int, tokens: tuple[int, int], *, model: str) -> list[Json]:
    """Different requests, every second one seeded."""
    chance = random.Random(number)
    words = "a red kite crosses the quiet valley while two old farmers count their sheep at dusk".split()
    found = []
    for at in range(number):
        said = " ".join(chance.choices(words, k=chance.randrange(4, 40)))
        body: Json = {"model": model, "messages": [{"role": "user", "content": said}], "ignore_eos": True}
        body |= {"max_tokens": chance.randrange(*tokens), "temperature": at % 2}
        found.append(body | ({"seed": at, "top_k": TOP_K} if at % 2 else {}))
    return found


def margin(reply: Json, body: Json, ids: Mapping[bytes, int]) -> float:
    """How near any choice of an answer came to another one. Greedy, in logprobs; seeded, in probability from the random
    number to the ends of its token's part, and in logprobs between the last candidate and who is none. 0 where that
    cannot be told. What is computed beside a request, or again after a move, changes a logprob by some 1e-6.
    """
    least = 1.0
    for at, told in enumerate(reply["choices"][0]["logprobs"]["content"]):
        top = [entry["logprob"] for entry in told["top_logprobs"]]
        if not body["temperature"]:
            least = min(least, top[0] - top[1])
            continue
        by_id = sorted(told["top_logprobs"][:TOP_K], key=lambda entry: ids[bytes(entry["bytes"])])
        weights = [math.exp(entry["logprob"]) for entry in by_id]
        ends = [end / sum(weights) for end in itertools.accumulate(weights)]
        drawn = uniform(body["seed"], reply["usage"]["prompt_tokens"] + at)
        if by_id[min(bisect.bisect_right(ends, drawn), TOP_K - 1)]["bytes"] != told["bytes"]:
            return 0.0
        least = min([least, top[TOP_K - 1] - top[TOP_K], *(abs(end - drawn) for end in ends[:-1])])
    return least


async def known(http: httpx2.AsyncClient, asked: list[Json], *, is_exact: bool) -> list[Question]:
    """The requests that have one answer, whatever is computed beside them; `is_exact`: all of them have."""
    found = []
    table = TokenTable(byte_level_tokenizer())
    ids = {table.spelling(token): token for token in range(table.tokenizer.get_vocab_size())}
    for body in asked:
        more = {} if is_exact else {"logprobs": True, "top_logprobs": TOP_K + 1}
        plain, told = [(await http.post(CALL, json=one)).raise_for_status().json() for one in (body, body | more)]
        text = plain["choices"][0]["message"]["content"]
        is_same = text == told["choices"][0]["message"]["content"]
        if is_same and (is_exact or margin(told, body, ids) >= LEAST_MARGIN):
            found.append(Question(body, text, plain["usage"]["completion_tokens"]))
    return found


async def streamed(http: httpx2.AsyncClient, question: Question, run: Run) -> Stream:
    """One stream to its end, whatever that is."""
    stream = Stream(question)
    more = {"stream": True, "stream_options": {"include_usage": True}, "explain": True}
    run.open.add(stream)
    last = time.monotonic()
    try:
        async with http.stream("POST", CALL, json=question.body | more) as reply:
            if reply.status_code != 200:
                stream.wrong = f"status {reply.status_code}: {(await reply.aread())[:300]!r}"
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    now = time.monotonic()
                    stream.longest_pause_s, last = max(stream.longest_pause_s, now - last), now
                    stream.read(line.removeprefix("data: "))
    except httpx2.HTTPError as exc:
        stream.wrong = f"{type(exc).__name__}: {exc}"
    finally:
        run.open.discard(stream)
    run.streams.append(stream)
    return stream


class Killer:
    """Ends decode engines, one after another, never the last one that takes requests."""

    def __init__(self, cluster: Cluster, run: Run, chance: random.Random, *, gap_s: float) -> None:
        self._cluster = cluster
        self._gap_s = gap_s
        self._run = run
        self._chance = chance
        self._since: dict[tuple[str, int], float] = {}  # when a life was first seen to take requests

    async def next(self) -> None:
        """The next kill, when there is somebody to kill who has lived long enough, and a stream to break."""
        give_up = time.monotonic() + READY_S
        while True:
            ready = await asyncio.to_thread(self._ready)
            old = [e for e in ready if time.monotonic() - self._since[e["engine"], e["epoch"]] >= LEAST_LIFE_S]
            is_time = not self._run.kills or time.monotonic() - self._run.kills[-1][1] >= self._gap_s
            if is_time and len(ready) >= 2 and old and any(stream.pieces for stream in self._run.open):
                break
            if time.monotonic() > give_up:
                raise SystemExit(f"no engine could be killed for {READY_S:g} s; {len(ready)} are ready")
            await asyncio.sleep(0.1)
        engine = min(old, key=lambda e: self._since[e["engine"], e["epoch"]])
        await asyncio.sleep(self._chance.uniform(0, 0.3))
        for stream in self._run.open:
            stream.at_kills.append(len(stream.pieces))
        os.kill(engine["pid"], signal.SIGKILL)
        self._run.kills.append((engine["engine"], time.monotonic()))
        # Long enough for the router to notice, so that the next choice does not count the dead among the living.
        await asyncio.sleep(0.3)

    def _ready(self) -> list[Json]:
        engines = [
            e
            for e in self._cluster.get("/info")["engines"]
            if e["connected"] and not e["draining"] and "decode" in e["roles"]
        ]
        for engine in engines:
            self._since.setdefault((engine["engine"], engine["epoch"]), time.monotonic())
        return engines


async def measure(cluster: Cluster, options: argparse.Namespace, model: str) -> Run:
    """All kills, or as many as there were at Ctrl-C, and every stream to its end."""
    run, over, chance = Run(), asyncio.Event(), random.Random(options.seed)
    enough = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, enough.set)
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=ANSWER_S, limits=limits) as http:
        asked = bodies(options.questions, (options.tokens // 2, options.tokens), model=model)
        questions = await known(http, asked, is_exact=options.echo)
        run.left_out = len(asked) - len(questions)
        print(f"{len(questions)} answers are known, {run.left_out} requests are left out", flush=True)

        async def client() -> None:
            while not over.is_set():
                stream = await streamed(http, chance.choice(questions), run)
                if why := stream.judge():
                    print(f"WRONG: {why}; moves {stream.moves}, at {stream.at_kills}", flush=True)

        async with asyncio.TaskGroup() as group:
            for _ in range(options.streams):
                group.create_task(client())
            try:
                killer = Killer(cluster, run, chance, gap_s=options.gap)
                for number in range(1, options.kills + 1):
                    if enough.is_set():
                        break
                    await killer.next()
                    if number % 10 == 0:
                        print(f"{number} kills, {len(run.broken)} of {len(run.streams)} streams moved", flush=True)
            finally:
                over.set()
    return run


def figures(run: Run) -> Json:
    """The result."""
    moved = run.broken
    places = [at / len(one.pieces) for one in moved for at in one.at_kills if one.pieces]
    wrong = run.wrong
    return {
        "kills": len(run.kills),
        "requests_left_out": run.left_out,
        "streams": len(run.streams),
        "streams_moved": len(moved),
        "of_them_greedy": sum(one.question.body["temperature"] == 0 for one in moved),
        "of_them_seeded": sum(one.question.body["temperature"] != 0 for one in moved),
        "moved_more_than_once": sum(one.moves > 1 for one in moved),
        "placed_again_before_the_first_token": sum(one.placements > 1 for one in run.streams),
        "place_of_the_kill": spread(places, 3),
        "longest_pause_s_of_moved": spread([one.longest_pause_s for one in moved], 3),
        "longest_pause_s_of_others": spread([one.longest_pause_s for one in run.streams if not one.moves], 3),
        "wrong": len(wrong),
        "wrong_quoted": [{"why": why, "body": one.question.body} for one, why in wrong[:MAX_TOLD]],
    }


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description="Kill decode engines under streams and compare every answer.")
    made.add_argument("--kills", type=int, default=200)
    made.add_argument("--decode", type=int, default=4, help="decode engines")
    made.add_argument("--streams", type=int, default=6, help="at a time")
    made.add_argument("--questions", type=int, default=36, help="different requests, before some are left out")
    made.add_argument("--tokens", type=int, default=480, help="of the longest answer; the shortest has half of them")
    made.add_argument(
        "--gap", type=float, default=2.5, help="least seconds between kills: few streams lose three engines"
    )
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--own", action="store_true", help="by the model's own name, without the gateway")
    made.add_argument("--echo", action="store_true", help="the echo model in place of the checkpoint")
    made.add_argument("--json", type=Path, help="write the figures there")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    options = parser().parse_args(arguments)
    print(regime(), flush=True)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        folder = Path(name)
        model = None if options.echo else make_model(folder / "model")
        settings = configuration(model, decode=options.decode, is_routed=not options.own)
        with served(folder / "served", settings) as cluster:
            began = time.monotonic()
            run = asyncio.run(measure(cluster, options, MODEL if options.own else ROUTE))
            took_s = time.monotonic() - began
    found = figures(run) | {"seconds": round(took_s, 1)}
    for key, value in found.items():
        print(f"{key:<40} {value}")
    told = {key: value for key, value in vars(options).items() if key != "json"}
    save_result({"bench": "kills", "config": told} | provenance() | {"results": found}, options.json)
    return 1 if found["wrong"] or not found["streams_moved"] else 0


if __name__ == "__main__":
    sys.exit(main())
