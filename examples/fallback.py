"""A stream whose provider dies goes on at the own pool, and one whose pool dies goes on at the provider.

python examples/fallback.py      starts all that it needs: a provider in this process, a cluster with the default model

Both routes say `midstream: continue`: other weights may end a sentence that they did not begin. Without that word only
the same weights go on, and what loses an engine of several goes on exactly, without anybody noticing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2

MODEL = "smollm2-135m-instruct"
CAPITAL = "What is the capital of France?"
STORY = "Tell me a long story about a fox and a crow."
BEFORE_THE_KILL = 8  # pieces of the pool's answer
READY_S = 300


class Provider(BaseHTTPRequestHandler):
    """Speaks OpenAI's format, and dies in the middle of every answer that it begins; what others began it ends."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """A streamed chat completion."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        last = asked["messages"][-1]
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if last["role"] == "assistant":
            self._say(f" ... and here the provider goes on, behind {' '.join(last['content'].split()[-3:])!r}.", "stop")
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True
            return
        for word in ("The ", "capital ", "of ", "France ", "is"):
            self._say(word)
            time.sleep(0.1)
        self.connection.shutdown(socket.SHUT_RDWR)  # neither a finish nor an end: it is just gone
        self.close_connection = True

    def _say(self, text: str, finish: str | None = None) -> None:
        choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
        chunk = {"id": "p", "object": "chat.completion.chunk", "model": "talker", "choices": [choice]}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def finish(self) -> None:
        """The connection may be gone."""
        try:
            super().finish()
        except OSError:
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def provider() -> Iterator[str]:
    """Its base URL, while it listens."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def configuration(provider_url: str, port: int, folder: str) -> dict[str, Any]:
    """As a diptych.yaml has it; JSON is YAML, too."""
    pool = f"pool/{MODEL}"
    common = {"strategy": "priority", "midstream": "continue", "timeouts": {"idle_s": 4}}
    return {
        "models": {MODEL: {"layout": "colocated", "kv": {"memory_mib": 128}}},
        "router": {"port": port},
        "data_dir": folder,
        "engines": {"restart": False},  # so that the pool stays dead in the second part
        "providers": {"outside": {"base_url": provider_url, "api_key": "none", "quirks": {"prefill": True}}},
        "gateway": {
            "routes": {
                "outside-first": {"targets": ["outside/talker", pool], **common},
                "own-first": {"targets": [pool, "outside/talker"], **common},
            }
        },
    }


@contextmanager
def cluster(provider_url: str) -> Iterator[str]:
    """The URL of `diptych serve`, once it is ready; ended afterwards as Ctrl-C would."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="fallback-") as folder:
        file, log = Path(folder, "diptych.yaml"), Path(folder, "serve.log")
        file.write_text(json.dumps(configuration(provider_url, port, folder)))
        command = [str(Path(sys.executable).with_name("diptych")), "serve", "--config", str(file)]
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        url = f"http://127.0.0.1:{port}"
        try:
            until_ready(process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Raises SystemExit with the end of the log when it does not come up."""
    end = time.monotonic() + READY_S
    while f"\nready: {url} " not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"diptych serve did not become ready:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.2)


def ask(url: str, route: str, question: str, at_piece: Callable[[int], None] = lambda number: None) -> None:
    """Prints an answer as it comes, and in brackets what happened under it."""
    body: dict[str, Any] = {"model": route, "messages": [{"role": "user", "content": question}], "stream": True}
    body |= {"temperature": 0, "max_tokens": 40, "explain": True}
    number = 0
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as reply:
        print(f"  [{reply.headers.get('x-route-target', reply.status_code)}] ", end="", flush=True)
        for line in reply.iter_lines():
            if line.startswith(": goes on"):
                print(f"\n  [{line[2:]}] ", end="", flush=True)
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                print(f"\n  [error: {event['error']['message']}]")
            for choice in event.get("choices", ()):
                if text := choice["delta"].get("content"):
                    print(text, end="", flush=True)
                    at_piece(number := number + 1)
                if choice["finish_reason"]:
                    print(f"\n  [end: {choice['finish_reason']}]")
            for told in event.get("diptych", {}).get("choices", ()):
                print("  attempts:", ", ".join(f"{one['target']} {one['outcome']}" for one in told["attempts"]))


def main() -> None:
    """Both directions."""
    with provider() as provider_url:
        print("starting a cluster with the default model", flush=True)
        with cluster(provider_url) as url:
            print("1. the provider dies in the middle of its answer, and the own pool goes on with it")
            ask(url, "outside-first", CAPITAL)

            engines = [engine["pid"] for engine in httpx2.get(f"{url}/info", timeout=20).json()["engines"]]

            def kill(number: int) -> None:
                if number == BEFORE_THE_KILL:
                    for pid in engines:
                        os.kill(pid, signal.SIGKILL)

            print("2. the pool's only engine is killed in the middle of its answer, and the provider goes on with it")
            ask(url, "own-first", STORY, kill)


if __name__ == "__main__":
    main()
