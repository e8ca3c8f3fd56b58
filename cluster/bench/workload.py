"""What a benchmark asks for: so many requests of so many tokens in and out, as random token ids or from a file."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diptych.protos.errors import StartupError

# name: (requests, input tokens, output tokens), all submitted at once
_NAMED = {
    "latency-b1": (1, 128, 256),  # time per output token at batch 1
    "decode-64": (64, 128, 256),
    "decode-512": (512, 128, 256),  # throughput, most of it decoding
    "mixed-1000": (1000, 1024, 128),  # throughput, most of it prompts
    "prefill-8k": (1, 8192, 1),  # time to the first token
}
# The same ids for every model that has them, clear of the special tokens at the low end.
_LOWEST_ID = 1_000
_HIGHEST_ID = 100_000


@dataclass(frozen=True, slots=True)
class Workload:
    """`name` is the key of its results."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int


def parse_workload(text: str) -> Workload:
    """A name of the table, or COUNTxINPUTxOUTPUT. Raises StartupError."""
    sizes = _NAMED.get(text)
    if sizes is None and (match := re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", text)) is not None:
        sizes = (int(match[1]), int(match[2]), int(match[3]))
    if sizes is None or min(sizes) < 1:
        raise StartupError(
            f"--workload {text}: there is {', '.join(_NAMED)}, or REQUESTSxINPUTxOUTPUT such as 64x128x256, "
            "each number at least 1"
        )
    return Workload(text, *sizes)


def random_prompts(count: int, length: int, *, vocab_size: int, seed: int) -> list[list[int]]:
    """Token ids; the same arguments give the same prompts."""
    rng = random.Random(seed)
    highest = min(_HIGHEST_ID, vocab_size)
    lowest = min(_LOWEST_ID, highest // 2)
    return [[rng.randrange(lowest, highest) for _ in range(length)] for _ in range(count)]


def read_prompts(path: Path, encode: Callable[[str], list[int]] | None = None) -> list[list[int] | str]:
    """The field `prompt` (a text or token ids) of each line of a JSON-lines file; texts through `encode` if given.

    Raises StartupError that names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as exc:
        raise StartupError(f"cannot read --prompts {path}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise StartupError(f"cannot read --prompts {path}: byte {exc.start} is not UTF-8 text") from exc
    prompts: list[list[int] | str] = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        is_ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
        if not prompt or not (is_ids or isinstance(prompt, str)):
            raise StartupError(f'{path}, line {number}: not {{"prompt": "a text, or a list of token ids"}}')
        prompts.append(encode(prompt) if encode is not None and isinstance(prompt, str) else prompt)
    if not prompts:
        raise StartupError(f"{path} has no lines")
    return prompts
