"""`diptych bench offline`: engines in this process, every request submitted at once, timed to the last token.

No HTTP, no Ray, no router: the figure that the rest of the cluster is measured against. Greedy, end tokens ignored.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.cluster.config import DiptychConfig, ModelSettings, load_config
from diptych.cluster.control import host
from diptych.cluster.engine.spec import EngineSpec
from diptych.cluster.models import ModelFolder, resolve
from diptych.protos.echo import ECHO
from diptych.protos.errors import EngineFault, StartupError
from diptych.protos.types import EngineId, Role

from .figures import PeakMemory, quantile, regime, system, write_result
from .shapes import SHAPES, shape_of, write_shape
from .workload import Workload, parse_workload, random_prompts, read_prompts

if TYPE_CHECKING:
    from diptych.cluster.engine.offline import OfflineEngines

_ONE_BATCH = 1 << 20  # requests that may wait: all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineOptions:
    """The command line, as it was written."""

    config: Path | None = None
    overrides: Sequence[str] = ()
    model: str | None = None
    random_weights: bool = False
    layout: str | None = None
    workloads: Sequence[str] = ()
    prompts: Path | None = None
    output: int | None = None
    repeats: int = 1
    json_out: Path | None = None


@dataclass(frozen=True, slots=True)
class _Run:
    """One workload with its prompts; `repeat` gets other prompts where they are random."""

    workload: Workload
    given: tuple[tuple[int, ...], ...] | None
    vocab_size: int

    def prompts(self, repeat: int) -> Sequence[Sequence[int]]:
        if self.given is not None:
            return self.given
        work = self.workload
        return random_prompts(work.requests, work.input_tokens, vocab_size=self.vocab_size, seed=1 + repeat)


def run_offline(options: OfflineOptions, began: float) -> None:
    """Measure and print. `began`: when the process started, on the monotonic clock. Raises DiptychError."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="diptych-bench-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        memory = stack.enter_context(PeakMemory())
        name, settings, config = _settings(options)
        model = _model(name, settings, config, folder)
        runs = _runs(options, model)
        specs = _specs(name, settings, config, model, folder)
        # torch and transformers, after everything that may be wrong with the command line
        from diptych.cluster.engine.offline import OfflineEngines

        engines = OfflineEngines(specs)
        stack.callback(engines.stop)
        infos = engines.start()
        startup_s = time.monotonic() - began
        room = min(info.max_context_tokens for info in infos)
        for run in runs:
            _check_room(run, room, name)
        print(f"{name}, {settings.weights} weights, {infos[-1].dtype}, {settings.layout}; {regime()}")
        print("all requests at once, greedy, end tokens ignored; no warm-up but the engine's own")
        for line in sorted({choice for info in infos for choice in info.degraded}):
            print(f"degraded: {line}")
        result: dict[str, Any] = {"system": system(), "model": name, "startup_s": round(startup_s, 2)}
        for run in runs:
            result[run.workload.name] = _measure(engines, run, options.repeats)
    result["peak_memory_mib"] = memory.peak_bytes >> 20
    print(f"ready after {startup_s:.1f} s, peak memory {memory.peak_bytes >> 20:,} MiB (proportional set size)")
    write_result(result, options.json_out)


def _measure(engines: OfflineEngines, run: _Run, repeats: int) -> dict[str, Any]:
    seconds, first_tokens = [], []
    prompts: Sequence[Sequence[int]] = ()
    cached = 0
    for repeat in range(repeats):
        prompts = run.prompts(repeat)
        salt = f"{run.workload.name}/{repeat}".encode()  # no KV of an earlier repeat or workload
        answers = engines.generate(prompts, run.workload.output_tokens, salt=salt)
        short = [answer.num_tokens for answer in answers if answer.num_tokens != run.workload.output_tokens]
        if short:
            raise EngineFault(
                f"{run.workload.name}: an answer has {short[0]} tokens; there are {len(short)} such answers"
            )
        seconds.append(max(answer.last_token_s for answer in answers))
        cached = sum(answer.cached_tokens for answer in answers)
        first_tokens += [answer.first_token_s for answer in answers]
    median = statistics.median(seconds)
    tokens_out = len(prompts) * run.workload.output_tokens
    tokens_in = sum(len(prompt) for prompt in prompts)
    figures = {
        "s": round(median, 4),
        "spread_s": [round(min(seconds), 4), round(max(seconds), 4)],
        "output_tok_s": round(tokens_out / median, 2),
        "total_tok_s": round((tokens_in + tokens_out) / median, 2),
        "ttft_p50_s": round(quantile(first_tokens, 0.5), 4),
    }
    print(
        f"{run.workload.name:<16}{len(prompts)} requests, "
        f"{tokens_in:,} tokens in ({cached:,} cached), {tokens_out:,} out: "
        f"{figures['s']} s ({min(seconds):.2f} to {max(seconds):.2f}, {repeats} repeats), "
        f"{figures['output_tok_s']:,} output tok/s, {figures['total_tok_s']:,} in all, "
        f"first token p50 {figures['ttft_p50_s']} s",
        flush=True,
    )
    return figures


