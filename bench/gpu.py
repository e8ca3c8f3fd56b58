"""Everything that is measured on one card, one JSON file a run: what bench/table.py makes the tables of.

Each section has a time box of its own: one that hangs or fails leaves a file that says so, and the others go on.
Regime: nothing else on the card or the cores; random weights (shape decides speed); the workloads of `diptych bench`.
Run: python bench/gpu.py [--out bench/results] [--only llama-8b --only http] [--budget 590] [--list]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from diptych.cluster.bench.provenance import card, commit_of
from diptych.cluster.bench.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
DIPTYCH = (sys.executable, "-c", "from diptych.cluster.cli import main; main()")
WORKLOADS = ("latency-b1", "decode-64", "decode-512", "mixed-1000", "prefill-8k")
HTTP_MODEL = "llama-8b"
# Of bench/peers/h200_http.json: row, then requests, rate, tokens in and out, most in work.
HTTP_ROWS = (
    ("decode-512 all at once", 512, "inf", 128, 256, None),
    ("mixed-1000 all at once", 1000, "inf", 1024, 128, None),
    ("1024/128 at 10 requests/s, 300 requests", 300, "10", 1024, 128, None),
    ("8000/500 at 2.5 requests/s, 80 requests", 80, "2.5", 8000, 500, None),
    ("128/256 one at a time", 16, "inf", 128, 256, 1),
)
# Ops in the order of what a step spends on them: a run that is ended early has these.
KERNELS = (
    *("moe", "linear", "paged_attention", "silu_mul", "add_norm", "qk_write"),
    *("sampling", "logprobs", "step_inputs", "kv_pack"),
)
LEAST_S = 15.0  # a section with less time than this is not begun
END_S = 30.0  # for a process to end that was asked to
LOG_LINES = 40  # of a log that are shown, the last ones


@dataclass
class Bench:
    """One call of this script: where results go, how long it may take, what failed."""

    out: Path
    prefix: str  # of the files: date and card
    repeats: int
    commit: str | None
    end_at: float  # of time.monotonic
    clients: int
    rows: Sequence[str] = ()  # of HTTP, by a part of their names; none: all
    failed: list[str] = field(default_factory=list)

    def left_s(self, box_s: float) -> float:
        return min(box_s, self.end_at - time.monotonic())

    def run(
        self,
        name: str,
        command: Sequence[str],
        box_s: float,
        *,
        about: dict[str, Any],
        env: dict[str, str] | None = None,
    ) -> None:
        """`command` in its time box; its --json result becomes the file of `name`, with `about` added.

        What ends early leaves what it had written so far, and why it ended.
        """
        seconds = self.left_s(box_s)
        if seconds < LEAST_S:
            self._miss(name, "not begun: no time left")
            return
        log = self.out / f"{self.prefix}_{name}.log"
        print(f"== {name}: {shlex.join(shown(command))}  ({seconds:.0f} s at most)", flush=True)
        with tempfile.TemporaryDirectory(prefix="diptych-gpu-") as folder:
            result_file = Path(folder) / "result.json"
            given = [*command, "--json", str(result_file)] if command[: len(DIPTYCH)] == DIPTYCH else list(command)
            began = time.monotonic()
            why = call(given, seconds, log, env)
            result = whole_json(result_file)
        result |= about | {"section": name, "command": shlex.join(shown(command))}
        result["section_s"] = round(time.monotonic() - began, 1)
        result["commit"] = result.get("commit") or self.commit
        result.setdefault("date", datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"))
        if why:
            result |= {"why_failed": why, "log": tail(log)}
            self._miss(name, why)
        else:
            print("\n".join(line for line in tail(log) if not line.startswith("{")), flush=True)
            log.unlink(missing_ok=True)
        self.new_file(name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"-- {name}: {result['section_s']} s{': ' + why if why else ''}", flush=True)

    def new_file(self, name: str) -> Path:
        """A second run of a day has a file of its own: results are never written over."""
        path, count = self.out / f"{self.prefix}_{name}.json", 1
        while path.exists():
            count += 1
            path = self.out / f"{self.prefix}_{name}_{count}.json"
        return path

    def _miss(self, name: str, why: str) -> None:
        self.failed.append(f"{name}: {why}")


def shown(command: Sequence[str]) -> list[str]:
    """As somebody would type it, no folder of this machine in it."""
    if tuple(command[: len(DIPTYCH)]) == DIPTYCH:
        command = ["diptych", *command[len(DIPTYCH) :]]
    return ["python" if part == sys.executable else Path(part).name if part[:1] == "/" else part for part in command]


def call(command: Sequence[str], seconds: float, log: Path, env: dict[str, str] | None = None) -> str:
    """Run it with its output in `log`; empty, or why it did not end well. Its whole process group ends in time."""
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | (env or {}),
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return f"not over after {seconds:.0f} s"
        finally:
            end(process)
    return "" if code == 0 else f"exit code {code}"


def end(process: subprocess.Popen[Any]) -> None:
    """Ask the process, wait, then kill it and whatever it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def whole_json(file: Path) -> dict[str, Any]:
    """Empty where there is none, or half of one."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def tail(log: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return []


# ---- sections ---------------------------------------------------------------------------------


def offline(
    bench: Bench, name: str, model: str, *more: str, box_s: float, workloads: Sequence[str] = WORKLOADS
) -> None:
    chosen = [part for workload in workloads for part in ("--workload", workload)]
    command = (*DIPTYCH, "bench", "offline", "--model", model, "--random-weights", *chosen, *more)
    bench.run(name, command, box_s, about={"kind": "offline"})


def whole(model: str, bench: Bench) -> None:
    """All workloads of a model, then a trace of each."""
    profile = bench.new_file(f"{model}_steps")
    offline(bench, model, model, "--repeats", str(bench.repeats), "--profile", str(profile), box_s=300.0)


def start(bench: Bench) -> None:
    """Until ready with empty caches of kernels, then with those that the first start has left."""
    command = (*DIPTYCH, "bench", "offline", "--model", "llama-8b", "--random-weights", "--workload", "latency-b1")
    with tempfile.TemporaryDirectory(prefix="diptych-caches-") as folder:
        caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "XDG_CACHE_HOME": f"{folder}/cache"}
        for name, box_s in (("start_cold", 120.0), ("start_warm", 90.0)):
            bench.run(name, command, box_s, about={"kind": "start"}, env=caches)


def session(bench: Bench) -> None:
    both = ("--through", "engine", "--through", "session", "--repeats", str(bench.repeats))
    offline(bench, "session", "llama-8b", *both, box_s=200.0, workloads=("decode-512", "decode-64"))


def deterministic(bench: Bench) -> None:
    exactly = ("--set", "models.llama-8b.deterministic=true", "--repeats", "1")
    offline(
        bench, "deterministic", "llama-8b", *exactly, box_s=120.0, workloads=("latency-b1", "decode-64", "decode-512")
    )


def generic(bench: Bench) -> None:
    """What transformers' forward does with our ops in it, as for models that nobody has written by hand."""
    for model in ("llama-8b", "qwen3-30b-a3b"):
        more = ("--path", "generic", "--repeats", "1")
        offline(
            bench, f"{model}_generic", model, *more, box_s=150.0, workloads=("latency-b1", "decode-64", "prefill-8k")
        )


