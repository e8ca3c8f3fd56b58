"""The adapter between a running cluster and an exam that knows nothing of it. Standard library only.

python rig.py start --model echo --folder F      one router, two prefill and two decode engines on loopback; prints JSON
python rig.py describe|processes|reading|quiet|kill|pause|faults|expected|stop --folder F       each prints JSON

The binary is the shipped one: `diptych serve` with a configuration file. As a module: `start`, `attach`, `Rig`, `stop`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from procfs import descendants, lives, reap, send, started_at, title_of

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
CALL_TIMEOUT_S = 5.0
POLL_S = 0.1
FAULTS_SEEN_S = 0.6  # processes look at the rules' file four times a second
STATE_FILE = "rig.json"
SMOLLM2 = "smollm2-135m-instruct"
NEEDED_MIB = {
    "echo": 2_500,
    "smollm2": 8_000,
}  # two engines in each pool; of echo measured, 2.2 GB in all, of the other estimated
TENANTS = ("a", "b")
# Processes that tell nobody their name but in their title, which Ray sets.
TITLES = {"manager": "PoolManager", "controller": "ServeController", "proxy": "ProxyActor"}
MAX_NEW_FILES = 24  # open files that a process may gain: connections to engines that came anew
MAX_NEW_THREADS = 16


class RigError(Exception):
    """The cluster does not do what the exam was promised; the text says what."""


class Leak(RigError):
    """Something is held although nothing runs."""


@dataclass(frozen=True)
class Gauges:
    """Names on `/metrics`, of engines with the labels engine, role and model. An open transfer holds one lease."""

    blocks_used: str = "diptych_engine_blocks_used"
    blocks_total: str = "diptych_engine_blocks_total"
    running: str = "diptych_engine_running"
    waiting: str = "diptych_engine_waiting"
    transfers: str = "diptych_engine_transfers"
    leases: str = "diptych_engine_transfers"
    slots: str = "diptych_engine_ring_slots_busy"
    in_flight: str = "diptych_requests_in_flight"


@dataclass(frozen=True)
class Process:
    """One of the cluster's. `epoch` numbers the lives of an engine; None where there is none."""

    name: str
    role: str
    pid: int
    epoch: int | None = None


@dataclass(frozen=True)
class Kill:
    """A signal that was sent."""

    process: Process
    signal: str
    at_unix: float


@dataclass
class Reading:
    """What the cluster holds now. `held` by engine: blocks, transfers, slots, running, waiting; only what is not 0."""

    held: dict[str, dict[str, float]] = field(default_factory=dict)
    in_flight: int = 0
    files: dict[int, int] = field(default_factory=dict)  # open files by pid
    threads: dict[int, int] = field(default_factory=dict)
    engines: int = 0

    def leaks(self, before: Reading | None) -> list[str]:
        """In words; empty when nothing is held."""
        found = [f"{engine}: {what} {number:g}" for engine, held in self.held.items() for what, number in held.items()]
        if self.in_flight:
            found.append(f"router: {self.in_flight} requests in work")
        if before is not None:
            for kind, now, then, most in (
                ("open files", self.files, before.files, MAX_NEW_FILES),
                ("threads", self.threads, before.threads, MAX_NEW_THREADS),
            ):
                for pid in now.keys() & then.keys():
                    if now[pid] > then[pid] + most:
                        found.append(f"process {pid}: {now[pid]} {kind}, {then[pid]} before")
        return found