def _settings(options: OfflineOptions) -> tuple[str, ModelSettings, DiptychConfig]:
    config = load_config(options.config, options.overrides, options.model)
    if len(config.models) > 1:
        raise StartupError(f"the configuration has several models: choose with --model {' or '.join(config.models)}")
    ((name, settings),) = config.models.items()
    if options.random_weights and settings.source == ECHO:
        raise StartupError(f"the model {ECHO} has no weights; drop it or --random-weights")
    layout = options.layout
    if layout is None:  # a decode engine alone, unless the configuration wants something else
        chosen = {"layout", "prefill"} & settings.model_fields_set
        layout = settings.layout if chosen else "colocated"
    if layout not in ("colocated", "disaggregated"):
        raise StartupError(f"--layout {layout}: there is colocated and disaggregated")
    if layout == "disaggregated" and (settings.prefill.engines, settings.decode.engines) != (1, 1):
        raise StartupError("bench offline runs one engine of each pool: set prefill.engines and decode.engines to 1")
    if layout == "colocated" and settings.decode.engines != 1:
        raise StartupError("bench offline runs one engine: set decode.engines to 1")
    update: dict[str, Any] = {"layout": layout}
    if options.random_weights:
        update["weights"] = "random"
    for pool in Role:
        update[pool.value] = getattr(settings, pool).model_copy(update={"max_waiting": _ONE_BATCH})
    return name, settings.model_copy(update=update), config


def _model(name: str, settings: ModelSettings, config: DiptychConfig, folder: Path) -> ModelFolder:
    source = settings.source
    if source in SHAPES:
        if settings.has_weights:
            raise StartupError(f"{source} is the shape of a model without weights: add --random-weights")
        return write_shape(source, folder)
    path = Path(source).expanduser()
    if not settings.has_weights and path.is_dir():
        return shape_of(path.resolve(), name)
    return resolve(source, config.cache_dir, print, echo=settings.echo, has_weights=settings.has_weights)


def _runs(options: OfflineOptions, model: ModelFolder) -> list[_Run]:
    vocab_size = model.facts.vocab_size
    runs = [_Run(parse_workload(text), None, vocab_size) for text in options.workloads]
    if (options.prompts is None) != (options.output is None):
        raise StartupError("--prompts FILE and --output N (tokens to generate) belong together")
    if options.prompts is not None and options.output is not None:
        given = tuple(tuple(prompt) for prompt in _encoded(options.prompts, model))
        if wrong := [token for prompt in given for token in prompt if token >= vocab_size]:
            raise StartupError(f"{options.prompts} holds the token id {wrong[0]}; the model's end at {vocab_size - 1}")
        longest = max(map(len, given))
        runs.append(_Run(Workload(options.prompts.name, len(given), longest, options.output), given, vocab_size))
    if not runs:
        raise StartupError("nothing to measure: give --workload, or --prompts and --output")
    names = [run.workload.name for run in runs]
    if twice := {name for name in names if names.count(name) > 1}:
        raise StartupError(f"the workload {twice.pop()} is given twice; --repeats repeats it")
    return runs


def _encoded(path: Path, model: ModelFolder) -> list[list[int]]:
    from tokenizers import Tokenizer

    @lru_cache(1)
    def tokenizer() -> Any:
        file = model.path / "tokenizer.json"
        if not file.is_file():
            raise StartupError(f"{path} holds texts, and the model has no {file}: use token ids")
        return Tokenizer.from_file(str(file))

    def encode(text: str) -> list[int]:
        return list(tokenizer().encode(text).ids)

    return [prompt for prompt in read_prompts(path, encode) if isinstance(prompt, list)]


def _specs(
    name: str, settings: ModelSettings, config: DiptychConfig, model: ModelFolder, folder: Path
) -> list[EngineSpec]:
    """The decode engine is the last one."""
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if host.has_native_bfloat16() else "float32"
    roles = [Role.DECODE] if settings.layout == "colocated" else [Role.PREFILL, Role.DECODE]
    return [
        EngineSpec(
            engine_id=EngineId(f"{role}-0"),
            epoch=1,
            roles=frozenset({role}),
            model=name,
            settings=settings,
            transfer=config.transfer,
            folder=model.path,
            facts=model.facts,
            dtype=dtype,
            run_dir=folder,
            cores=max(1, len(os.sched_getaffinity(0)) // len(roles)),
        )
        for role in roles
    ]


def _check_room(run: _Run, room: int, name: str) -> None:
    work = run.workload
    if work.input_tokens + work.output_tokens > room:
        raise StartupError(
            f"{work.name} needs a context of {work.input_tokens + work.output_tokens} tokens and there are {room}: "
            f"raise models.{name}.kv.memory_mib or max_context_tokens, where the model allows it"
        )