def kernels(bench: Bench) -> None:
    ops = [part for op in KERNELS for part in ("--op", op)]
    bench.run("kernels", (*DIPTYCH, "bench", "kernels", *ops), 240.0, about={"kind": "kernels"})


def tests(bench: Bench) -> None:
    command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "tests/conformance", "tests/cluster")
    bench.run("tests", command, 240.0, about={"kind": "tests"})


def http(bench: Bench) -> None:
    """The whole cluster in the colocated layout; one server for all rows, after a few requests that do not count."""
    with tempfile.TemporaryDirectory(prefix="diptych-model-") as folder, serving(bench, Path(folder)) as url:
        if url:
            warm = (*DIPTYCH, "bench", "serve", "--url", url, "--requests", "8", "--output", "8", "--vocab", "100000")
            call(warm, 60.0, Path(folder) / "warm.log")
        for row, requests, rate, tokens_in, tokens_out, most in HTTP_ROWS if url else ():
            if bench.rows and not any(part in row for part in bench.rows):
                continue
            command = [*DIPTYCH, "bench", "serve", "--url", url, "--requests", str(requests), "--rate", rate]
            command += ["--input", str(tokens_in), "--output", str(tokens_out), "--seed", "1", "--vocab", "100000"]
            command += ["--concurrency", str(most)] if most else ["--clients", str(bench.clients)]
            name = "http_" + re.sub(r"[^a-z0-9]+", "-", row.split(",")[0].lower()).strip("-")
            bench.run(name, tuple(command), 110.0, about={"kind": "http", "row": row})