@dataclass
class Rig:
    """A running cluster. Everything it says is asked anew at each call."""

    url: str
    model: str
    kind: str  # echo or smollm2
    folder: Path
    pid: int  # of `diptych serve`
    keys: dict[str, str] | None = None  # of a, b and admin; None: a front door that asks for none
    gauges: Gauges = Gauges()
    recorded: dict[str, list[str]] = field(default_factory=dict)

    @property
    def metrics_url(self) -> str:
        """Prometheus' text format."""
        return f"{self.url}/metrics"

    @property
    def log(self) -> Path:
        """What `diptych serve` printed."""
        return self.folder / "serve.log"

    @property
    def faults_file(self) -> Path:
        """`{"rules": [...], "seed": N}`, the rules in force; the processes read it when it changes."""
        return self.folder / "faults.json"

    @property
    def keys_file(self) -> Path:
        """The hashes of the keys, a line each; the router reads it when it changes."""
        return self.folder / "keys.jsonl"

    def headers(self, who: str = "a") -> dict[str, str]:
        """Of a request of tenant a or b, or of the admin: the one place that knows them. Raises RigError for others."""
        if who not in (*TENANTS, "admin"):
            raise RigError(f"{who!r}: there are the tenants a and b, and admin")
        if self.keys is not None:
            return {"authorization": f"Bearer {self.keys[who]}"}
        return {"x-tenant": who} if who in TENANTS else {}

    def describe(self) -> dict[str, Any]:
        """All that an exam may assume, as plain data."""
        return {
            "url": self.url,
            "metrics_url": self.metrics_url,
            "info_url": f"{self.url}/info",
            "ready_url": f"{self.url}/ready",
            "model": self.model,
            "kind": self.kind,
            "folder": str(self.folder),
            "pid": self.pid,
            "log": str(self.log),
            "audit_log": None,
            "faults_file": str(self.faults_file),
            "keys_file": str(self.keys_file),
            "keys": self.keys,
            "headers": {who: self.headers(who) for who in (*TENANTS, "admin")},
            "gauges": asdict(self.gauges),
            "processes": [asdict(process) for process in self.processes()],
        }

    # -- what is there

    def get(self, path: str, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """A JSON page, whatever its status. Raises RigError when nobody answers."""
        return json.loads(self.text(path, timeout_s))

    def text(self, path: str, timeout_s: float = CALL_TIMEOUT_S) -> str:
        """A page as it is. Raises RigError when nobody answers."""
        request = urllib.request.Request(self.url + path, headers=self.headers("admin"))
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return str(reply.read().decode())
        except urllib.error.HTTPError as exc:
            return exc.read().decode()
        except OSError as exc:
            raise RigError(f"{self.url}{path} does not answer: {exc}") from exc

    def post(self, path: str, body: Mapping[str, Any], who: str = "a", timeout_s: float = 120.0) -> Any:
        """A JSON answer; raises RigError with the status and the body of a refusal."""
        headers = {"content-type": "application/json", **self.headers(who)}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as exc:
            raise RigError(f"{path}: status {exc.code}: {exc.read()[:500].decode(errors='replace')}") from exc
        except OSError as exc:
            raise RigError(f"{path}: {exc}") from exc

    def engines(self) -> list[Process]:
        """Those that a router knows and that are not on their way out."""
        return [
            Process(engine["engine"], "+".join(engine["roles"]), engine["pid"], engine["epoch"])
            for engine in self.get("/info")["engines"]
            if not engine["draining"]
        ]

    def processes(self) -> list[Process]:
        """Engines, routers, and those of Ray that carry the cluster."""
        found = self.engines()
        routers = self.get("/info")["routers"]
        found += [Process(f"router-{i}", "router", router["pid"]) for i, router in enumerate(routers)]
        titles = {pid: title_of(pid) for pid in descendants(self.pid)}
        for name, part in TITLES.items():
            found += [Process(name, name, pid) for pid, title in titles.items() if part in title][:1]
        return found

    def process(self, name: str) -> Process:
        """The present life of that name. Raises RigError."""
        for process in (found := self.processes()):
            if process.name == name:
                return process
        raise RigError(f"no process {name!r}; there are {', '.join(process.name for process in found)}")

    def connected(self) -> list[str]:
        """Names of the engines that take requests."""
        return [e["engine"] for e in self.get("/info")["engines"] if e["connected"] and not e["draining"]]

    def reading(self) -> Reading:
        """What is held, over all engines that are connected."""
        info = self.get("/info")
        reading = Reading()
        for engine in info["engines"]:
            if not engine["connected"]:
                continue
            reading.engines += 1
            counts = {
                "blocks_used": engine["blocks"]["used"],
                "transfers": engine["transfers"],
                "slots": engine["ring_slots_busy"],
                "running": engine["running"],
                "waiting": engine["waiting"],
            }
            if held := {name: number for name, number in counts.items() if number}:
                reading.held[engine["engine"]] = held
        for router in info["routers"]:
            reading.in_flight += sum(router["in_flight"].values()) + router["waiting"]
        for pid in [e["pid"] for e in info["engines"]] + [r["pid"] for r in info["routers"]]:
            try:
                reading.files[pid] = len(os.listdir(f"/proc/{pid}/fd"))
                reading.threads[pid] = len(os.listdir(f"/proc/{pid}/task"))
            except OSError:
                continue  # it ended just now
        return reading

    def quiet(self, within_s: float = 5.0, before: Reading | None = None) -> Reading:
        """Wait until nothing is held. Raises Leak with what is after `within_s`."""
        deadline = time.monotonic() + within_s
        while True:
            leaks = (reading := self.reading()).leaks(before)
            if not leaks:
                return reading
            if time.monotonic() > deadline:
                raise Leak("; ".join(leaks))
            time.sleep(POLL_S)

    def counters(self) -> dict[str, float]:
        """What the engines count, summed over those that live."""
        total: dict[str, float] = {}
        for engine in self.get("/info")["engines"]:
            for name, number in engine["counters"].items():
                total[name] = total.get(name, 0.0) + number
        return total

    def metrics(self) -> dict[str, float]:
        """`/metrics`, each name summed over its labels; buckets left out."""
        total: dict[str, float] = {}
        for line in self.text("/metrics").splitlines():
            name = line.partition("{")[0].partition(" ")[0]
            if line and not line.startswith("#") and not name.endswith("_bucket"):
                total[name] = total.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return total

    # -- what can be done to it

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> Kill:
        """Send a signal to the present life of `name`."""
        process = self.process(name)
        at = time.time()
        os.kill(process.pid, number)
        return Kill(process, number.name, at)

    def stop_continue(self, name: str, for_s: float) -> Kill:
        """SIGSTOP now, SIGCONT after `for_s` if that process is still there. Returns at once."""
        done = self.kill(name, signal.SIGSTOP)
        pid, life = done.process.pid, started_at(done.process.pid)

        def go_on() -> None:
            if started_at(pid) == life is not None:
                os.kill(pid, signal.SIGCONT)

        timer = threading.Timer(for_s, go_on)
        timer.daemon = True
        timer.start()
        return done

    def faults(self, rules: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        """Put these rules in force, and no others, and wait until the processes have had time to read them.

        A rule is what stands in `faults.rules` of a configuration; its count of occasions begins anew.
        """
        put_json(self.faults_file, {"rules": list(rules), "seed": seed})
        time.sleep(FAULTS_SEEN_S)

    def command(self, verb: str, *arguments: str, timeout_s: float = 300.0) -> str:
        """Another verb of `diptych` on this cluster, such as scale; what it printed. Raises RigError."""
        known = {} if self.keys is None else {"DIPTYCH_API_KEY": self.keys["admin"]}
        done = subprocess.run(
            [*diptych(), verb, *arguments, "--url", self.url],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **known},
        )
        if done.returncode:
            raise RigError(f"diptych {verb}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    # -- what it should answer

    def expected(self, prompt: Sequence[int], num_tokens: int, **sampling: Any) -> list[Any]:
        """The answer without any fault: of echo as token ids; of another model as the texts of the tokens, which are
        asked once (greedy, float32) and kept: ask before the first fault."""
        if self.kind == "echo":
            from diptych.kernels.echo.testing import expected_tokens
            from diptych.protos.types import SamplingParams

            chosen = SamplingParams(max_tokens=num_tokens, temperature=sampling.pop("temperature", 0.0), **sampling)
            return list(expected_tokens(prompt, num_tokens, chosen))
        if sampling:
            raise RigError("answers of this model are recorded for greedy sampling alone")
        key = f"{num_tokens}:{','.join(map(str, prompt))}"
        if key not in self.recorded:
            body = {"model": self.model, "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0}
            answer = self.post("/v1/completions", body | {"ignore_eos": True, "logprobs": 0})
            self.recorded[key] = answer["choices"][0]["logprobs"]["tokens"]
            self.save()
        return list(self.recorded[key])

    def save(self) -> None:
        """So that `attach` finds it."""
        kept = {name: getattr(self, name) for name in ("url", "model", "kind", "pid", "keys", "recorded")}
        put_json(self.folder / STATE_FILE, kept | {"folder": str(self.folder)})


def configuration(kind: str, folder: Path, *, prefill: int, decode: int, port: int) -> dict[str, Any]:
    """The cluster's configuration, which is written as JSON: every JSON file is YAML."""
    pools: dict[str, Any] = {"prefill": {"engines": prefill}, "decode": {"engines": decode}, "dtype": "float32"}
    if kind == "echo":
        # A step of 10 ms makes answers last long enough to be hit in the middle, and leaves the cores to the rest.
        own = {"source": "echo", "kv": {"memory_mib": 32}, "echo": {"step_s": 0.01}}
        model, name = pools | own, "echo"
    else:
        model, name = pools | {"source": SMOLLM2, "kv": {"memory_mib": 128}}, SMOLLM2
    return {
        "models": {name: model},
        "router": {"port": port, "tenants": {"a": {"weight": 1}, "b": {"weight": 1}}},
        "security": {"api_keys": str(folder / "keys.jsonl")},
        "data_dir": str(folder / "data"),
        "engines": {"max_restarts": 1000},  # an exam kills one engine more often than five times in ten minutes
        "faults": {"file": str(folder / "faults.json")},
    }


def start(
    kind: str = "echo",
    *,
    folder: Path | None = None,
    prefill: int = 2,
    decode: int = 2,
    changes: Mapping[str, Any] | None = None,
) -> Rig:
    """Start and wait until every engine takes requests. `changes`: other values of `configuration`, group by group.

    Raises RigError when memory does not suffice or it does not become ready; nothing is left behind then.
    """
    if kind not in NEEDED_MIB:
        raise RigError(f"{kind!r}: the models are {', '.join(NEEDED_MIB)}")
    if (free := available_mib()) < NEEDED_MIB[kind]:
        raise RigError(f"{kind} with {prefill + decode} engines takes {NEEDED_MIB[kind]} MiB, {free} are free")
    folder = (folder or Path(tempfile.mkdtemp(prefix="exam-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    settings = merged(configuration(kind, folder, prefill=prefill, decode=decode, port=port), changes or {})
    keys = make_keys(folder / "keys.jsonl")
    put_json(folder / "faults.json", {"rules": []})
    put_json(folder / "rig.yaml", settings)
    command = [*diptych(), "serve", "--config", str(folder / "rig.yaml")]
    with (folder / "serve.log").open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    rig = Rig(f"http://127.0.0.1:{port}", next(iter(settings["models"])), kind, folder, process.pid, keys)
    rig.save()
    try:
        until(
            lambda: process.poll() is not None or f"\nready: {rig.url} " in rig.log.read_text(errors="replace"),
            START_TIMEOUT_S,
            "ready",
        )
        if process.poll() is not None:
            raise RigError("diptych serve has ended")
        await_engines(rig, prefill + decode)
    except RigError as exc:
        stop(rig)
        raise RigError(f"{exc}:\n{rig.log.read_text(errors='replace')[-4000:]}") from exc
    return rig


def make_keys(file: Path) -> dict[str, str]:
    """Fresh keys of the tenants and of an admin; the file gets their hashes."""
    keys = {who: f"dk_{secrets.token_urlsafe(32)}" for who in (*TENANTS, "admin")}
    of = {who: hashlib.sha256(key.encode()).hexdigest() for who, key in keys.items()}
    lines: list[dict[str, Any]] = [{"sha256": digest, "tenant": who} for who, digest in of.items()]
    lines[-1]["scopes"] = ["inference", "files", "admin"]
    put_private(file, "".join(json.dumps(line) + "\n" for line in lines))
    return keys


def await_engines(rig: Rig, number: int, within_s: float = 60.0) -> float:
    """Wait until so many engines take requests; the seconds that it took. Raises RigError."""
    began = time.monotonic()

    def complete() -> bool:
        try:
            return len(rig.connected()) >= number
        except RigError:
            return False

    until(complete, within_s, f"{number} engines")
    return time.monotonic() - began


def attach(folder: Path) -> Rig:
    """A rig that another process started. Raises RigError."""
    try:
        kept = json.loads((folder / STATE_FILE).read_text())
    except OSError as exc:
        raise RigError(f"no rig in {folder}: {exc.strerror}") from exc
    return Rig(**(kept | {"folder": Path(kept["folder"])}))


def stop(rig: Rig) -> list[str]:
    """As Ctrl-C would; what did not end by itself is killed and told, by process. The folder stays."""
    family = descendants(rig.pid)
    # What is stopped ends no requests and answers no signal.
    for pid in family:
        send(pid, signal.SIGCONT)
    send(rig.pid, signal.SIGINT)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while lives(rig.pid) and time.monotonic() < deadline:
        reap(rig.pid)
        time.sleep(POLL_S)
    time.sleep(POLL_S)
    left = [pid for pid in family if lives(pid)]
    told = [f"{pid} {title_of(pid)[:100]}" for pid in left]
    for pid in left:
        send(pid, signal.SIGKILL)
    reap(rig.pid)
    return told


def diptych() -> list[str]:
    """The command beside this interpreter, or else on the PATH."""
    beside = Path(sys.executable).with_name("diptych")
    found = str(beside) if beside.exists() else shutil.which("diptych")
    if found is None:
        raise RigError("the command diptych is not installed")
    return [found]


def available_mib() -> int:
    """Memory that a new process can have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    raise RigError("/proc/meminfo does not tell the free memory")


def free_port() -> int:
    """Free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until(condition: Callable[[], bool], within_s: float, what: str) -> None:
    """Raises RigError when it does not come true."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            raise RigError(f"waited {within_s:g} s in vain: {what}")
        time.sleep(POLL_S)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with other values, group by group."""
    result = dict(base)
    for key, value in changes.items():
        is_group = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if is_group else value
    return result


def put_json(path: Path, value: Any) -> None:
    """As `put_private`."""
    put_private(path, json.dumps(value, indent=1))


def put_private(path: Path, text: str) -> None:
    """For no other user. A reader sees all of it or what was there before."""
    partial = path.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.chmod(0o600)
    partial.write_text(text)
    partial.replace(path)


# -- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """One verb; prints JSON; 1 and a sentence when the cluster does not do what was asked."""
    parser = argparse.ArgumentParser(description="Start, look at, disturb and stop a cluster for an exam.")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / f"diptych-exam-{os.getuid()}")
    verbs = parser.add_subparsers(dest="verb", required=True)
    begin = verbs.add_parser("start")
    begin.add_argument("--model", choices=list(NEEDED_MIB), default="echo")
    begin.add_argument("--prefill", type=int, default=2)
    begin.add_argument("--decode", type=int, default=2)
    for verb in ("describe", "processes", "reading", "stop"):
        verbs.add_parser(verb)
    verbs.add_parser("quiet").add_argument("--within", type=float, default=5.0, help="seconds")
    kill = verbs.add_parser("kill")
    kill.add_argument("name")
    kill.add_argument("--signal", default="SIGKILL")
    pause = verbs.add_parser("pause", help="SIGSTOP, and SIGCONT after so many seconds")
    pause.add_argument("name")
    pause.add_argument("seconds", type=float)
    verbs.add_parser("faults", help="the only rules in force from now on").add_argument("rules", help="a JSON list")
    expected = verbs.add_parser("expected", help="the answer without any fault")
    expected.add_argument("--prompt", required=True, help="token ids, with commas")
    expected.add_argument("--tokens", type=int, required=True)
    asked = parser.parse_args(arguments)
    try:
        print(json.dumps(answer(asked), indent=1))
    except RigError as exc:
        print(f"rig: {exc}", file=sys.stderr)
        return 1
    return 0


def answer(asked: argparse.Namespace) -> Any:
    """What one verb prints."""
    if asked.verb == "start":
        rig = start(asked.model, folder=asked.folder, prefill=asked.prefill, decode=asked.decode)
        return rig.describe()
    rig = attach(asked.folder)
    match asked.verb:
        case "describe":
            return rig.describe()
        case "processes":
            return [asdict(process) for process in rig.processes()]
        case "reading":
            return asdict(rig.reading())
        case "quiet":
            return asdict(rig.quiet(asked.within))
        case "kill":
            return asdict(rig.kill(asked.name, signal.Signals[asked.signal]))
        case "pause":
            done = rig.stop_continue(asked.name, asked.seconds)
            time.sleep(asked.seconds + 2 * POLL_S)  # the thread that lets it go on is this process's
            return asdict(done)
        case "faults":
            rig.faults(json.loads(asked.rules))
            return json.loads(asked.rules)
        case "expected":
            return rig.expected([int(token) for token in asked.prompt.split(",")], asked.tokens)
    return {"left_behind": stop(rig)}


if __name__ == "__main__":
    sys.exit(main())