@contextlib.contextmanager
def serving(bench: Bench, folder: Path) -> Iterator[str]:
    """The URL of a cluster that is ready, or nothing when none came to be, which is noted."""
    model = folder / HTTP_MODEL  # whose name is the model's
    model.mkdir()
    write_model(model, HTTP_MODEL)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = bench.out / f"{bench.prefix}_serve.log"
    seconds = bench.left_s(150.0)
    with log.open("w", encoding="utf-8") as file:
        command = (*DIPTYCH, "serve", *serve_options(model, port))
        print(f"== {shlex.join(shown(command))}", flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            began = time.monotonic()
            ready = wait_until_ready(url, process, seconds)
            print(f"-- serve: {'ready' if ready else 'not ready'} after {time.monotonic() - began:.1f} s", flush=True)
            if not ready:
                bench.failed.append("serve: not ready; its log is in " + log.name)
            yield url if ready else ""
        finally:
            end(process)


def serve_options(folder: Path, port: int) -> list[str]:
    """Settings that differ from the defaults, and why: all requests of a row are let in, and no prefix is found."""
    settings = {
        f"models.{HTTP_MODEL}.weights": "random",
        f"models.{HTTP_MODEL}.layout": "colocated",
        f"models.{HTTP_MODEL}.kv.prefix_cache": "false",
        f"models.{HTTP_MODEL}.decode.max_waiting": "1024",
        "router.limits.max_running": "1024",
        "router.limits.max_connections": "2048",
        "router.port": str(port),
    }
    return ["--model", str(folder), *(part for key, value in settings.items() for part in ("--set", f"{key}={value}"))]


def write_model(folder: Path, shape: str) -> None:
    """A shape with a tokenizer of as many words as the vocabulary has ids: every token has a text of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    config = SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = {f"t{number}": number for number in range(config["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"eos_token": "t1", "bos_token": "t2"}), "utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, process: subprocess.Popen[Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=2) as answer:
            if answer.status == 200:
                return True
        time.sleep(0.25)
    return False


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "start": start,
    "llama-8b": partial(whole, "llama-8b"),
    "qwen3-30b-a3b": partial(whole, "qwen3-30b-a3b"),
    "session": session,
    "http": http,
    "kernels": kernels,
    "tests": tests,
    "deterministic": deterministic,
    "generic": generic,
}


def card_name() -> str:
    """Of the files: the last word of the card's name."""
    found = card()
    return re.sub(r"[^a-z0-9]+", "-", found["name"].split()[-1].lower()) if found else "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all sections")
    parser.add_argument("--clients", type=int, default=max(1, min(4, len(os.sched_getaffinity(0)) // 4)))
    parser.add_argument("--row", action="append", default=[], help="of http: a part of a row's name; may be repeated")
    parser.add_argument("--commit", default=commit_of(ROOT)[0], help="where the sources lie outside of git")
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    args = parser.parse_args()
    if args.list:
        print("\n".join(SECTIONS))
        return 0
    rows = [row for row, *_ in HTTP_ROWS]
    for part in args.row:
        if not any(part in row for row in rows):
            parser.error(f"--row {part}: no row of http has that in its name; there are " + "; ".join(rows))
    args.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        out=args.out.resolve(),
        prefix=f"{datetime.now(UTC):%Y-%m-%d}_{card_name()}",
        repeats=args.repeats,
        commit=args.commit,
        end_at=time.monotonic() + args.budget,
        clients=args.clients,
        rows=args.row,
    )
    for name in args.only or SECTIONS:
        SECTIONS[name](bench)
    print("\n".join(["all sections are whole"] if not bench.failed else ["missing or failed:", *bench.failed]))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
